"""Recipe attack: how often what ships is still right when test images are changed to mislead it.

No stage: nothing depends on it. The network that export_onnx exports is attacked in torch, where its gradients are, on
some test images, which neither training nor the choice of an epoch has seen: FGSM, PGD-20, PGD-50 from five starts, and
AutoAttack where the extra ``robust`` is installed. An image counts as withstood if no attack found a change within
epsilon that makes it another class; a cleverer attack may.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import load_file

from deploy.machine import available_cores
from deploy.runtime import open_session
from tasks.data.image_store import open_images
from tasks.data.manifest import read_manifest
from tasks.errors import DataError
from tasks.evaluation.metrics import Accuracy, accuracy_of
from tasks.finetune import NETWORK_NAME
from tasks.models.architectures import build_network
from tasks.models.backbone_card import read_card
from tasks.models.head import read_head
from tasks.training.adversarial import MEANING, PixelClassifier, answered_rightly, fixed_rows, robustness_attacks
from tasks.training.attacks import pgd
from tasks.training.augmented import LabelledPixels, PixelSource
from tasks.training.auto_attack import auto_attack, is_installed
from tasks.training.device import choose_compute, place, this_machine
from tasks.training.staged import deterministic_torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from tasks.layout import Layout
    from tasks.params import AttackParams, EvaluateParams, FinetuneParams
    from tasks.training.device import Compute

MAX_PIXELS = 10**9  # index_images has judged the size of these bytes
LONG_STEPS, LONG_STARTS = 50, 5
LONG_PGD = f"pgd_{LONG_STEPS}_{LONG_STARTS}_starts"
AUTO_ATTACK, WITHSTOOD = "auto_attack", "withstood"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AttackReport:
    """Accuracy on test images under attacks.

    Args:
        model: What was attacked: ``fine-tuned`` or ``linear probe``.
        epsilon: Largest change of a value, of 255.
        num_images: Test images that were attacked.
        accuracy: By attack, ``clean`` without one; ``withstood`` are those right under every one of them.
        auto_attack: Whether AutoAttack was among them.
        meaning: What these numbers are.
    """

    model: str
    epsilon: float
    num_images: int
    accuracy: Mapping[str, Accuracy]
    auto_attack: bool
    meaning: str


def run(
    layout: Layout, *, seed: int, finetune: FinetuneParams, evaluate: EvaluateParams, attack: AttackParams
) -> AttackReport:
    """Attacks what ships within ``finetune.adversarial.epsilon``.

    Raises:
        DataError: If there is no test image, or one has gone or changed.
        StoreError: If the head is missing: run a retrain first.
    """
    if not is_installed():
        logger.warning("without AutoAttack: it needs the extra robust (uv pip install 'tanuki[robust]')")
    compute = attacked_on(finetune)
    with deterministic_torch(available_cores(), strict=compute.device == "cpu"):
        data = test_images(layout)
        accuracy = measure(
            shipped(layout, compute),
            data,
            num_images=attack.images,
            epsilon=finetune.adversarial.epsilon / 255,
            seed=seed,
            batch_size=finetune.batch_size,
            confidence=evaluate.confidence,
        )
    for name, found in accuracy.items():
        logger.info("%s: %.1f%% (%.1f%% to %.1f%%)", name, *(100 * share for share in vars(found).values()))
    return AttackReport(
        model="fine-tuned" if _is_tuned(layout) else "linear probe",
        epsilon=finetune.adversarial.epsilon,
        num_images=min(attack.images, len(data.labels)),
        accuracy=accuracy,
        auto_attack=AUTO_ATTACK in accuracy,
        meaning=MEANING,
    )


def attacked_on(finetune: FinetuneParams) -> Compute:
    """Where to attack: on ``finetune.device``, but for MPS, which AutoAttack's toolbox does not know.

    Raises:
        ParamsError: If it is not there.
    """
    compute = choose_compute(finetune.device, "float32", this_machine())
    return replace(compute, device="cpu") if compute.device == "mps" else compute


def shipped(layout: Layout, compute: Compute) -> PixelClassifier:
    """What the last retrain made, fine-tuned or not, on a device.

    Raises:
        StoreError: If there is none.
    """
    if _is_tuned(layout):
        return classifier(layout, layout.finetuned_dir / NETWORK_NAME, layout.finetuned_dir, compute)
    return classifier(layout, layout.backbone_weights, layout.head_dir, compute)


def _is_tuned(layout: Layout) -> bool:
    return (layout.finetuned_dir / NETWORK_NAME).is_file()


def classifier(layout: Layout, weights: Path, head_dir: Path, compute: Compute) -> PixelClassifier:
    """A network from its files on a device, pictures in [0, 1] to logits."""
    card, head = read_card(layout.backbone_card), read_head(head_dir)
    network = build_network(card.architecture, depths=card.depths)
    network.load_trunk(load_file(weights))
    place(network, compute)
    return PixelClassifier.of(network, head, card.mean, card.std)


def test_images(layout: Layout) -> LabelledPixels:
    """The test split of classes that the head knows, as the network sees it.

    Raises:
        DataError: If there is none.
    """
    labels = read_head(layout.head_dir).labels
    rows = read_manifest(layout.accepted)
    rows = rows[(rows["split"] == "test") & rows["label"].isin(labels)]
    if rows.empty:
        raise DataError("There are no test images of known classes to attack. Add images, then run `tanuki retrain`.")
    session, store = open_session(layout.preprocess_onnx), open_images(layout.raw)
    pixels = PixelSource(
        files=[store.file(path) for path in rows["path"]],
        shas=rows["sha256"].tolist(),
        views=("centre",),
        whole=session,
        crop=session,
        min_area_fraction=1.0,
        hflip=False,
        max_pixels=MAX_PIXELS,
        workers=available_cores(),
    )
    return LabelledPixels(pixels, np.array([labels.index(label) for label in rows["label"]], np.int64))


def measure(
    model: PixelClassifier,
    data: LabelledPixels,
    *,
    num_images: int,
    epsilon: float,
    seed: int,
    batch_size: int,
    confidence: float,
) -> dict[str, Accuracy]:
    """Accuracy by attack on the same pictures, with intervals; ``epsilon`` as a share of the range of a value."""

    def restarted(images: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
        settings = {"epsilon": epsilon, "num_steps": LONG_STEPS, "restarts": LONG_STARTS}
        return pgd(model, images, labels, **settings, rng=rng)  # type: ignore[arg-type]

    attacks = {**robustness_attacks(model, epsilon), LONG_PGD: restarted}
    if is_installed():
        attacks[AUTO_ATTACK] = lambda images, labels, _rng: auto_attack(
            model, images, labels, epsilon=epsilon, seed=seed
        )
    rows = fixed_rows(data, num_images)
    right = answered_rightly(model, data, rows, attacks, seed=(seed,), batch_size=batch_size)
    right[WITHSTOOD] = np.logical_and.reduce(list(right.values()))
    return {name: accuracy_of(each, confidence) for name, each in right.items()}
