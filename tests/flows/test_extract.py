"""Extraction in parts: as processes of one machine, and on the workers of a Dask cluster."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from deploy.files import sha256_file
from flows.workspace import StageError, WorkspaceError, run_part
from tasks import cache_features
from tasks.data.feature_store import Key, open_store
from tasks.data.features import feature_space
from tasks.layout import Layout
from tasks.models.backbone_card import read_card
from tests.conftest import Workspace, prepared, write_digits
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
@pytest.mark.timeout(1200)
@with_dask
def test_two_dask_workers_store_what_one_process_stores_and_one_that_dies_costs_its_part_only(
    tmp_path: Path, prefect_home: Path
) -> None:
    write_digits(tmp_path / "digits", 0, 80)
    workspace = prepared(tmp_path / "workspace", prefect_home, tmp_path / "digits")
    layout = Layout(workspace.root)
    workspace.set_param("features.views", 8)
    with dask_cluster(workspace) as (address, workers):
        command = [sys.executable, "-m", "flows.cli", "extract", "--parts", "3", "--dask", address]
        process = subprocess.Popen(
            command, cwd=workspace.root, env=workspace.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while not (begun := committed_parts(layout, 3)):
            assert process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.02)
        at_work = kill_worker_of(workers, f"{begun[0]}/3")
        before = digests(layout.features_dir)
        told, _ = process.communicate(timeout=600)
        assert process.returncode == 0, told.decode()
    assert not psutil.wait_procs(at_work, timeout=60)[1], "what the worker had begun went on without it"
    assert sorted(PART_DONE.findall(worker_logs(workspace))) == ["1", "2", "3"]  # each came to its end once
    assert before
    assert before.items() <= digests(layout.features_dir).items()  # what was stored then was not done again
    found = stored_rows(layout)
    assert all(found)

    shutil.move(layout.features_dir, tmp_path / "of-dask")
    workspace.run(sys.executable, "-m", "tasks", "cache_features")
    assert sum(len(rows) for rows in found) == len(stored_rows(layout, 1)[0])
    assert {key: row for rows in found for key, row in rows.items()} == stored_rows(layout, 1)[0]


PART_DONE = re.compile(r"'part-(\d)-of-3' - Finished in state Completed")


def committed_parts(layout: Layout, count: int) -> list[int]:
    """Parts, from 1, that have stored something."""
    return sorted({int(path.stem) % count + 1 for path in layout.features_dir.rglob("[0-9]*.json")})


def stored_rows(layout: Layout, count: int = 3) -> list[dict[Key, bytes]]:
    """The bytes of all features, by the part that stored them; none is there twice."""
    store = open_store(layout.features_dir, feature_space(read_card(layout.backbone_card), "onnxruntime-cpu-float32"))
    assert sum(len(shard.keys) for shard in store.shards) == len(store)
    rows: list[dict[Key, bytes]] = [{} for _ in range(count)]
    for shard in store.shards:
        features = store.gather(shard.keys)
        rows[int(shard.path.stem) % count] |= {
            key: row.tobytes() for key, row in zip(shard.keys, features, strict=True)
        }
    return rows


def kill_worker_of(workers: list["subprocess.Popen[bytes]"], part: str) -> list[psutil.Process]:
    """Kills the worker that is at a part; gives the processes that it had started."""
    for worker in workers:
        children = psutil.Process(worker.pid).children(recursive=True)
        if any(part in child.cmdline() for child in children):
            worker.send_signal(signal.SIGKILL)
            return children
    raise AssertionError(f"nobody is at part {part}: the kill came too late to test anything")


def digests(folder: Path) -> dict[str, str]:
    """Of all committed shards, by name."""
    return {
        path.name: sha256_file(path)
        for index in folder.rglob("[0-9]*.json")
        for path in (index, index.with_suffix(".npy"))
    }


def worker_logs(workspace: Workspace) -> str:
    return "".join(path.read_text() for path in workspace.root.parent.glob("worker-*.log"))


@contextmanager
def dask_cluster(workspace: Workspace) -> Iterator[tuple[str, list["subprocess.Popen[bytes]"]]]:
    """A scheduler and two workers, each a process of its own; its address and the workers."""
    file = workspace.root.parent / "scheduler.json"
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard"]
    quiet = {"cwd": workspace.root, "env": workspace.environment, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([*scheduler, "--no-dashboard", "--scheduler-file", str(file)], **quiet)]  # type: ignore[call-overload]
    workers: list[subprocess.Popen[bytes]] = []
    try:
        while not file.exists():
            assert started[0].poll() is None
            time.sleep(0.1)
        for number in range(2):
            with (file.parent / f"worker-{number}.log").open("wb") as log:
                command = [*worker, "--scheduler-file", str(file)]
                workers.append(subprocess.Popen(command, **quiet | {"stdout": log, "stderr": log}))  # type: ignore[call-overload]
        started += workers
        yield json.loads(file.read_text())["address"], workers
    finally:
        for process in started:
            process.kill()
            process.wait()
