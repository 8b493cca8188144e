"""Whether exported graphs compute what was trained: on real pictures, at several batches, whole and in halves.

Called by export_onnx. No torch here: the reference is a function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnxruntime as ort

BATCHES = (1, 2, 7)

# Images (N, H, W, 3) uint8 of one size to class probabilities (N, C) float32.
Reference = Callable[[NDArray[np.uint8]], NDArray[np.float32]]


@dataclass(frozen=True)
class Parity:
    """How far an exported model is from what was trained.

    Args:
        num_images: Pictures compared.
        num_sizes: Sizes that they had, whole and cut.
        max_probability_difference: The largest, over pictures, classes, batches, the whole graph and its halves.
        top1_agreement: Share of the comparisons in which both name the same class.
        worst_image: Position of the picture with the largest difference.
    """

    num_images: int
    num_sizes: int
    max_probability_difference: float
    top1_agreement: float
    worst_image: int


def measure_parity(
    images: Sequence[NDArray[np.uint8]],
    reference: Reference,
    *,
    whole: ort.InferenceSession,
    front: ort.InferenceSession,
    back: ort.InferenceSession,
) -> Parity:
    """Compares the whole graph and its halves with a reference.

    Every picture goes through the whole graph alone, in batches of 2 and 7 made of itself and its mirror image (a batch
    of the whole graph has one size), and cut to two thirds of its height, because many sets have one size only; the
    halves take all pictures, of all sizes, in batches of 1, 2 and 7.

    Args:
        images: Each (H, W, 3) uint8, of any size.
        reference: What was trained.
        whole: ``images`` → ``probabilities``.
        front: ``images`` → ``pixels``.
        back: ``pixels`` → ``probabilities``.
    """
    expected = np.concatenate([reference(image[None]) for image in images])  # (N, C)
    differences, agreements = np.zeros(len(images)), []
    for positions, found, wanted in (
        *_whole_answers(images, expected, reference, whole),
        *_half_answers(images, expected, front, back),
    ):
        difference = np.nan_to_num(np.abs(found - wanted).max(axis=1), nan=np.inf)
        np.maximum.at(differences, positions, difference)
        agreements.append(found.argmax(axis=1) == wanted.argmax(axis=1))
    return Parity(
        num_images=len(images),
        num_sizes=len({each.shape for image in images for each in (image, _cut(image))}),
        max_probability_difference=float(differences.max()),
        top1_agreement=float(np.concatenate(agreements).mean()),
        worst_image=int(differences.argmax()),
    )


# Positions of the pictures in a batch, the graph's probabilities, the reference's.
Answers = tuple[NDArray[np.intp], NDArray[np.float32], NDArray[np.float32]]


def _whole_answers(
    images: Sequence[NDArray[np.uint8]],
    expected: NDArray[np.float32],
    reference: Reference,
    whole: ort.InferenceSession,
) -> Iterator[Answers]:
    """The whole graph on each picture alone, on it and its mirror image in batches of 2 and 7, and on a part of it."""
    for position, image in enumerate(images):
        batch_size = BATCHES[position % len(BATCHES)]
        pair = np.stack([image, image[:, ::-1]])  # (2, H, W, 3)
        wanted = np.concatenate([expected[position][None], reference(pair[1:])])  # (2, C)
        turns = np.arange(batch_size) % 2
        cut = _cut(image)[None]
        for batch, answer in ((pair[:1], wanted[:1]), (pair[turns], wanted[turns]), (cut, reference(cut))):
            found = whole.run(["probabilities"], {"images": np.ascontiguousarray(batch)})[0]
            yield np.full(len(batch), position), found, answer


def _cut(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The upper two thirds, (2 H / 3, W, 3)."""
    return image[: max(1, 2 * len(image) // 3)]


def _half_answers(
    images: Sequence[NDArray[np.uint8]],
    expected: NDArray[np.float32],
    front: ort.InferenceSession,
    back: ort.InferenceSession,
) -> Iterator[Answers]:
    """The halves: the front a picture at a time, the back in batches over pictures of all sizes."""
    pixels = np.concatenate([front.run(["pixels"], {"images": image[None]})[0] for image in images])
    for batch_size in BATCHES:
        for start in range(0, len(images), batch_size):
            part = slice(start, start + batch_size)
            found = back.run(["probabilities"], {"pixels": pixels[part]})[0]
            yield np.arange(start, start + len(found)), found, expected[part]
