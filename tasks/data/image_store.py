"""Where the bytes of labelled images lie: a file an image, or tar shards. All stages read images through this.

With shards, data/raw holds

- ``shard-000000-0123456789ab.tar``: images under the paths that they would have as files. A shard never changes; the
  end of its name is the beginning of its sha256, which is checked before the first image is taken from it;
- ``edits.jsonl``, where images were removed or relabelled: one line an image, the last one holds.

Images are read from within a shard by offset and nothing is unpacked. Safe to call from several threads. Shards are
written by flows.shards.
"""

import io
import json
import os
import re
import tarfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from deploy.files import Readable, sha256_file
from tasks.data.image_files import Listing, labelled_images, list_images
from tasks.errors import DataError, StoreError

DataLayout = Literal["folders", "shards"]

SHARD_NAME: Final = re.compile(r"shard-(?P<number>\d{6,})-(?P<digest>[0-9a-f]{12})\.tar")
DIGEST_DIGITS: Final = 12
EDITS_NAME: Final = "edits.jsonl"
BLOCK_BYTES: Final = tarfile.BLOCKSIZE
END_OF_TAR: Final = bytes(2 * BLOCK_BYTES)
NUM_NAMED = 5


class ImageStore(Protocol):
    """The images of data/raw in either layout."""

    @property
    def layout(self) -> DataLayout:
        """How they lie there."""
        ...

    def listing(self) -> Listing:
        """All of them, with their labels; the same in both layouts.

        Raises:
            DataError: If images lie both in shards and in folders.
        """
        ...

    def file(self, path: str) -> Readable:
        """The image of a path as a listing gives it; one that is not there fails when it is read."""
        ...

    def read_bytes(self, path: str) -> bytes:
        """The bytes of an image of the listing; as of `file`, in half the time where many are read."""
        ...

    def size_bytes(self, path: str) -> int:
        """Size of an image of the listing."""
        ...

    def status(self, path: str) -> tuple[os.stat_result, int]:
        """The status of the file that holds an image of the listing, and where in it the image begins."""
        ...


@dataclass(frozen=True)
class FolderImages:
    """A file an image."""

    root: Path
    layout: DataLayout = "folders"

    def listing(self) -> Listing:
        return list_images(self.root)

    def file(self, path: str) -> Path:
        return self.root / path

    def read_bytes(self, path: str) -> bytes:
        with io.FileIO(f"{self.root}/{path}") as file:
            return file.readall()

    def size_bytes(self, path: str) -> int:
        return (self.root / path).stat().st_size

    def status(self, path: str) -> tuple[os.stat_result, int]:
        return os.stat(f"{self.root}/{path}"), 0  # noqa: PTH116 - a Path takes twice as long


class Shard:
    """A tar file, with the digest in its name.

    Args:
        path: Where it lies.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._found_whole = False

    def read(self, offset: int, size: int) -> bytes:
        """Bytes from within, once the digest of the whole was found right.

        Raises:
            StoreError: If it was not; all damaged shards beside it are named.
        """
        with self._lock:  # whoever comes second waits for the check and does not repeat it
            if not self._found_whole and not is_whole(self.path):
                refuse_damaged([path for path in shard_paths(self.path.parent) if not is_whole(path)])
            self._found_whole = True
        descriptor = os.open(self.path, os.O_RDONLY)  # a shard held open would count against the limit of open files
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)


@dataclass(frozen=True, slots=True)
class ShardImage:
    """An image in a shard, read like a file.

    Args:
        shard: Which holds it.
        member: Its name there; its path where it was never relabelled.
        path: Its path in the listing.
        offset: Where its bytes begin in the shard.
        size_bytes: How many they are.
    """

    shard: Shard
    member: str
    path: str
    offset: int
    size_bytes: int

    def __str__(self) -> str:
        return f"{self.shard.path}/{self.path}"

    def read_bytes(self) -> bytes:
        return self.shard.read(self.offset, self.size_bytes)

    def is_file(self) -> bool:
        return True


@dataclass(frozen=True)
class ShardImages:
    """Images in shards, by path."""

    root: Path
    images: Mapping[str, ShardImage]
    layout: DataLayout = "shards"

    def listing(self) -> Listing:
        beside = list_images(self.root)
        if beside.images:
            names = ", ".join(image.path for image in beside.images[:NUM_NAMED])
            more = ", ..." if len(beside.images) > NUM_NAMED else ""
            raise DataError(
                f"{self.root} holds {len(self.images):,} images in shards and {len(beside.images):,} in folders beside "
                f"them: {names}{more}. Expected one or the other: a change of layout was cut short, or they were "
                "copied there by hand. Run `tanuki layout`, which brings all into the layout of params.yaml."
            )
        ours = {EDITS_NAME, *(path.name for path in shard_paths(self.root))}
        skipped = tuple(pair for pair in beside.skipped if pair[0] not in ours)
        empty = tuple(folder for folder in beside.empty_classes if not self._fill(folder))
        return Listing(labelled_images(self.images), skipped, empty)

    def _fill(self, folder: str) -> bool:
        """Whether images in shards make a folder that is empty on the disk no empty class."""
        above = folder.split("/")[0]
        return any(
            path.startswith(f"{folder}/") or (path.startswith(f"{above}/") and path.count("/") == 1)
            for path in self.images
        )

    def file(self, path: str) -> Readable:
        return self.images.get(path, self.root / path)

    def read_bytes(self, path: str) -> bytes:
        return self.file(path).read_bytes()

    def size_bytes(self, path: str) -> int:
        return self.images[path].size_bytes

    def status(self, path: str) -> tuple[os.stat_result, int]:
        image = self.images[path]
        return image.shard.path.stat(), image.offset


def open_images(raw: Path) -> ImageStore:
    """The images of a folder, in the layout that is found there.

    Raises:
        StoreError: If a shard is damaged so that its contents cannot be listed, or edits.jsonl is.
        DataError: If two shards hold the same path.
    """
    return ShardImages(raw, _shard_images(raw)) if shard_paths(raw) else FolderImages(raw)


def require_layout(images: ImageStore, wanted: DataLayout, raw: Path) -> None:
    """Refuses a layout other than params.yaml names, where there are images.

    Raises:
        DataError: With both ways out.
    """
    if images.layout != wanted and images.listing().images:
        raise DataError(
            f"data.layout in params.yaml is {wanted}, but {raw} holds its images in {images.layout}. Run `tanuki "
            f"layout` to bring them into {wanted}, or set data.layout: {images.layout}."
        )


def shard_paths(raw: Path) -> list[Path]:
    """The shards of a folder, in order."""
    names = (entry.name for entry in os.scandir(raw)) if raw.is_dir() else ()
    return [raw / name for name in sorted(name for name in names if SHARD_NAME.fullmatch(name))]


def is_whole(shard: Path) -> bool:
    """Whether a shard's bytes are those that its name tells of."""
    found = SHARD_NAME.fullmatch(shard.name)
    return found is not None and sha256_file(shard)[:DIGEST_DIGITS] == found["digest"]


def refuse_damaged(shards: list[Path]) -> None:
    """Raises StoreError naming damaged shards and what brings them back; does nothing where there are none."""
    if shards:
        raise StoreError(
            f"{len(shards)} damaged shard(s): {', '.join(map(str, shards))}. A shard never changes, and these bytes "
            "are not those that the name tells of. Remove the file and run `dvc checkout data/raw.dvc`; where DVC's "
            "cache has no good copy, `dvc pull data/raw.dvc`."
        )


def _shard_images(raw: Path) -> dict[str, ShardImage]:
    """The images of all shards by path, as edits.jsonl has left them."""
    edits = read_edits(raw)
    found: dict[str, ShardImage] = {}
    twice: list[str] = []
    damaged: list[Path] = []
    for shard in map(Shard, shard_paths(raw)):
        spans = _spans(shard.path)
        if spans is None:
            damaged.append(shard.path)
            continue
        for member, (offset, size) in spans.items():
            path = edits.get((shard.path.name, member), member)
            if path in found:
                twice.append(f"{path} ({found[path].shard.path.name} and {shard.path.name})")
            elif path is not None:
                found[path] = ShardImage(shard, member, path, offset, size)
    refuse_damaged(damaged)
    if twice:
        raise DataError(
            f"{raw}: {len(twice):,} paths lie in two shards each: {', '.join(twice[:NUM_NAMED])}. Two clones added "
            "them apart from each other. Remove one of the shards and add its images again with `tanuki add`."
        )
    return found


def _spans(shard: Path) -> dict[str, tuple[int, int]] | None:
    """Offset and size of every member, from the headers alone; None where they do not lead to the end of the file.

    tarfile takes five times as long, and takes a broken header for the end.
    """
    spans: dict[str, tuple[int, int]] = {}
    offset, long_name = 0, b""
    descriptor = os.open(shard, os.O_RDONLY)
    try:
        while (header := os.pread(descriptor, BLOCK_BYTES, offset)) != bytes(BLOCK_BYTES):
            name, size = _parsed(header)
            offset += BLOCK_BYTES
            if header[156:157] == tarfile.GNUTYPE_LONGNAME:
                long_name = os.pread(descriptor, size, offset).rstrip(b"\0")
            else:
                spans[(long_name or name).decode()] = (offset, size)
                long_name = b""
            offset += -(-size // BLOCK_BYTES) * BLOCK_BYTES
        return spans if os.pread(descriptor, 2 * len(END_OF_TAR), offset) == END_OF_TAR else None
    except ValueError:
        return None
    finally:
        os.close(descriptor)


def _parsed(header: bytes) -> tuple[bytes, int]:
    """Name and size of a tar header's member.

    Raises:
        ValueError: If it is no header, or its checksum says otherwise.
    """
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")  # POSIX: the field itself counts as spaces
    if len(header) < BLOCK_BYTES or checksum != int(header[148:156].rstrip(b"\0 "), 8):
        raise ValueError("no tar header")
    return header[:100].rstrip(b"\0"), int(header[124:136].rstrip(b"\0 "), 8)


def read_edits(raw: Path) -> dict[tuple[str, str], str | None]:
    """By shard and member, the path that an image has now; None where it was removed.

    Raises:
        StoreError: If edits.jsonl cannot be read.
    """
    path = raw / EDITS_NAME
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {(line["shard"], line["member"]): line["path"] for line in lines}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path} cannot be read ({error!r}). Remove it and run `dvc checkout data/raw.dvc`, which brings it back."
        ) from error
