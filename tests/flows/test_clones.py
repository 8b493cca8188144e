"""Clones that scheduled runs work in: what comes in, what goes back, and that two runs never share one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flows.clones import adopt, borrow_clone, finish, prepare_clone, take_snapshot
from flows.garbage import collect_garbage
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


@pytest.mark.slow
def test_garbage_collection_takes_clones_that_have_ended_and_nothing_that_a_run_goes_on_with(main: Layout) -> None:
    with borrow_clone(main) as clone:
        with exclusive(main, "test"):
            snapshot = take_snapshot(main)
        prepare_clone(main, clone, snapshot)
        reproduce(clone, "count", timeout_s=60)
        at_work = collect_garbage(main, dry_run=False)
        assert f"at work in {clone.root} and shares DVC's cache" in at_work.text()
    killed = collect_garbage(main, dry_run=False)  # its lock is gone, its end was not noted
    assert (killed.clones.ended, killed.cache.objects) == (0, 0)
    assert counted_images(clone) == "10"
    finish(clone)
    told = collect_garbage(main, dry_run=True)
    assert told.clones.ended == 1
    assert clone.root.is_dir()
    done = collect_garbage(main, dry_run=False)
    assert "Removed 1 clones of scheduled runs that have ended" in done.text()
    assert (done.clones, done.cache.objects) == (told.clones, 2)  # what only that run's dvc.lock named
    assert done.clones.freed_bytes > 10_000
    assert not clone.root.exists()
    assert counted_with(main) == "10"


def counted_with(main: Layout) -> str:
    """What a run in a new clone comes to, whatever went before."""
    with borrow_clone(main) as clone:
        run(main, clone)
    return counted_images(main)


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
