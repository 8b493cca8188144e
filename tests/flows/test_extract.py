"""Extraction in parts: as processes of one machine, and on the workers of a Dask cluster."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.workspace import StageError, WorkspaceError, run_part
from tasks import cache_features
from tasks.layout import Layout
from tests.conftest import Workspace, prepared
from tests.tasks.feature_workspaces import AUGMENT, FEATURES, make_workspace

with_dask = pytest.mark.skipif(
    importlib.util.find_spec("prefect_dask") is None, reason="the optional extra scale is not installed"
)


def test_parts_fill_the_store_and_say_what_is_wrong_in_the_words_of_the_stage(workspace: Workspace) -> None:
    layout = make_workspace(workspace.root, {"ant": 10, "bee": 10})
    yaml = YAML()
    params = yaml.load(layout.params.read_text())
    params["features"].update(FEATURES.model_dump())
    params["augment"].update(AUGMENT.model_dump())
    yaml.dump(params, layout.params)
    for index in (1, 2):
        run_part(layout, index, 2, timeout_s=300)
    assert cache_features.run(layout, features=FEATURES, augment=AUGMENT).extracted == 0
    for path in (layout.raw / "ant").glob("*.png"):
        path.unlink()
    with pytest.raises(StageError, match=r"cache_features: \d+ accepted image\(s\) are not there any more") as error:
        run_part(layout, 1, 2, timeout_s=300)
    assert error.value.exit_code == 1


def test_without_the_extra_dask_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.extract import on_dask

    monkeypatch.setitem(sys.modules, "prefect_dask", None)  # as if it were not installed
    with pytest.raises(WorkspaceError, match=r"tanuki\[scale\].*here and on the workers"):
        on_dask("tcp://127.0.0.1:8786")


@pytest.mark.slow
@with_dask
def test_a_dask_worker_that_dies_costs_its_part_only(tmp_path: Path, prefect_home: Path, digits: Path) -> None:
    workspace = prepared(tmp_path / "workspace", prefect_home, digits)
    layout = Layout(workspace.root)
    workspace.set_param("features.views", 8)
    with dask_cluster(workspace) as (address, workers):
        command = [sys.executable, "-m", "flows.cli", "extract", "--parts", "4", "--dask", address]
        process = subprocess.Popen(
            command, cwd=workspace.root, env=workspace.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while not list(layout.features_dir.rglob("[0-9]*.json")):
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.05)
        workers[0].send_signal(signal.SIGKILL)
        told, _ = process.communicate(timeout=600)
        assert process.returncode == 0, told.decode()
    workspace.run(sys.executable, "-m", "tasks", "cache_features")
    report = json.loads(layout.report("cache_features").read_text())
    assert (report["extracted"], report["stale"]) == (0, 0)
    assert report["num_features"] > 0


@contextmanager
def dask_cluster(workspace: Workspace) -> Iterator[tuple[str, list["subprocess.Popen[bytes]"]]]:
    """A scheduler and two workers, each a process of its own; its address and the workers."""
    file = workspace.root.parent / "scheduler.json"
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    quiet = {"cwd": workspace.root, "env": workspace.environment, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([*scheduler, "--no-dashboard", "--scheduler-file", str(file)], **quiet)]  # type: ignore[call-overload]
    try:
        while not file.exists():
            assert started[0].poll() is None
            time.sleep(0.1)
        workers = [subprocess.Popen([*worker, "--scheduler-file", str(file)], **quiet) for _ in range(2)]  # type: ignore[call-overload]
        started += workers
        yield json.loads(file.read_text())["address"], workers
    finally:
        for process in started:
            process.kill()
            process.wait()
