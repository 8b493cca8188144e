"""Attacks in the maximum norm: the worst picture within epsilon of a given one, as far as gradients find it.

Pictures are float32 in [0, 1] and stay there; a model normalises inside, so that epsilon means what a person sees.
What withstands these may fall to a cleverer attack: accuracy under them is an upper bound of robustness. Called by
``tasks.training.adversarial``.

References:
    Goodfellow, Shlens and Szegedy 2015, arXiv:1412.6572 (FGSM).
    Wong, Rice and Kolter 2020, arXiv:2001.03994 (FGSM from a random start, with a step of 1.25 epsilon).
    Madry et al. 2018, arXiv:1706.06083 (PGD). Carlini and Wagner 2017, arXiv:1608.04644 (the margin as a loss).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

FGSM_RS_STEP = 1.25
PGD_REACH = 2.5
"""Steps of PGD over epsilon, all together: enough to cross the ball from any start."""

Model = Callable[[Tensor], Tensor]
"""Pictures (B, 3, S, S) in [0, 1] to logits (B, C)."""


def fgsm(model: Model, images: Tensor, labels: Tensor, *, epsilon: float) -> Tensor:
    """One step of epsilon from the pictures (B, 3, S, S) themselves, against labels (B,) int64."""
    return within(images + epsilon * _ascent(model, images, labels), images, epsilon)


def fgsm_rs(model: Model, images: Tensor, labels: Tensor, *, epsilon: float, rng: np.random.Generator) -> Tensor:
    """One step of 1.25 epsilon from a random place in the ball: the cheapest attack that one can train against."""
    start = uniform_noise(images, epsilon=epsilon, rng=rng)
    return within(start + FGSM_RS_STEP * epsilon * _ascent(model, start, labels), images, epsilon)


def pgd(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    epsilon: float,
    num_steps: int,
    restarts: int = 1,
    rng: np.random.Generator,
) -> Tensor:
    """Projected gradient descent: many small steps, each time from another random place in the ball.

    Of the pictures themselves and where each start led to, it returns what the model misjudges most, by the margin of
    the best wrong class over the right one: it is never weaker than no attack, nor for one more restart.

    Args:
        model: The model.
        images: (B, 3, S, S) float32 in [0, 1].
        labels: (B,) int64, the right classes.
        epsilon: Largest change of a value.
        num_steps: Of ``2.5 * epsilon / num_steps`` each.
        restarts: Random starts.
        rng: Of the starts.
    """
    with torch.no_grad():
        worst, worst_margins = images, _margins(model(images), labels)
    for _ in range(restarts):
        found = climb(model, images, labels, epsilon=epsilon, num_steps=num_steps, rng=rng)
        with torch.no_grad():
            margins = _margins(model(found), labels)
        worst = torch.where((margins > worst_margins)[:, None, None, None], found, worst)
        worst_margins = torch.maximum(margins, worst_margins)
    return worst


def climb(
    model: Model, images: Tensor, labels: Tensor, *, epsilon: float, num_steps: int, rng: np.random.Generator
) -> Tensor:
    """Where the steps of `pgd` lead from one random start, worse or not: to train against, two passes cheaper."""
    found = uniform_noise(images, epsilon=epsilon, rng=rng)
    for _ in range(num_steps):
        step = PGD_REACH * epsilon / num_steps * _ascent(model, found, labels)
        found = within(found + step, images, epsilon)
    return found


def uniform_noise(images: Tensor, *, epsilon: float, rng: np.random.Generator) -> Tensor:
    """Pictures with uniform noise of up to epsilon: alone, the attack of somebody who knows nothing of the model."""
    noise = rng.uniform(-epsilon, epsilon, size=tuple(images.shape)).astype(np.float32)
    return within(images + torch.from_numpy(noise).to(images.device), images, epsilon)


def within(found: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """The nearest pictures in [0, 1] that differ from ``images`` by at most epsilon in every value."""
    return torch.clamp(found, images - epsilon, images + epsilon).clamp(0, 1)


def _ascent(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """Signs of the gradient of the margin by the pictures (B, 3, S, S).

    Of the margin, not of the cross-entropy: where float32 rounds a probability to 1, the right class drops out of that
    one's gradient, and a confident model, such as one with a temperature below 1, would seem robust.
    """
    moving = images.detach().requires_grad_()
    return torch.autograd.grad(_margins(model(moving), labels).sum(), moving)[0].sign()


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the best wrong class minus that of the right one (B,); above 0 the model is wrong."""
    own = labels[:, None]
    return logits.scatter(1, own, -torch.inf).amax(dim=1) - logits.gather(1, own)[:, 0]
