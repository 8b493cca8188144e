"""Clones that scheduled runs work in: what comes in, what goes back, and that two runs never share one."""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.clones import Snapshot, adopt, borrow_clone, finish, prepare_clone, take_snapshot
from flows.garbage import collect_garbage
from flows.scheduled_retrain import _bring_back as bring_back
from flows.workspace import dvc, exclusive, find_workspace, out_of_date, reproduce
from tasks.layout import Layout
from tests.conftest import Workspace, clone, write_digits

PIPELINE = """
stages:
  count:
    cmd: >-
      python -c "import json, pathlib; raw = pathlib.Path('data/raw'); out = pathlib.Path('data/bundle'); out.mkdir();
      (out / 'number').write_text(str(len(list(raw.rglob('*.png'))))); pathlib.Path('seconds').write_text('1')"
    deps: [data/raw]
    params: [seed]
    outs:
    - data/bundle
    - seconds: {cache: false}
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Path:
    """A workspace whose pipeline counts images, with one commit and 10 images that no commit has."""
    folder = tmp_path_factory.mktemp("clones") / "workspace"
    workspace = clone(folder, prefect_home)
    (folder / "dvc.yaml").write_text(PIPELINE)
    workspace.run("git", "add", "--all")
    workspace.run("git", "commit", "--quiet", "--message", "Pipeline")
    write_digits(folder / "data" / "raw", 0, 1)
    return folder


@pytest.fixture
def main(counted: Path, tmp_path: Path) -> Layout:
    shutil.copytree(counted, tmp_path / "workspace", symlinks=True)
    return find_workspace(tmp_path / "workspace")


def run(main: Layout, clone: Layout) -> None:
    """What a scheduled run does between its snapshot and its end."""
    with exclusive(main, "test"):
        snapshot = take_snapshot(main)
    prepare_clone(main, clone, snapshot)
    reproduce(clone, "count", timeout_s=60)
    with exclusive(main, "test"):
        adopt(main, clone, snapshot)
    finish(clone)


def counted_images(layout: Layout) -> str:
    return (layout.bundle_dir / "number").read_text()


def test_a_run_in_a_clone_leaves_the_workspace_as_a_retrain_by_hand_would(main: Layout) -> None:
    with borrow_clone(main) as clone:
        run(main, clone)
        assert counted_images(clone) == "10"
        assert clone.registry_dir.resolve() == main.registry_dir
    assert counted_images(main) == "10"
    assert out_of_date(main) == {}
    assert (main.root / "seconds").read_text() == "1"


@pytest.mark.slow
def test_what_is_not_committed_comes_along_and_what_is_gone_does_not(main: Layout) -> None:
    (main.root / "README.md").unlink()
    params = main.params.read_text().replace("seed: 0", "seed: 7")
    main.params.write_text(params)
    with borrow_clone(main) as clone:
        run(main, clone)
        assert clone.params.read_text() == params
        assert not (clone.root / "README.md").exists()
        write_digits(main.raw, 1, 2)  # and the next run in the same clone has today's images
        run(main, clone)
    assert counted_images(main) == "20"


@pytest.mark.slow
def test_what_somebody_retrained_meanwhile_stays(main: Layout) -> None:
    with borrow_clone(main) as clone:
        with exclusive(main, "test"):
            snapshot = take_snapshot(main)
        prepare_clone(main, clone, snapshot)
        reproduce(clone, "count", timeout_s=60)
        write_digits(main.raw, 1, 2)
        dvc(main, "add", "--quiet", "data/raw")
        reproduce(main, "count", timeout_s=60)
        with exclusive(main, "test"):
            assert not adopt(main, clone, snapshot)
    assert counted_images(main) == "20"
    assert out_of_date(main) == {}


def test_a_full_disk_while_results_go_back_does_not_hide_what_went_wrong_before(
    main: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))  # no file can grow beyond that
    try:
        bring_back(main, Layout(main.clones_dir / "1"), Snapshot("", "", None))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "the next run does it again: [Errno 27] File too large" in caplog.text


HOLDER = """
import sys, time
from pathlib import Path
from flows.clones import borrow_clone
from tasks.layout import Layout
with borrow_clone(Layout(Path(sys.argv[1]))) as clone:
    print(clone.root.name, flush=True)
    sys.stdin.read()
"""


def test_two_runs_at_once_get_clones_of_their_own_and_a_kill_frees_one(main: Layout, repository: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(main.root)],
        cwd=repository,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == "1\n"
    with borrow_clone(main) as clone:
        assert clone.root.name == "2"
    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    with borrow_clone(main) as clone:
        assert clone.root.name == "1"


@pytest.mark.slow
def test_a_clone_has_the_workspaces_dvc_settings_and_its_cache(main: Layout, tmp_path: Path) -> None:
    workspace = Workspace(main.root, tmp_path)
    workspace.dvc("remote", "add", "--local", "secret", "https://user:password@example.org")
    with borrow_clone(main) as clone:
        run(main, clone)
        assert "password" in (clone.root / ".dvc" / "config.local").read_text()
        assert not (clone.root / ".dvc" / "cache").exists()
    told = json.loads(workspace.dvc("data", "status", "--json").stdout or "{}")
    assert "uncommitted" not in told


@pytest.mark.slow
def test_garbage_collection_spares_what_a_run_works_on_or_will_go_on_with(main: Layout) -> None:
    outputs = main.root / ".dvc" / "cache" / "files" / "md5"
    with borrow_clone(main) as first, borrow_clone(main) as second, borrow_clone(main) as third:
        for clone in (first, third):
            run(main, clone)
        write_digits(main.raw, 1, 2)
        with exclusive(main, "test"):
            snapshot = take_snapshot(main)
        prepare_clone(main, second, snapshot)
        reproduce(second, "count", timeout_s=60)  # 20 images; and then its run is killed
        at_work = collect_garbage(main, dry_run=False)
        assert "A scheduled run works in a clone" in at_work.text()
    (listing,) = (file for file in outputs.rglob("*.dir") if "number" in file.read_text() and is_new(file, main))
    told = collect_garbage(main, dry_run=True)
    assert third.root.is_dir()
    swept = collect_garbage(main, dry_run=False)
    assert (swept.clones.removed, swept.clones.unfinished) == (1, (str(second.root),))
    assert swept.clones == told.clones
    assert swept.clones.freed_bytes > 0
    assert (first.root.is_dir(), second.root.is_dir(), third.root.is_dir()) == (True, True, False)
    assert listing.is_file()
    finish(second)
    assert collect_garbage(main, dry_run=False).clones.removed == 1
    assert not listing.is_file()  # no clone, no commit and no version names it any more
    with borrow_clone(main) as again:
        run(main, again)
        assert counted_images(again) == "20"


def is_new(listing: Path, main: Layout) -> bool:
    """Whether the workspace's own dvc.lock does not name it."""
    return f"{listing.parent.name}{listing.name}" not in main.dvc_lock.read_text()
