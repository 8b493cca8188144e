"""Two models on the same images: paired difference, its lower bound, McNemar's test, and how many images they take.

Pairing is what makes a few hundred images enough: images that both answer alike carry no noise. Called by the gate.

Sources: Connor 1987 (sample size of paired proportions); Fagerland, Lydersen and Laake 2013 (mid-p McNemar); Hanley and
Lippman-Hand 1983 (rule of three).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

POWER = 0.8
SMALLEST_PROBABILITY = 1e-7  # what a likelihood counts at least: one sure miss must not outweigh a test set
BOOTSTRAP_VALUES = 4_000_000  # drawn at a time: bounds memory
UNEVEN_RATIO = 3.0  # of the largest class to the smallest, above which classes are judged alike and not images

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Texts = NDArray[np.str_]


@dataclass(frozen=True)
class Paired:
    """Two models compared on the same images.

    Args:
        num_images: N.
        wins: Images that only the challenger answers right.
        losses: Images that only the champion answers right.
        difference: Challenger minus champion in the metric.
        lower_bound: One-sided, of the difference.
    """

    num_images: int
    wins: int
    losses: int
    difference: float
    lower_bound: float

    @property
    def discordance(self) -> float:
        """Share of images on which exactly one model is right."""
        return (self.wins + self.losses) / self.num_images


def is_uneven(labels: Sequence[str] | Texts) -> bool:
    """Whether the largest class has over 3 times the images of the smallest; (N,) labels, of none it is not."""
    counts = np.unique(np.asarray(labels, dtype=np.str_), return_counts=True)[1]
    return bool(len(counts) and counts.max() > UNEVEN_RATIO * counts.min())


def compare(
    right: Bools, right_before: Bools, labels: Texts, *, balanced: bool, confidence: float, draws: int, seed: int
) -> Paired:
    """Compares two models on N images that both answered.

    Args:
        right: Whether the challenger is right, (N,).
        right_before: Whether the champion is, (N,).
        labels: True labels, (N,): the strata of the bootstrap.
        balanced: Weigh classes alike instead of images.
        confidence: One-sided.
        draws: Of the bootstrap.
        seed: Of the bootstrap. The draws depend on it and the class sizes alone, so that one more image answered
            right never lowers the bound.
    """
    gains = right.astype(np.int8) - right_before.astype(np.int8)  # (N,) of -1, 0, 1
    difference, drawn = _weighed_means(gains, labels, balanced=balanced, draws=draws, seed=seed)
    return Paired(
        num_images=len(gains),
        wins=int((gains > 0).sum()),
        losses=int((gains < 0).sum()),
        difference=_settled(difference),
        lower_bound=_settled(float(np.quantile(drawn, 1 - confidence))),
    )


def difference_interval(
    right: Bools, right_before: Bools, labels: Texts, *, balanced: bool, confidence: float, draws: int, seed: int
) -> tuple[float, float, float]:
    """The paired difference in accuracy of two models on the same N images, and its two-sided interval (bootstrap).

    Args:
        right: Whether the one is right, (N,).
        right_before: Whether the other is, (N,).
        labels: True labels, (N,).
        balanced: Weigh classes alike instead of images; they are then the strata of the bootstrap.
        confidence: Two-sided.
        draws: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        Difference, lower and upper end.
    """
    gains = right.astype(np.int8) - right_before.astype(np.int8)  # (N,) of -1, 0, 1
    strata = labels if balanced else np.zeros_like(labels)
    difference, drawn = _weighed_means(gains, strata, balanced=balanced, draws=draws, seed=seed)
    low, high = np.quantile(drawn, ((1 - confidence) / 2, (1 + confidence) / 2))
    return _settled(difference), _settled(float(low)), _settled(float(high))


def mcnemar_midp(wins: int, losses: int) -> float:
    """One-sided mid-p of McNemar's test that the challenger is no better; small where wins outnumber losses.

    ``P(X > wins) + P(X = wins) / 2`` for ``X ~ Binomial(wins + losses, 1/2)``. Swapping the models gives one minus it.
    """
    if wins < losses:
        return 1 - mcnemar_midp(losses, wins)  # the shorter tail is the exact one
    num = wins + losses
    log_all = math.lgamma(num + 1) - num * math.log(2)
    terms = [math.exp(log_all - math.lgamma(k + 1) - math.lgamma(num - k + 1)) for k in range(wins, num + 1)]
    return math.fsum(terms) - terms[0] / 2


def images_to_show_gain(gain: float, discordance: float, *, confidence: float, power: float = POWER) -> float:
    """Test images needed to show a true gain in accuracy (Connor 1987).

    Args:
        gain: True difference of the paired models, in (0, 1].
        discordance: Share of images on which exactly one is right; below the gain no number is enough (infinity).
        confidence: One-sided.
        power: Chance to show it.
    """
    if discordance < gain:
        return math.inf
    z_alpha, z_beta = NormalDist().inv_cdf(confidence), NormalDist().inv_cdf(power)
    return math.ceil(((z_alpha * math.sqrt(discordance) + z_beta * math.sqrt(discordance - gain**2)) / gain) ** 2)


def images_to_exclude_loss(margin: float, discordance: float, *, confidence: float, power: float = POWER) -> float:
    """Test images needed to exclude a loss of ``margin`` where the models are truly equal (Connor 1987).

    At least as many as the rule of three asks for: so many that a loss of ``margin`` would have shown at least once.
    """
    if margin <= 0:
        return math.inf
    z = NormalDist().inv_cdf(confidence) + NormalDist().inv_cdf(power)
    return max(math.ceil(z**2 * discordance / margin**2), images_by_rule_of_three(margin, confidence))


def images_by_rule_of_three(margin: float, confidence: float) -> int:
    """Test images of which, were the true loss ``margin``, one would be lost with ``confidence``."""
    return math.ceil(math.log(1 - confidence) / math.log1p(-margin))


def _weighed_means(
    gains: NDArray[np.int8], labels: Texts, *, balanced: bool, draws: int, seed: int
) -> tuple[float, Floats]:
    """The mean of gains (N,), by class or by image, and of ``draws`` samples with replacement within each class."""
    mean, drawn = 0.0, np.zeros(draws)
    generator = np.random.default_rng(seed)
    classes = np.unique(labels)
    for label in classes:
        stratum = gains[labels == label]
        weight = 1 / len(classes) if balanced else len(stratum) / len(gains)
        mean += weight * float(stratum.mean())
        drawn += weight * resampled_means(stratum, draws, generator)
    return mean, drawn


def resampled_means(stratum: NDArray[np.int8], draws: int, generator: np.random.Generator) -> Floats:
    """Means of ``draws`` samples with replacement, (draws,); a bounded number of values at a time."""
    at_a_time = max(1, BOOTSTRAP_VALUES // len(stratum))
    means = [
        stratum[generator.integers(0, len(stratum), (min(at_a_time, draws - start), len(stratum)), dtype=np.int32)]
        .sum(axis=1, dtype=np.int64)
        .astype(np.float64)
        for start in range(0, draws, at_a_time)
    ]
    return np.concatenate(means) / len(stratum)


def _settled(value: float) -> float:
    """Without the last digits, in which only the order of an addition shows: 0 is 0."""
    return round(value, 12) + 0.0
