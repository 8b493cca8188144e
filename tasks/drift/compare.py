"""A window of production against the reference: three tests, what shifted, and which pictures are most unlike it.

The reference are test images, answered by the very bundle that answered in production: trained on by nobody, so that a
model's greater confidence in what it has learnt does not look like drift. Called by flows.drift.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tasks.drift.two_sample import (
    TwoSampleTest,
    classifier_test,
    distance_test,
    group_tests,
    holm,
    mix_test,
    permuted_windows,
    squared_distances,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

SAME = 1e-4  # share of the reference's median distance below which two pictures are one picture, sent again


@dataclass(frozen=True, eq=False)
class Answers:
    """What a bundle answered for N pictures.

    Args:
        probabilities: Of shape (N, C).
        embeddings: Of shape (N, D).
    """

    probabilities: Float32
    embeddings: Float32

    def __len__(self) -> int:
        return len(self.probabilities)

    def of(self, rows: NDArray[np.int64]) -> "Answers":
        """Some of them."""
        return Answers(self.probabilities[rows], self.embeddings[rows])

    @property
    def predicted(self) -> NDArray[np.int64]:
        columns: NDArray[np.int64] = self.probabilities.argmax(axis=1)
        return columns

    @property
    def confidence(self) -> Float64:
        highest: Float64 = self.probabilities.max(axis=1).astype(np.float64)
        return highest


@dataclass(frozen=True)
class DriftTest:
    """One of the tests.

    Args:
        statistic: Pictures: area under the ROC curve of a classifier that tells window from reference. Predictions:
            chi-square of the predicted classes. Confidence: largest distance of its distribution functions.
        expected: What it would be without drift.
        p_value: By permutation.
        adjusted_p_value: After Holm over all tests; drift where it is at most the level.
    """

    statistic: float
    expected: float
    p_value: float
    adjusted_p_value: float


@dataclass(frozen=True)
class ClassShift:
    """How often a class was predicted.

    Args:
        label: The class.
        reference_share: Of the reference.
        window_share: Of the window.
        adjusted_p_value: Of the difference, after Holm over the classes.
        is_shifted: Whether that is at most the level.
    """

    label: str
    reference_share: float
    window_share: float
    adjusted_p_value: float
    is_shifted: bool


@dataclass(frozen=True, eq=False)
class Comparison:
    """What the comparison found.

    Args:
        is_drift: Whether any test says so, at the level.
        tests: ``pictures``, ``predictions`` and ``confidence``.
        classes: Of each class, the greatest difference first.
        reference_confidence: Mean probability of the predicted class.
        window_confidence: The same in the window.
        window_rows: Rows of the window that were compared, (M,): a picture sent again counts once.
        novelty: Of each of those, (M,): share of the reference that lies closer to the rest of the reference.
        novelty_distances: Of each of those, (M,): mean distance to its nearest of the reference.
        projection: Reference and window in two dimensions, (N + M, 2).
    """

    is_drift: bool
    tests: dict[str, DriftTest]
    classes: list[ClassShift]
    reference_confidence: float
    window_confidence: float
    window_rows: NDArray[np.int64]
    novelty: Float64
    novelty_distances: Float64
    projection: Float64

    @property
    def most_novel(self) -> NDArray[np.int64]:
        """Positions in ``window_rows``, the most novel first."""
        order: NDArray[np.int64] = np.argsort(-self.novelty_distances, kind="stable")
        return order


def compare(
    reference: Answers,
    window: Answers,
    labels: Sequence[str],
    *,
    level: float,
    permutations: int,
    neighbours: int,
    seed: int,
) -> Comparison:
    """Compares a window with the reference.

    Pictures and confidence are permuted within the predicted classes only, so that another mix of classes is told by
    the test of the predictions and by no other.

    Args:
        reference: Held-out images.
        window: What production saw.
        labels: Of the C classes.
        level: Chance of a false alarm, of all tests together.
        permutations: Of each test.
        neighbours: Nearest of the reference that novelty is measured by.
        seed: Of the permutations.
    """
    with threadpool_limits(1):  # the same numbers however many cores there are; and it takes less than a second
        rows = _distinct(*_scaled(reference.embeddings, window.embeddings))
        window = window.of(rows)
        scaled, of_window = _scaled(reference.embeddings, window.embeddings)
        pooled = np.concatenate([scaled, of_window])
        predicted = np.concatenate([reference.predicted, window.predicted])
        confidence = np.concatenate([reference.confidence, window.confidence])
        sizes = (len(reference), len(window))
        free = permuted_windows(*sizes, permutations=permutations, seed=seed)
        within = permuted_windows(*sizes, permutations=permutations, seed=seed + 1, strata=predicted)
        tests = {
            "pictures": classifier_test(pooled, within, seed=seed),
            "predictions": mix_test(predicted, free),
            "confidence": distance_test(confidence, within),
        }
        adjusted = holm({name: test.p_value for name, test in tests.items()})
        distances, novelty = _novelty(scaled, of_window, neighbours)
        return Comparison(
            is_drift=min(adjusted.values()) <= level,
            tests={
                name: DriftTest(test.statistic, test.expected, test.p_value, adjusted[name])
                for name, test in tests.items()
            },
            classes=_class_shifts(predicted, free, labels, level),
            reference_confidence=float(reference.confidence.mean()),
            window_confidence=float(window.confidence.mean()),
            window_rows=rows,
            novelty=novelty,
            novelty_distances=distances,
            projection=_projection(pooled, sizes[0]),
        )


def _scaled(reference: Float32, window: Float32) -> tuple[Float64, Float64]:
    """Each dimension to mean 0 and deviation 1 over both: the same whoever is whose."""
    pooled = np.concatenate([reference, window]).astype(np.float64)
    deviation = pooled.std(axis=0)
    pooled = (pooled - pooled.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    return pooled[: len(reference)], pooled[len(reference) :]


def _distinct(reference: Float64, window: Float64) -> NDArray[np.int64]:
    """Rows of the window that repeat no earlier one: a picture sent a thousand times is no shift of a thousand.

    How far apart pictures are is asked of the reference: most of a window may be one picture, such as a probe's.
    """
    limit = SAME**2 * np.median(squared_distances(reference, reference))
    repeats = np.tril(squared_distances(window, window) <= limit, -1).any(axis=1)
    return np.flatnonzero(~repeats)


def _class_shifts(
    predicted: NDArray[np.int64], windows: NDArray[np.bool_], labels: Sequence[str], level: float
) -> list[ClassShift]:
    is_window = windows[:, 0]
    tests: list[TwoSampleTest] = group_tests(predicted, windows)
    adjusted = holm({labels[index]: test.p_value for index, test in enumerate(tests)})
    shares = [
        np.bincount(predicted[rows], minlength=len(tests)) / max(1, rows.sum()) for rows in (~is_window, is_window)
    ]
    shifts = [
        ClassShift(
            label=labels[index],
            reference_share=float(shares[0][index]),
            window_share=float(shares[1][index]),
            adjusted_p_value=adjusted[labels[index]],
            is_shifted=adjusted[labels[index]] <= level,
        )
        for index in range(len(tests))
    ]
    return sorted(shifts, key=lambda shift: -abs(shift.window_share - shift.reference_share))


def _novelty(reference: Float64, window: Float64, neighbours: int) -> tuple[Float64, Float64]:
    """Mean distance to the nearest of the reference, and the share of the reference that is closer to the rest of it.

    References:
        Sun et al. 2022, arXiv:2204.06507 (deep nearest neighbours for what is out of distribution).
    """
    count = min(neighbours, len(reference) - 1)
    among = squared_distances(reference, reference)
    np.fill_diagonal(among, np.inf)
    usual = _mean_of_nearest(among, count)
    distances = _mean_of_nearest(squared_distances(window, reference), count)
    return distances, np.searchsorted(np.sort(usual), distances, side="left") / len(usual)


def _mean_of_nearest(squared: Float64, count: int) -> Float64:
    nearest: Float64 = np.sqrt(np.partition(squared, count - 1, axis=1)[:, :count]).mean(axis=1)
    return nearest


def _projection(pooled: Float64, num_reference: int) -> Float64:
    """The reference's two main components, each with its longer tail up: the same picture each time."""
    _, _, directions = np.linalg.svd(pooled[:num_reference] - pooled[:num_reference].mean(axis=0), full_matrices=False)
    points: Float64 = (pooled - pooled[:num_reference].mean(axis=0)) @ directions[:2].T
    signs = np.sign((points[:num_reference] ** 3).sum(axis=0))
    return points * np.where(signs == 0, 1.0, signs)
