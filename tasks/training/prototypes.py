"""Class prototypes: nearest class mean as a linear head. No gradient step; the baseline that a probe must beat.

Logits are ``-|x - mean_c|^2 / (2 s)`` up to a constant of the row, so weight = mean_c / s and bias =
-|mean_c|^2 / (2 s) (Snell et al. 2017, arXiv:1703.05175). The scale s only sets confidence and is chosen on
leave-one-out distances: without its own image x a class mean is (n mean - x) / (n - 1), n / (n - 1) times as far.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasks.models.head import Head
from tasks.training.temperature import fit_temperature


def class_prototypes(features: NDArray[np.float32], labels: Sequence[str], *, calibrated: bool = True) -> Head:
    """The nearest-class-mean head of features (N, D), one row a sorted label.

    Args:
        features: Of training images, (N, D).
        labels: Class of each row, (N,).
        calibrated: Choose s; without, the decisions are the same and confidence means nothing.
    """
    names = tuple(sorted(set(labels)))
    index = {name: number for number, name in enumerate(names)}
    targets = np.array([index[label] for label in labels], dtype=np.intp)
    counts = np.bincount(targets)
    centre = features.mean(axis=0, dtype=np.float64)
    centred = features - centre
    means = np.stack([centred[targets == number].mean(axis=0) for number in range(len(names))])  # (C, D)
    scale = _scale(centred, targets, counts, means) if calibrated else 1.0
    weight = means / scale
    bias = -0.5 * (means**2).sum(axis=1) / scale - weight @ centre
    return Head(names, weight.astype(np.float32), (bias - bias.mean()).astype(np.float32))


def _scale(
    centred: NDArray[np.float64], targets: NDArray[np.intp], counts: NDArray[np.intp], means: NDArray[np.float64]
) -> float:
    """s: mean squared leave-one-out distance to the own class, times the temperature that fits it best."""
    judged = counts[targets] > 1
    x, y = centred[judged], targets[judged]
    if not len(y):
        return 1.0
    distances = (x**2).sum(axis=1)[:, None] - 2 * x @ means.T + (means**2).sum(axis=1)  # (N, C), squared
    rows, dim = np.arange(len(y)), centred.shape[1]
    distances[rows, y] *= (counts[y] / (counts[y] - 1)) ** 2
    unit = float(distances[rows, y].mean())
    if not unit > 0:
        return 1.0
    # Squared distances add up over D dimensions: s lies between one dimension's share of them and all of it.
    per_dim = unit / dim
    temperature = fit_temperature(-0.5 * distances / per_dim, y, min_rows=1, max_log=math.log(dim) + 3.0)
    return float(per_dim * temperature)
