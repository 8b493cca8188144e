"""The linear probe: logistic regression on frozen features, its strength chosen by grouped cross-validation.

A path of C from strong to weak regularisation is fitted in each fold, each fit starting from its neighbour; C is the
strongest whose out-of-fold NLL is within one standard error of the lowest (Breiman et al. 1984); the head is refitted
on all images at that C, its temperature is fitted to the out-of-fold logits, and both are folded in with the scaling.
The path ends early where the NLL has clearly risen again.

Fits use all views of an image and are judged on its centre view, which is what will be served. Centring, the scalar
scale and the basis come from all training rows: the bias is free and the basis does not move the optimum, so no fold
learns anything from them. One BLAS thread a fit, folds side by side: the result does not hang on the number of cores.
Called by tasks.train_head and tasks.suspects. No torch.
"""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from deploy.machine import available_cores
from tasks.errors import TrainingError
from tasks.models.head import Head
from tasks.training.folds import NEVER_HELD_OUT, assign_folds
from tasks.training.logistic import Basis, Fit, fit_logistic, principal_basis
from tasks.training.logit_adjustment import class_shift
from tasks.training.temperature import fit_temperature, row_nll

PATH_TOLERANCE = 1e-4  # of a fit that only ranks C
FINAL_TOLERANCE = 1e-5
HOLDOUT_PARTS = 10  # a hold-out is one part of these
EXTENSION_DECADES = 2.0
SEGMENT = 4  # points of the path between two looks at how it goes
HOPELESS = 4.0  # standard errors above the lowest NLL at which weaker penalties, the slowest to fit, are left out
REFIT_STEP = 1.0  # decades of C between the way points of the last fit
FALLBACK_LOG10_C = -1.0  # where no class has two groups and nothing can be held out

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PathPoint:
    """One C of the path, on held-out images in their centre view.

    Args:
        log10_c: Inverse regularisation strength.
        nll: Mean out-of-fold NLL, nats.
        standard_error: Of its excess over the lowest one, groups counting as units.
        accuracy: Out of fold.
    """

    log10_c: float
    nll: float
    standard_error: float
    accuracy: float


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe and how it was chosen; the out-of-fold numbers are None where nothing could be held out.

    Those are of the fit itself, but for ``adjusted_balanced_accuracy``, which is with the logit adjustment. Of the held
    out images it alone has ``num_won`` right, and always naming the largest class alone ``num_lost``.
    """

    head: Head
    log10_c: float
    path: tuple[PathPoint, ...]
    num_parts: int
    num_held_out: int
    num_won: int
    num_lost: int
    nll: float | None
    accuracy: float | None
    temperature: float
    balanced_accuracy: float | None
    adjusted_balanced_accuracy: float | None
    num_iterations: int
    converged: bool


@dataclass(frozen=True, eq=False)
class Problem:
    """Rotated features of V views of N images, (V, N, r), their targets (N,), groups (N,), and fold (N,)."""

    basis: Basis
    views: NDArray[np.float32]
    targets: NDArray[np.intp]
    groups: NDArray[np.intp]
    folds: NDArray[np.intp]
    num_classes: int
    max_iterations: int

    def fit(self, rows: NDArray[np.bool_], log10_c: float, start: Fit | None, tolerance: float) -> Fit:
        """Fits all views of the chosen images."""
        num_views = len(self.views)
        return fit_logistic(
            self.views[:, rows].reshape(-1, self.views.shape[2]),
            np.tile(self.targets[rows], num_views),
            self.basis.variances,
            num_classes=self.num_classes,
            c=10.0**log10_c,
            row_weight=1 / num_views,
            max_iterations=self.max_iterations,
            tolerance=tolerance,
            start=start,
        )

    @property
    def judged(self) -> NDArray[np.bool_]:
        """Images that are held out once by a fit that knows their class, (N,)."""
        judged: NDArray[np.bool_] = self.folds != NEVER_HELD_OUT
        for fold in np.unique(self.folds[judged]):
            known = np.unique(self.targets[self.folds != fold])
            judged &= (self.folds != fold) | np.isin(self.targets, known)
        return judged


def fit_probe(
    features: NDArray[np.float32],
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    classes: Sequence[str],
    seed: int,
    min_log10_c: float,
    max_log10_c: float,
    num_c: int,
    folds: int,
    max_iterations: int,
    holdout_above: int,
    adjustment: float,
) -> Probe:
    """Chooses C and fits the head.

    Args:
        features: Of V views of N training images, (V, N, D); the first view is the centre.
        labels: Class of each image, (N,).
        groups: Near-duplicate group of each image, (N,).
        classes: The distinct labels, in the order of the head's rows.
        seed: Of the folds.
        min_log10_c: Where the path starts (strong regularisation).
        max_log10_c: Where it ends.
        num_c: Its length. Where the choice falls on an end, the path is extended there once, by two decades.
        folds: Of the cross-validation.
        max_iterations: Of one fit.
        holdout_above: Number of images above which one tenth is held out once instead.
        adjustment: Share of the classes' log frequencies that is taken out of the scores, 0 for none; it goes into the
            bias after the temperature, and moves nothing that is chosen here.

    Raises:
        TrainingError: If there are fewer than two classes, or features that are not finite.
    """
    check_examples(features, labels)
    with threadpool_limits(1, user_api="blas"):
        problem = _problem(features, labels, groups, classes, folds, holdout_above, seed, max_iterations)
        log10_cs = np.linspace(min_log10_c, max_log10_c, num_c)
        logits_of = _search(problem, log10_cs)
        path = _path(problem, logits_of)
        log10_c = choose(path) if path else FALLBACK_LOG10_C
        fit = _refit(problem, log10_c, strongest=min(min_log10_c, log10_c))
    judged = problem.judged
    targets = problem.targets[judged]
    temperature = fit_temperature(logits_of[log10_c][judged], targets) if path else 1.0
    weight, bias = problem.basis.unfold(fit.weight / temperature, fit.bias / temperature)
    counts = np.bincount(problem.targets, minlength=len(classes))
    shift = class_shift(counts.tolist(), adjustment)
    held_out = logits_of[log10_c][judged] / temperature if path else None
    right = held_out.argmax(axis=1) == targets if held_out is not None else np.zeros(0, np.bool_)
    largest = targets == counts.argmax()
    point = next((point for point in path if point.log10_c == log10_c), None)
    return Probe(
        head=Head(tuple(classes), weight.astype(np.float32), bias.astype(np.float32) + shift),
        log10_c=log10_c,
        path=path,
        num_parts=len(np.unique(problem.folds[judged])),
        num_held_out=int(judged.sum()),
        num_won=int((right & ~largest).sum()),
        num_lost=int((largest & ~right).sum()),
        nll=None if point is None else point.nll,
        accuracy=None if point is None else point.accuracy,
        temperature=temperature,
        balanced_accuracy=None if held_out is None else mean_recall(held_out, targets),
        adjusted_balanced_accuracy=None if held_out is None else mean_recall(held_out + shift, targets),
        num_iterations=fit.num_iterations,
        converged=fit.converged,
    )


def out_of_fold_probabilities(
    features: NDArray[np.float32],
    labels: Sequence[str],
    groups: Sequence[str],
    *,
    seed: int,
    log10_c: float,
    folds: int,
    max_iterations: int,
) -> tuple[NDArray[np.bool_], tuple[str, ...], NDArray[np.float64]]:
    """What probes that have not seen an image, nor its near-duplicates, make of it.

    Args:
        features: Of N images in one view, (N, D).
        labels: Class of each image, (N,).
        groups: Near-duplicate group of each image, (N,).
        seed: Of the folds.
        log10_c: Inverse regularisation strength.
        folds: Number of probes.
        max_iterations: Of one fit.

    Returns:
        Which images could be judged (N,), the class names (C), and calibrated probabilities (M, C) of the judged ones.

    Raises:
        TrainingError: If there are fewer than two classes, or features that are not finite.
    """
    check_examples(features[None], labels)
    names = tuple(sorted(set(labels)))
    with threadpool_limits(1, user_api="blas"):
        problem = _problem(features[None], labels, groups, names, folds, len(labels), seed, max_iterations)
        judged = problem.judged
        if not judged.any():
            return judged, names, np.zeros((0, len(names)))
        starts: dict[int, Fit | None] = {int(fold): None for fold in np.unique(problem.folds) if fold != NEVER_HELD_OUT}
        _held_out_logits(problem, np.array([log10_c - REFIT_STEP]), starts)  # on the way
        logits = _held_out_logits(problem, np.array([log10_c]), starts)[log10_c][judged]
    temperature = fit_temperature(logits, problem.targets[judged])
    return judged, names, softmax(logits.astype(np.float64) / temperature, axis=1)


def choose(path: Sequence[PathPoint]) -> float:
    """The strongest regularisation whose NLL exceeds the lowest by at most one standard error."""
    best = min(point.nll for point in path)
    return min(point.log10_c for point in path if point.nll - best <= point.standard_error)


def mean_recall(logits: NDArray[np.float32], targets: NDArray[np.intp]) -> float:
    """Balanced accuracy of logits (N, C) on targets (N,): the mean over their classes of the share found."""
    right = logits.argmax(axis=1) == targets
    return float(np.mean([right[targets == target].mean() for target in np.unique(targets)]))


def check_examples(features: NDArray[np.float32], labels: Sequence[str]) -> None:
    """Whether a classifier can be made of features (views, N, D) and their N labels.

    Raises:
        TrainingError: If there are fewer than two classes, or features that are not finite.
    """
    if len(set(labels)) < 2:
        raise TrainingError(f"A classifier needs two classes; all {len(labels)} training images are {labels[0]!r}.")
    if bad := int((~np.isfinite(features).all(axis=(0, 2))).sum()):
        raise TrainingError(f"Features of {bad} images are not finite. Delete data/features and run again.")


def _problem(
    features: NDArray[np.float32],
    labels: Sequence[str],
    groups: Sequence[str],
    classes: Sequence[str],
    folds: int,
    holdout_above: int,
    seed: int,
    max_iterations: int,
) -> Problem:
    """Rotates the features and deals the folds."""
    num_views, num_images, dim = features.shape
    targets = _numbered(labels, classes)
    holdout = num_images > holdout_above
    fold = assign_folds(targets.tolist(), groups, num_folds=HOLDOUT_PARTS if holdout else folds, seed=seed)
    if holdout:
        fold[fold != 0] = NEVER_HELD_OUT
    basis = principal_basis(features.reshape(-1, dim))
    return Problem(
        basis=basis,
        views=basis.rotate(features.reshape(-1, dim)).reshape(num_views, num_images, -1),
        targets=targets,
        groups=_numbered(groups, sorted(set(groups))),
        folds=fold,
        num_classes=int(targets.max()) + 1,
        max_iterations=max_iterations,
    )


def _numbered(names: Sequence[str], distinct: Sequence[str]) -> NDArray[np.intp]:
    """The place of each name among the distinct ones, (N,)."""
    place = {name: number for number, name in enumerate(distinct)}
    return np.array([place[name] for name in names], dtype=np.intp)


def _search(problem: Problem, log10_cs: NDArray[np.float64]) -> dict[float, NDArray[np.float32]]:
    """Held-out logits (N, C) of each C; stops where weaker penalties only overfit, extends once at a chosen end."""
    if not problem.judged.any():
        logger.warning("no class has two groups of images: C = 10^%g without cross-validation", FALLBACK_LOG10_C)
        return {}
    step = float(log10_cs[1] - log10_cs[0])
    extra = step * np.arange(1, 1 + max(1, round(EXTENSION_DECADES / step)))
    starts: dict[int, Fit | None] = {int(fold): None for fold in np.unique(problem.folds) if fold != NEVER_HELD_OUT}
    logits_of: dict[float, NDArray[np.float32]] = {}
    for segment in np.array_split(log10_cs, max(1, len(log10_cs) // SEGMENT)):
        logits_of |= _held_out_logits(problem, segment, starts)
        path = _path(problem, logits_of)
        chosen = choose(path)
        if path[-1].nll - min(point.nll for point in path) > HOPELESS * path[-1].standard_error:
            break
    if chosen == log10_cs[0]:
        logits_of |= _held_out_logits(problem, np.sort(log10_cs[0] - extra), dict.fromkeys(starts))
    elif chosen == log10_cs[-1]:
        logits_of |= _held_out_logits(problem, log10_cs[-1] + extra, starts)
    return logits_of


def _held_out_logits(
    problem: Problem, log10_cs: NDArray[np.float64], starts: dict[int, Fit | None]
) -> dict[float, NDArray[np.float32]]:
    """Logits (N, C) of each image by fits that have not seen its fold, for each C; rows never held out stay zero.

    Args:
        problem: What is fitted.
        log10_cs: From strong to weak.
        starts: Where the fit of each fold starts; replaced by where it ended.
    """
    logits_of = {
        float(log10_c): np.zeros((len(problem.targets), problem.num_classes), np.float32) for log10_c in log10_cs
    }

    def fit_path(fold: int) -> None:
        held_out = problem.folds == fold
        for log10_c, logits in logits_of.items():
            starts[fold] = fit = problem.fit(~held_out, log10_c, starts[fold], PATH_TOLERANCE)
            logits[held_out] = fit.logits(problem.views[0, held_out])

    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(fit_path, starts))
    return logits_of


def _refit(problem: Problem, log10_c: float, *, strongest: float) -> Fit:
    """Fits all images at the chosen C, by way of stronger penalties."""
    everyone = np.ones(len(problem.targets), dtype=bool)
    fit = None
    for waypoint in np.arange(strongest, log10_c, REFIT_STEP):
        fit = problem.fit(everyone, float(waypoint), fit, PATH_TOLERANCE)
    return problem.fit(everyone, log10_c, fit, FINAL_TOLERANCE)


def _path(problem: Problem, logits_of: dict[float, NDArray[np.float32]]) -> tuple[PathPoint, ...]:
    """What each C reached on the judged images, from strong to weak."""
    judged = problem.judged
    targets, groups = problem.targets[judged], problem.groups[judged]
    nll_of = {log10_c: row_nll(logits[judged], targets) for log10_c, logits in logits_of.items()}
    best = min(nll_of.values(), key=lambda nll: float(nll.mean()), default=None)
    return tuple(
        PathPoint(
            log10_c=log10_c,
            nll=float(nll_of[log10_c].mean()),
            standard_error=grouped_standard_error(nll_of[log10_c] - best, groups),
            accuracy=float((logits_of[log10_c][judged].argmax(axis=1) == targets).mean()),
        )
        for log10_c in sorted(nll_of)
        if best is not None
    )


def grouped_standard_error(values: NDArray[np.float64], groups: NDArray[np.intp]) -> float:
    """Standard error of the mean of values (N,) whose groups are the independent units (cluster-robust, CR0)."""
    sums = np.bincount(groups, values - values.mean())
    return float(np.sqrt((sums**2).sum()) / len(values))
