"""An inbox: taken when it has settled, emptied only of what is safe elsewhere, nothing lost or twice in a kill."""

import hashlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows import inbox as steps
from flows.ingest import Added, add_from
from flows.publication import check_publishable
from flows.raw_log import read_changes
from flows.sources import Folder
from flows.workspace import WorkspaceError, find_workspace, missing_in_remote
from tasks.errors import DataError
from tasks.layout import Layout
from tests.conftest import Workspace
from tests.flows.test_cli import paragraph
from tests.flows.test_ingest import put, tree
from tests.tasks.test_index_images import picture

DROPPED = {"cat/a.png": 1, "cat/b.png": 2, "dog/a.png": 3}


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    return put(tmp_path / "inbox", DROPPED)


def add_remote(workspace: Workspace, remote: Path) -> None:
    """`dvc remote add --default`, without its second."""
    with (workspace.root / ".dvc" / "config").open("a") as config:
        config.write(f"    remote = storage\n['remote \"storage\"']\n    url = {remote}\n")
    workspace.run("git", "commit", "--quiet", "--message", "Remote", "--", ".dvc/config")


def add_upstream(workspace: Workspace, upstream: Path) -> None:
    workspace.run("git", "init", "--quiet", "--bare", upstream)
    workspace.run("git", "remote", "add", "origin", upstream)
    workspace.run("git", "push", "--quiet", "--set-upstream", "origin", "main")


def ingest(layout: Layout, inbox: Path | str, *, publish: bool = False) -> tuple[Added, int]:
    """The flow's steps in the flow's order, without Prefect."""
    waiting = steps.look(str(inbox), settle_s=0)
    added = steps.take(layout, waiting)
    steps.secure(layout)
    if publish:
        steps.publish(layout)
    return added, steps.empty(waiting, added)


# --- looking ----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_being_written_to_is_left_for_the_next_run(inbox: Path) -> None:
    put(inbox, {"cat/.c.png.part": b"half", "notes.txt": b"text"})
    os.utime(inbox / "cat" / "a.png", (0, 0))  # a copy that keeps the times of its original was still made just now
    waiting = steps.look(str(inbox), settle_s=60)
    assert waiting.unsettled == ("cat/a.png", "cat/b.png", "dog/a.png")
    assert not waiting.settled.images
    assert {image.path for image in steps.look(str(inbox), settle_s=0).settled.images} == set(DROPPED)


def test_what_is_no_inbox_is_told(tmp_path: Path, inbox: Path) -> None:
    with pytest.raises(DataError, match="An inbox is a folder or a URL"):
        steps.look(str(tmp_path / "gone"), settle_s=0)
    with pytest.raises(DataError, match="lies in the inbox"):
        steps.take(Layout(inbox), steps.look(str(inbox), settle_s=0))


# --- emptying ---------------------------------------------------------------------------------------------------------


def add(waiting: steps.Waiting, raw: Path) -> Added:
    return add_from(waiting.source, waiting.settled, raw, replace=False, log=None, command="ingest")


def test_only_what_was_taken_leaves_the_inbox(tmp_path: Path, inbox: Path) -> None:
    put(tmp_path / "raw", {"cat/there.png": 2, "owl/there.png": 3})
    put(inbox, {"cat/broken.png": b"text", "cat/copy.png": 1, "notes.txt": b"text"})
    waiting = steps.look(str(inbox), settle_s=0)
    added = add(waiting, tmp_path / "raw")
    put(inbox, {"cat/late.png": 9})
    assert steps.empty(waiting, added) == 3
    assert set(tree(inbox)) == {"cat/broken.png", "cat/late.png", "dog/a.png", "notes.txt"}
    assert {path for path, _ in added.report.refused} == {"cat/broken.png", "dog/a.png"}
    assert set(tree(tmp_path / "raw")) == {"cat/a.png", "cat/there.png", "owl/there.png"}


def test_a_file_that_changed_after_it_was_read_stays(tmp_path: Path, inbox: Path) -> None:
    waiting = steps.look(str(inbox), settle_s=0)
    added = add(waiting, tmp_path / "raw")
    put(inbox, {"cat/a.png": 50})
    (inbox / "cat" / "b.png").unlink()
    assert steps.empty(waiting, added) == 1
    assert set(tree(inbox)) == {"cat/a.png"}


def test_an_object_store_can_be_an_inbox(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe({"/drop/in/cat/a.png": picture(1), "/drop/in/cat/b.png": b"text", "/drop/in/dog/c.png": picture(3)})
    waiting = steps.look("memory://drop/in", settle_s=0)
    added = add(waiting, tmp_path / "raw")
    store.pipe("/drop/in/dog/c.png", picture(4))
    assert steps.empty(waiting, added) == 1
    assert store.find("/drop/in") == ["/drop/in/cat/b.png", "/drop/in/dog/c.png"]
    assert set(tree(tmp_path / "raw")) == {"cat/a.png", "dog/c.png"}
    assert not steps.look("memory://drop/in", settle_s=60).settled.images


@contextmanager
def without_roots_rights() -> Iterator[None]:
    """Root may remove anything; nobody else may."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(pwd.getpwnam("nobody").pw_uid)
    try:
        yield
    finally:
        os.seteuid(user)


def test_an_inbox_that_does_not_let_go_is_told(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # where others may look, as pytest's own folders are not
        inbox = put(Path(folder) / "inbox", DROPPED)
        waiting = steps.look(str(inbox), settle_s=0)
        added = add(waiting, tmp_path / "raw")
        before = tree(inbox)
        (inbox / "cat").chmod(0o555)
        with without_roots_rights(), pytest.raises(DataError, match="cannot be removed from the inbox"):
            steps.empty(waiting, added)
        assert {path for path in before if path.startswith("cat/")} <= set(tree(inbox))
        (inbox / "cat").chmod(0o755)
        assert steps.empty(waiting, added) > 0


# --- a remote, and git ------------------------------------------------------------------------------------------------


def test_a_version_is_on_the_remote_and_in_git_before_the_inbox_is_emptied(
    workspace: Workspace, inbox: Path, tmp_path: Path
) -> None:
    add_remote(workspace, tmp_path / "storage")
    add_upstream(workspace, tmp_path / "upstream.git")
    put(workspace.root, {"mine.txt": b"not to be published"})
    workspace.run("git", "add", "mine.txt")
    storage = tmp_path / "storage"
    storage.write_text("a file, so no folder of a remote")
    layout = find_workspace(workspace.root)
    with pytest.raises(WorkspaceError, match=r"storage did not take the images(?s:.*)inbox keeps everything"):
        ingest(layout, inbox, publish=True)
    assert set(tree(inbox)) == set(DROPPED)

    storage.unlink()
    added, emptied = ingest(layout, inbox, publish=True)
    assert (added.report.known, emptied, tree(inbox)) == (3, 3, {})
    assert workspace.run("git", "diff", "--name-only", "HEAD~1", "HEAD", "--").stdout.split() == [
        "data/raw-changes.jsonl",
        "data/raw.dvc",
    ]
    assert workspace.run("git", "rev-parse", "HEAD", "@{upstream}").stdout.split()[0] in (
        workspace.run("git", "--git-dir", tmp_path / "upstream.git", "rev-parse", "main").stdout
    )
    assert len(read_changes(layout.raw_changes)) == 1
    stored = [file for file in storage.rglob("*") if file.is_file() and file.suffix != ".dir"]
    assert len(stored) == 3
    stored[0].unlink()
    with pytest.raises(WorkspaceError, match=r"lacks 1 files(?s:.*)data/raw/(?s:.*)\.dir file"):
        steps.secure(layout)


@pytest.mark.parametrize("trouble", ["fails halfway", "refuses"])
def test_a_remote_that_fails_or_refuses_gets_the_rest_the_next_time(
    workspace: Workspace, inbox: Path, tmp_path: Path, trouble: str
) -> None:
    add_remote(workspace, tmp_path / "storage")
    obstacle = tmp_path / "storage" / "files" / "md5"
    if trouble == "fails halfway":
        obstacle /= hashlib.md5((inbox / "cat" / "a.png").read_bytes()).hexdigest()[:2]
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file, so no folder for the images whose digest begins so, or for any")
    layout = find_workspace(workspace.root)
    before = workspace.run("git", "rev-parse", "HEAD").stdout
    with pytest.raises(WorkspaceError, match=r"storage did not take the images(?s:.*)inbox keeps everything"):
        ingest(layout, inbox, publish=True)
    assert set(tree(inbox)) == set(DROPPED)
    assert workspace.run("git", "rev-parse", "HEAD").stdout == before

    obstacle.unlink()
    _, emptied = ingest(layout, inbox, publish=True)
    assert (emptied, tree(inbox), missing_in_remote(layout)) == (3, {}, [])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for two small files."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", disk]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_remote_that_fills_up_gets_the_rest_when_there_is_room(
    workspace: Workspace, inbox: Path, small_disk: Path
) -> None:
    add_remote(workspace, small_disk)
    layout = find_workspace(workspace.root)
    with pytest.raises(WorkspaceError, match=r"storage did not take the images(?s:.*)inbox keeps everything"):
        ingest(layout, inbox)
    assert set(tree(inbox)) == set(DROPPED)

    subprocess.run(["mount", "-o", "remount,size=1m", small_disk], check=True)
    _, emptied = ingest(layout, inbox)
    assert (emptied, tree(inbox), missing_in_remote(layout)) == (3, {}, [])


def test_pointers_are_not_published_to_bytes_that_nobody_else_can_get(workspace: Workspace, tmp_path: Path) -> None:
    layout = find_workspace(workspace.root)
    check_publishable(layout)  # without an upstream a commit stays here
    add_upstream(workspace, tmp_path / "upstream.git")
    with pytest.raises(WorkspaceError, match="dvc remote add -d"):
        check_publishable(layout)


# --- kills ------------------------------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from flows.workspace import find_workspace
from tests.flows.test_inbox import ingest
left = int(sys.argv[2])
def hook(event, args):
    global left
    ours = event == "subprocess.Popen" or event in ("os.rename", "os.remove") and sys.argv[1] in str(args)
    if ours or event == "os.rename" and "data/raw" in str(args):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
layout = find_workspace(Path.cwd())
sys.addaudithook(hook)
ingest(layout, sys.argv[1], publish=True)
"""


# Steps 0 to 2 copy images; dvc add, git add, dvc config, push and status follow, then git, which has committed by 12
# and not pushed; then the inbox is emptied.
@pytest.mark.parametrize(
    "step", [12, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 6, 8, 10, 15, 17))]
)
def test_a_kill_anywhere_loses_nothing_and_takes_nothing_twice(
    repository: Path, workspace: Workspace, inbox: Path, tmp_path: Path, step: int
) -> None:
    add_remote(workspace, tmp_path / "storage")
    add_upstream(workspace, tmp_path / "upstream.git")
    expected = tree(inbox)
    command = [sys.executable, "-c", KILLED_AT, str(inbox), str(step)]
    environment = {**workspace.environment, "PYTHONPATH": str(repository)}
    killed = subprocess.run(command, cwd=workspace.root, env=environment, capture_output=True, text=True)
    assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
    layout = find_workspace(workspace.root)
    assert set(expected.values()) == set(tree(inbox).values()) | set(tree(layout.raw).values())
    subprocess.run([*command[:-1], "999"], cwd=workspace.root, env=environment, check=True)
    assert tree(inbox) == {}
    assert tree(layout.raw) == expected
    assert workspace.run("git", "status", "--porcelain").stdout == ""
    assert workspace.run("git", "rev-list", "--count", "@{upstream}..HEAD").stdout == "0\n"


# --- the command ------------------------------------------------------------------------------------------------------


def test_an_inbox_with_nothing_settled_does_not_wait_for_prefect(workspace: Workspace, inbox: Path) -> None:
    told = json.loads(workspace.tanuki("ingest", inbox, "--settle", "3600", "--json").stdout)
    assert told == {"settled": 0, "unsettled": sorted(DROPPED), "left_out": []}


@pytest.mark.slow
def test_the_command_takes_an_inbox_in_through_prefect(workspace: Workspace, inbox: Path, tmp_path: Path) -> None:
    add_upstream(workspace, tmp_path / "upstream.git")
    assert "dvc remote add -d" in paragraph(
        workspace.tanuki("ingest", inbox, "--settle", "0", "--publish", check=False)
    )
    add_remote(workspace, tmp_path / "storage")
    told = json.loads(workspace.tanuki("ingest", inbox, "--settle", "0", "--publish", "--json").stdout)
    assert (told["added"]["added"], told["emptied"], told["remote"]) == (3, 3, "storage")
    assert told["pushed_to"] == "origin/main"
    assert isinstance(steps.look(str(inbox), settle_s=0).source, Folder)
