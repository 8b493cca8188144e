"""Clones of the workspace that scheduled runs work in, so that runs which overlap cannot corrupt each other.

What a run gets is the workspace as it stands: the commit that is checked out, and on top of it, not committed there
either, every change of a file that git knows (`git stash create`), data/raw.dvc, params.yaml and dvc.lock included. So
a schedule computes what `tanuki retrain` would. The images come out of DVC's cache, which all clones share; the
registry is the workspace's own, through a link. What a run came to goes back as dvc.lock and the outputs that it names,
unless somebody retrained in the workspace meanwhile.

A clone is kept for the next run, and a kernel lock says which are free: what a killed run had not finished lies in its
clone, and the next run goes on there. `tanuki gc` takes away those that only overlapping runs needed.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.files import sha256_file, write_bytes
from flows.dvc_files import keep_lock, mend
from flows.graph import Stage, read_stages
from flows.workspace import (
    BusyError,
    WorkspaceError,
    cache_dir,
    default_remote,
    dvc,
    git,
    remote_url,
    set_dvc_cache,
    set_dvc_remote,
    track_raw,
)
from tasks.layout import Layout
from tasks.params import load_params

MAX_CLONES = 8
LINKS = (
    "reflink,hardlink,copy"  # of DVC's cache into a clone: nothing there is written to in place but what DVC unlinks
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """The workspace at a moment.

    Args:
        commit: What was checked out.
        tree: A commit object that holds the files which git knows as they were, committed or not.
        dvc_lock: sha256 of dvc.lock; None where there was none.
    """

    commit: str
    tree: str
    dvc_lock: str | None


def take_snapshot(main: Layout) -> Snapshot:
    """The workspace as it stands. Call it with the workspace's lock held.

    Raises:
        WorkspaceError: If git has no commit yet.
    """
    track_raw(main)
    try:
        commit = git(main, "rev-parse", "--verify", "--quiet", "HEAD")
    except WorkspaceError as error:
        raise WorkspaceError(
            f"{main.root} has no commit yet, and a scheduled run works in a clone of one. "
            "Run `git add -A && git commit -m 'Start'` there."
        ) from error
    return Snapshot(commit, git(main, "stash", "create") or commit, _digest(main.dvc_lock))


@dataclass(frozen=True)
class ClonesSweep:
    """What became of the clones, or would.

    Args:
        removed: How many went.
        freed_bytes: Of the files that lay nowhere else.
        unfinished: Folders of those in which a killed run left something to go on with: they stay.
    """

    removed: int = 0
    freed_bytes: int = 0
    unfinished: tuple[str, ...] = ()


@contextmanager
def borrow_clone(main: Layout) -> Iterator[Layout]:
    """A clone that nobody else works in; a new one where all are in use.

    The lock is handed down to what runs in the clone: it is free when all of that has ended.

    Raises:
        BusyError: If too many are in use.
    """
    with _doorway(main).open("a", encoding="utf-8") as doorway:
        fcntl.flock(doorway, fcntl.LOCK_SH)  # waits while `tanuki gc` looks at the clones
        os.set_inheritable(doorway.fileno(), True)
        for number in range(1, MAX_CLONES + 1):
            with (main.clones_dir / f"{number}.lock").open("a", encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                os.set_inheritable(file.fileno(), True)
                yield Layout(main.clones_dir / str(number))
                return
    raise BusyError(f"All {MAX_CLONES} clones in {main.clones_dir} are in use. Wait until a run has ended.")


@contextmanager
def clones_at_rest(main: Layout) -> Iterator[bool]:
    """Keeps runs from beginning in a clone meanwhile; False where one is at work in one already."""
    with _doorway(main).open("a", encoding="utf-8") as doorway:
        try:
            fcntl.flock(doorway, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def sweep_clones(main: Layout, *, dry_run: bool) -> ClonesSweep:
    """Removes all clones but the first and the unfinished ones. Call it with `clones_at_rest`.

    Args:
        main: The workspace.
        dry_run: Only tell.
    """
    clones = [Layout(main.clones_dir / str(number)) for number in range(1, MAX_CLONES + 1)]
    there = [clone for clone in clones if clone.root.is_dir()]
    unfinished = [clone for clone in there if _unfinished(clone).is_file()]
    for clone in unfinished:
        mend(clone)  # a dvc.lock that a kill cut off would hide from DVC what is needed
    gone = [clone for clone in there[1:] if clone not in unfinished]
    freed = sum(_own_bytes(clone.root) for clone in gone)
    for clone in () if dry_run else gone:
        shutil.rmtree(clone.root)
    return ClonesSweep(len(gone), freed, tuple(str(clone.root) for clone in unfinished))


def prepare_clone(main: Layout, clone: Layout, snapshot: Snapshot) -> None:
    """Brings a clone to a snapshot; what an earlier run left half done in it, outside git and DVC, stays.

    Raises:
        WorkspaceError: If git or DVC refuses.
    """
    unfinished = _unfinished(clone).is_file()
    if not (clone.root / ".git").is_dir() or not _is_clone_of(main, clone):
        shutil.rmtree(clone.root, ignore_errors=True)
    _bring_files(main, clone, snapshot)
    _configure(main, clone)
    main.registry_dir.mkdir(parents=True, exist_ok=True)
    _link(main.registry_dir, clone.registry_dir)
    _link_weights(main, clone)
    _copy_uncached(main, clone)
    mend(clone)
    write_bytes(_unfinished(clone), b"")
    # The store only grows: what a killed run has extracted is found there, and `dvc checkout` would take it away.
    stages = [each.name for each in read_stages(clone.pipeline) if not (unfinished and _has_features(clone, each))]
    raw = str(clone.raw_pointer.relative_to(clone.root))
    dvc(clone, "checkout", "--quiet", "--force", "--allow-missing", raw, *stages)


def scratch_copy(main: Layout, copy: Layout, snapshot: Snapshot) -> None:
    """The files of a snapshot that git knows, but for the data: a workspace to try something in.

    Raises:
        WorkspaceError: If git refuses.
    """
    _bring_files(main, copy, snapshot)
    for pointer in (copy.dvc_lock, copy.raw_pointer, copy.raw_changes):
        pointer.unlink(missing_ok=True)


@contextmanager
def worktree(main: Layout, commit: str) -> Iterator[Layout]:
    """A commit's files, checked out aside for a while; what is committed there the workspace has, on no branch.

    Call it with the workspace's lock held.

    Raises:
        WorkspaceError: If git does not have the commit.
    """
    place = Layout(main.clones_dir / "worktree")
    _drop_worktree(main, place)  # a killed run's
    try:
        # No hooks: `dvc install` has one that would check out all the data.
        git(main, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--quiet", "--detach", str(place.root), commit)
        _configure(main, place)
        if (remote := default_remote(main)) is not None:
            set_dvc_remote(place, remote, remote_url(main, remote))
        yield place
    finally:
        _drop_worktree(main, place)


def _drop_worktree(main: Layout, place: Layout) -> None:
    shutil.rmtree(place.root, ignore_errors=True)
    git(main, "worktree", "prune")


def adopt(main: Layout, clone: Layout, snapshot: Snapshot) -> bool:
    """Brings what a run came to back into the workspace, as if it had been made there.

    Call it with the workspace's lock held.

    Returns:
        False where somebody retrained in the workspace since the snapshot: that stays.
    """
    if _digest(main.dvc_lock) != snapshot.dvc_lock:
        logger.info("%s was retrained meanwhile; its own outputs stay", main.root)
        return False
    if not clone.dvc_lock.is_file():
        return True  # not even the first stage came to an end
    write_bytes(main.dvc_lock, clone.dvc_lock.read_bytes())
    keep_lock(main)
    git(main, "add", "--", str(main.dvc_lock.relative_to(main.root)))
    _copy_uncached(clone, main)
    for page in (clone.decision, clone.decision_page):
        if page.is_file():
            write_bytes(main.root / page.relative_to(clone.root), page.read_bytes())
    # The stages by name, so that images in data/raw which DVC does not know yet are left alone.
    dvc(main, "checkout", "--quiet", "--force", "--allow-missing", *(each.name for each in read_stages(main.pipeline)))
    return True


def finish(clone: Layout) -> None:
    """Notes that the run in a clone came to its end."""
    _unfinished(clone).unlink(missing_ok=True)


def _doorway(main: Layout) -> Path:
    """Shared by all who work in clones, and what they start."""
    main.clones_dir.mkdir(parents=True, exist_ok=True)
    return main.clones_dir / "doorway.lock"


def _own_bytes(folder: Path) -> int:
    """Of the files in a folder that are no link to what lies elsewhere too."""
    facts = (Path(place, name).lstat() for place, _, names in os.walk(folder) for name in names)
    return sum(each.st_size for each in facts if each.st_nlink == 1)


def _has_features(clone: Layout, stage: Stage) -> bool:
    return str(clone.features_dir.relative_to(clone.root)) in stage.outs


def _unfinished(clone: Layout) -> Path:
    return clone.root / ".dvc" / "tmp" / "tanuki-unfinished"


def _bring_files(main: Layout, clone: Layout, snapshot: Snapshot) -> None:
    if not clone.root.is_dir():
        # --shared borrows the workspace's objects, the uncommitted ones of the snapshot included.
        git(main, "clone", "--quiet", "--shared", "--no-checkout", str(main.root), str(clone.root))
    (clone.root / ".git" / "index.lock").unlink(missing_ok=True)  # of a killed git: nobody else works here
    git(clone, "checkout", "--quiet", "--force", "--detach", snapshot.commit)
    git(clone, "read-tree", "--reset", "-u", snapshot.tree)
    git(clone, "clean", "--quiet", "--force", "-d")


def _is_clone_of(main: Layout, clone: Layout) -> bool:
    """Not where the workspace was moved, or the clone is half made."""
    try:
        return git(clone, "config", "remote.origin.url") == str(main.root)
    except WorkspaceError:
        return False


def _configure(main: Layout, clone: Layout) -> None:
    """The workspace's own settings of DVC, secrets of remotes included, and its cache."""
    local = Path(".dvc") / "config.local"
    if (main.root / local).is_file():
        shutil.copy(main.root / local, clone.root / local)
    set_dvc_cache(clone, cache_dir(main), link=LINKS)


def _link_weights(main: Layout, clone: Layout) -> None:
    """Weights that params.yaml names by a path within the workspace and that neither git nor DVC brings."""
    kind, _, name = load_params(clone.params).backbone.source.partition(":")
    if kind != "file" or Path(name).is_absolute():
        return
    for file in (Path(name), Path(name).with_suffix(".json")):
        if (main.root / file).is_file() and not (clone.root / file).exists():
            _link(main.root / file, clone.root / file)


def _copy_uncached(source: Layout, target: Layout) -> None:
    """Outputs that dvc.lock names and DVC does not keep: without them their stage would run again."""
    for stage in read_stages(source.pipeline):
        for name in stage.uncached:
            if (source.root / name).is_file():
                write_bytes(target.root / name, (source.root / name).read_bytes())


def _link(there: Path, here: Path) -> None:
    if here.is_symlink() and here.readlink() == there:
        return
    here.unlink(missing_ok=True)
    here.parent.mkdir(parents=True, exist_ok=True)
    here.symlink_to(there)


def _digest(file: Path) -> str | None:
    return sha256_file(file) if file.is_file() else None
