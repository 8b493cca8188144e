"""What an onnxruntime session of ours does besides answering: nothing."""

import os
import subprocess
import sys
from pathlib import Path

from tests.deploy.tiny_bundle import colour_graphs


def test_a_session_tells_nobody_of_itself(tmp_path: Path) -> None:
    """onnxruntime's own telemetry collects in the home folder what it will send; it spares machines that set CI."""
    (tmp_path / "model.onnx").write_bytes(colour_graphs()[0])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ORT_", "CI"))}
    code = "from pathlib import Path; from deploy.runtime import open_session; open_session(Path('model.onnx'))"
    subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**environment, "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
