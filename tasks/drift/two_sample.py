"""Are two samples from one distribution? Tests by permutation, which hold their level whatever the distribution is.

N rows are the reference's and the window's, one after the other. A permutation says anew which rows are the window's;
the share of permutations whose statistic is at least the real one is the p-value (Phipson and Smyth 2010, with the real
one counted in). All permutations are computed at once, as columns of a matrix. Called by tasks.drift.compare.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

FOLDS = 5
RIDGES = (
    0.001,
    0.1,
)  # times N, added to the kernel's diagonal of ones: a shift shows with the one, a spread with the other
COLUMNS_AT_A_TIME = 128  # of the permutations: bounds memory

Float = NDArray[np.float64]
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class TwoSampleTest:
    """What a test found.

    Args:
        statistic: Of the samples as they are.
        expected: Its median over the permutations: what it would be without a difference.
        p_value: Share of the permutations, the real one included, with at least this statistic.
    """

    statistic: float
    expected: float
    p_value: float


def permuted_windows(
    num_reference: int, num_window: int, *, permutations: int, seed: int, strata: NDArray[np.int64] | None = None
) -> Masks:
    """Which rows are the window's: (N, 1 + permutations), as they are in column 0.

    Args:
        num_reference: Rows of the reference; they come first.
        num_window: Rows of the window.
        permutations: How many.
        seed: Another one, other permutations.
        strata: A number a row, (N,): rows change places only with rows of the same number, so that another mix of
            strata is not by itself a difference. All rows are one stratum where None.
    """
    num_rows = num_reference + num_window
    masks = np.empty((num_rows, 1 + permutations), dtype=np.bool_)
    masks[:] = (np.arange(num_rows) >= num_reference)[:, None]
    generator = np.random.default_rng(seed)
    groups = np.zeros(num_rows, dtype=np.int64) if strata is None else strata
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        masks[rows, 1:] = generator.permuted(masks[rows, 1:], axis=0)
    return masks


def classifier_test(samples: Float, windows: Masks, *, seed: int) -> TwoSampleTest:
    """Can a classifier tell the window's rows from the reference's? The statistic is its area under the ROC curve.

    The classifier is a kernel ridge regression (Gaussian kernel, its width the median distance), cross-validated, the
    better of two regularisations in each permutation as in the samples as they are. Its predictions are linear in who
    is whose, so one matrix serves all permutations: a thousand of them cost a product of matrices, where other
    classifiers would be fitted a thousand times.

    Args:
        samples: Of shape (N, D), scaled by what does not depend on which rows are the window's.
        windows: From `permuted_windows`.
        seed: Of the folds.

    References:
        Lopez-Paz and Oquab 2017, arXiv:1610.06545 (classifier two-sample tests).
    """
    kernel = _gaussian_kernel(samples)
    smoothers = [_cross_validated_smoother(kernel, ridge=ridge, seed=seed) for ridge in RIDGES]
    share = windows[:, 0].mean()
    found = [
        np.max([_areas_under_curve(smoother @ (chosen - share), chosen) for smoother in smoothers], axis=0)
        for chosen in _in_columns(windows.astype(np.float64))
    ]
    return _tested(np.concatenate(found))


def mix_test(groups: NDArray[np.int64], windows: Masks) -> TwoSampleTest:
    """Does the window hold another mix of groups? The statistic is chi-square of the table of both.

    Args:
        groups: A number a row, (N,).
        windows: From `permuted_windows`, without strata.
    """
    counts = _counts(groups, windows)
    totals = np.bincount(groups)[:, None]
    share = windows[:, 0].mean()
    used = totals[:, 0] > 0
    off = (counts - totals * share)[used] ** 2
    return _tested((off / (totals * share)[used] + off / (totals * (1 - share))[used]).sum(axis=0))


def group_tests(groups: NDArray[np.int64], windows: Masks) -> list[TwoSampleTest]:
    """For each group: is its share of the window another one? The statistic is the absolute difference of shares."""
    counts = _counts(groups, windows)
    num_window = windows[:, 0].sum()
    totals = np.bincount(groups, minlength=len(counts))[:, None]
    differences = np.abs(counts / num_window - (totals - counts) / (len(groups) - num_window))
    return [_tested(row) for row in differences]


def distance_test(values: Float, windows: Masks) -> TwoSampleTest:
    """Is one number distributed otherwise? The statistic is the largest distance of the distribution functions.

    Args:
        values: One a row, (N,).
        windows: From `permuted_windows`.
    """
    order = np.argsort(values, kind="stable")
    last = np.append(np.diff(values[order]) > 0, True)  # of equal values, so that ties stay together
    num_window = int(windows[:, 0].sum())
    found = []
    for chosen in _in_columns(windows[order].astype(np.float64)):
        of_window = np.cumsum(chosen, axis=0)[last] / num_window
        of_reference = np.cumsum(1 - chosen, axis=0)[last] / (len(values) - num_window)
        found.append(np.abs(of_window - of_reference).max(axis=0))
    return _tested(np.concatenate(found))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted so that the chance of any false one among them stays below the level (Holm 1979)."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for index, (name, p_value) in enumerate(sorted(p_values.items(), key=lambda pair: pair[1])):
        highest = max(highest, min(1.0, p_value * (len(p_values) - index)))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def squared_distances(ones: Float, others: Float) -> Float:
    """Squared Euclidean distances of rows, (N, M)."""
    squares: Float = (ones**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)[None, :] - 2 * ones @ others.T
    return np.maximum(squares, 0.0, out=squares)


def _gaussian_kernel(samples: Float) -> Float:
    distances = squared_distances(samples, samples)
    width = np.median(distances[np.triu_indices(len(samples), 1)])
    kernel: Float = np.exp(-distances / (width or 1.0))
    return kernel


def _cross_validated_smoother(kernel: Float, *, ridge: float, seed: int) -> Float:
    """The matrix (N, N) that makes targets into predictions, each from a fit that has not seen its row."""
    num_rows = len(kernel)
    fold = np.random.default_rng(seed).permutation(num_rows) % FOLDS
    smoother = np.zeros_like(kernel)
    for number in range(FOLDS):
        out, fitted = np.flatnonzero(fold == number), np.flatnonzero(fold != number)
        ridged = kernel[np.ix_(fitted, fitted)] + ridge * num_rows * np.eye(len(fitted))
        smoother[np.ix_(out, fitted)] = np.linalg.solve(ridged, kernel[np.ix_(fitted, out)]).T
    return smoother


def _areas_under_curve(scores: Float, chosen: Float) -> Float:
    """Area under the ROC curve of each column of scores, (P,)."""
    num_window = chosen[:, 0].sum()
    # Ties share their rank: in the order of the rows, the reference would come first.
    ranks = (rankdata(scores, axis=0) * chosen).sum(axis=0)
    areas: Float = (ranks - num_window * (num_window + 1) / 2) / (num_window * (len(scores) - num_window))
    return areas


def _counts(groups: NDArray[np.int64], windows: Masks) -> Float:
    """How many of the window's rows are of each group, (G, P)."""
    one_hot = groups[None, :] == np.arange(groups.max() + 1)[:, None]
    counts: Float = one_hot.astype(np.float64) @ windows.astype(np.float64)
    return counts


def _in_columns(values: Float) -> Iterable[Float]:
    return (values[:, start : start + COLUMNS_AT_A_TIME] for start in range(0, values.shape[1], COLUMNS_AT_A_TIME))


def _tested(statistics: Float) -> TwoSampleTest:
    """The test whose statistics these are, the real one first."""
    # Equal statistics may differ in their last digits by the order in which they were summed.
    at_least = statistics >= statistics[0] - 1e-9 * max(1.0, abs(float(statistics[0])))
    return TwoSampleTest(float(statistics[0]), float(np.median(statistics[1:])), float(at_least.mean()))
