"""Which images have not changed since they were read: the sha256 of their bytes by what the file system says of a file.

As git's index and DVC's own state have it (size, time of change, inode), and with the time that no program can set
(ctime) besides: an image whose file was changed, replaced or only touched is read again. Kept per workspace, since
another one's files have other inodes; where it is lost or damaged, everything is read once more.
"""

import logging
import os
import struct
import time
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deploy.files import sha256_bytes, write_bytes
from tasks.data.image_files import ImageFile
from tasks.data.image_store import ImageStore

logger = logging.getLogger(__name__)

RECENT_S = 2.0
"""A file that was changed so shortly before may change again within a tick of its clock (2 s on FAT; git's "racy")."""

RECORD: Final = np.dtype([("stamp", "u8"), ("check", "u8"), ("sha256", "V32")])
FORMAT: Final = b"tanuki stamps 2"
STATUS: Final = struct.Struct("=QQqqqq")


class Stamps:
    """The stamps of images as they lie there now, and what those that were read before hashed to.

    Args:
        path: Where they are kept.
        store: Where the images lie.
        images: Which.
    """

    def __init__(self, path: Path, store: ImageStore, images: Sequence[ImageFile]) -> None:
        self._path = path
        self._now = np.zeros(len(images), RECORD)
        now_ns = time.time_ns()
        changed_ns, stamps = array("q"), bytearray()
        for image in images:
            status, offset = store.status(image.path)
            changed_ns.append(status.st_ctime_ns)
            stamps += _stamp(image.path, status, offset)
        self._is_settled = np.array(changed_ns) < now_ns - int(RECENT_S * 1e9)
        self._now["stamp"], self._now["check"] = np.frombuffer(stamps, "u8").reshape(-1, 2).T
        before = _read(path)
        if len(before):
            found = np.minimum(np.searchsorted(before["stamp"], self._now["stamp"]), len(before) - 1)
            same = (before["stamp"][found] == self._now["stamp"]) & (before["check"][found] == self._now["check"])
            self._now["sha256"][same] = before["sha256"][found[same]]

    @property
    def sha256(self) -> NDArray[np.void]:
        """Of each image, as 32 bytes; zeros where it has to be read."""
        return self._now["sha256"]

    def read(self, place: int, sha256: str) -> None:
        """Notes what an image that was read just now hashes to."""
        self._now["sha256"][place] = bytes.fromhex(sha256)

    def save(self) -> None:
        """Keeps them for the next run, those of images that were changed a moment ago left out."""
        kept = self._now[self._is_settled]
        data = kept[np.argsort(kept["stamp"])].tobytes()
        write_bytes(self._path, _digest(data) + data)


def _stamp(path: str, status: os.stat_result, offset: int) -> bytes:
    """16 bytes that are others as soon as anything of a file is."""
    facts = STATUS.pack(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, offset)
    return blake2b(facts + path.encode(), digest_size=16).digest()


def _digest(data: bytes) -> bytes:
    return sha256_bytes(FORMAT + data).encode()


def _read(path: Path) -> NDArray[np.void]:
    """What an earlier run kept, sorted."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return np.empty(0, RECORD)
    size = len(_digest(b""))
    if data[:size] == _digest(data[size:]):
        return np.frombuffer(data, RECORD, offset=size)
    logger.warning("%s is damaged or of another version: all images are read again", path)
    return np.empty(0, RECORD)
