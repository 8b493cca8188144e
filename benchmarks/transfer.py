"""Does the embedded backbone transfer? Few labelled handwritten digits, and who reads the others best.

    python -m benchmarks.transfer --scratch-seeds 10

prints a markdown table: mean accuracy on all digits that are not among the 1, 3 or 10 labelled ones of each class, for

- logistic regression on raw pixels (scikit-learn, C = 1, pixels in 0..1);
- the same network trained from random weights on the same labelled digits, with affine augmentation;
- linear probes on the frozen embedded backbone: last features only, and pooled at four depths. They are logistic
  regressions on centred features divided by one number, as strong as the product's where nothing can be held out.

The digits are scikit-learn's ``load_digits`` (8x8 px, real scans), enlarged to the backbone's 64 px. No digit was a
class of the backbone's source task.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from tasks.models.architectures import build_network
from tasks.models.depthwise import use_fast_depthwise
from tasks.models.weights import PretrainedWeights, read_weights
from tasks.pretraining.train import build_model
from tasks.training.linear_probe import FALLBACK_LOG10_C

EMBEDDED = "embedded:glyphs_mobilenet_v3_small"
LABELLED = (1, 3, 10)
NUM_CLASSES = 10
SCRATCH_STEPS = 400
SCRATCH_BATCH = 32
SCRATCH_LEARNING_RATE = 2e-3

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Rows = NDArray[np.intp]
Contender = Callable[[Rows, Rows, int], float]


@dataclass(frozen=True)
class Digits:
    """Pixels (N, 64) in 0..1, pictures (N, 3, 64, 64) normalised for the backbone, labels (N,)."""

    pixels: Floats
    pictures: torch.Tensor
    labels: Labels


def load(weights: PretrainedWeights) -> Digits:
    """The digits as PNG files would come: 8 bits, then enlarged and normalised as the backbone was trained."""
    found = load_digits()
    levels = np.round(found.images / 16 * 255).astype(np.float32) / 255  # (N, 8, 8)
    large = nn.functional.interpolate(
        torch.from_numpy(levels)[:, None], size=(weights.size_px,) * 2, mode="bilinear", align_corners=False
    ).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (weights.mean, weights.std))
    return Digits((found.data / 16).astype(np.float32), (large - mean) / std, found.target.astype(np.int64))


def draw_labelled(labels: Labels, per_class: int, seed: int) -> tuple[Rows, Rows]:
    """Rows of the labelled digits and of all others."""
    rng = np.random.default_rng(seed)
    chosen = [rng.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in range(NUM_CLASSES)]
    train = np.concatenate(chosen)
    return train, np.setdiff1d(np.arange(len(labels)), train)


@torch.inference_mode()
def extract(weights: PretrainedWeights, pictures: torch.Tensor, depths: int) -> Floats:
    """Features (N, D) of the frozen backbone."""
    network = build_network(weights.architecture or "", depths=depths)
    network.load_trunk(weights.state)
    features: Floats = torch.cat([network(part) for part in pictures.split(256)]).numpy()
    return features


def probe(features: Floats, labels: Labels, train: Rows, test: Rows) -> float:
    """Accuracy of a logistic regression on centred features with one common scale."""
    centred = features - features[train].mean(0)
    centred /= np.sqrt(np.mean(centred[train] ** 2))
    classifier = LogisticRegression(C=10.0**FALLBACK_LOG10_C, max_iter=1000).fit(centred[train], labels[train])
    return float(classifier.score(centred[test], labels[test]))


def raw_pixels(digits: Digits, train: Rows, test: Rows) -> float:
    """Accuracy of a logistic regression on the 64 pixels."""
    classifier = LogisticRegression(C=1.0, max_iter=1000).fit(digits.pixels[train], digits.labels[train])
    return float(classifier.score(digits.pixels[test], digits.labels[test]))


def scratch(digits: Digits, train: Rows, test: Rows, seed: int, architecture: str) -> float:
    """Accuracy of the same network trained from random weights: AdamW, warm-up and cosine, affine augmentation.

    BatchNorm's statistics are measured anew at the end: its running ones are far behind after so few steps, and would
    leave the network at chance.
    """
    torch.manual_seed(seed)
    model = use_fast_depthwise(build_model(architecture, NUM_CLASSES)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=SCRATCH_LEARNING_RATE, weight_decay=0.05)
    pictures, labels = digits.pictures[train], torch.from_numpy(digits.labels[train])
    for step in range(SCRATCH_STEPS):
        rate = min((step + 1) / 40, 0.5 * (1 + math.cos(math.pi * step / SCRATCH_STEPS)))
        optimizer.param_groups[0]["lr"] = SCRATCH_LEARNING_RATE * rate
        rows = torch.randint(len(labels), (SCRATCH_BATCH,))
        loss = nn.functional.cross_entropy(model(augment(pictures[rows])), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    measure_batch_norm(model, pictures)
    model.eval()
    with torch.inference_mode():
        answers = torch.cat([model(part).argmax(1) for part in digits.pictures[test].split(256)]).numpy()
    return float((answers == digits.labels[test]).mean())


def augment(pictures: torch.Tensor) -> torch.Tensor:
    """Random rotation of up to 10 degrees, scale of up to 10 % and shift of up to 4 %, (B, 3, S, S) channels last."""
    batch = len(pictures)
    angle = math.radians(10) * (2 * torch.rand(batch) - 1)
    scale = 1 + 0.1 * (2 * torch.rand(batch) - 1)
    cos, sin, shift = torch.cos(angle) / scale, torch.sin(angle) / scale, 0.08 * (2 * torch.rand(batch, 2) - 1)
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], 1).view(batch, 2, 3)
    grid = nn.functional.affine_grid(rows, list(pictures.shape), align_corners=False)
    moved = nn.functional.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    return moved.contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def measure_batch_norm(model: nn.Module, pictures: torch.Tensor) -> None:
    """Sets BatchNorm's statistics to the mean over 20 augmented batches."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean from now on
    model.train()
    for _ in range(20):
        model(augment(pictures[torch.randint(len(pictures), (SCRATCH_BATCH,))]))


def compare(weights: PretrainedWeights, *, seeds: int, scratch_seeds: int) -> list[tuple[str, int, list[float]]]:
    """A row a contender: its name, its number of seeds, its mean accuracy at 1, 3 and 10 labelled digits a class."""
    digits = load(weights)
    last, four = (extract(weights, digits.pictures, depths) for depths in (1, 4))
    architecture = (weights.architecture or "").partition("@")[0]
    contenders: list[tuple[str, int, Contender]] = [
        ("logistic regression, raw pixels", seeds, lambda train, test, _: raw_pixels(digits, train, test)),
        (
            f"{architecture} from random weights",
            scratch_seeds,
            lambda train, test, seed: scratch(digits, train, test, seed, architecture),
        ),
        ("probe, last features", seeds, lambda train, test, _: probe(last, digits.labels, train, test)),
        ("probe, four depths", seeds, lambda train, test, _: probe(four, digits.labels, train, test)),
    ]
    rows = []
    for name, num_seeds, contend in contenders:
        if num_seeds == 0:
            continue
        means = []
        for per_class in LABELLED:
            splits = [(*draw_labelled(digits.labels, per_class, seed), seed) for seed in range(num_seeds)]
            means.append(float(np.mean([contend(*split) for split in splits])))
            print(f"{name}, {per_class} a class: {means[-1]:.3f}", file=sys.stderr, flush=True)
        rows.append((name, num_seeds, means))
    return rows


def table(rows: Sequence[tuple[str, int, Sequence[float]]]) -> str:
    """Rows as markdown."""
    head = "| labelled digits a class | seeds | 1 | 3 | 10 |\n|---|---|---|---|---|"
    lines = [
        f"| {name} | {seeds} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |" for name, seeds, means in rows
    ]
    return "\n".join([head, *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default=EMBEDDED, help="as backbone.source in params.yaml")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--scratch-seeds", type=int, default=3, help="0 leaves the slow contender out")
    arguments = parser.parse_args()
    start = time.perf_counter()
    torch.set_flush_denormal(True)  # ten pictures are soon fitted so well that gradients fall below the normal range
    weights = read_weights(arguments.weights, root=Path(), sha256=None)
    print(table(compare(weights, seeds=arguments.seeds, scratch_seeds=arguments.scratch_seeds)))
    print(f"\n{time.perf_counter() - start:.0f} s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
