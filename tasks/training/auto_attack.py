"""AutoAttack as the adversarial-robustness-toolbox has it: several attacks without a knob, against what each has left.

APGD on the cross-entropy and on the difference-of-logits ratio, DeepFool, and Square, which needs no gradient: five
thousand queries a picture. It is what published robust accuracies are measured with, and much stronger than PGD alone:
of 42 defences of CIFAR-10, papers' own numbers exceed AutoAttack's by 3 points in the median and 70 at most. Not the
reference implementation, whose targeted attacks (APGD-T, FAB-T) the toolbox has not, so still an upper bound. Needs the
extra ``robust``. Called by ``tasks.attack``.

References:
    Croce and Hein 2020, arXiv:2003.01690 (AutoAttack); the 42 defences are in its repository's README.
"""

from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

SQUARE_QUERIES = 5_000
APGD_STEPS, DEEPFOOL_STEPS = 100, 50
FIRST_STEP = 2.0
"""First step of APGD over epsilon, as in the paper."""
MIN_CLASSES_FOR_RATIO = 3
NUM_GRADIENTS = 10  # classes whose boundaries DeepFool looks at
ROUNDING = 1e-5


def is_installed() -> bool:
    """Whether the extra ``robust`` is."""
    return all(find_spec(name) for name in ("art", "multiprocess"))  # the toolbox imports it and does not say so


def auto_attack(
    model: nn.Module, images: Tensor, labels: Tensor, *, epsilon: float, seed: int, square_queries: int = SQUARE_QUERIES
) -> Tensor:
    """The pictures that it found, (B, 3, S, S): the given one where it found none that is taken for another class.

    Args:
        model: Pictures in [0, 1] to logits.
        images: (B, 3, S, S) float32 in [0, 1].
        labels: (B,) int64, the right classes.
        epsilon: Largest change of a value.
        seed: Of its random draws.
        square_queries: Of Square, a picture.
    """
    from art.attacks.evasion import AutoAttack, AutoProjectedGradientDescent, DeepFool, SquareAttack
    from art.estimators.classification import PyTorchClassifier

    with torch.no_grad():
        num_classes = model(images[:1]).shape[1]
    target = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(images.shape[1:]),
        nb_classes=num_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if images.is_cuda else "cpu",
    )
    size = {"batch_size": len(images), "verbose": False}
    ball = {"norm": np.inf, "eps": epsilon}
    losses = ["cross_entropy", "difference_logits_ratio"][: 2 if num_classes >= MIN_CLASSES_FOR_RATIO else 1]
    step = {"eps_step": FIRST_STEP * epsilon, "max_iter": APGD_STEPS, "nb_random_init": 1}
    attacks = [
        *(AutoProjectedGradientDescent(target, **ball, **step, **size, loss_type=loss) for loss in losses),
        DeepFool(target, max_iter=DEEPFOOL_STEPS, nb_grads=min(NUM_GRADIENTS, num_classes), **size),
        SquareAttack(target, **ball, max_iter=square_queries, nb_restarts=1, **size),
    ]
    given = images.cpu().numpy()
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        found: NDArray[np.float32] = AutoAttack(
            target, **ball, eps_step=step["eps_step"], attacks=attacks, batch_size=len(images)
        ).generate(x=given.copy(), y=labels.cpu().numpy())
    finally:
        np.random.set_state(state)
    outside = float(np.abs(found - given).max()) - epsilon
    if outside > ROUNDING or found.min() < 0 or found.max() > 1:
        raise RuntimeError(f"AutoAttack left its bounds by {outside:g}")
    return torch.from_numpy(found).to(images.device)
