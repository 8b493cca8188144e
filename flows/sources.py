"""Where labelled images come from: a folder, a table, tar shards or a URL, all seen as one listing that can be read.

What a source says about labels and official splits follows the rules of tasks/data/image_files.py, whatever its shape.
"""

import csv
import gzip
import os
import re
import tarfile
import unicodedata
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from tasks.data.image_files import (
    NO_IMAGE_FOLDERS,
    SPLIT_FOLDERS,
    ImageFile,
    Listing,
    list_images,
    no_image_reason,
)
from tasks.errors import DataError
from tasks.params import holds_password

NUM_NAMED = 20
MAX_NAME_BYTES = 255
TABLES = (".csv", ".parquet")
SHARDS = (".tar", ".tar.gz", ".tgz")
SHARD_SPLIT = re.compile(r"(train|val|valid|validation|test)[-_.]", re.IGNORECASE)
CHANGE_TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")  # as file systems of fsspec call it
NO_LABEL = "lies beside the class folders, so it has no label"
SHAPES = (
    "Expected a folder a class, each with images, or train/val/test folders of such folders; a CSV or Parquet table of "
    "path,label[,split]; tar shards of either, or of WebDataset pairs; or a URL of such folders."
)


class Source(Protocol):
    """Labelled images somewhere, under names that its listing gives."""

    @property
    def name(self) -> str:
        """How a person called it."""

    @property
    def in_order(self) -> bool:
        """Whether reading in the order of ``position``, one after another, is the only quick way."""

    def listing(self) -> Listing:
        """What it holds.

        Raises:
            DataError: If it cannot be listed, or says things that cannot be.
        """

    def position(self, image: ImageFile) -> tuple[Any, ...]:
        """Sort key of where an image lies."""

    def size(self, image: ImageFile) -> int | None:
        """Bytes of an image; None where only reading tells."""

    def read(self, image: ImageFile) -> bytes:
        """The bytes of an image.

        Raises:
            DataError: If it may not be read, or not as the source says it is.
            OSError: If it cannot be read.
        """


def open_source(source: Path | str) -> Source:
    """The source that a person named.

    Raises:
        DataError: If there is nothing of that name, or nothing that could hold labelled images.
    """
    if "://" in str(source):
        return Url(str(source))
    path = Path(source)
    if path.is_dir():
        shards = sorted(file for file in path.rglob("*") if file.is_file() and file.name.lower().endswith(SHARDS))
        return Shards(path, shards) if shards and not list_images(path).images else Folder(path)
    if path.is_file() and path.suffix.lower() in TABLES:
        return LabelTable(path)
    if path.is_file() and path.name.lower().endswith(SHARDS):
        return Shards(path, [path])
    raise DataError(f"{path} is no folder, table or tar archive. {SHAPES}")


class Folder:
    """A folder on this machine."""

    in_order = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = str(root)

    def listing(self) -> Listing:
        return list_images(self.root)

    def position(self, image: ImageFile) -> tuple[Any, ...]:
        return (image.path,)

    def size(self, image: ImageFile) -> int | None:
        return self.file(image).stat().st_size

    def file(self, image: ImageFile) -> Path:
        return self.root / image.path

    def read(self, image: ImageFile) -> bytes:
        if not self.file(image).resolve().is_relative_to(self.root.resolve()):
            raise DataError("a link that leads out of the folder")
        return self.file(image).read_bytes()

    def changed_at(self, image: ImageFile) -> float:
        """When an image was last changed, in seconds since 1970; by the file system's own clock, which nobody sets."""
        return self.file(image).lstat().st_ctime

    def signature(self, image: ImageFile) -> object:
        """What differs once an image was changed or replaced."""
        facts = self.file(image).lstat()
        return facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns

    def remove(self, image: ImageFile) -> None:
        """Removes an image for good."""
        self.file(image).unlink()


class LabelTable(Folder):
    """A table of ``path,label[,split]`` beside the images that it names, paths relative to the table."""

    def __init__(self, table: Path) -> None:
        super().__init__(table.parent)
        self.name = str(table)
        self.table = table

    def listing(self) -> Listing:
        images: dict[str, ImageFile] = {}
        skipped, mistakes = [], []
        for where, row in read_rows(self.table, required=("path", "label"), optional=("split",)):
            found = self._image(row)
            if isinstance(found, str):
                mistakes.append((where, found))
            elif images.setdefault(found.path, found) is not found:
                first = images[found.path]
                if first != found:
                    mistakes.append((where, f"{found.path}: is {first.label} ({first.split}) in an earlier row"))
                else:
                    skipped.append((found.path, f"named again in {where}"))
        refuse(mistakes, f"{self.table}: {len(mistakes):,} row(s) that cannot be, so nothing was added")
        return Listing(tuple(sorted(images.values(), key=lambda image: image.path)), tuple(sorted(skipped)), ())

    def _image(self, row: dict[str, Any]) -> ImageFile | str:
        """The image of a row, or what is wrong with the row."""
        path, label, split = (_text(row.get(column)) for column in ("path", "label", "split"))
        if path is None or label is None or split is None:
            return "path, label and split must be text or whole numbers"
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts:
            return f"{path or 'no path'}: expected a path below the table's folder"
        if split and split.lower() not in SPLIT_FOLDERS:
            return f"{path}: {split} is no split; expected train, val, test or nothing"
        if (unfit := unfit_label(label)) is not None:
            return f"{path}: {label!r} {unfit}"
        if not (self.root / path).is_file():
            return f"{path}: there is no such file"
        name = unicodedata.normalize("NFC", label)
        return ImageFile(str(PurePosixPath(path)), name, SPLIT_FOLDERS[split.lower()] if split else None)


@dataclass(frozen=True)
class _Member:
    """Where an image's bytes lie in the unpacked archive."""

    shard: Path
    offset: int
    size_bytes: int


class Shards:
    """Tar files, read where they lie: members LABEL/x.jpg or SPLIT/LABEL/x.jpg, or pairs key.jpg and key.cls (key.txt).

    A shard whose own name begins with a split (``test-000.tar``) says the split of what names none itself.
    """

    def __init__(self, source: Path, shards: Sequence[Path]) -> None:
        self.name = str(source)
        self.in_order = any(_is_gzip(shard) for shard in shards)
        self._root = source
        self._shards = shards
        self._members: dict[str, _Member] = {}
        self._open: dict[Path, gzip.GzipFile] = {}

    def listing(self) -> Listing:
        listings = [self._list_shard(shard) for shard in self._shards]
        images = sorted((image for each in listings for image in each.images), key=lambda image: image.path)
        return Listing(tuple(images), tuple(sorted(skip for each in listings for skip in each.skipped)), ())

    def position(self, image: ImageFile) -> tuple[Any, ...]:
        member = self._members[image.path]
        return (str(member.shard), member.offset)

    def size(self, image: ImageFile) -> int | None:
        return self._members[image.path].size_bytes

    def read(self, image: ImageFile) -> bytes:
        member = self._members[image.path]
        with _naming(member.shard):
            if _is_gzip(member.shard):
                data = self._read_compressed(member)
            else:
                with member.shard.open("rb") as file:
                    file.seek(member.offset)
                    data = file.read(member.size_bytes)
        if len(data) != member.size_bytes:
            raise DataError("the archive ends within it")
        return data

    def _read_compressed(self, member: _Member) -> bytes:
        """Reads on from where the last read stopped; the stream stays open, for a new one would begin at the front."""
        if member.shard not in self._open:
            self._open[member.shard] = stream = gzip.open(member.shard)  # noqa: SIM115
            weakref.finalize(self, stream.close)
        self._open[member.shard].seek(member.offset)
        return self._open[member.shard].read(member.size_bytes)

    def _list_shard(self, shard: Path) -> Listing:
        """The images of one shard, named by shard and member where there are several."""
        prefix = "" if shard == self._root else f"{shard.relative_to(self._root).as_posix()}/"
        members, texts = _read_members(shard)
        listing = _pairs(shard, members, texts) or list_names(members)
        named = SHARD_SPLIT.match(shard.name)
        split = SPLIT_FOLDERS[named.group(1).lower()] if named and not listing.official_splits else None
        images = []
        for image in listing.images:
            self._members[prefix + image.path] = members[image.path]
            images.append(ImageFile(prefix + image.path, image.label, image.split or split))
        return Listing(tuple(images), tuple((prefix + path, reason) for path, reason in listing.skipped), ())


def _is_gzip(shard: Path) -> bool:
    return not shard.name.lower().endswith(".tar")


@contextmanager
def _naming(shard: Path) -> Iterator[None]:
    """Names the archive where it is broken."""
    try:
        yield
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{shard} is no whole tar archive: {error}. Nothing was added.") from error


def _read_members(shard: Path) -> tuple[dict[str, _Member], dict[str, bytes]]:
    """The plain files of an archive by name, and the content of those that hold a label.

    Raises:
        DataError: Naming every member that no honest archive of images has.
    """
    members: dict[str, _Member] = {}
    texts: dict[str, bytes] = {}
    hostile = []
    with (
        _naming(shard),
        gzip.open(shard) if _is_gzip(shard) else shard.open("rb") as file,
        tarfile.open(fileobj=file, mode="r:") as archive,
    ):
        for member in archive:
            name = str(PurePosixPath(member.name))
            if (reason := _hostile(member, name in members)) is not None:
                hostile.append((member.name, reason))
            elif member.isfile():
                members[name] = _Member(shard, member.offset_data, member.size)
                if name.lower().endswith((".cls", ".txt")) and member.size <= MAX_NAME_BYTES:
                    content = archive.extractfile(member)
                    texts[name] = content.read() if content else b""
    refuse(hostile, f"{shard} has {len(hostile):,} member(s) that an archive of images must not have")
    return members, texts


def _hostile(member: tarfile.TarInfo, is_known: bool) -> str | None:
    if member.name.startswith("/") or ".." in PurePosixPath(member.name).parts:
        return "a path that leads out of the archive"
    if member.issym() or member.islnk():
        return f"a link to {member.linkname}"
    if member.isdir():
        return None
    if not member.isreg() or member.issparse():
        return "no plain file"
    return "a second member of that name" if is_known else None


def _pairs(shard: Path, members: Iterable[str], texts: dict[str, bytes]) -> Listing | None:
    """The listing of WebDataset pairs, ``key.jpg`` with ``key.cls`` or ``key.txt``; None where the shard holds none.

    Raises:
        DataError: Naming each image whose label is missing or unfit.
    """
    suffix = ".cls" if any(name.lower().endswith(".cls") for name in texts) else ".txt"
    labels = {_key(name): text for name, text in texts.items() if name.lower().endswith(suffix)}
    names = [name for name in members if name not in texts]
    images = [name for name in names if no_image_reason(PurePosixPath(name).name) is None]
    if suffix == ".txt" and not any("/" not in name and _key(name) in labels for name in images):
        return None
    repeated = {key for key, count in Counter(map(_key, images)).items() if count > 1}
    found, mistakes = [], []
    for name in images:
        label = labels.get(_key(name), b"").decode(errors="replace").strip()
        if _key(name) in repeated:
            mistakes.append((name, "another image has the same key"))
        elif (unfit := unfit_label(label)) is not None:
            mistakes.append((name, f"its label {label!r} {unfit}" if label else f"has no {_key(name)}{suffix}"))
        else:
            found.append(ImageFile(name, unicodedata.normalize("NFC", label), None))
    refuse(mistakes, f"{shard}: {len(mistakes):,} image(s) without one label, so nothing was added")
    skipped = [(name, "no image by its name") for name in names if name not in images]
    return Listing(tuple(found), tuple(skipped), ())


def _key(name: str) -> str:
    """What the members of one WebDataset sample share: all before the first dot of the file's name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".")[0] or path.name))


class Url:
    """A prefix of any file system that fsspec knows."""

    in_order = False

    def __init__(self, url: str) -> None:
        if holds_password(url):
            raise DataError(
                f"{url.split('://')[0]}://... has a password in it, which would stand in data/raw-changes.jsonl. Leave "
                "it to the environment (AWS_SECRET_ACCESS_KEY and the like), an agent, or fsspec's configuration."
            )
        self.name = url
        self._files: dict[str, tuple[str, dict[str, Any]]] = {}
        try:
            from fsspec.core import url_to_fs

            self.fs, root = url_to_fs(url)
        except ImportError as error:
            raise DataError(
                f"{url} cannot be read, for its protocol needs a package that is not installed: {error}. Install it "
                "into this environment (s3fs for s3://, sshfs for ssh://, gcsfs for gs://, adlfs for az://)."
            ) from error
        except ValueError as error:
            raise DataError(f"{url} cannot be read: {error}. {SHAPES}") from error
        self.root = str(root).rstrip("/")

    def listing(self) -> Listing:
        try:
            found: dict[str, dict[str, Any]] = self.fs.find(self.root, detail=True)
        except Exception as error:  # each file system raises types of its own
            raise DataError(f"{self.name} cannot be listed: {type(error).__name__}: {error}") from error
        self._files = {path[len(self.root) :].lstrip("/"): (path, facts) for path, facts in found.items()}
        return list_names(filter(None, self._files))

    def position(self, image: ImageFile) -> tuple[Any, ...]:
        return (image.path,)

    def size(self, image: ImageFile) -> int | None:
        size = self._files[image.path][1].get("size")
        return None if size is None else int(size)

    def read(self, image: ImageFile) -> bytes:
        try:
            data: bytes = self.fs.cat_file(self._files[image.path][0])
        except Exception as error:  # each file system raises types of its own
            raise DataError(f"cannot be read: {type(error).__name__}: {error}") from error
        return data

    def changed_at(self, image: ImageFile) -> float:
        """When an image was last changed, in seconds since 1970; 0 where the store does not tell."""
        facts = self._files[image.path][1]
        told = [facts[name] for name in CHANGE_TIMES if facts.get(name) is not None]
        return max((each.timestamp() if isinstance(each, datetime) else float(each) for each in told), default=0.0)

    def signature(self, image: ImageFile) -> object:
        """What differs once an image was changed or replaced."""
        self.fs.invalidate_cache()
        facts = self.fs.info(self._files[image.path][0])
        return [str(facts.get(name)) for name in ("size", "ETag", *CHANGE_TIMES)]

    def remove(self, image: ImageFile) -> None:
        """Removes an image for good."""
        self.fs.rm_file(self._files[image.path][0])


def list_names(names: Iterable[str]) -> Listing:
    """Images among posix names, with the labels and official splits that their folders say; as list_images has it."""
    parts = {name: PurePosixPath(name).parts for name in names}
    reasons = {name: next(filter(None, map(_reason, _kinds(each))), None) for name, each in parts.items()}
    with_images = {each[0] for name, each in parts.items() if len(each) == 2 and reasons[name] is None}
    images, skipped = [], []
    for name, (top, *below) in parts.items():
        split = None if top in with_images else SPLIT_FOLDERS.get(top.lower())
        reason = reasons[name] or (None if below else NO_LABEL)
        if reason is not None:
            skipped.append((name.encode(errors="replace").decode(), reason))
        else:
            images.append(ImageFile(name, unicodedata.normalize("NFC", top if split is None else below[0]), split))
    return Listing(tuple(sorted(images, key=lambda image: image.path)), tuple(sorted(skipped)), ())


def _kinds(parts: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """The parts of a name, each with whether it is a folder."""
    return ((part, number < len(parts) - 1) for number, part in enumerate(parts))


def _reason(part: tuple[str, bool]) -> str | None:
    name, is_folder = part
    return no_image_reason(name, is_folder=is_folder)


def read_rows(
    table: Path, *, required: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a CSV (UTF-8, names in the first line) or Parquet table, each with what to call it in a message.

    Raises:
        DataError: If it cannot be read, lacks a column or has no row.
    """
    try:
        names, rows = _parquet(table) if table.suffix.lower() == ".parquet" else _csv(table)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a table: {error}. A CSV is UTF-8.") from error
    missing = [name for name in required if name not in names]
    if missing:
        wanted = ",".join([*required, *(f"[{name}]" for name in optional)])
        raise DataError(f"{table} has no column {' and '.join(missing)}. Expected the columns {wanted}.")
    if not rows:
        raise DataError(f"{table} names no file.")
    yield from rows


Rows = list[tuple[str, dict[str, Any]]]


def _csv(table: Path) -> tuple[Sequence[str], Rows]:
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        return reader.fieldnames or (), [(f"line {reader.line_num}", row) for row in reader]


def _parquet(table: Path) -> tuple[Sequence[str], Rows]:
    from pyarrow import parquet  # half a second, and few commands read one

    rows = parquet.read_table(table)
    return rows.column_names, [(f"row {number}", row) for number, row in enumerate(rows.to_pylist(), start=1)]


def _text(value: object) -> str | None:
    """A cell as text, empty where there is nothing; None where it is neither text nor a whole number."""
    if value is None:
        return ""
    return str(value).strip() if isinstance(value, str | int) and not isinstance(value, bool) else None


def unfit_label(label: str) -> str | None:
    """Why no folder of images may be called so; None where it may."""
    unfit = not label or label.startswith(".") or "/" in label or "\0" in label or label.lower() in NO_IMAGE_FOLDERS
    if unfit or len(label.encode(errors="replace")) > MAX_NAME_BYTES:
        return "cannot be a label: a label names a folder, so no slash, no dot in front, not empty, 255 bytes at most"
    return None


def named_lines(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each of the first 20, and how many more."""
    lines = [f"  {path}: {reason}" for path, reason in pairs]
    return lines[:NUM_NAMED] + ([f"  and {len(lines) - NUM_NAMED:,} more"] if len(lines) > NUM_NAMED else [])


def refuse(mistakes: Sequence[tuple[str, str]], what: str) -> None:
    """Stops where there are mistakes, and names them.

    Raises:
        DataError: If there are any.
    """
    if mistakes:
        raise DataError("\n".join([f"{what}:", *named_lines(mistakes)]))


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's bytes; shares them with the original until one is edited, where the file system can.

    A copy and no hard link: DVC makes what it tracks read-only, and the original stays the person's to edit.
    """
    with source.open("rb") as reader, target.open("wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        try:
            while left and (done := os.copy_file_range(reader.fileno(), writer.fileno(), left)):
                left -= done
        except (OSError, AttributeError):  # AttributeError: macOS has no such call
            reader.seek(0)
            writer.seek(0)
            writer.truncate()
            left = -1
        if left:  # also where the file grew or shrank meanwhile: its digest will tell
            writer.write(reader.read())
