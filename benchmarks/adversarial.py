"""What the adversarial stage brings and costs, on the sample's handwritten digits with the embedded backbone.

    python -m benchmarks.adversarial --epochs 5

runs the stages up to the probe in a temporary workspace, then ``finetune`` with the adversarial stage alone, and prints
accuracy on test images, which neither training nor the choice of an epoch has seen: as they are, under FGSM, under
PGD-20 and under PGD-50 from five starts, within the epsilon of params.yaml; and the seconds. The accuracies are upper
bounds: stronger attacks exist.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from deploy.machine import available_cores
from deploy.runtime import open_session
from flows.sample import lay_out_sample
from tasks import finetune
from tasks.__main__ import run_stage
from tasks.data.manifest import read_manifest
from tasks.evaluation.metrics import Accuracy, accuracy_of
from tasks.layout import Layout
from tasks.models.architectures import build_network
from tasks.models.backbone_card import read_card
from tasks.models.head import read_head
from tasks.params import Params, load_params
from tasks.training.adversarial import PixelClassifier, answered_rightly, fixed_rows, robustness_attacks
from tasks.training.attacks import pgd
from tasks.training.augmented import LabelledPixels, PixelSource
from tasks.training.staged import deterministic_torch

BEFORE = ("fetch_backbone", "index_images", "validate_data", "cache_features", "train_head")


def classifier(layout: Layout, weights: Path, head_dir: Path) -> PixelClassifier:
    """A network from its files."""
    card, head = read_card(layout.backbone_card), read_head(head_dir)
    network = build_network(card.architecture, depths=card.depths)
    network.load_trunk(load_file(weights))
    linear = nn.Linear(network.feature_dim, len(head.labels))
    linear.load_state_dict({"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)})
    return PixelClassifier(network.to(memory_format=torch.channels_last), linear, card.mean, card.std)


def test_images(layout: Layout) -> LabelledPixels:
    """The test split, as the network sees it."""
    rows = read_manifest(layout.accepted).query("split == 'test'")
    session, labels = open_session(layout.preprocess_onnx), read_head(layout.head_dir).labels
    pixels = PixelSource(
        files=[layout.raw / path for path in rows["path"]],
        shas=rows["sha256"].tolist(),
        views=("centre",),
        whole=session,
        crop=session,
        min_area_fraction=1.0,
        hflip=False,
        max_pixels=10**8,
        workers=available_cores(),
    )
    return LabelledPixels(pixels, np.array([labels.index(label) for label in rows["label"]], np.int64))


def measured(model: PixelClassifier, data: LabelledPixels, num_images: int, params: Params) -> dict[str, Accuracy]:
    """Accuracy by attack, with its 95 % interval."""
    epsilon = params.finetune.adversarial.epsilon / 255

    def restarted(images: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        return pgd(model, images, labels, epsilon=epsilon, num_steps=50, restarts=5, rng=rng)

    right = answered_rightly(
        model,
        data,
        fixed_rows(data, num_images),
        {**robustness_attacks(model, epsilon), "pgd_50, 5 starts": restarted},
        seed=(params.seed,),
        batch_size=params.finetune.batch_size,
    )
    return {name: accuracy_of(each, params.evaluate.confidence) for name, each in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, help="default: as in params.yaml")
    parser.add_argument("--images", type=int, default=200, help="test images that are attacked")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tasks").setLevel(logging.INFO)
    params = load_params(Path("params.yaml"))
    adversarial = params.finetune.adversarial
    if arguments.epochs:
        adversarial = adversarial.model_copy(update={"epochs": arguments.epochs})
    settings = params.finetune.model_copy(update={"stages": ("adversarial",), "adversarial": adversarial})
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        layout.raw.mkdir(parents=True)
        lay_out_sample(layout.raw)
        for stage in BEFORE:
            run_stage(stage, layout, params)
        start = time.perf_counter()
        report = finetune.run(layout, seed=params.seed, augment=params.augment, finetune=settings)
        seconds = time.perf_counter() - start
        models = {"linear probe": (layout.backbone_weights, layout.head_dir)}
        if report.kept:
            models["adversarial"] = (layout.finetuned_dir / finetune.NETWORK_NAME, layout.finetuned_dir)
        data = test_images(layout)
        with deterministic_torch(available_cores()):
            found = {
                name: measured(classifier(layout, *files), data, arguments.images, params)
                for name, files in models.items()
            }
    print(f"epsilon {adversarial.epsilon:g}/255, {adversarial.attack}, {report.stages[-1].reason}\n")
    print(f"| | {' | '.join(next(iter(found.values())))} |\n|---|---|---|---|---|")
    for name, shares in found.items():
        cells = [
            f"{each.accuracy:.3f} ({each.accuracy_low:.3f} to {each.accuracy_high:.3f})" for each in shares.values()
        ]
        print(f"| {name} | {' | '.join(cells)} |")
    stage = dataclasses.asdict(report.stages[-1])
    print(
        f"\n{seconds:.0f} s for {stage['epochs']} epochs, {available_cores()} cores, {report.num_train} training images"
    )


if __name__ == "__main__":
    main()
