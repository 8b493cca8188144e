"""The manifest: one row an image, as a parquet file that is the same bytes whenever the rows are the same.

Written by index_images (every file of data/raw, a group of rows at a time) and validate_data (the rows that passed),
read by every later stage.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deploy.files import atomic_path
from tasks.data.splits import Split
from tasks.errors import DataError

if TYPE_CHECKING:  # index_images needs no frame, and pandas takes half a second and 40 MB
    import pandas as pd

# Raised when the same bytes would now get other facts (decoder, hash, statistics): older rows are then computed again.
FACTS_VERSION: Final = 2

# What is in memory at once where a manifest is written or known facts are read.
ROWS_PER_GROUP: Final = 8192

VERSION_KEY: Final = b"tanuki.facts_version"
DIGEST_KEY: Final = b"tanuki.rows_sha256"

SCHEMA: Final = pa.schema(
    [
        pa.field("path", pa.string(), nullable=False),  # posix, relative to data/raw
        pa.field("label", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),  # upright, px
        pa.field("height", pa.int32(), nullable=False),
        pa.field("mode", pa.string(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("num_frames", pa.int32(), nullable=False),
        pa.field("exif_orientation", pa.int32(), nullable=False),
        pa.field("phash", pa.string(), nullable=False),  # 16 hex digits
        pa.field("brightness", pa.float32(), nullable=False),  # mean luma, 0..255
        pa.field("contrast", pa.float32(), nullable=False),  # standard deviation of luma
        pa.field("sharpness", pa.float32(), nullable=False),  # variance of the Laplacian of luma
        pa.field("error", pa.string(), nullable=True),  # why it does not decode; null: it does
        pa.field("group", pa.string(), nullable=False),  # near-duplicates share it
        pa.field("split", pa.string(), nullable=False),
        pa.field("official_split", pa.bool_(), nullable=False),
        pa.field("class_id", pa.int32(), nullable=True),  # of the class map; null until validate_data has accepted it
    ],
    metadata={VERSION_KEY: str(FACTS_VERSION)},
)

pa.set_memory_pool(pa.system_memory_pool())  # Arrow's own pool takes 40 MB for a group of rows that has 3

Columns = dict[str, list[Any]]
"""Some columns of a manifest, by name."""

# What reading a damaged file can raise, ours and pyarrow's.
DAMAGE: Final = (OSError, ValueError, TypeError, KeyError, MemoryError, pa.ArrowException)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of an image from its bytes alone; zeros and empty texts where it does not decode."""

    sha256: str
    size_bytes: int
    width: int = 0
    height: int = 0
    mode: str = ""
    format: str = ""
    num_frames: int = 0
    exif_orientation: int = 0
    phash: str = ""
    brightness: float = 0.0
    contrast: float = 0.0
    sharpness: float = 0.0
    error: str | None = None
    group: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One image of the manifest."""

    path: str
    label: str
    facts: Facts
    split: Split
    official_split: bool


class ManifestWriter:
    """A manifest that is being written, a group of rows at a time; see `manifest_writer`."""

    def __init__(self, parquet: pq.ParquetWriter) -> None:
        self._parquet = parquet
        self._digest = hashlib.sha256()

    def write(self, table: pa.Table) -> None:
        """Appends rows: ROWS_PER_GROUP of them, or fewer in the last group."""
        table = table.replace_schema_metadata(SCHEMA.metadata)
        _add_to_digest(self._digest, table)
        self._parquet.write_table(table)

    def finish(self) -> None:
        """Writes the digest of all rows."""
        self._parquet.add_key_value_metadata({DIGEST_KEY: self._digest.hexdigest()})


@contextmanager
def manifest_writer(path: Path) -> Iterator[ManifestWriter]:
    """Writes a manifest atomically, with a digest of its rows, which must come sorted by path."""
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as parquet:
        manifest = ManifestWriter(parquet)
        yield manifest
        manifest.finish()


def rows_to_table(rows: Sequence[Row]) -> pa.Table:
    """Rows in SCHEMA, in their order."""
    return columns_to_table(
        {
            "path": [row.path for row in rows],
            "label": [row.label for row in rows],
            **facts_to_columns([row.facts for row in rows]),
            "split": [row.split for row in rows],
            "official_split": [row.official_split for row in rows],
        }
    )


def facts_to_columns(facts: Sequence[Facts]) -> Columns:
    """The fields of Facts, a list each."""
    return {name: list(map(attrgetter(name), facts)) for name in Facts.__dataclass_fields__}


def columns_to_table(columns: Columns) -> pa.Table:
    """Columns of SCHEMA but for the class id, which validate_data gives."""
    return pa.Table.from_pydict({**columns, "class_id": [None] * len(columns["path"])}, schema=SCHEMA)


def rows_to_frame(rows: Sequence[Row]) -> "pd.DataFrame":
    """A manifest of rows, as `read_manifest` would give it."""
    frame: pd.DataFrame = rows_to_table(rows).to_pandas()
    return frame.sort_values("path", kind="stable", ignore_index=True)


def write_manifest(path: Path, frame: "pd.DataFrame") -> None:
    """Writes a manifest atomically, sorted by path."""
    frame = frame.sort_values("path", kind="stable", ignore_index=True)
    table = pa.Table.from_pandas(frame, schema=SCHEMA, preserve_index=False)
    with manifest_writer(path) as manifest:
        for start in range(0, table.num_rows, ROWS_PER_GROUP):
            manifest.write(table.slice(start, ROWS_PER_GROUP))


def read_manifest(path: Path) -> "pd.DataFrame":
    """A manifest sorted by path; ``error`` is missing (``isna``) where the image decodes.

    Raises:
        DataError: If it is missing, damaged, or no manifest of this version.
    """
    with _readable(path):
        frame: pd.DataFrame = _read_table(path).to_pandas()
    return frame.sort_values("path", kind="stable", ignore_index=True)


def read_columns(path: Path, columns: Sequence[str]) -> Columns:
    """Some columns of a manifest in the order of the file, in less memory than a frame takes.

    Raises:
        DataError: As `read_manifest`.
    """
    found: Columns = {name: [] for name in columns}
    with _readable(path), pq.ParquetFile(path) as parquet:
        for group in _checked_groups(parquet):
            for name, values in found.items():
                values += group.column(name).to_pylist()
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Says what to do where a manifest cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing. Run `tanuki retrain`, or `dvc repro` up to the stage that writes it."
        ) from error
    except DAMAGE as error:
        raise DataError(
            f"{path} is damaged or no manifest ({one_line(error)}). Remove it; `tanuki retrain` (or "
            "`dvc repro`) makes it again."
        ) from error


def read_groups(path: Path, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Some columns of a manifest of this version of the facts, a group at a time; nothing where it has another.

    Raises:
        FileNotFoundError: If it is missing.
        OSError, ValueError: See `DAMAGE`; at the end at the latest, so nothing may be believed before.
    """
    with pq.ParquetFile(path) as parquet:
        if (parquet.metadata.metadata or {}).get(VERSION_KEY) == str(FACTS_VERSION).encode():
            for table in _checked_groups(parquet):
                yield table.select(list(columns))


def _read_table(path: Path) -> pa.Table:
    """The rows as they were written.

    Raises:
        OSError, ValueError: See `DAMAGE`.
    """
    with pq.ParquetFile(path) as parquet:
        return pa.concat_tables([SCHEMA.empty_table(), *_checked_groups(parquet)])


def _checked_groups(parquet: pq.ParquetFile) -> Iterator[pa.Table]:
    """The groups that a file has, of however many rows; raises ValueError at the end if they have not its digest."""
    digest = hashlib.sha256()
    for group in range(parquet.num_row_groups):
        table = parquet.read_row_group(group, use_threads=False).cast(SCHEMA)  # each would keep a hoard of memory
        _add_to_digest(digest, table)
        yield table
    _check_digest(parquet.metadata.metadata or {}, digest)


def _check_digest(metadata: Mapping[bytes, bytes], digest: "hashlib._Hash") -> None:
    if metadata.get(DIGEST_KEY) != digest.hexdigest().encode():
        raise ValueError("its rows no longer have their digest")


def _add_to_digest(digest: "hashlib._Hash", table: pa.Table) -> None:
    """Hashes a group of rows. Parquet's own checksums leave out headers, and a flipped bit may decompress."""
    for field in SCHEMA:
        column = table.column(field.name).combine_chunks()
        digest.update(column.is_null().to_numpy(zero_copy_only=False).tobytes())
        if pa.types.is_string(field.type):
            lengths, texts = _texts(column.fill_null(""))
            digest.update(lengths.tobytes())
            digest.update(texts)
        else:
            zero = False if pa.types.is_boolean(field.type) else 0
            digest.update(column.fill_null(zero).to_numpy(zero_copy_only=False).tobytes())


def _texts(column: pa.StringArray) -> tuple[NDArray[np.int64], memoryview]:
    """The lengths of texts as UTF-8, and all of them in one piece, out of Arrow's own memory."""
    if not len(column):
        return np.empty(0, np.int64), memoryview(b"")
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
    return np.diff(ends).astype(np.int64), memoryview(data or b"")[ends[0] : ends[-1]]


def one_line(error: BaseException) -> str:
    """An error's text without its line breaks."""
    return " ".join(str(error).split())


def class_names(frame: "pd.DataFrame") -> tuple[str, ...]:
    """The classes in the order that every head, bundle and report keeps: labels of train rows by class id.

    Rows that have no id yet come last, by label.
    """
    classes = frame.loc[frame["split"] == "train", ["class_id", "label"]].drop_duplicates()
    return tuple(classes.sort_values(["class_id", "label"], na_position="last")["label"].astype(str))
