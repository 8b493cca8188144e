"""Which labels are probably wrong: confident learning on out-of-fold probabilities. Called by tasks.suspects.

How many are wrong is the off-diagonal of the confident joint: images for which another class is more probable than it
usually is for the images that carry it (Northcutt et al. 2021). Which ones, says the probability of the own label
alone (Kuan and Mueller 2022): on trashnet6_dev with 5 % of the labels flipped, .63 of as many first ones are flipped;
with the off-diagonal first .57, by the margin of the label over the runner-up .48.

References:
    Northcutt, Jiang, Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels", arXiv:1911.00068.
    Kuan, Mueller 2022, "Model-agnostic label quality scoring to detect real-world label errors", ICML DataPerf.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ranking:
    """All images, those whose label is most probably wrong first.

    Args:
        order: Rows of the input, (N,).
        num_suspects: How many of the first are probably wrong.
        suggested: The most probable other class of each row of the input, (N,).
    """

    order: NDArray[np.intp]
    num_suspects: int
    suggested: NDArray[np.intp]


def rank_labels(probabilities: NDArray[np.floating], targets: NDArray[np.intp]) -> Ranking:
    """Ranks labels by how little the images' own features support them.

    Args:
        probabilities: (N, C) by a model that has not seen the row; every class has at least one row.
        targets: The given label of each row, (N,).
    """
    rows = np.arange(len(targets))
    given = probabilities[rows, targets]
    usual = np.bincount(targets, given) / np.bincount(targets)  # (C,): how sure the model is of those that carry it
    others = probabilities.copy()
    others[rows, targets] = -np.inf
    confident = np.where(probabilities >= usual, probabilities, -np.inf)  # (N, C)
    off_diagonal = np.isfinite(confident.max(axis=1)) & (confident.argmax(axis=1) != targets)
    return Ranking(np.argsort(given, kind="stable"), int(off_diagonal.sum()), others.argmax(axis=1))
