"""What a kill leaves of DVC's and git's files: half a dvc.lock or data/raw.dvc, half an output, and locks of the dead.

A copy of the last whole dvc.lock is kept in .dvc/tmp. What a stage made is not lost with its entry: its outputs are in
DVC's cache, and the run cache finds them again. Call these with the workspace's lock held.
"""

import json
import logging
import re
import subprocess
from pathlib import Path
from typing import Any

import psutil
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from deploy.files import write_bytes
from tasks.layout import Layout

# Files that git makes for as long as it writes, and that stay where it is killed: every git after it then refuses.
GIT_LOCKS = ("index.lock", "HEAD.lock", "packed-refs.lock", "refs/**/*.lock")

# An output that DVC has not copied to its end: it was killed, or the disk was full.
PART = re.compile(r"\.[\w-]{22}\.tmp")

logger = logging.getLogger(__name__)


def is_whole(data: bytes) -> bool:
    """Whether the bytes of a dvc.lock are all that DVC meant to write: it ends each entry with what came out."""
    try:
        stages = YAML(typ="safe").load(data)["stages"].values()
        outs = [out for stage in stages for out in stage["outs"]]
        return data.endswith(b"\n") and all({"path", "md5", "size"} <= out.keys() for out in outs)
    except (YAMLError, TypeError, KeyError, AttributeError):
        return False


def keep_lock(layout: Layout) -> None:
    """Remembers dvc.lock as it is now, if it is whole."""
    data = layout.dvc_lock.read_bytes() if layout.dvc_lock.is_file() else b""
    if is_whole(data):
        write_bytes(layout.dvc_lock_copy, data)


def mend(layout: Layout) -> None:
    """Puts back what a kill left half written: from the copy, else as git has it, else away, to be made again."""
    if _is_held_by_the_dead(layout):
        layout.dvc_rwlock.unlink()
    _drop_leftovers(layout)
    if layout.dvc_lock.is_file() and not is_whole(layout.dvc_lock.read_bytes()):
        copy = layout.dvc_lock_copy.read_bytes() if layout.dvc_lock_copy.is_file() else None
        _put_back(layout, "dvc.lock", copy or _committed(layout, "dvc.lock"))
    if layout.raw_pointer.is_file() and not _is_pointer(layout.raw_pointer.read_bytes()):
        name = layout.raw_pointer.relative_to(layout.root).as_posix()
        _put_back(layout, name, _committed(layout, name))


def is_torn(layout: Layout) -> bool:
    """Whether there is something to mend, or DVC is writing right now."""
    lock, pointer = layout.dvc_lock, layout.raw_pointer
    torn_lock = lock.is_file() and not is_whole(lock.read_bytes())
    torn_pointer = pointer.is_file() and not _is_pointer(pointer.read_bytes())
    return torn_lock or torn_pointer or _is_held_by_the_dead(layout)


def _is_held_by_the_dead(layout: Layout) -> bool:
    """Whether DVC's list of who reads and writes what is torn, or names no process that still runs DVC.

    DVC takes a number that any process has for a holder: one that ended and was not yet reaped, or another program
    which got the number after a restart of the container. It would wait for that for ever.
    """
    try:
        held: dict[str, Any] = json.loads(layout.dvc_rwlock.read_bytes())
        readers = [reader for several in held.get("read", {}).values() for reader in several]
        holders = [*held.get("write", {}).values(), *readers]
        return bool(holders) and not any(_runs_dvc(holder["pid"]) for holder in holders)
    except FileNotFoundError:
        return False
    except (ValueError, KeyError, TypeError, AttributeError):
        return True


def _drop_leftovers(layout: Layout) -> None:
    """Git's locks and DVC's half outputs."""
    folders = (layout.data, layout.images.parent, layout.head_dir.parent, layout.reports_dir, layout.evaluation_dir)
    leftovers = [path for pattern in GIT_LOCKS for path in (layout.root / ".git").glob(pattern)]
    leftovers += [path for folder in folders for path in folder.glob(".*.tmp") if PART.fullmatch(path.name)]
    if leftovers and not _is_at_work(layout.root):
        for path in leftovers:
            path.unlink(missing_ok=True)
        names = ", ".join(str(path.relative_to(layout.root)) for path in leftovers)
        logger.warning("git or DVC was stopped in the middle here: %s dropped", names)


def _is_at_work(root: Path) -> bool:
    """Whether a git may be writing here: one that a person started, an editor's, or a DVC, which writes git's index."""
    for process in psutil.process_iter(["name", "cmdline", "cwd", "status"]):
        facts = process.info
        words = facts["cmdline"] or []
        writes = (facts["name"] or "").startswith("git") or any(Path(word).name == "dvc" for word in words)
        if not writes or facts["status"] == psutil.STATUS_ZOMBIE:
            continue
        if facts["cwd"] is None or Path(facts["cwd"]).is_relative_to(root) or any(str(root) in word for word in words):
            return True
    return False


def _runs_dvc(pid: int) -> bool:
    try:
        return any(Path(word).name == "dvc" for word in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def _is_pointer(data: bytes) -> bool:
    try:
        (out,) = YAML(typ="safe").load(data)["outs"]
        return data.endswith(b"\n") and {"path", "md5", "size"} <= out.keys()
    except (YAMLError, TypeError, KeyError, ValueError, AttributeError):
        return False


def _committed(layout: Layout, name: str) -> bytes | None:
    """A file as the last commit has it, or None."""
    run = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=layout.root, capture_output=True, check=False)
    return run.stdout if run.returncode == 0 else None


def _put_back(layout: Layout, name: str, data: bytes | None) -> None:
    if data is None:
        (layout.root / name).unlink()
        logger.warning("%s was half written when DVC was killed; it is made again", name)
    else:
        write_bytes(layout.root / name, data)
        logger.warning("%s was half written when DVC was killed; it is back as it was before", name)
