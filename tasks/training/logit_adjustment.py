"""Logit adjustment: what a class gains from being common alone is taken out of its score.

Trained on uneven classes, a head has learnt their shares with all the rest, and a rare class loses every close call.
``logits - strength * log(share)`` takes that out again: at strength 1 its largest entry is the class that would be
likeliest were all classes equally common, which is what balanced accuracy asks for. It moves the bias and nothing else.
It costs plain accuracy under the same shares, so it is for those who are judged by the balanced one. No torch.

References:
    Menon et al. 2021, arXiv:2007.07314 (post-hoc logit adjustment; consistent for the balanced error).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.evaluation.paired import is_uneven

FULL = 1.0  # the strength that makes all classes count alike


def adjustment_strength(
    wanted: float | Literal["auto"],
    *,
    train_labels: Sequence[str],
    test_labels: Sequence[str],
    balanced: bool | Literal["auto"],
) -> float:
    """How much of the classes' shares to take out, 0 for nothing.

    ``auto`` is 1 where the training images are uneven and the gate will judge by balanced accuracy, else 0.

    Args:
        wanted: ``train_head.logit_adjustment``.
        train_labels: Classes of the training images.
        test_labels: Classes of the test images, which the gate looks at.
        balanced: ``gate.balanced``.
    """
    if wanted != "auto":
        return wanted
    judged_alike = is_uneven(test_labels) if balanced == "auto" else balanced
    return FULL if judged_alike and is_uneven(train_labels) else 0.0


def class_shift(counts: Sequence[int], strength: float) -> NDArray[np.float32]:
    """What the bias of each class gains, (C,) with mean zero, for its training images; one counts for none."""
    gain = -strength * np.log(np.maximum(np.asarray(counts, dtype=np.float64), 1))
    shift: NDArray[np.float32] = (gain - gain.mean()).astype(np.float32)
    return shift
