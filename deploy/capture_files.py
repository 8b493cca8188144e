"""What a server captured, as files: Parquet in one folder, each whole and never changed, named by when it was written.

    time (UTC), request_id, version, bundle (digest), label, probability, probabilities (C), embedding (D),
    picture, thumbnail (encoded; null where they are not kept)

Written by deploy/serving/capture.py; read for drift and for labelling, which take only as many rows as they ask for,
however much was captured.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.files import atomic_path

PREFIX = "captured-"
NUM_KEYS = 4
KEY_STEPS = 2**14  # of a cosine: far wider than what a batch changes in it, far finer than what two pictures differ by
NAME = re.compile(rf"{PREFIX}(\d{{8}}T\d{{6}})-\d+\.parquet")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CapturedRow:
    """One answer.

    Args:
        time: Seconds since 1970.
        request_id: As the client or the server called the request.
        version: Of the registry.
        bundle: Digest of the bundle that answered.
        label: The most probable one.
        probabilities: Of shape (C,), float32.
        embedding: Of shape (D,), float32.
        picture: As it was sent, encoded, or None.
        thumbnail: Of it, encoded, or None.
    """

    time: float
    request_id: str
    version: int
    bundle: str
    label: str
    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    picture: bytes | None = None
    thumbnail: bytes | None = None


@dataclass(frozen=True, eq=False)
class Captured:
    """A sample of what one bundle answered.

    Args:
        times: When, UTC.
        request_ids: Of each answer.
        labels: The most probable class of each.
        probabilities: Of shape (N, C), float32.
        embeddings: Of shape (N, D), float32.
        pictures: As they were sent, encoded; None where none was kept.
        thumbnails: The same.
        num_found: How many answers of this bundle there were to choose from.
        num_others: Answers of other bundles in the same time.
    """

    times: list[datetime]
    request_ids: list[str]
    labels: list[str]
    probabilities: NDArray[np.float32]
    embeddings: NDArray[np.float32]
    pictures: list[bytes | None]
    thumbnails: list[bytes | None]
    num_found: int
    num_others: int


def captured_files(directory: Path) -> list[tuple[datetime, Path]]:
    """The files of a folder with the time each was written, oldest first."""
    found = ((NAME.fullmatch(path.name), path) for path in directory.glob(f"{PREFIX}*.parquet"))
    written = [
        (datetime.strptime(match[1], "%Y%m%dT%H%M%S").replace(tzinfo=UTC), path) for match, path in found if match
    ]
    return sorted(written)


def write_rows(directory: Path, rows: Sequence[CapturedRow], number: int) -> None:
    """Writes one file.

    Args:
        directory: The folder.
        rows: At least one.
        number: Tells files of the same second apart.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = pa.list_(pa.float32())
    columns: dict[str, tuple[Any, Iterable[Any]]] = {
        "time": (pa.timestamp("us", tz="UTC"), (int(row.time * 1e6) for row in rows)),
        "request_id": (pa.string(), (row.request_id for row in rows)),
        "version": (pa.int32(), (row.version for row in rows)),
        "bundle": (pa.string(), (row.bundle for row in rows)),
        "label": (pa.string(), (row.label for row in rows)),
        "probability": (pa.float32(), (row.probabilities.max() for row in rows)),
        "probabilities": (numbers, (row.probabilities for row in rows)),
        "embedding": (numbers, (row.embedding for row in rows)),
        "picture": (pa.binary(), (row.picture for row in rows)),
        "thumbnail": (pa.binary(), (row.thumbnail for row in rows)),
    }
    table = pa.table({name: pa.array(list(values), kind) for name, (kind, values) in columns.items()})
    name = f"{PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S}-{number:06d}.parquet"
    with atomic_path(directory / name) as path:
        pq.write_table(table, path, compression="zstd")


def read_captured(
    directory: Path, *, bundle: str, since: datetime, limit: int, seed: int, only_with_pictures: bool = False
) -> Captured:
    """A random sample of what a bundle answered, in the order of time.

    A picture that was sent again and again, such as a probe's, stands among the rest but a few times, however often it
    was sent: else a sample of seldom-asked pictures would be of it alone. A file that cannot be read is left out and
    told of.

    Args:
        directory: Where the server put it.
        bundle: Digest of the bundle.
        since: Earlier answers are left out.
        limit: Rows at most.
        seed: Another one, another sample.
        only_with_pictures: Answers whose picture was not kept are left out.
    """
    places, keys, num_others = _places(directory, bundle=bundle, since=since, with_pictures=only_with_pictures)
    chosen = np.sort(np.unique(keys, axis=0, return_index=True)[1])
    if len(chosen) > limit:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, limit, replace=False))
    columns = ["time", "request_id", "label", "probabilities", "embedding", "picture", "thumbnail"]
    rows = _rows([places[index] for index in chosen], columns)
    return Captured(
        times=[row["time"] for row in rows],
        request_ids=[row["request_id"] for row in rows],
        labels=[row["label"] for row in rows],
        probabilities=np.array([row["probabilities"] for row in rows], dtype=np.float32),
        embeddings=np.array([row["embedding"] for row in rows], dtype=np.float32),
        pictures=[row["picture"] for row in rows],
        thumbnails=[row["thumbnail"] for row in rows],
        num_found=len(places),
        num_others=num_others,
    )


def _places(
    directory: Path, *, bundle: str, since: datetime, with_pictures: bool
) -> tuple[list[tuple[Path, int]], NDArray[np.int64], int]:
    """File and row of each answer of a bundle, its keys, and how many answers others gave."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    places: list[tuple[Path, int]] = []
    keys = [np.empty((0, NUM_KEYS), np.int64)]
    num_others = 0
    for written, path in captured_files(directory):
        if written < since.replace(microsecond=0):
            continue  # all of its rows are older still
        try:
            table = pq.read_table(path, columns=["time", "bundle", "embedding", *(["picture"] * with_pictures)])
        except (OSError, pa.ArrowException) as error:
            logger.warning("%s cannot be read and is left out: %s", path, error)
            continue
        is_recent = pc.greater_equal(table["time"], pa.scalar(since, pa.timestamp("us", tz="UTC"))).to_numpy()
        is_ours = pc.equal(table["bundle"], bundle).to_numpy()
        num_others += int((is_recent & ~is_ours).sum())
        is_wanted = is_recent & is_ours
        if with_pictures:
            is_wanted &= pc.is_valid(table["picture"]).to_numpy()
        wanted = np.flatnonzero(is_wanted)
        if len(wanted):
            places += [(path, int(row)) for row in wanted]
            embeddings = table["embedding"].combine_chunks().take(wanted).flatten().to_numpy()
            keys.append(_keys(embeddings.reshape(len(wanted), -1)))
    return places, np.concatenate(keys), num_others


def _keys(embeddings: NDArray[np.float32]) -> NDArray[np.int64]:
    """Numbers by which answers can be told apart, of shape (N, NUM_KEYS).

    Those of one picture are mostly the same: the last digits of an embedding hang on the batch that it was made in.

    Args:
        embeddings: Of shape (N, D).
    """
    directions = np.random.default_rng(0).normal(size=(embeddings.shape[1], NUM_KEYS))
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    cosines = embeddings.astype(np.float64) @ (directions / np.linalg.norm(directions, axis=0))
    keys: NDArray[np.int64] = np.rint(cosines / np.where(lengths > 0, lengths, 1.0) * KEY_STEPS).astype(np.int64)
    return keys


def _rows(places: Sequence[tuple[Path, int]], columns: list[str]) -> list[dict[str, Any]]:
    """Those rows, file by file."""
    import pyarrow.parquet as pq

    rows: dict[Path, list[int]] = {}
    for path, row in places:
        rows.setdefault(path, []).append(row)
    return [
        row for path, wanted in rows.items() for row in pq.read_table(path, columns=columns).take(wanted).to_pylist()
    ]
