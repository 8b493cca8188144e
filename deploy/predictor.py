"""Answers for pictures: the graph's front half a picture at a time, its back half a batch at a time.

Pictures of different sizes cannot share a batch before they are resized, and the network is called less often when
they do share one afterwards. One session a half, and as many threads calling it as there are cores: that uses the cores
best, and an answer does not depend on their number. Evaluation, the command line, the registry's checks and the server
all use this and nothing else.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from deploy.errors import BundleError, ImageError
from deploy.files import Readable
from deploy.images import decode_image
from deploy.machine import available_cores
from deploy.runtime import open_session

if TYPE_CHECKING:
    from deploy.bundle import Bundle

# Larger batches are slower for small networks (cache) and hold more memory.
BATCH_SIZE = 8
# Pictures decoded at a time: what bounds memory when thousands of files are asked for.
CHUNK_SIZE = 64

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Predictions:
    """Answers for N pictures.

    Args:
        probabilities: Of shape (N, C), float32; rows sum to 1.
        embeddings: Of shape (N, D), float32.
    """

    probabilities: Float32
    embeddings: Float32


@dataclass(frozen=True)
class Answer:
    """The answer for one encoded picture: a label, or why there is none.

    Args:
        source: The file, or the name that the caller gave.
        label: The most probable class, or None where the picture cannot be read.
        probability: Of that class, in 0..1.
        top: The k most probable classes with their probabilities, falling.
        error: Why there is no label.
    """

    source: str
    label: str | None
    probability: float | None
    top: tuple[tuple[str, float], ...]
    error: ImageError | None = None


class Predictor:
    """Runs a bundle. Safe to call from several threads; close it, or use it as a context manager.

    Args:
        bundle: A bundle that `read_bundle` found whole.
        threads: Threads that share the work; all available cores where None.

    Raises:
        BundleError: If the graphs do not run or do not fit the bundle's labels.
    """

    def __init__(self, bundle: "Bundle", *, threads: int | None = None) -> None:
        self.bundle = bundle
        self.labels = bundle.labels
        self._front = open_session(bundle.front_path)
        self._back = open_session(bundle.back_path)
        widths = {port.name: port.shape[-1] for port in self._back.get_outputs() if port.shape}
        if widths.get("probabilities") != len(self.labels) or not isinstance(widths.get("embedding"), int):
            raise BundleError(
                f"{bundle.back_path} gives {widths} values, where the bundle has {len(self.labels)} labels and an "
                "embedding."
            )
        self._embedding_width: int = widths["embedding"]
        self._threads = threads or available_cores()
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="predictor")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown()

    def predict(self, images: Sequence[UInt8]) -> Predictions:
        """Answers for decoded pictures.

        Args:
            images: Upright RGB uint8 of shape (H, W, 3) each, sizes may differ.
        """
        if not images:
            return self._joined([])
        pixels = list(self._each(self.pixels, images))
        batches = [np.concatenate(pixels[i : i + BATCH_SIZE]) for i in range(0, len(pixels), BATCH_SIZE)]
        return self._joined(list(self._each(self.answers, batches)))

    def pixels(self, image: UInt8) -> Float32:
        """What the network sees of one picture: float32 (1, 3, S, S). Runs in the calling thread."""
        pixels: Float32 = self._front.run(["pixels"], {"images": image[None]})[0]
        return pixels

    def answers(self, pixels: Float32) -> tuple[Float32, Float32]:
        """Probabilities (B, C) and embeddings (B, D) of pixels (B, 3, S, S). Runs in the calling thread."""
        probabilities, embeddings = self._back.run(["probabilities", "embedding"], {"pixels": pixels})
        return probabilities, embeddings

    def score_files(self, paths: Iterable[Readable]) -> Predictions:
        """Answers for files that must all be readable, such as a test set; memory does not grow with their pixels.

        Raises:
            ImageError: Naming every file that cannot be read.
        """
        answers: list[tuple[Float32, Float32]] = []
        unreadable: list[str] = []
        for chunk in _chunks(paths):
            images = [image for _, image in self._each(_decode, chunk)]
            unreadable += [str(image) for image in images if isinstance(image, ImageError)]
            found = self.predict([image for image in images if not isinstance(image, ImageError)])
            answers.append((found.probabilities, found.embeddings))
        if unreadable:
            more = f" and {len(unreadable) - 20} more" if len(unreadable) > 20 else ""
            raise ImageError(f"{len(unreadable)} images cannot be read: {'; '.join(unreadable[:20])}{more}")
        return self._joined(answers)

    def predict_bytes(self, pictures: Sequence[tuple[str, bytes]], *, top_k: int = 5) -> list[Answer]:
        """Answers for encoded pictures; one that cannot be read has an error in its place.

        Args:
            pictures: A name and the file's bytes, each.
            top_k: How many classes an answer names.
        """
        return [answer for chunk in _chunks(pictures) for answer in self._answer_chunk(chunk, top_k)]

    def predict_files(self, paths: Sequence[Readable], *, top_k: int = 5) -> list[Answer]:
        """Answers for files; one that is missing or cannot be read has an error in its place."""
        return [answer for chunk in _chunks(paths) for answer in self._answer_chunk(chunk, top_k)]

    def _answer_chunk(self, chunk: Sequence[Readable] | Sequence[tuple[str, bytes]], top_k: int) -> list[Answer]:
        decoded = list(self._each(_decode, chunk))
        rows = iter(self.predict([image for _, image in decoded if not isinstance(image, ImageError)]).probabilities)
        return [
            Answer(source, None, None, (), error=image)
            if isinstance(image, ImageError)
            else self._answer(source, next(rows), top_k)
            for source, image in decoded
        ]

    def _answer(self, source: str, probabilities: Float32, top_k: int) -> Answer:
        order = np.argsort(-probabilities, kind="stable")[:top_k]
        top = tuple((self.labels[index], float(probabilities[index])) for index in order)
        return Answer(source, *top[0], top)

    def _each(self, function: Any, items: Sequence[Any]) -> Iterator[Any]:
        """Applies a function to each item, on the pool where there is more than one."""
        return self._pool.map(function, items) if len(items) > 1 else map(function, items)

    def _joined(self, batches: Sequence[tuple[Float32, Float32]]) -> Predictions:
        empty = (np.empty((0, len(self.labels)), np.float32), np.empty((0, self._embedding_width), np.float32))
        probabilities, embeddings = zip(empty, *batches, strict=True)
        return Predictions(np.concatenate(probabilities), np.concatenate(embeddings))


def _decode(picture: Readable | tuple[str, bytes]) -> tuple[str, UInt8 | ImageError]:
    """Name and pixels of a picture, or why there are none."""
    source = picture[0] if isinstance(picture, tuple) else str(picture)
    try:
        data = picture[1] if isinstance(picture, tuple) else picture.read_bytes()
        return source, decode_image(data)
    except ImageError as error:
        return source, ImageError(f"{source}: {error}")
    except OSError as error:
        return source, ImageError(f"{source}: {error.strerror or error}")


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(items)
    while chunk := list(islice(rest, CHUNK_SIZE)):
        yield chunk
