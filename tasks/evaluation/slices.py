"""Accuracy by what pictures are like: dark or bright, small or large, wide or tall, from which folder.

A mean hides a part of the pictures that fares badly; a slice shows it. Called by tasks.evaluate.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation.metrics import Accuracy, accuracy_of

PARTS = 3  # of about as many images each, along a number
MAX_SOURCES = 20  # the folders with the most test images

Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Slice:
    """A part of the test images.

    Args:
        kind: What they were parted by: "brightness", "size", "aspect" or "source".
        name: Which part.
        num_images: Images in it.
        accuracy: Of the model on them.
        is_weak: The model does worse there than on all test images, with the confidence of the interval.
    """

    kind: str
    name: str
    num_images: int
    accuracy: Accuracy
    is_weak: bool


def slices_by_number(
    values: Mapping[str, NDArray[np.float64]], right: Bools, *, confidence: float, min_images: int
) -> list[Slice]:
    """Slices along numbers, at their terciles; a number that hardly varies gives none.

    Args:
        values: By kind, such as the brightness of each image, (N,).
        right: Whether each image was answered right, (N,).
        confidence: Of the intervals.
        min_images: Smaller slices are left out.
    """
    return [
        found
        for kind, numbers in values.items()
        for found in _slices(kind, _parts(numbers), right, confidence, min_images)
    ]


def slices_by_source(
    paths: Sequence[str], labels: Sequence[str], right: Bools, *, confidence: float, min_images: int
) -> list[Slice]:
    """Slices by the folder under the label that an image comes from; none where labels have no folders.

    Args:
        paths: Posix, relative to data/raw, (N,): ``LABEL/FOLDERS/FILE`` or ``SPLIT/LABEL/FOLDERS/FILE``.
        labels: Of the images, (N,).
        right: Whether each was answered right, (N,).
        confidence: Of the intervals.
        min_images: Smaller slices are left out.
    """
    sources = [_source(path, label) for path, label in zip(paths, labels, strict=True)]
    most = dict(Counter(sources).most_common(MAX_SOURCES))
    masks = {name or "no folder": np.array([source == name for source in sources]) for name in sorted(most)}
    return list(_slices("source", masks, right, confidence, min_images))


def _slices(kind: str, masks: Mapping[str, Bools], right: Bools, confidence: float, min_images: int) -> Iterator[Slice]:
    if len(masks) < 2:
        return
    for name, mask in masks.items():
        if mask.sum() >= max(1, min_images):
            accuracy = accuracy_of(right[mask], confidence)
            yield Slice(kind, name, int(mask.sum()), accuracy, bool(accuracy.accuracy_high < right.mean()))


def _parts(numbers: NDArray[np.float64]) -> dict[str, Bools]:
    """Masks of the parts, by the range of their values."""
    inner = np.quantile(numbers, np.linspace(0, 1, PARTS + 1)[1:-1], method="lower")
    edges = [edge for edge in np.unique(inner) if numbers.min() <= edge < numbers.max()]
    part = np.searchsorted(edges, numbers, side="left")
    bounds = [f"{edge:.4g}" for edge in edges]
    names = [f"up to {bounds[0]}", *map("{} to {}".format, bounds, bounds[1:]), f"over {bounds[-1]}"] if edges else []
    return {name: part == index for index, name in enumerate(names)}


def _source(path: str, label: str) -> str:
    """The folders between the label's own and the file; empty where there are none."""
    folders = PurePosixPath(path).parts[:-1]
    named = [unicodedata.normalize("NFC", folder) for folder in folders[:2]]
    return "/".join(folders[named.index(label) + 1 :]) if label in named else ""
