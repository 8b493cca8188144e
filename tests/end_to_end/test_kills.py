"""Any stage may be killed or interrupted at any moment; what comes after comes to the same bytes."""

import contextlib
import os
import random
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest

from tasks.__main__ import STAGES
from tests.conftest import Workspace, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = Path("data") / "bundle" / "model.onnx"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path, retrained: Path) -> tuple[Workspace, bytes]:
    """A workspace that ran through once, and the model it came to."""
    workspace = Workspace(tmp_path_factory.mktemp("killed") / "workspace", prefect_home)
    shutil.copytree(retrained, workspace.root, symlinks=True)
    return workspace, (workspace.root / MODEL).read_bytes()


CUTS = [(stage, how) for stage in STAGES for how in (signal.SIGKILL, signal.SIGINT)]


@pytest.mark.parametrize(("stage", "how"), CUTS, ids=[f"{how.name}-{stage}" for stage, how in CUTS])
def test_a_stage_cut_short_loses_nothing(finished: tuple[Workspace, bytes], stage: str, how: signal.Signals) -> None:
    workspace, model = finished
    delay_s = random.Random(f"{stage} {how}").uniform(0, 3)
    cut_short(workspace, stage, how, delay_s)
    workspace.tanuki("status")  # mends a dvc.lock that DVC had half written
    workspace.dvc("repro")
    if stage == "index_images":  # killed with its last outputs whole, it has nothing to do but to clear up
        workspace.dvc("repro", "--single-item", "--force", stage)
    assert (workspace.root / MODEL).read_bytes() == model
    leftovers = [path for path in (workspace.root / "data").rglob(".*") if path.is_file() and path.name != ".gitignore"]
    assert [path for path in leftovers if "registry" not in path.parts and path.suffix in (".parquet", ".onnx")] == []


def cut_short(workspace: Workspace, stage: str, how: signal.Signals, delay_s: float) -> None:
    """Runs a stage afresh and ends it and its DVC some time after it started."""
    process = workspace.start(sys.executable, "-m", "dvc", "repro", "--single-item", "--force", stage)
    wait_for(f"{stage} starts", process)
    timer = threading.Timer(delay_s, end, (process.pid, how))
    timer.start()
    process.communicate()
    timer.cancel()


def end(group: int, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was done before
        os.killpg(group, how)
