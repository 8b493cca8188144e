"""Several processes of a stage end with it, and what one of them meets is told once."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tasks.layout import Layout
from tests.tasks.finetune_workspaces import digit_images, splits, write_backbone, write_images, write_probe
from tests.tasks.test_warm import hang_up, hosting  # noqa: F401

WAIT_S = 120
SOON_S = 10


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path / "workspace")
    write_images(layout, *digit_images(40), splits(40, 16))
    write_probe(layout, write_backbone(layout, "squeezenet1_1", size_px=32, depths=2))
    return layout


def write_params(layout: Layout, repository: Path, **changes: str) -> None:
    """Those of the repository, but for two processes, with a few lines of finetune that are others."""
    text = (repository / "params.yaml").read_text()
    for name, value in {"num_processes": "2", "min_val_images": "10", "device": "cpu", **changes}.items():
        text, num = re.subn(rf"^  {name}: .*$", f"  {name}: {value}", text, count=1, flags=re.MULTILINE)
        assert num, name
    layout.params.write_text(text)


def test_a_stage_that_is_killed_takes_its_processes_along(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.tasks.process_works", "stay", str(tmp_path)]
    stage = subprocess.Popen(command, cwd=repository)
    written = [tmp_path / f"pid.{rank}" for rank in range(2)]
    until(lambda: all(path.exists() and path.read_text() for path in written) or stage.poll() is not None, WAIT_S)
    workers = [psutil.Process(int(path.read_text())) for path in written]
    stage.kill()
    stage.wait()
    until(lambda: not any(map(is_running, workers)), SOON_S)


@pytest.mark.slow
@pytest.mark.usefixtures("hang_up")
@pytest.mark.parametrize("is_warm", [False, True])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_whatever_ends_the_stage_ends_its_processes(
    layout: Layout, repository: Path, how: signal.Signals, is_warm: bool
) -> None:
    write_params(layout, repository, epochs="9999", max_steps="9999999")
    with ExitStack() as stack:
        if is_warm:
            host = stack.enter_context(hosting(repository, layout.root))
            stage = host.ask("tasks", "finetune", "--root", str(layout.root), cwd=repository)
        else:
            command = [sys.executable, "-m", "tasks", "finetune", "--root", str(layout.root)]
            stage = subprocess.Popen(command, cwd=repository, stderr=subprocess.PIPE, text=True)
        stack.callback(stage.kill)
        until((layout.checkpoints_dir / "finetune.safetensors").exists, WAIT_S)
        top = psutil.Process(host.process.pid if is_warm else stage.pid)
        workers = [each for each in top.children(recursive=True) if each.environ().get("WORLD_SIZE")]
        assert len(workers) == 2
        if how == signal.SIGINT and is_warm:  # a terminal tells both who asked and the fork
            workers[0].parent().send_signal(how)  # type: ignore[union-attr]
        stage.send_signal(how)
        _, told = stage.communicate(timeout=SOON_S)
        until(lambda: not any(map(is_running, workers)), SOON_S)
    by_signal = 128 + how if is_warm and how != signal.SIGKILL else -how
    assert stage.returncode == (130 if how == signal.SIGINT else by_signal), told
    assert told.count("interrupted") == (how == signal.SIGINT)
    assert "Traceback" not in told
    assert "torch.distributed" not in told


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_mistake_that_several_processes_meet_is_one_paragraph(layout: Layout, repository: Path) -> None:
    write_params(layout, repository, stages="[top, nonsense7]")
    command = [sys.executable, "-m", "tasks", "finetune", "--root", str(layout.root)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    starts, trains, told = done.stderr.splitlines()
    assert (done.returncode, starts) == (1, "finetune starts")
    assert trains.startswith("training on cpu")
    assert re.fullmatch(r"finetune: .*no layer group .*nonsense7.*", told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "expected"),
    [
        ("mistake", 75, r"no such pictures\n"),
        ("bug", 1, r"in process 2 of 2:\nTraceback(.|\n)*in end_second(.|\n)*ZeroDivisionError: of nothing\n"),
        ("killed", 75, r".*was killed.*memory ran out.*finetune.num_processes.*\n"),
        ("silent", 1, r"Traceback(.|\n)*RuntimeError: .* ended with exit code 3\n"),
    ],
)
def test_what_one_of_several_meets_is_told_once(repository: Path, how: str, code: int, expected: str) -> None:
    command = [sys.executable, "-m", "tests.tasks.process_works", how]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert re.fullmatch(expected, done.stderr), "nor does the first tell of the end of the second"
    assert done.stderr.count("Traceback") == expected.count("Traceback")


# Expected seconds

SIZES = """
import dataclasses, json, os, sys
from pathlib import Path
from tasks import finetune
from tasks.layout import Layout
from tasks.params import load_params
from tasks.training.augmented import LabelledPixels, PixelSource
from tasks.training.checkpoint import CheckpointFile
from tasks.training.processes import is_first, joined
from tasks.training.staged import deterministic_torch, fine_tune
from tests.tasks.finetune_workspaces import stage_inputs

class Noted(PixelSource):
    def batches(self, batches):
        for batch in batches:
            sizes.append(len(batch))
            yield from super().batches([batch])

sizes = []
layout, params = Layout(Path(sys.argv[1])), load_params(Path("params.yaml"))
card, network, head, train, val = stage_inputs(layout, params.augment)
noted = Noted(**{each.name: getattr(train.pixels, each.name) for each in dataclasses.fields(PixelSource)})
settings = params.finetune.model_copy(update={"epochs": 1, "batch_size": 8, "boundary_cache_gb": 0})
with joined(), deterministic_torch(1):
    fine_tune(
        network,
        head,
        train=LabelledPixels(noted, train.labels),
        val=val,
        stages=("top",),
        settings=finetune.tuning_settings(card, 0, settings, "cpu"),
        checkpoints=CheckpointFile(layout.checkpoints_dir / "c.safetensors", "digest"),
    )
    if is_first():
        print(json.dumps(sizes))
"""


@pytest.mark.slow
def test_what_a_stage_takes_is_foretold_from_a_process_s_own_share(layout: Layout, repository: Path) -> None:
    script = layout.root / "sizes.py"
    script.write_text(SIZES)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *torchrun, str(script), str(layout.root)],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [1, 1, 4, 4, 4, 4, 4]
