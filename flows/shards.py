"""Shards of data/raw, written: new images, a change of layout, and what was removed or relabelled.

The same images added in the same order with the same shard size make the same bytes: headers carry no time, owner or
mode of a person's file. A kill leaves whole shards under their names and nothing else that counts; running the same
again finishes. tasks.data.image_store reads what is written here.
"""

import contextlib
import hashlib
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import BinaryIO, Final, Self

from deploy.files import sha256_bytes, sync_directory, write_text
from tasks.data.image_files import list_images
from tasks.data.image_store import (
    BLOCK_BYTES,
    DIGEST_DIGITS,
    EDITS_NAME,
    END_OF_TAR,
    SHARD_NAME,
    DataLayout,
    ShardImages,
    is_whole,
    open_images,
    read_edits,
    refuse_damaged,
    require_layout,
    shard_paths,
)
from tasks.errors import DataError
from tasks.layout import Layout
from tasks.params import load_params
from tasks.progress import progress

PART_NAME: Final = ".tanuki-add-shard"


class ShardWriter:
    """Writes images into new shards of a folder, each of which appears under its name when it is whole and on the disk.

    Args:
        raw: The folder; made where it is missing.
        shard_bytes: A shard is ended before it would grow over this; a larger image gets one to itself.
        written: Called with the names of a shard's images once the shard is there.
    """

    def __init__(self, raw: Path, *, shard_bytes: int, written: Callable[[list[str]], None] | None = None) -> None:
        raw.mkdir(parents=True, exist_ok=True)
        self._raw = raw
        self._part = raw / PART_NAME
        self._shard_bytes = shard_bytes
        self._written = written
        self._numbers = _new_numbers(raw)
        self._names: list[str] = []
        self._digest = hashlib.sha256()
        self._size_bytes = 0
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._end_shard()
        elif self._file is not None:
            self._file.close()
        self._part.unlink(missing_ok=True)

    def add(self, name: str, data: bytes) -> None:
        """Puts an image behind those before it, into the same shard where it fits.

        Args:
            name: Its path in data/raw, which no other image has.
            data: Its bytes.
        """
        pieces = [_header(name, len(data)), data, bytes(-len(data) % BLOCK_BYTES)]
        if self._names and self._size_bytes + sum(map(len, pieces)) + len(END_OF_TAR) > self._shard_bytes:
            self._end_shard()
        self._write(*pieces)
        self._names.append(name)

    def _write(self, *pieces: bytes) -> None:
        if self._file is None:
            self._file = self._part.open("wb")
        for piece in pieces:
            self._file.write(piece)
            self._digest.update(piece)
            self._size_bytes += len(piece)

    def _end_shard(self) -> None:
        if not self._names:
            return
        self._write(END_OF_TAR)
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._part.chmod(0o644)
        digest = self._digest.hexdigest()[:DIGEST_DIGITS]
        self._part.replace(self._raw / f"shard-{next(self._numbers):06d}-{digest}.tar")
        sync_directory(self._raw)
        if self._written is not None:
            self._written(self._names)
        self._names, self._digest, self._size_bytes, self._file = [], hashlib.sha256(), 0, None


def shard_bytes(layout: Layout) -> int | None:
    """Size of new shards as params.yaml has it; None where images are kept as files.

    Raises:
        DataError: If data/raw is in the other layout.
    """
    data = load_params(layout.params).data
    require_layout(open_images(layout.raw), data.layout, layout.raw)
    return int(data.shard_mb * 1e6) if data.layout == "shards" else None


def change_layout(layout: Layout) -> str:
    """Brings data/raw into the layout that params.yaml names; says what was done.

    Raises:
        DataError: If it holds no images, or the same path in a shard and as a file, with other bytes.
        StoreError: If a shard is damaged.
    """
    data = load_params(layout.params).data
    if not shard_paths(layout.raw) and not list_images(layout.raw).images:
        raise DataError(f"{layout.raw} holds no images. `tanuki add FOLDER` will write them in {data.layout}.")
    number = bring_into(layout.raw, data.layout, shard_bytes=int(data.shard_mb * 1e6))
    where = f"{len(shard_paths(layout.raw)):,} shards" if data.layout == "shards" else "folders, a file an image"
    return f"{number:,} images were moved: {layout.raw} now holds all of them in {where}."


def bring_into(raw: Path, layout: DataLayout, *, shard_bytes: int) -> int:
    """Brings all images of a folder into one layout, in place; each keeps its path and its bytes.

    What was cut short before, in either direction, is gone on with. A file or shard is removed only when what takes its
    place is on the disk, so no more room is needed than a shard's.

    Returns:
        Images that were moved.

    Raises:
        DataError: If the same path lies in a shard and as a file, with other bytes.
        StoreError: If a shard is damaged.
    """
    (raw / PART_NAME).unlink(missing_ok=True)
    return _to_shards(raw, shard_bytes) if layout == "shards" else _to_folders(raw)


def _to_shards(raw: Path, shard_bytes: int) -> int:
    store = open_images(raw)
    sharded = store.images if isinstance(store, ShardImages) else {}
    paths = [image.path for image in list_images(raw).images]
    twice = [path for path in paths if path in sharded]  # a kill came between writing a shard and removing its files
    _refuse_other_bytes(raw, [path for path in twice if (raw / path).read_bytes() != sharded[path].read_bytes()])
    _remove_files(raw, twice)
    rest = [path for path in paths if path not in sharded]
    with ShardWriter(raw, shard_bytes=shard_bytes, written=lambda names: _remove_files(raw, names)) as writer:
        for path in progress(rest, total=len(rest), what="into shards"):
            writer.add(path, (raw / path).read_bytes())
    return len(paths)


def _to_folders(raw: Path) -> int:
    store = open_images(raw)
    images = list(store.images.values()) if isinstance(store, ShardImages) else []
    by_shard = {path: [image for image in images if image.shard.path == path] for path in shard_paths(raw)}
    refuse_damaged([path for path in by_shard if not is_whole(path)])
    _refuse_other_bytes(
        raw,
        [
            image.path
            for image in images
            if (raw / image.path).exists() and (raw / image.path).read_bytes() != image.read_bytes()
        ],
    )
    for shard in progress(list(by_shard), total=len(by_shard), what="into folders", unit="shard"):
        for image in by_shard[shard]:
            (raw / PART_NAME).write_bytes(image.read_bytes())
            (raw / image.path).parent.mkdir(parents=True, exist_ok=True)
            (raw / PART_NAME).replace(raw / image.path)
        os.sync()  # once a shard: a sync a file would take hours
        shard.unlink()
    (raw / EDITS_NAME).unlink(missing_ok=True)
    return len(images)


def edit_images(raw: Path, moves: Mapping[str, str | None]) -> None:
    """Removes or renames images in shards (relabelling is renaming), with a line each in edits.jsonl.

    Shards stay as they are: a removed image keeps its bytes there, which DVC would keep for the older version anyway.

    Args:
        raw: A folder of shards.
        moves: By an image's path, its new one, or None to remove it.

    Raises:
        DataError: If a path is not there, or a new one is taken.
    """
    store = open_images(raw)
    if not isinstance(store, ShardImages):
        raise DataError(f"{raw} holds no shards. Move or remove its files as you like; DVC takes note.")
    store.listing()  # refuses what is in the midst of a change
    left = [path for path in store.images if path not in moves]
    taken = set(left) | {path for path in moves.values() if path is not None}
    missing = sorted(set(moves) - set(store.images))
    if missing or len(taken) < len(left) + sum(path is not None for path in moves.values()):
        clash = sorted({path for path in moves.values() if path is not None} & set(left))
        raise DataError(
            f"{raw}: of {len(moves):,} images to move, {len(missing):,} are not there ({', '.join(missing[:20])}) and "
            f"{len(clash):,} would take another's place ({', '.join(clash[:20])}). Nothing was changed."
        )
    edits = read_edits(raw)
    for path, new in moves.items():
        image = store.images[path]
        edits[image.shard.path.name, image.member] = new
    lines = (
        json.dumps({"shard": shard, "member": member, "path": path}, ensure_ascii=False) + "\n"
        for (shard, member), path in sorted(edits.items())
        if path != member
    )
    write_text(raw / EDITS_NAME, "".join(lines))


def remove_shards(raw: Path) -> None:
    """Removes all shards and edits; the shards first, so that a kill brings no removed image back."""
    for path in (*shard_paths(raw), raw / EDITS_NAME):
        path.unlink(missing_ok=True)


def free_path(path: PurePosixPath, data: bytes, taken: set[str]) -> str:
    """A path that no other image has: the one wished for, or it with the beginning of the content's sha256."""
    if str(path) not in taken:
        return str(path)
    return str(path.with_name(f"{path.stem}-{sha256_bytes(data)[:12]}{path.suffix}"))


def _header(name: str, size: int) -> bytes:
    """A tar header with nothing in it but a name and a size; TarInfo's other fields are constants."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _new_numbers(raw: Path) -> Iterator[int]:
    found = (SHARD_NAME.fullmatch(path.name) for path in shard_paths(raw))
    number = max((int(each["number"]) for each in found if each), default=-1)
    while True:
        number += 1
        yield number


def _refuse_other_bytes(raw: Path, paths: list[str]) -> None:
    if paths:
        raise DataError(
            f"{raw}: {len(paths):,} paths lie in a shard and as a file with other bytes: {', '.join(paths[:20])}. "
            "Rename the files or remove them, then run `tanuki layout` again."
        )


def _remove_files(raw: Path, paths: Iterable[str]) -> None:
    """Removes files, and the folders that this empties."""
    folders = set()
    for path in paths:
        (raw / path).unlink()
        folders.add((raw / path).parent)
    for folder in sorted(folders, key=lambda each: len(each.parts), reverse=True):
        while folder != raw:
            with contextlib.suppress(OSError):  # not empty, or gone with one below it
                folder.rmdir()
            folder = folder.parent
