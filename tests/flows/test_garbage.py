"""`tanuki gc`: what goes and what never does, on a real store, a real registry and DVC's real cache."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from deploy.bundle import read_bundle
from deploy.errors import RegistryError
from deploy.registry import Registry
from flows.dvc_cache import sweep_cache
from flows.garbage import collect_garbage
from flows.registries import registry_of
from flows.workspace import WorkspaceError
from tasks import cache_features
from tasks.data.feature_store import FeatureStore, drop_orphans, open_store, writing
from tasks.data.features import feature_space, read_engine
from tasks.data.manifest import read_manifest
from tasks.layout import Layout
from tasks.models.backbone_card import read_card
from tests.conftest import REPOSITORY, Workspace
from tests.deploy.tiny_bundle import write_colour_bundle
from tests.flows.kill_garbage import KEYS, SPACE
from tests.tasks.feature_workspaces import AUGMENT, FEATURES, make_workspace, put_backbone, put_manifest, trunk_graph


def extract(layout: Layout) -> int:
    return cache_features.run(layout, features=FEATURES, augment=AUGMENT).extracted


def store_of(layout: Layout) -> FeatureStore:
    space = feature_space(read_card(layout.backbone_card), read_engine(layout.features_dir))
    return open_store(layout.features_dir, space)


def register(layout: Layout, workspace: Workspace, sharpness: float) -> int:
    """A version whose lineage names the manifest and the backbone as they are, kept in DVC's cache."""
    kept = layout.root / "kept"
    shutil.copytree(layout.backbone_dir, kept / "backbone")
    shutil.copy(layout.accepted, kept)
    workspace.dvc("add", "--quiet", kept / layout.accepted.name, kept / "backbone")
    pointers = [kept / "accepted.parquet.dvc", kept / "backbone.dvc"]
    hashes = [YAML(typ="safe").load(path)["outs"][0]["md5"] for path in pointers]
    outputs = dict(zip(("data/manifest/accepted.parquet", "data/backbone"), hashes, strict=True))
    write_colour_bundle(layout.bundle_dir, sharpness=sharpness)
    assert read_bundle(layout.bundle_dir)
    return Registry(layout.registry_dir).register(layout.bundle_dir, {"dvc_outputs": outputs}).id


@contextmanager
def processes_started() -> Iterator[list[list[str]]]:
    """The words of each that this process starts meanwhile."""
    started: list[list[str]] = []
    is_over = False

    def listen(event: str, told: tuple[Any, ...]) -> None:  # who listens cannot be sent away
        if event == "subprocess.Popen" and not is_over:
            started.append([str(word) for word in told[1]])

    sys.addaudithook(listen)
    try:
        yield started
    finally:
        is_over = True


@pytest.fixture
def layout(workspace: Workspace) -> Layout:
    return make_workspace(workspace.root, {"ant": 10, "bee": 10})  # 32 features


def test_it_keeps_what_the_manifest_or_a_version_needs_and_drops_the_rest(layout: Layout, workspace: Workspace) -> None:
    extract(layout)
    first = register(layout, workspace, 8.0)
    removed = layout.raw / "ant" / "00000.png"
    sha = read_manifest(layout.accepted).set_index("path").loc["ant/00000.png", "sha256"]
    picture = removed.read_bytes()
    removed.unlink()
    put_manifest(layout)
    assert collect_garbage(layout, dry_run=False).orphans == ()  # the version needs its picture and its backbone
    put_backbone(layout, trunk_graph(seed=1))
    extract(layout)  # 30 features of another backbone
    other = store_of(layout)
    put_backbone(layout, trunk_graph())
    before = {path: path.read_bytes() for path in layout.features_dir.rglob("*") if path.is_file()}

    told = collect_garbage(layout, dry_run=True)
    assert [(each.rows, each.of_rows) for each in told.orphans] == [(30, 30)]
    assert "Would free 30 features" in told.text()
    assert {path: path.read_bytes() for path in layout.features_dir.rglob("*") if path.is_file()} == before
    done = collect_garbage(layout, dry_run=False)
    assert done.orphans == told.orphans
    assert not other.directory.exists()
    assert done.orphans[0].freed_bytes == sum(
        len(data) for path, data in before.items() if path.parent == other.directory and path.name != "space.json"
    )
    assert extract(layout) == 0

    forgotten = collect_garbage(layout, dry_run=False, forget=[first])
    assert [(each.rows, each.of_rows) for each in forgotten.orphans] == [(2, 32)]
    assert all(key.image_sha256 != sha for key in store_of(layout).rows)
    assert extract(layout) == 0
    removed.write_bytes(picture)
    put_manifest(layout)
    assert extract(layout) == 2
    assert collect_garbage(layout, dry_run=False, forget=[first]).text().startswith("Every stored feature is needed")


@pytest.mark.parametrize("gone", ["accepted", "backbone_card"])
def test_features_stay_where_a_failed_stage_left_nothing_that_tells_what_is_needed(layout: Layout, gone: str) -> None:
    extract(layout)
    getattr(layout, gone).unlink()
    before = {path: path.read_bytes() for path in layout.features_dir.rglob("*") if path.is_file()}
    report = collect_garbage(layout, dry_run=False)
    assert report.orphans == ()
    assert f"left alone: data/{'manifest/accepted.parquet' if gone == 'accepted' else 'backbone/'}" in report.text()
    assert {path: path.read_bytes() for path in layout.features_dir.rglob("*") if path.is_file()} == before


def test_of_dvcs_cache_goes_what_no_commit_and_no_kept_version_names(workspace: Workspace) -> None:
    layout = Layout(workspace.root)
    files = {}  # DVC's hashes of three states of a folder, none of which is in a commit
    for state in ("version", "neither", "now"):
        layout.raw.mkdir(parents=True, exist_ok=True)
        (layout.raw / "a.txt").write_text(state)
        workspace.dvc("add", "--quiet", layout.raw)
        folder = str(YAML(typ="safe").load(layout.raw_pointer)["outs"][0]["md5"])
        files[state] = (folder, hashlib.md5(state.encode(), usedforsecurity=False).hexdigest())
    registry = Registry(layout.registry_dir)
    bundle = write_colour_bundle(layout.bundle_dir).directory
    outputs = {"data/manifest/accepted.parquet": files["version"][1]}  # no manifest, but that is not asked here
    registry.register(bundle, {"data_version": files["version"][0], "dvc_outputs": outputs})
    kept = {1: {"data/raw": files["version"][0]}}

    def there(state: str) -> list[bool]:
        cache = workspace.root / ".dvc" / "cache" / "files" / "md5"
        return [(cache / md5[:2] / md5[2:]).is_file() for md5 in files[state]]

    would = sweep_cache(layout, kept, dry_run=True)
    assert (would.objects, would.freed_bytes > 0) == (2, True)
    assert all(map(all, map(there, files)))
    with processes_started() as started:
        assert sweep_cache(layout, kept, dry_run=False) == would
    assert sum("gc" in words for words in started) == 1  # each time DVC reads all commits, a minute for some hundred
    assert [there(state) for state in files] == [[True, True], [False, False], [True, True]]
    report = collect_garbage(layout, dry_run=False, forget=[1])
    assert report.cache.objects == 2
    assert report.text().endswith("Removed 2 files from DVC's cache that no commit and no version names, 0.0 MB.")
    assert [there(state) for state in files] == [[False, False], [False, False], [True, True]]
    with (workspace.root / ".dvc" / "config").open("a") as config:
        config.write(f"[cache]\n    dir = {workspace.root.parent / 'shared-cache'}\n")
    assert "others may use it" in str(sweep_cache(layout, kept, dry_run=False).left_alone)


def test_what_killed_writers_left_of_reports_goes_once_nobody_can_be_writing_it(layout: Layout) -> None:
    extract(layout)
    old, young, report = (
        path.parent / name
        for path, name in (
            (layout.report("evaluate"), ".evaluate.json.abcd_123.json"),
            (layout.decision, ".decision.json.abcd_123.json"),
            (layout.report("evaluate"), "evaluate.json"),
        )
    )
    for path in (old, young, report):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for path in (old, report):
        os.utime(path, (0, 0))
    collect_garbage(layout, dry_run=True)
    assert old.exists()
    collect_garbage(layout, dry_run=False)
    assert [path.exists() for path in (old, young, report)] == [False, True, True]


@pytest.mark.slow
def test_old_runs_of_this_workspace_go_and_those_of_others_stay(workspace: Workspace) -> None:
    runs = """
import sys
from pathlib import Path
from prefect import flow
from flows.server import prefect_server
from flows.settings import quiet_prefect
from tasks.layout import Layout
@flow(persist_result=False, validate_parameters=False)
def named(root): print(root)
with prefect_server(Layout(Path.cwd())):
    for root in sys.argv[1:]: named(root)
"""
    environment = {**workspace.environment, "PREFECT_HOME": str(workspace.root.parent / "prefect")}
    mine = [sys.executable, "-m", "flows.cli", "gc", "--json", "--keep-runs"]

    def collect(*options: str) -> int:
        done = subprocess.run([*mine, *options], cwd=workspace.root, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["runs"])

    assert collect("0") == 0  # no database, no server
    subprocess.run(
        [sys.executable, "-c", runs, workspace.root, workspace.root, "/elsewhere"],
        cwd=workspace.root,
        env={**environment, "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    assert collect("1") == 0
    assert collect("0") == 2
    assert collect("0", "--dry-run") == 0


@pytest.mark.slow
def test_runs_of_this_workspaces_schedules_go_from_the_boxs_own_database(workspace: Workspace) -> None:
    """`tanuki up` keeps a Prefect of its own; a schedule's run names no workspace but the folder it begins in."""
    runs = """
import sys
from pathlib import Path
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed
from flows.server import server_on
from tasks.layout import Layout
@flow
def named(root="."): ...
layout = Layout(Path.cwd())
layout.prefect_home.mkdir(parents=True)
with server_on(layout, layout.prefect_home) as url, temporary_settings({PREFECT_API_URL: url}):
    with get_client(sync_client=True) as client:
        for folder in (layout.root, "/elsewhere"):
            steps = [{"prefect.deployments.steps.set_working_directory": {"directory": str(folder)}}]
            made = client.create_deployment(client.create_flow(named), name=Path(folder).name, pull_steps=steps)
            run = client.create_flow_run_from_deployment(made)
            client.set_flow_run_state(run.id, Completed(), force=True)
"""
    environment = {**workspace.environment, "PREFECT_HOME": str(workspace.root.parent / "prefect")}
    script = [sys.executable, "-c", runs]
    subprocess.run(script, cwd=workspace.root, env={**environment, "PYTHONPATH": str(REPOSITORY)}, check=True)
    mine = [sys.executable, "-m", "flows.cli", "gc", "--json", "--keep-runs", "0"]
    done = subprocess.run(mine, cwd=workspace.root, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["runs"] == 1


def test_a_version_that_nobody_can_tell_the_needs_of_stops_it(layout: Layout, workspace: Workspace) -> None:
    extract(layout)
    version = register(layout, workspace, 8.0)
    (cache,) = (path for path in (workspace.root / ".dvc" / "cache").rglob("*.dir"))
    cache.unlink()
    with pytest.raises(WorkspaceError, match=rf"version\(s\) {version}.*nothing was changed.*--forget {version}`"):
        collect_garbage(layout, dry_run=False)
    told = json.loads(workspace.tanuki("gc", "--dry-run", "--no-runs", "--forget", str(version), "--json").stdout)
    assert (told["dry_run"], told["orphans"], told["versions"], told["runs"]) == (True, [], [], None)


def test_versions_that_were_never_live_go_with_the_features_that_they_alone_needed(layout: Layout) -> None:
    extract(layout)
    registry = Registry(layout.registry_dir)
    for sharpness in (7.0, 8.0):  # neither names its images, but both may go
        registry.register(write_colour_bundle(layout.bundle_dir, sharpness=sharpness).directory, {})
    assert collect_garbage(layout, dry_run=True, forget=[2], keep_last=1).versions == (1,)
    assert [version.id for version in registry.versions()] == [1, 2]
    done = collect_garbage(layout, dry_run=False, forget=[2], keep_last=1)
    assert done.text().startswith("Removed version 1, never live.\nEvery stored feature is needed")
    assert [version.id for version in registry.versions()] == [2]


def test_shards_that_hold_both_are_written_anew_with_the_same_values(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float16)
    with writing(tmp_path, SPACE) as store:
        for start in (0, 2, 4):
            store.append(KEYS[start : start + 2], values[start : start + 2])
        untouched = (store.directory / "000001.npy").read_bytes()
    kept = [0, 1, 3]  # the first shard is whole, one row of the second is needed, none of the third
    (orphans,) = drop_orphans(tmp_path, lambda _: {KEYS[row].image_sha256 for row in kept}, dry_run=False)
    store = open_store(tmp_path, SPACE)
    assert (orphans.rows, orphans.of_rows, len(store)) == (3, 6, 3)
    np.testing.assert_array_equal(store.gather([KEYS[row] for row in kept]), values[kept].astype(np.float32))
    assert (store.directory / "000001.npy").read_bytes() == untouched
    assert sorted(path.name for path in store.directory.glob("*.npy")) == ["000001.npy", "000004.npy"]


def test_a_space_that_a_kill_left_before_its_first_step_goes(tmp_path: Path) -> None:
    for number, left in enumerate(([], [".space.json.k3a_9zq1.json"])):
        folder = tmp_path / f"{number:016x}"
        folder.mkdir()
        for name in left:
            (folder / name).write_text("{")
    assert drop_orphans(tmp_path, lambda _: set(), dry_run=True) == []
    assert len(list(tmp_path.iterdir())) == 2
    assert drop_orphans(tmp_path, lambda _: set(), dry_run=False) == []
    assert list(tmp_path.iterdir()) == []


def test_a_kill_at_any_step_loses_nothing_that_is_needed(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-m", "tests.flows.kill_garbage", str(tmp_path / "features")]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


def test_a_registry_that_does_not_answer_stops_it(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version that another machine registered meanwhile may need what would go."""
    monkeypatch.setenv("TANUKI_REGISTRY", f"memory://{tmp_path.name}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    registry_of(layout).register(write_colour_bundle(layout.bundle_dir).directory, {})

    def away(*_: object, **__: object) -> bytes:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.cat_file", away)
    extract(layout)
    before = sorted(layout.features_dir.rglob("*"))
    layout.accepted.unlink()
    with pytest.raises(RegistryError, match=r"cannot be changed: .*no route to host"):
        collect_garbage(layout, dry_run=False, forget=[1])
    assert sorted(layout.features_dir.rglob("*")) == before
