"""Which labels are probably wrong: confident learning on out-of-fold probabilities (Northcutt et al. 2021).

An image is suspect where some other class is more probable than that class usually is for images that carry its label.
Called by tasks.suspects.

References:
    Northcutt, Jiang, Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset Labels", arXiv:1911.00068.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Ranking:
    """All images, those whose label is most probably wrong first.

    Args:
        order: Rows of the input, (N,); the suspects come first.
        num_suspects: How many of them are suspect.
        suggested: The most probable other class of each row of the input, (N,); for a suspect, of those that are
            confident.
    """

    order: NDArray[np.intp]
    num_suspects: int
    suggested: NDArray[np.intp]


def rank_labels(probabilities: NDArray[np.floating], targets: NDArray[np.intp]) -> Ranking:
    """Ranks labels by how little the images' own features support them.

    Suspects are the off-diagonal of the confident joint; they, and after them all others, are sorted by the margin of
    the given label over the suggested one.

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
    found = confident.argmax(axis=1)
    suspect = np.isfinite(confident.max(axis=1)) & (found != targets)
    suggested = np.where(suspect, found, others.argmax(axis=1))
    margin = given - probabilities[rows, suggested]
    order = np.lexsort((margin, ~suspect))
    return Ranking(order, int(suspect.sum()), suggested)
