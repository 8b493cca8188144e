"""dvc.lock and data/raw.dvc after a kill. DVC writes both in place, so that one in a bad moment leaves half of one.

A copy of the last whole dvc.lock is kept in .dvc/tmp. What a stage made is not lost with its entry: its outputs are in
DVC's cache, and the run cache finds them again. Call these with the workspace's lock held.
"""

import logging
import subprocess

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from deploy.files import write_bytes
from tasks.layout import Layout

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
    return torn_lock or (pointer.is_file() and not _is_pointer(pointer.read_bytes()))


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
