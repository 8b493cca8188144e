"""Training pictures as network input: decoded, shown in one view, preprocessed, as feature caching and serving do it.

There is no second preprocessing: decoding is deploy.images, views are tasks.data.views, and resizing and normalising
are the ONNX graphs that ship in the bundle. Worker threads work ahead of the network; simplejpeg and onnxruntime
release the GIL. Called by ``tasks.finetune``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from deploy.files import Readable, sha256_bytes
from deploy.images import decode_image
from tasks.data.views import apply_view, is_crop
from tasks.errors import DataError, ImageError

if TYPE_CHECKING:
    import onnxruntime as ort

BATCHES_AHEAD = 2
"""Batches that are being made while the network works on one."""

Item = tuple[int, int]
"""(index of the picture, index of the view)."""


@dataclass(frozen=True)
class PixelSource:
    """Pictures in a few views each.

    Attributes:
        files: (N,) encoded pictures.
        shas: (N,) their sha256 when they were indexed.
        views: (K,) names of views, as ``tasks.data.views`` gives them.
        whole: Session of the backbone's own preprocessing, for pictures shown whole.
        crop: Session of the same preprocessing without its central crop, for random squares.
        min_area_fraction: Smallest share of the picture that a random square keeps.
        hflip: May a picture be mirrored?
        max_pixels: Larger pictures are not decoded.
        workers: Threads.
    """

    files: Sequence[Readable]
    shas: Sequence[str]
    views: Sequence[str]
    whole: ort.InferenceSession
    crop: ort.InferenceSession
    min_area_fraction: float
    hflip: bool
    max_pixels: int
    workers: int

    def pixels(self, index: int, views: Sequence[int]) -> list[NDArray[np.float32]]:
        """Network input of one picture in some views, by their indices; it is decoded once.

        Returns:
            (3, S, S) float32, normalised, for each.

        Raises:
            DataError: If the file is gone or is not the one that was indexed.
        """
        image = self._decode(index)
        return [self._shown(image, self.shas[index], self.views[view]) for view in views]

    def batches(self, batches: Iterable[Sequence[Item]]) -> Iterator[NDArray[np.float32]]:
        """Network input of batch after batch, in order, made ahead of time.

        Yields:
            (B, 3, S, S) float32.
        """
        pending: deque[list[Future[list[NDArray[np.float32]]]]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="pixels")
        try:
            for batch in batches:
                neighbours = groupby(batch, key=itemgetter(0))  # of one picture
                pending.append(
                    [pool.submit(self.pixels, index, [view for _, view in items]) for index, items in neighbours]
                )
                if len(pending) > BATCHES_AHEAD:
                    yield _stacked(pending.popleft())
            while pending:
                yield _stacked(pending.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _shown(self, image: NDArray[np.uint8], sha256: str, view: str) -> NDArray[np.float32]:
        shown = apply_view(image, view, key=sha256, min_area_fraction=self.min_area_fraction, hflip=self.hflip)
        session = self.crop if is_crop(view) else self.whole
        return cast(NDArray[np.float32], session.run(["pixels"], {"images": shown[None]})[0][0])

    def _decode(self, index: int) -> NDArray[np.uint8]:
        path = self.files[index]
        remedy = "Run `tanuki retrain` so that the images are indexed again."
        try:
            data = path.read_bytes()
            if sha256_bytes(data) != self.shas[index]:
                raise DataError(f"{path} has changed since it was indexed. {remedy}")
            return decode_image(data, max_pixels=self.max_pixels)
        except FileNotFoundError as error:
            raise DataError(f"{path} was indexed and is gone. {remedy}") from error
        except ImageError as error:
            raise DataError(f"{path}: {error}. It could be decoded when it was indexed. {remedy}") from error


@dataclass(frozen=True)
class LabelledPixels:
    """Pictures and their classes.

    Attributes:
        pixels: N pictures in K views.
        labels: (N,) int64 class indices.
    """

    pixels: PixelSource
    labels: NDArray[np.int64]


def _stacked(futures: list[Future[list[NDArray[np.float32]]]]) -> NDArray[np.float32]:
    return np.stack([shown for future in futures for shown in future.result()])  # (B, 3, S, S)
