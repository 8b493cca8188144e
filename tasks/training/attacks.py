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

from tasks.training.memory import in_parts

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

    A picture that the model misjudges is left alone from then on, so that of a model that withstands little most of
    the work is saved, and what counts is whether any step misled it, not where the last one led: never weaker than no
    attack, nor for one more restart.

    Args:
        model: The model.
        images: (B, 3, S, S) float32 in [0, 1].
        labels: (B,) int64, the right classes.
        epsilon: Largest change of a value.
        num_steps: Of ``2.5 * epsilon / num_steps`` each.
        restarts: Random starts.
        rng: Of the starts.

    Returns:
        The first picture found that is misjudged, or the last one of those that never were.
    """
    found = images.clone()
    left = torch.nonzero(_margins(all_logits(model, images), labels) <= 0)[:, 0]
    for _ in range(restarts):
        moving = uniform_noise(images, epsilon=epsilon, rng=rng)[left]
        for _ in range(num_steps + 1):
            if len(left) == 0:
                return found
            margins, signs = _margins_and_ascent(model, moving, labels[left])
            found[left] = moving
            right = margins <= 0
            left = left[right]
            moving = _stepped(moving[right], signs[right], images[left], epsilon, num_steps)
    return found


def climb(
    model: Model, images: Tensor, labels: Tensor, *, epsilon: float, num_steps: int, rng: np.random.Generator
) -> Tensor:
    """Where so many steps of `pgd` lead from one random start, each of them, misjudged or not: to train against."""
    found = uniform_noise(images, epsilon=epsilon, rng=rng)
    for _ in range(num_steps):
        found = _stepped(found, _ascent(model, found, labels), images, epsilon, num_steps)
    return found


def uniform_noise(images: Tensor, *, epsilon: float, rng: np.random.Generator) -> Tensor:
    """Pictures with uniform noise of up to epsilon: alone, the attack of somebody who knows nothing of the model."""
    noise = rng.uniform(-epsilon, epsilon, size=tuple(images.shape)).astype(np.float32)
    return within(images + torch.from_numpy(noise).to(images.device), images, epsilon)


@torch.no_grad()
def all_logits(model: Model, images: Tensor) -> Tensor:
    """Logits (B, C) of pictures (B, 3, S, S)."""
    return torch.cat(in_parts(model, images))


def within(found: Tensor, images: Tensor, epsilon: float) -> Tensor:
    """The nearest pictures in [0, 1] that differ from ``images`` by at most epsilon in every value."""
    return torch.clamp(found, images - epsilon, images + epsilon).clamp(0, 1)


def _stepped(found: Tensor, signs: Tensor, images: Tensor, epsilon: float, num_steps: int) -> Tensor:
    """One of so many steps of PGD."""
    return within(found + PGD_REACH * epsilon / num_steps * signs, images, epsilon)


def _ascent(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    """Signs of the gradient of the margin by the pictures (B, 3, S, S)."""
    return _margins_and_ascent(model, images, labels)[1]


def _margins_and_ascent(model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Margins (B,) and the signs of their gradient by the pictures (B, 3, S, S).

    Of the margin, not of the cross-entropy: where float32 rounds a probability to 1, the right class drops out of that
    one's gradient, and a confident model, such as one with a temperature below 1, would seem robust.
    """

    def of(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        moving = images.detach().requires_grad_()
        margins = _margins(model(moving), labels)
        return margins.detach(), torch.autograd.grad(margins.sum(), moving)[0].sign()

    margins, signs = zip(*in_parts(of, images, labels), strict=True)
    return torch.cat(margins), torch.cat(signs)


def _margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the best wrong class minus that of the right one (B,); above 0 the model is wrong."""
    own = labels[:, None]
    return logits.scatter(1, own, -torch.inf).amax(dim=1) - logits.gather(1, own)[:, 0]
