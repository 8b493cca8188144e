"""`dvc repro` by hand, in another clone, comes to the bytes of the flow."""

from pathlib import Path

import pytest

from tests.conftest import locked_outputs, prepared


@pytest.mark.slow
def test_dvc_repro_in_another_clone_gives_the_same_bytes(
    retrained: Path, tmp_path: Path, prefect_home: Path, digits: Path
) -> None:
    other = prepared(tmp_path / "elsewhere" / "another clone", prefect_home, digits, awkward=True)
    other.dvc("repro")
    assert (other.root / "data" / "bundle" / "model.onnx").read_bytes() == (
        retrained / "data" / "bundle" / "model.onnx"
    ).read_bytes()
    mine, theirs = locked_outputs(retrained / "dvc.lock"), locked_outputs(other.root / "dvc.lock")
    times = [f"data/reports/{stage}_times.json" for stage in ("train_head", "finetune")]
    for tells_the_time in ("data/reports/validation", "data/reports/evaluation/latency.json", *times):
        mine.pop(tells_the_time)
        theirs.pop(tells_the_time)
    assert theirs == mine
