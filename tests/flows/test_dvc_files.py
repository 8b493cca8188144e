"""Half a dvc.lock or half a raw.dvc, as a killed DVC leaves it, is seen and put right."""

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
