"""What each way to learn reaches on real photos, and what caching the frozen part saves.

    python -m benchmarks.learning trashnet6_dev squeezenet1_1 --seeds 5 --results results.jsonl

runs, for each seed (of the splits and of every draw), the stages up to the probe in a temporary workspace on a photo
set and ImageNet weights of $TANUKI_MATERIAL, then fine-tuning of the top layers and of all but the stem, and appends a
line to the results: accuracy on the test images of class prototypes, probe, top and full; seconds; and what the
training of the top layers would have taken with the frozen part computed in every epoch (torch, float32, channels
last: what tutorials do, a little faster), from timed batches. A seed that is in the results is not run again. It then
prints the table of all results: means, their range, and the mean paired difference to the probe with its interval.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy.stats import t as student_t

from deploy.machine import available_cores
from tasks import finetune
from tasks.__main__ import run_stage
from tasks.data.features import load_features
from tasks.data.manifest import read_manifest
from tasks.layout import Layout
from tasks.models.backbone_card import read_card
from tasks.models.head import Head, read_head
from tasks.params import Params, load_params
from tasks.training.prototypes import class_prototypes
from tasks.training.staged import deterministic_torch, logits_of

BEFORE = ("fetch_backbone", "index_images", "validate_data", "cache_features", "train_head")
WAYS = {"top": ("top",), "full": ("top", "rest")}
CONFIDENCE = 0.95


def run_seed(photos: Path, weights: Path, architecture: str, seed: int, params: Params) -> dict[str, Any]:
    """One line of the results."""
    backbone = params.backbone.model_copy(update={"source": f"file:{weights}", "architecture": architecture})
    changes: dict[str, Any] = {"seed": seed, "backbone": backbone}
    changes["augment"] = params.augment.model_copy(update={"hflip": True})
    changes["features"] = params.features.model_copy(update={"depths": 1})
    params = params.model_copy(update=changes)
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        layout.raw.parent.mkdir(parents=True)
        layout.raw.symlink_to(photos)
        for stage in BEFORE:
            run_stage(stage, layout, params)
        facts: dict[str, Any] = {"seed": seed, **_frozen(layout)}
        for name, stages in WAYS.items():
            settings = params.finetune.model_copy(update={"stages": stages})
            began = time.perf_counter()
            report = finetune.run(layout, seed=seed, augment=params.augment, finetune=settings)
            facts[f"{name}_s"] = time.perf_counter() - began
            facts[name] = _tuned(layout, params) if report.kept else facts["probe"]
            facts[f"{name}_kept"] = list(report.kept)
            times = json.loads(layout.times("finetune").read_text())["stages"]
            if name == "top" and times:
                facts["top_stage_s"], predicted = times[0]["seconds"], times[0]["predicted_s"]
                facts["recomputed_s"] = predicted["recomputed"]
    return facts


def _frozen(layout: Layout) -> dict[str, float]:
    """Accuracy of prototypes and probe on the test images, from stored features, and seconds of the probe."""
    card, images = read_card(layout.backbone_card), read_manifest(layout.accepted)
    train, test = images[images["split"] == "train"], images[images["split"] == "test"]
    features = {
        split: load_features(layout.features_dir, card, list(rows["sha256"]))
        for split, rows in (("train", train), ("test", test))
    }
    heads = {
        "prototypes": class_prototypes(features["train"], list(train["label"])),
        "probe": read_head(layout.head_dir),
    }
    found = {name: _accuracy(head, head.logits(features["test"]), list(test["label"])) for name, head in heads.items()}
    times = json.loads(layout.times("train_head").read_text())
    return {"num_train": len(train), "num_test": len(test), "probe_s": times["seconds"], **found}


def _tuned(layout: Layout, params: Params) -> float:
    """Accuracy of the tuned network on the test images."""
    card, head = read_card(layout.backbone_card), read_head(layout.finetuned_dir)
    network = finetune._load_network(layout, card)
    network.load_trunk(load_file(layout.finetuned_dir / finetune.NETWORK_NAME))
    images = read_manifest(layout.accepted)
    test = images[images["split"] == "test"]
    sessions = finetune._open_preprocessing(layout, card)
    data = finetune._labelled(layout, test, head, sessions, ("centre",), params.augment)
    with deterministic_torch(available_cores()):
        logits = logits_of(network, head, data.pixels, params.finetune.batch_size)
    return _accuracy(head, logits, list(test["label"]))


def _accuracy(head: Head, logits: NDArray[np.float32], labels: Sequence[str]) -> float:
    return float((np.array(head.labels, np.str_)[logits.argmax(axis=1)] == np.array(labels, np.str_)).mean())


def table(lines: Sequence[dict[str, Any]]) -> str:
    """All results of one set and model."""
    rows = [f"| {len(lines)} seeds | accuracy | range | points to the probe | seconds |", "|---|---|---|---|---|"]
    for name in ("prototypes", "probe", *WAYS):
        values = np.array([line[name] for line in lines])
        seconds = np.median([line.get(f"{name}_s", 0.0) for line in lines])
        difference = _interval(100 * (values - np.array([line["probe"] for line in lines])))
        told = "–" if name == "probe" else difference
        rows.append(
            f"| {name} | {values.mean():.3f} | {values.min():.3f} to {values.max():.3f} | {told} | {seconds:.1f} |"
        )
    ratios = [line["recomputed_s"] / line["top_stage_s"] for line in lines if "recomputed_s" in line]
    kept = {name: sum(bool(line[f"{name}_kept"]) for line in lines) for name in WAYS}
    rows.append("")
    rows.append(f"Kept: {', '.join(f'{name} {number} of {len(lines)}' for name, number in kept.items())}.")
    if ratios:
        rows.append(
            f"Top layers: {np.median(ratios):.1f} times as fast as with the frozen part in every epoch "
            f"({min(ratios):.1f} to {max(ratios):.1f}), validation included."
        )
    return "\n".join(rows)


def _interval(differences: NDArray[np.float64]) -> str:
    """Mean over the seeds and its Student interval; the interval only from two seeds on."""
    mean, num = float(differences.mean()), len(differences)
    if num < 2:
        return f"{mean:+.1f}"
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, num - 1)) * float(differences.std(ddof=1)) / math.sqrt(num)
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", help="a folder of datasets/")
    parser.add_argument("architecture", help="mobilenet_v2 or squeezenet1_1")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("learning.jsonl"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tasks").setLevel(logging.INFO)
    material = Path(os.environ.get("TANUKI_MATERIAL", "../shared/material")).resolve()
    photos, weights = (
        material / "datasets" / arguments.set,
        material / "weights" / f"{arguments.architecture}_imagenet1k.safetensors",
    )
    what = {"set": arguments.set, "architecture": arguments.architecture}
    known = (
        [json.loads(line) for line in arguments.results.read_text().splitlines()] if arguments.results.exists() else []
    )
    lines = [line for line in known if what.items() <= line.items()]
    for seed in range(arguments.seeds):
        if seed not in {line["seed"] for line in lines}:
            lines.append(
                what | run_seed(photos, weights, arguments.architecture, seed, load_params(Path("params.yaml")))
            )
            with arguments.results.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
    sizes = f"{lines[0]['num_train']} training and {lines[0]['num_test']} test images"
    print(f"{arguments.set}, {arguments.architecture}, {sizes}\n")
    print(table(lines))


if __name__ == "__main__":
    main()
