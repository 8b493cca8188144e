"""What was asked and answered, sampled, for drift and labelling: files in a folder that others pick up.

A request puts a row into a bounded queue and is done; one thread writes. When it cannot keep up, or cannot write, rows
are dropped and counted: nothing here makes a request wait or fail. What is too old goes, and the oldest when the folder
holds too much. Pictures are kept only where that is asked for: small ones to look at, or, to label and train on, the
very bytes that the client sent. The files: deploy/capture_files.py.
"""

import io
import logging
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from PIL import Image

from deploy.bundle import Bundle
from deploy.capture_files import CapturedRow, captured_files, write_rows
from deploy.images import decode_image
from deploy.serving.batcher import Answer, Outcome, Picture
from deploy.serving.errors import ServingError
from deploy.serving.live_model import LiveModel

QUEUE_ROWS = 4096
QUEUE_BYTES = 64_000_000  # of pictures that wait to be written
FILE_ROWS = 4096
FILE_BYTES = 16_000_000  # of pictures; then the file is closed
FILE_S = 60.0  # a file is closed after this, however few rows it has
MAX_PICTURE_BYTES = 8_000_000  # of a larger one the answer is kept without it
MAX_ID = 128  # characters of a client's name for its request
THUMBNAIL_PX = 96  # of the long side
JPEG_QUALITY = 85

Fate = Literal["kept", "dropped"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Row:
    """One answer. Of the model its record only: a row must not keep a retired version's sessions."""

    time: float
    request_id: str
    version: int
    bundle: Bundle
    answer: Answer
    picture: Picture | None

    @property
    def num_bytes(self) -> int:
        return (
            0 if self.picture is None else len(self.picture) if isinstance(self.picture, bytes) else self.picture.nbytes
        )


class Capture:
    """Writes a sample of the answers.

    Args:
        directory: Where the files go; made if it is not there.
        fraction: Of the answers, in 0..1.
        max_bytes: Of all files in the folder.
        max_age: After which a file goes.
        pictures: What of the pictures is kept: none, thumbnails or originals (settings.KEPT_PICTURES).
        on_rows: Told how many rows were kept or dropped; from any thread.

    Raises:
        ServingError: If the folder cannot be made, or pyarrow is not installed.
    """

    def __init__(
        self,
        directory: Path,
        *,
        fraction: float,
        max_bytes: int,
        max_age: timedelta,
        pictures: str,
        on_rows: Callable[[Fate, int], None],
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
        self._max_age = max_age
        self._pictures = pictures
        self._on_rows = on_rows
        self._queue: queue.Queue[_Row | None] = queue.Queue(QUEUE_ROWS)
        self._waiting_bytes = 0
        self._counting = threading.Lock()
        self._number = os.getpid() * 1_000_000  # workers write into one folder, and at the same second
        self._is_failing = False
        self._make_room()
        self._thread = threading.Thread(target=self._work, name="capture", daemon=True)
        self._thread.start()

    def offer(
        self, model: LiveModel, pictures: Sequence[Picture], outcomes: Sequence[Outcome], request_id: str
    ) -> None:
        """Keeps a sample of a request's answers; returns at once, whatever happens.

        Args:
            model: Who answered.
            pictures: What was asked.
            outcomes: For each picture its answer; one that has none is not kept.
            request_id: The request's name.
        """
        for picture, outcome in zip(pictures, outcomes, strict=True):
            if not isinstance(outcome, Answer) or random.random() >= self._fraction:
                continue
            kept = None if self._pictures == "none" else picture
            row = _Row(time.time(), request_id[:MAX_ID], model.version, model.bundle, outcome, kept)
            try:
                if self._waiting_bytes + row.num_bytes > QUEUE_BYTES:
                    raise queue.Full
                self._queue.put_nowait(row)
            except queue.Full:
                self._on_rows("dropped", 1)
            else:
                self._count(row.num_bytes)

    def close(self) -> None:
        """Writes what is left, and ends."""
        self._queue.put(None)
        self._thread.join()

    def _count(self, num_bytes: int) -> None:
        with self._counting:
            self._waiting_bytes += num_bytes

    def _work(self) -> None:
        rows: list[CapturedRow] = []
        num_bytes = 0
        due, is_over = time.monotonic() + FILE_S, False
        while not is_over:
            try:
                row = self._queue.get(timeout=max(0.0, due - time.monotonic()))
                is_over = row is None
                if row is not None:
                    self._count(-row.num_bytes)
                    rows.append(self._finished(row))
                    num_bytes += len(rows[-1].picture or rows[-1].thumbnail or b"")
            except queue.Empty:
                pass
            except Exception as error:  # noqa: BLE001 - told and counted
                self._lose(1, error)
            is_full = len(rows) >= FILE_ROWS or num_bytes >= FILE_BYTES
            if is_over or is_full or time.monotonic() >= due:
                self._write(rows)
                rows, num_bytes, due = [], 0, time.monotonic() + FILE_S

    def _finished(self, row: _Row) -> CapturedRow:
        """As it will be written."""
        best = int(row.answer.probabilities.argmax())
        return CapturedRow(
            time=row.time,
            request_id=row.request_id,
            version=row.version,
            bundle=row.bundle.digest,
            label=row.bundle.labels[best],
            probabilities=row.answer.probabilities,
            embedding=row.answer.embedding,
            picture=_original(row.picture) if row.picture is not None and self._pictures == "originals" else None,
            thumbnail=_thumbnail(row.picture) if row.picture is not None and self._pictures == "thumbnails" else None,
        )

    def _write(self, rows: list[CapturedRow]) -> None:
        """Makes room, and writes a file where there is something to write; told once where it cannot."""
        try:
            if rows:
                self._number += 1
                write_rows(self._directory, rows, self._number)
            self._make_room()
        except Exception as error:  # noqa: BLE001 - told and counted
            self._lose(len(rows), error)
            return
        if rows:
            self._is_failing = False
            self._on_rows("kept", len(rows))

    def _lose(self, num_rows: int, error: Exception) -> None:
        """Counts rows that could not be kept; whatever the reason, those that follow are tried."""
        if not self._is_failing:
            logger.warning("captured answers cannot be kept and are dropped: %r", error)
        self._is_failing = True
        self._on_rows("dropped", num_rows)

    def _make_room(self) -> None:
        """Removes what is too old, then the oldest until the rest is small enough."""
        oldest = datetime.now(UTC) - self._max_age
        files = captured_files(self._directory)
        left = []
        for written, path in files:
            if written < oldest:
                path.unlink(missing_ok=True)
            else:
                with suppress(FileNotFoundError):  # another worker made room
                    left.append((path, path.stat().st_size))
        excess = sum(size for _, size in left) - self._max_bytes
        for path, size in left[:-1]:
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= size


def _original(picture: Picture) -> bytes | None:
    """The bytes as sent, or pixels without loss; None where that is too large."""
    data = picture if isinstance(picture, bytes) else _encoded(Image.fromarray(picture), "PNG")
    return data if len(data) <= MAX_PICTURE_BYTES else None


def _thumbnail(picture: Picture) -> bytes:
    """A small one of a picture that was answered: one within the server's limits, whatever those are."""
    image = Image.fromarray(decode_image(picture, max_pixels=sys.maxsize) if isinstance(picture, bytes) else picture)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return _encoded(image, "JPEG")


def _encoded(image: Image.Image, kind: str) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, quality=JPEG_QUALITY)
    return data.getvalue()
