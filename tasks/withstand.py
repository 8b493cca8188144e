"""Recipe withstand: how often what was learnt last is right on test images under PGD-20.

No stage: `tanuki compare` runs it after each way to learn, on the same images with the same starts. `tanuki attack`
tells more of one model, and takes longer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deploy.machine import available_cores
from tasks.attack import attacked_on, shipped, test_images
from tasks.evaluation.metrics import Accuracy, accuracy_of
from tasks.training.adversarial import STRONGEST, answered_rightly, fixed_rows, robustness_attacks
from tasks.training.staged import deterministic_torch

if TYPE_CHECKING:
    from tasks.layout import Layout
    from tasks.params import EvaluateParams, FinetuneParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WithstandReport:
    """Accuracy on attacked test images.

    Attributes:
        num_images: Attacked, at most ``finetune.adversarial.val_images``.
        epsilon: Largest change of a channel of a pixel, of 255.
        accuracy: Share of them that is right under PGD-20.
    """

    num_images: int
    epsilon: float
    accuracy: Accuracy


def run(layout: Layout, *, seed: int, finetune: FinetuneParams, evaluate: EvaluateParams) -> WithstandReport:
    """Attacks what ships within ``finetune.adversarial.epsilon``.

    Raises:
        DataError: If there is no test image, or one has gone or changed.
        StoreError: If the head is missing: run a retrain first.
    """
    settings, compute = finetune.adversarial, attacked_on(finetune)
    with deterministic_torch(available_cores(), strict=compute.device == "cpu"):
        data, model = test_images(layout), shipped(layout, compute)
        rows = fixed_rows(data, settings.val_images)
        attack = {STRONGEST: robustness_attacks(model, settings.epsilon / 255)[STRONGEST]}
        right = answered_rightly(model, data, rows, attack, seed=(seed,), batch_size=finetune.batch_size)[STRONGEST]
    found = accuracy_of(right, evaluate.confidence)
    logger.info("%d of %d test images are right under PGD-20", right.sum(), len(rows))
    return WithstandReport(len(rows), settings.epsilon, found)
