"""Half a dvc.lock or half a raw.dvc, as a killed DVC leaves it, is seen and put right."""

import json
import os
import signal
import subprocess
import sys

import pytest

from flows.dvc_files import is_torn, is_whole, keep_lock, mend
from tasks.layout import Layout
from tests.conftest import Workspace

LOCK = b"""schema: '2.0'
stages:
  one:
    cmd: make one
    outs:
    - path: one
      hash: md5
      md5: 0123
      size: 1
  two:
    cmd: make two
    deps:
    - path: one
      hash: md5
      md5: 0123
      size: 1
    outs:
    - path: two
      hash: md5
      md5: '4567'
      size: 1
"""
POINTER = b"outs:\n- md5: 0123.dir\n  size: 10\n  nfiles: 2\n  hash: md5\n  path: raw\n"


def test_no_cut_but_one_between_two_stages_passes_for_whole() -> None:
    passing = [end for end in range(len(LOCK)) if is_whole(LOCK[:end])]
    assert passing == [LOCK.index(b"  two:")]
    assert is_whole(LOCK)


def test_a_lock_comes_back_as_it_was_kept(workspace: Workspace) -> None:
    layout = Layout(workspace.root)
    layout.dvc_lock.write_bytes(LOCK)
    keep_lock(layout)
    layout.dvc_lock.write_bytes(LOCK[:100])
    keep_lock(layout)  # half a lock is not worth keeping
    assert is_torn(layout)
    mend(layout)
    assert layout.dvc_lock.read_bytes() == LOCK
    assert not is_torn(layout)


def test_without_a_copy_it_comes_back_from_git_or_is_made_again(workspace: Workspace) -> None:
    layout = Layout(workspace.root)
    layout.dvc_lock.write_bytes(LOCK[:100])
    mend(layout)
    assert not layout.dvc_lock.exists()
    layout.dvc_lock.write_bytes(LOCK)
    workspace.run("git", "add", "dvc.lock")
    workspace.run("git", "commit", "--quiet", "--message", "Lock")
    layout.dvc_lock.write_bytes(b"")
    mend(layout)
    assert layout.dvc_lock.read_bytes() == LOCK


def test_half_a_pointer_to_the_images_is_made_again_and_a_whole_one_is_left_alone(workspace: Workspace) -> None:
    layout = Layout(workspace.root)
    layout.raw_pointer.write_bytes(POINTER)
    mend(layout)
    assert layout.raw_pointer.read_bytes() == POINTER
    layout.raw_pointer.write_bytes(POINTER[:20])
    mend(layout)
    assert not layout.raw_pointer.exists()


def held_by(pid: int) -> str:
    """What DVC notes while a process writes."""
    return json.dumps({"write": {"data/features": {"pid": pid, "cmd": "dvc repro"}}, "read": {}})


def test_locks_of_the_dead_are_dropped(workspace: Workspace) -> None:
    layout = Layout(workspace.root)
    ended = subprocess.Popen(["true", "dvc"])  # not yet reaped: its number is still taken
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    for torn in (held_by(ended.pid), held_by(os.getpid()), held_by(1)[:20], ""):
        layout.dvc_rwlock.parent.mkdir(exist_ok=True)
        layout.dvc_rwlock.write_text(torn)
        assert is_torn(layout)
        mend(layout)
        assert not is_torn(layout)
        workspace.dvc("status")
    ended.wait()


@pytest.mark.parametrize("nobody", ["{}", json.dumps({"write": {}, "read": {}}), None])
def test_a_lock_that_a_living_dvc_holds_or_nobody_is_left_alone(workspace: Workspace, nobody: str | None) -> None:
    layout = Layout(workspace.root)
    layout.dvc_rwlock.parent.mkdir(exist_ok=True)
    with subprocess.Popen([sys.executable, "-c", "input()", "dvc"], stdin=subprocess.PIPE) as alive:
        held = nobody or held_by(alive.pid)
        layout.dvc_rwlock.write_text(held)
        assert not is_torn(layout)
        mend(layout)
        assert layout.dvc_rwlock.read_text() == held
        alive.kill()


def test_half_an_output_of_a_dvc_that_found_no_room_is_dropped(workspace: Workspace) -> None:
    layout = Layout(workspace.root)
    layout.images.parent.mkdir(parents=True)
    whole, own = workspace.root / "whole", layout.images.parent / ".own.tmp"
    for path in (whole, own):
        path.write_bytes(bytes(100_000))
    copy = "import sys; from dvc_objects.fs import LocalFileSystem; LocalFileSystem().put_file(*sys.argv[1:])"
    limited = ["bash", "-c", 'ulimit -f 50; exec "$@"', "bash", sys.executable, "-c", copy, whole, layout.images]
    copied = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert "File too large" in copied.stderr
    assert len(list(layout.images.parent.iterdir())) == 2
    mend(layout)
    assert list(layout.images.parent.iterdir()) == [own]


def test_locks_of_a_git_that_was_killed_are_dropped_and_those_of_one_at_work_are_not(workspace: Workspace) -> None:
    """Killed by its own hook, where it holds the locks of its index and of a tag."""
    hook = workspace.root / ".git" / "hooks" / "reference-transaction"
    hook.write_text("#!/bin/sh\n[ $1 != prepared ] || kill -9 $PPID\n")
    hook.chmod(0o755)
    assert workspace.run("git", "tag", "--annotate", "--message", "x", "v1", check=False).returncode == -signal.SIGKILL
    lock = workspace.root / ".git" / "refs" / "tags" / "v1.lock"
    (workspace.root / ".git" / "index.lock").touch()  # what a killed `git add` leaves; it calls no hook
    hook.unlink()
    assert lock.exists()
    with subprocess.Popen(
        ["git", "cat-file", "--batch"], cwd=workspace.root, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    ):
        mend(Layout(workspace.root))
        assert lock.exists()
    mend(Layout(workspace.root))
    workspace.run("git", "tag", "--annotate", "--message", "x", "v1")
    (workspace.root / "README.md").write_text("edited")
    workspace.run("git", "commit", "--quiet", "--all", "--message", "edited")
