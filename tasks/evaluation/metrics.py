"""How good answers are: accuracy with its interval, per class, likelihood, calibration. Plain arrays in, numbers out.

True labels are indices into the columns of the probabilities. Called by tasks.evaluate.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation.paired import SMALLEST_PROBABILITY

Indices = NDArray[np.int64]
Probabilities = NDArray[np.float32]

DIGITS = 6  # of a reported number


@dataclass(frozen=True)
class Accuracy:
    """Share of images answered right, with its two-sided Wilson interval; all in 0..1."""

    accuracy: float
    accuracy_low: float
    accuracy_high: float


@dataclass(frozen=True)
class ClassScore:
    """How one class fares. A class that was never predicted has precision 0.

    Args:
        num_test: Test images of the class.
        precision: Share of images called so that are so.
        recall: Share of its images that are found.
        f1: Harmonic mean of the two.
    """

    num_test: int
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class ReliabilityBin:
    """Answers of like confidence.

    Args:
        confidence: Mean probability of the predicted class.
        accuracy: Share of them that is right.
        count: How many.
    """

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class MacroIntervals:
    """Two-sided bootstrap intervals of the means over the classes, in 0..1."""

    balanced_accuracy_low: float
    balanced_accuracy_high: float
    macro_f1_low: float
    macro_f1_high: float


def accuracy_of(right: NDArray[np.bool_], confidence: float) -> Accuracy:
    """Accuracy of N answers, of which each is right or not, and its interval."""
    num_right, num_images = int(right.sum()), len(right)
    low, high = wilson_interval(num_right, num_images, confidence)
    return Accuracy(*(rounded(value) for value in (num_right / num_images, low, high)))


def wilson_interval(successes: int, trials: int, confidence: float) -> tuple[float, float]:
    """Two-sided interval of a proportion (Wilson 1927).

    Args:
        successes: Of the trials.
        trials: At least 1.
        confidence: In (0, 1), such as 0.95.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / trials
    centre = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def class_scores(predicted: Indices, truth: Indices, num_classes: int) -> list[ClassScore]:
    """Precision, recall and F1 of each class."""
    num_test = np.bincount(truth, minlength=num_classes)
    num_predicted = np.bincount(predicted, minlength=num_classes)
    num_right = np.bincount(truth[predicted == truth], minlength=num_classes)
    precision = num_right / np.maximum(num_predicted, 1)
    recall = num_right / np.maximum(num_test, 1)
    f1 = 2 * num_right / np.maximum(num_test + num_predicted, 1)
    columns = zip(num_test, precision, recall, f1, strict=True)
    return [ClassScore(int(num), *(rounded(float(value)) for value in values)) for num, *values in columns]


def balanced_accuracy(scores: list[ClassScore]) -> float:
    """Mean recall of the classes that have test images."""
    return rounded(float(np.mean([score.recall for score in scores if score.num_test])))


def macro_f1(scores: list[ClassScore]) -> float:
    """Mean F1 of the classes that have test images."""
    return rounded(float(np.mean([score.f1 for score in scores if score.num_test])))


def macro_intervals(
    predicted: Indices, truth: Indices, num_classes: int, *, confidence: float, draws: int, seed: int
) -> MacroIntervals:
    """Intervals of balanced accuracy and macro F1: a percentile bootstrap within each class.

    Where no image of any class was answered wrong nothing varies and the interval is a point; the accuracy's own
    (Wilson) still tells how much so many images can say.

    Args:
        predicted: Columns, (N,).
        truth: Columns, (N,).
        num_classes: C.
        confidence: In (0, 1).
        draws: Of the bootstrap.
        seed: Of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    num_test = np.bincount(truth, minlength=num_classes)
    num_right = np.zeros((draws, num_classes), dtype=np.int64)
    num_predicted = np.zeros((draws, num_classes), dtype=np.int64)
    for index in np.flatnonzero(num_test):
        said, counts = np.unique(predicted[truth == index], return_counts=True)
        drawn = generator.multinomial(num_test[index], counts / num_test[index], size=draws)  # (draws, said)
        num_predicted[:, said] += drawn
        num_right[:, index] = drawn[:, said == index].sum(axis=1)
    present = num_test > 0
    recall = (num_right[:, present] / num_test[present]).mean(axis=1)
    f1 = (2 * num_right / np.maximum(num_test + num_predicted, 1))[:, present].mean(axis=1)
    tail = (1 - confidence) / 2
    bounds = [np.quantile(each, side) for each in (recall, f1) for side in (tail, 1 - tail)]
    return MacroIntervals(*(rounded(float(bound)) for bound in bounds))


def negative_log_likelihood(probabilities: Probabilities, truth: Indices) -> float:
    """Mean over the images, in nats; a probability counts as at least 1e-7."""
    likelihoods = probabilities[np.arange(len(truth)), truth].astype(np.float64)
    return rounded(float(-np.log(np.maximum(likelihoods, SMALLEST_PROBABILITY)).mean()))


def reliability(probabilities: Probabilities, truth: Indices, num_bins: int) -> list[ReliabilityBin]:
    """Answers by the confidence of the predicted class, in bins of equal width; empty bins are left out."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == truth
    bins = np.minimum((confidence * num_bins).astype(np.int64), num_bins - 1)
    return [
        ReliabilityBin(
            rounded(float(confidence[bins == index].mean())),
            rounded(float(right[bins == index].mean())),
            int((bins == index).sum()),
        )
        for index in np.unique(bins)
    ]


def expected_calibration_error(bins: list[ReliabilityBin]) -> float:
    """Mean distance between confidence and accuracy, weighted by the bins' counts (Guo et al. 2017)."""
    total = sum(each.count for each in bins)
    return rounded(sum(each.count * abs(each.confidence - each.accuracy) for each in bins) / total)


def rounded(value: float) -> float:
    """To the digits that are reported."""
    return round(value, DIGITS)
