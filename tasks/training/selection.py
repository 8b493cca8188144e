"""Is a stage of fine-tuning worth keeping? Validation decides, by likelihood, beyond noise.

Called by ``tasks.training.staged`` and ``tasks.training.adversarial``. No torch.

The rule: of a stage's end and of what lies between its start and end (WiSE), each candidate is judged on the validation
images by its negative log-likelihood at its own best temperature, and so is the start: the temperature is fitted there
anyway before a model ships, and fine-tuning from a probe mostly spoils confidence. The candidate with the lowest mean
is kept if the paired difference to the start, image by image, has a mean greater than its standard error; otherwise
the stage is dropped.

An adversarial stage is judged by another rule, as likelihood is not what it is for: `RobustVerdict`.

References:
    Wortsman et al. 2022, arXiv:2109.01903 (WiSE-FT, interpolation of weights).
    Guo et al. 2017, arXiv:1706.04599 (temperature scaling).
    Tomihari and Sato 2024, arXiv:2405.16747 (the head's norm grows in LP-FT; a temperature mends it).
"""

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation.paired import mcnemar_midp
from tasks.training.temperature import fit_temperature, row_nll

ALPHAS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the way from a stage's start to its end that are tried."""
MIN_IMAGES_TO_PICK_EPOCHS = 300
"""Below this many validation images the last average of the weights is taken: the best of many epochs would be luck."""
MIN_PROBABILITY = 1e-12
SIGNIFICANCE = 0.05
"""Chance at which luck alone may pass for robustness."""

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Judgement:
    """A candidate on the validation images.

    Attributes:
        temperature: Its best temperature.
        nll: (N,) float64 nats a picture, at that temperature.
        accuracy: Share of the images that it labels rightly.
    """

    temperature: float
    nll: NDArray[np.float64]
    accuracy: float

    @property
    def mean_nll(self) -> float:
        """Nats a picture."""
        return float(self.nll.mean())


@dataclass(frozen=True)
class Verdict:
    """Whether one candidate is better than another beyond noise.

    Attributes:
        gain: Mean fall of the negative log-likelihood, nats a picture.
        standard_error: Of that mean, over the images.
    """

    gain: float
    standard_error: float

    @property
    def better(self) -> bool:
        """Whether the gain exceeds its standard error."""
        return self.gain > self.standard_error


def judge(logits: Logits, labels: NDArray[np.int64]) -> Judgement:
    """Negative log-likelihood of logits (N, C) at their best temperature, and accuracy, for class indices (N,)."""
    scores = logits.astype(np.float64)
    temperature = best_temperature(scores, labels)
    return Judgement(
        temperature=temperature,
        nll=negative_log_likelihood(scores / temperature, labels),
        accuracy=accuracy(scores, labels),
    )


def negative_log_likelihood(logits: Logits, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Nats a picture (N,) of logits (N, C), at most -log(1e-12) each."""
    return cast(NDArray[np.float64], np.minimum(row_nll(logits, labels), -math.log(MIN_PROBABILITY)))


def accuracy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Share of the pictures whose highest logit (N, C) is that of their class (N,)."""
    return float((logits.argmax(axis=1) == labels).mean())


def best_temperature(logits: Logits, labels: NDArray[np.int64]) -> float:
    """The temperature at which logits (N, C) are likeliest, for however few images."""
    return fit_temperature(logits, labels, min_rows=1)


def compare(before: Judgement, after: Judgement) -> Verdict:
    """The paired difference of two candidates on the same images."""
    difference = before.nll - after.nll
    error = difference.std(ddof=1) / math.sqrt(len(difference)) if len(difference) > 1 else math.inf
    return Verdict(float(difference.mean()), float(error))


@dataclass(frozen=True)
class RobustVerdict:
    """Whether a network that was trained against attacks is worth its price.

    Attributes:
        clean_loss: Fall of the accuracy on undisturbed pictures, a share of them.
        gain: Rise of the accuracy on attacked pictures, a share of them.
        p_value: Chance of as many newly right answers among those that changed, were both networks alike.
        max_clean_loss: Fall that is tolerated.
    """

    clean_loss: float
    gain: float
    p_value: float
    max_clean_loss: float

    @property
    def affordable(self) -> bool:
        """Whether the clean accuracy stays within what it may cost."""
        return self.clean_loss <= self.max_clean_loss

    @property
    def better(self) -> bool:
        """Whether it is affordable and the gain is more than luck."""
        return self.affordable and self.p_value < SIGNIFICANCE

    @property
    def reason(self) -> str:
        """The verdict in words."""
        gain = f"robust accuracy rose by {self.gain:.4f} (p = {self.p_value:.2g}, {SIGNIFICANCE} is the limit)"
        cost = f"clean accuracy fell by {self.clean_loss:.4f} ({self.max_clean_loss} is the limit)"
        return f"{'kept' if self.better else 'dropped'}: {gain}, {cost}"


def compare_robustness(
    *,
    clean_before: NDArray[np.bool_],
    clean_after: NDArray[np.bool_],
    robust_before: NDArray[np.bool_],
    robust_after: NDArray[np.bool_],
    max_clean_loss: float,
) -> RobustVerdict:
    """McNemar's test, one-sided, of which of the same N pictures two networks have right; each (N,)."""
    won, lost = int((robust_after & ~robust_before).sum()), int((robust_before & ~robust_after).sum())
    clean_lost = int(clean_before.sum()) - int(clean_after.sum())
    return RobustVerdict(
        clean_loss=clean_lost / len(clean_before),
        gain=(won - lost) / len(robust_before),
        p_value=mcnemar_midp(won, lost),
        max_clean_loss=max_clean_loss,
    )
