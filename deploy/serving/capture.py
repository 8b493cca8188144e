"""What was asked and answered, sampled, for drift and labelling: Parquet files in a folder that others pick up.

A request puts a row into a bounded queue and is done; one thread writes. When it cannot keep up, or cannot write, rows
are dropped and counted: nothing here makes a request wait or fail. When the folder holds too much, the oldest go.

    time (UTC), request_id, version, bundle (digest), label, probability, probabilities (C), embedding (D)
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploy.bundle import Bundle
from deploy.files import atomic_path
from deploy.serving.errors import ServingError
from deploy.serving.live_model import LiveModel

if TYPE_CHECKING:
    from deploy.serving.batcher import Answer

QUEUE_ROWS = 4096
FILE_ROWS = 4096
FILE_S = 60.0  # a file is closed after this, however few rows it has
PREFIX = "captured-"
MAX_ID = 128  # characters of a client's name for its request

Fate = Literal["kept", "dropped"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Row:
    """One answer. Of the model its record only: a row must not keep a retired version's sessions."""

    time: float
    request_id: str
    version: int
    bundle: Bundle
    answer: "Answer"


class Capture:
    """Writes a sample of the answers.

    Args:
        directory: Where the files go; made if it is not there.
        fraction: Of the answers, in 0..1.
        max_bytes: Of all files in the folder.
        on_rows: Told how many rows were kept or dropped; from any thread.

    Raises:
        ServingError: If the folder cannot be made, or pyarrow is not installed.
    """

    def __init__(
        self, directory: Path, *, fraction: float, max_bytes: int, on_rows: Callable[[Fate, int], None]
    ) -> None:
        try:
            import pyarrow.parquet  # noqa: F401  told at the start, not in the thread

            directory.mkdir(parents=True, exist_ok=True)
        except ImportError as error:
            raise ServingError("--capture-dir needs pyarrow: install the extra capture.") from error
        except OSError as error:
            raise ServingError(f"{directory} cannot be made: {error.strerror}. Choose with --capture-dir.") from error
        self._directory = directory
        self._fraction = fraction
        self._max_bytes = max_bytes
        self._on_rows = on_rows
        self._queue: queue.Queue[_Row | None] = queue.Queue(QUEUE_ROWS)
        self._number = 0
        self._is_failing = False
        self._thread = threading.Thread(target=self._work, name="capture", daemon=True)
        self._thread.start()

    def offer(self, model: LiveModel, answers: Sequence["Answer"], request_id: str) -> None:
        """Keeps a sample of the answers; returns at once, whatever happens."""
        for answer in answers:
            if random.random() >= self._fraction:
                continue
            try:
                self._queue.put_nowait(_Row(time.time(), request_id[:MAX_ID], model.version, model.bundle, answer))
            except queue.Full:
                self._on_rows("dropped", 1)

    def close(self) -> None:
        """Writes what is left, and ends."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        rows: list[_Row] = []
        due, is_over = time.monotonic() + FILE_S, False
        while not is_over:
            try:
                row = self._queue.get(timeout=max(0.0, due - time.monotonic()))
                is_over = row is None
                rows += [row] if row is not None else []
            except queue.Empty:
                pass
            if is_over or len(rows) >= FILE_ROWS or time.monotonic() >= due:
                self._write(rows)
                rows, due = [], time.monotonic() + FILE_S

    def _write(self, rows: list[_Row]) -> None:
        """Writes a file, and makes room; told once where it cannot."""
        if not rows:
            return
        try:
            self._number += 1
            name = f"{PREFIX}{datetime.now(UTC):%Y%m%dT%H%M%S}-{self._number:06d}.parquet"
            with atomic_path(self._directory / name) as path:
                _write_parquet(path, rows)
            self._make_room()
        except OSError as error:
            if not self._is_failing:
                logger.warning("captured answers cannot be written and are dropped: %s", error)
            self._is_failing = True
            self._on_rows("dropped", len(rows))
        else:
            self._is_failing = False
            self._on_rows("kept", len(rows))

    def _make_room(self) -> None:
        files = [(path, path.stat().st_size) for path in sorted(self._directory.glob(f"{PREFIX}*.parquet"))]
        excess = sum(size for _, size in files) - self._max_bytes
        for path, size in files[:-1]:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _write_parquet(path: Path, rows: list[_Row]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    numbers = pa.list_(pa.float32())
    best = [int(row.answer.probabilities.argmax()) for row in rows]
    columns: dict[str, tuple[Any, list[Any]]] = {
        "time": (pa.timestamp("us", tz="UTC"), [int(row.time * 1e6) for row in rows]),
        "request_id": (pa.string(), [row.request_id for row in rows]),
        "version": (pa.int32(), [row.version for row in rows]),
        "bundle": (pa.string(), [row.bundle.digest for row in rows]),
        "label": (pa.string(), [row.bundle.labels[index] for row, index in zip(rows, best, strict=True)]),
        "probability": (pa.float32(), [row.answer.probabilities[index] for row, index in zip(rows, best, strict=True)]),
        "probabilities": (numbers, [row.answer.probabilities for row in rows]),
        "embedding": (numbers, [row.answer.embedding for row in rows]),
    }
    arrays = {name: pa.array(values, kind) for name, (kind, values) in columns.items()}
    pq.write_table(pa.table(arrays), path, compression="zstd")
