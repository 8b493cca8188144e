"""Atomic writes and digests. A reader sees the old file or the new one, never half of one."""

import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

CHUNK_BYTES = 1 << 20
LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}(\.\w+)?")  # as tempfile.mkstemp names it below


class Readable(Protocol):
    """A file that is read as a whole: a Path, or a part of an archive. Its text is a name for messages."""

    def read_bytes(self) -> bytes: ...

    def is_file(self) -> bool: ...


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and renames it over ``path`` at the end.

    The temporary file is synced before the rename and removed where the block fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, older_than_s: float = 0.0) -> None:
    """Removes what writers that were killed left of ``atomic_path`` in a folder.

    Args:
        folder: Where.
        older_than_s: How old it is; 0 is for a folder that nobody else writes to now.
    """
    until = time.time() - older_than_s if older_than_s else math.inf
    for path in folder.glob(".*"):
        if LEFTOVER.fullmatch(path.name) and path.is_file() and path.stat().st_mtime < until:
            path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys, atomically, so that equal values make equal bytes."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def sync_directory(directory: Path) -> None:
    """Makes renames within a directory outlive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_bytes(data: bytes) -> str:
    """Hexadecimal sha256."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()
