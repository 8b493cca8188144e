"""What each way to learn reaches on real photos, and what keeping the frozen part's output saves.

    python -m benchmarks.learning trashnet6_dev squeezenet1_1 --only probe top --seeds 5 --results learning.jsonl

takes a photo set and ImageNet weights of $TANUKI_MATERIAL and, for each seed (of the splits and of every draw), runs
the stages up to the probe, then each way that is asked for, and appends a line a way to the results:

- prototypes, probe: from stored features.
- imbalance: the probe with every other class cut to a tenth of its training images, without and with logit adjustment.
- scratch: from random weights, for --scratch-seconds.
- top, full: fine-tuning of the top layers, of all but the stem.
- adversarial: after the probe, against attacks; accuracy on test images, clean and under PGD-20.
- speed: the loop of PyTorch's tutorial on transfer learning, for the layers and epochs of top: it reads and crops
  pictures anew and runs the frozen part in eager float32 in every step, and takes the best epoch. Told beside top, in
  processor seconds, because the machine may have other work.

A set with official test images keeps those; validation images are drawn anew by each seed. What is in the results is
not run again, and after --minutes nothing new is begun, so a long run can be taken in pieces. At the end it prints the
table of all results: means over the seeds and the mean paired difference to the probe, with Student intervals, and the
range of the seeds.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import t as student_t
from torch import Tensor, nn

from deploy.machine import available_cores
from tasks import finetune, train_head
from tasks.__main__ import run_stage
from tasks.attack import attacked_on, classifier, test_images
from tasks.data.features import load_features
from tasks.data.manifest import read_manifest, write_manifest
from tasks.data.views import view_names
from tasks.evaluation.metrics import accuracy_of
from tasks.layout import Layout
from tasks.models.backbone_card import read_card
from tasks.models.head import Head, read_head
from tasks.params import Params, load_params
from tasks.training.adversarial import PixelClassifier, answered_rightly, fixed_rows, robustness_attacks
from tasks.training.augmented import Item, LabelledPixels
from tasks.training.linear_probe import mean_recall
from tasks.training.prototypes import class_prototypes
from tasks.training.schedule import stage_length
from tasks.training.staged import batched, deterministic_torch, logits_of
from tasks.training.temperature import row_nll

BEFORE = ("fetch_backbone", "index_images", "validate_data", "cache_features", "train_head")
STAGES = {"scratch": ("scratch",), "top": ("top",), "full": ("top", "rest"), "adversarial": ("adversarial",)}
WAYS = ("probe", "prototypes", "imbalance", "speed", *STAGES)  # the probe first: others are told beside it
CUT = 10  # what is left of every other class: one in so many
TUTORIAL_RATE, TUTORIAL_MOMENTUM, TUTORIAL_FALL, TUTORIAL_EPOCHS = 1e-3 / 4, 0.9, 0.1, 7
"""Of SGD, a picture of a batch; the rate is a tenth after each seven epochs."""
CONFIDENCE = 0.95

Facts = dict[str, Any]


def lay_out(photos: Path, raw: Path) -> None:
    """Copies a set; official validation images join the training ones, so that each seed draws its own from both."""
    for path in sorted(photos.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            split, *rest = path.relative_to(photos).parts
            target = raw / {"val": "train"}.get(split, split) / Path(*rest[:-1]) / f"{split}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)


def settings_of(weights: Path, architecture: str, seed: int, arguments: argparse.Namespace) -> Params:
    """params.yaml with what photos want."""
    params = load_params(Path("params.yaml"))
    adversarial = params.finetune.adversarial.model_copy(update={"val_images": arguments.attacked})
    if arguments.adversarial_epochs:
        adversarial = adversarial.model_copy(update={"epochs": arguments.adversarial_epochs})
    scratch = params.finetune.scratch.model_copy(update={"seconds": arguments.scratch_seconds})
    changes: Facts = {
        "seed": seed,
        "backbone": params.backbone.model_copy(update={"source": f"file:{weights}", "architecture": architecture}),
        "augment": params.augment.model_copy(update={"hflip": True}),
        "features": params.features.model_copy(update={"depths": 1, "views": 2}),
        "finetune": params.finetune.model_copy(update={"adversarial": adversarial, "scratch": scratch}),
    }
    return params.model_copy(update=changes)


def run_way(layout: Layout, params: Params, way: str) -> Facts:
    """What a way came to; the stages up to the probe have run."""
    if way in STAGES:
        return _tuned(layout, params, way)
    if way in ("imbalance", "speed"):
        return (_imbalance if way == "imbalance" else _as_tutorials_do)(layout, params)
    card, images = read_card(layout.backbone_card), read_manifest(layout.accepted)
    train, test = images[images["split"] == "train"], images[images["split"] == "test"]
    head, seconds = read_head(layout.head_dir), json.loads(layout.times("train_head").read_text())["seconds"]
    if way == "prototypes":
        began = time.perf_counter()
        head = class_prototypes(load_features(layout.features_dir, card, list(train["sha256"])), list(train["label"]))
        seconds = time.perf_counter() - began
    logits = head.logits(load_features(layout.features_dir, card, list(test["sha256"])))
    facts = {"num_train": len(train), "num_val": int((images["split"] == "val").sum()), "num_test": len(test)}
    return {**facts, **_answers(head, logits, list(test["label"])), "seconds": seconds}


def _imbalance(layout: Layout, params: Params) -> Facts:
    """Balanced accuracy on the test images after uneven training, without adjustment and with."""
    card, images = read_card(layout.backbone_card), read_manifest(layout.accepted)
    test = images[images["split"] == "test"]
    cut = sorted(images["label"].unique())[::2]
    left_out = (images["split"] == "train") & images["label"].isin(cut)
    left_out &= images.groupby(["split", "label"]).cumcount() % CUT != 0
    features = load_features(layout.features_dir, card, list(test["sha256"]))
    facts: Facts = {}
    with tempfile.TemporaryDirectory() as folder:
        uneven = Layout(Path(folder))
        for name in ("backbone_dir", "features_dir"):
            getattr(uneven, name).parent.mkdir(parents=True, exist_ok=True)
            getattr(uneven, name).symlink_to(getattr(layout, name))
        write_manifest(uneven.accepted, images[~left_out])
        for strength in (0.0, 1.0):
            settings = params.train_head.model_copy(update={"logit_adjustment": strength})
            work = {"augment": params.augment, "features": params.features, "gate": params.gate}
            report = train_head.run(uneven, seed=params.seed, train_head=settings, **work)
            head = read_head(uneven.head_dir)
            targets = np.array([head.labels.index(label) for label in test["label"]], np.intp)
            facts[f"balanced_{strength:g}"] = mean_recall(head.logits(features), targets)
    return {**facts, "class_ratio": report.class_ratio}


def _tuned(layout: Layout, params: Params, way: str) -> Facts:
    """Fine-tunes and answers the test images with what ships."""
    settings = params.finetune.model_copy(update={"stages": STAGES[way]})
    began, began_cpu = time.perf_counter(), time.process_time()
    report = finetune.run(layout, seed=params.seed, augment=params.augment, finetune=settings)
    facts: Facts = {"seconds": time.perf_counter() - began, "cpu_s": time.process_time() - began_cpu}
    facts |= {"kept": list(report.kept), "reasons": [stage.reason for stage in report.stages]}
    weights, head_dir = layout.backbone_weights, layout.head_dir
    if report.kept:
        weights, head_dir = layout.finetuned_dir / finetune.NETWORK_NAME, layout.finetuned_dir
    head, data = read_head(head_dir), test_images(layout)
    compute = attacked_on(params.finetune)
    network = classifier(layout, weights, head_dir, compute).network
    with deterministic_torch(available_cores(), strict=compute.device == "cpu"):
        logits = logits_of(network, head, data.pixels, params.finetune.batch_size)
        facts |= _answers(head, logits, [head.labels[label] for label in data.labels])
        if way == "adversarial":
            networks = {"probe": (layout.backbone_weights, layout.head_dir), "adversarial": (weights, head_dir)}
            models = {name: classifier(layout, *files, compute) for name, files in networks.items()}
            facts |= _attacked(params, data, models)
    return facts


def _attacked(params: Params, data: LabelledPixels, models: Mapping[str, PixelClassifier]) -> Facts:
    """Accuracy of probe and hardened network on the same test images, clean, under FGSM and PGD-20."""
    settings, facts = params.finetune.adversarial, Facts()
    rows = fixed_rows(data, settings.val_images)
    for name, model in models.items():
        attacks = robustness_attacks(model, settings.epsilon / 255)
        right = answered_rightly(model, data, rows, attacks, seed=(0,), batch_size=params.finetune.batch_size)
        facts[f"under_attack_{name}"] = {
            attack: [round(value, 3) for value in vars(accuracy_of(each, CONFIDENCE)).values()]
            for attack, each in right.items()
        }
    return {**facts, "epsilon": settings.epsilon, "num_attacked": len(rows)}


def _as_tutorials_do(layout: Layout, params: Params) -> Facts:
    """Trains a new head and the layers of the stage top as PyTorch's tutorial does, and answers the test images."""
    began, began_cpu = time.perf_counter(), time.process_time()
    card, head, images = read_card(layout.backbone_card), read_head(layout.head_dir), read_manifest(layout.accepted)
    train, val = (images[images["split"] == split] for split in ("train", "val"))
    settings = finetune.tuning_settings(card, params.seed, params.finetune, "cpu")
    size, steps = settings.batch_size, settings.max_steps
    work: Facts = {"num_images": len(train), "batch_size": size, "epochs": settings.epochs}
    length = stage_length(**work, length_factor=1.0, max_steps=steps, affordable_steps=steps)
    sessions = finetune.open_preprocessing(layout, card)
    crops = view_names(1 + length.epochs, params.augment.hflip)[1:]
    data = finetune.labelled_pixels(layout, train, head, sessions, crops, params.augment)
    held_out = finetune.labelled_pixels(layout, val, head, sessions, ("centre",), params.augment)
    with deterministic_torch(available_cores()):
        torch.manual_seed(params.seed)
        network = finetune.load_network(layout, card).requires_grad_(False)
        model = nn.Sequential(network, nn.Linear(network.feature_dim, len(head.labels)))
        moving = [*network.group_parameters(network.num_groups - 1), *model[1].parameters()]
        for parameter in moving:
            parameter.requires_grad_(True)
        optimiser = torch.optim.SGD(moving, lr=TUTORIAL_RATE * size, momentum=TUTORIAL_MOMENTUM)
        scheduler = torch.optim.lr_scheduler.StepLR(optimiser, TUTORIAL_EPOCHS, TUTORIAL_FALL)
        best, best_right = dict[str, Tensor](), -1
        for epoch in range(length.epochs):
            rows = np.random.default_rng((params.seed, epoch)).permutation(len(train)).tolist()
            _descend(model, data, [(row, epoch) for row in rows], size, optimiser)
            scheduler.step()
            right = int((_logits(model, held_out, size).argmax(axis=1) == held_out.labels).sum())
            if right > best_right:
                best, best_right = {name: tensor.clone() for name, tensor in model.state_dict().items()}, right
        cpu_s = time.process_time() - began_cpu
        model.load_state_dict(best)
        tested = test_images(layout)
        answers = _answers(head, _logits(model, tested, size), [head.labels[label] for label in tested.labels])
    return {"seconds": time.perf_counter() - began, "cpu_s": cpu_s, "epochs": length.epochs, **answers}


def _descend(
    model: nn.Module, data: LabelledPixels, items: Sequence[Item], size: int, optimiser: torch.optim.Optimizer
) -> None:
    """An epoch."""
    batches = batched(items, size)
    for batch, pixels in zip(batches, data.pixels.batches(batches), strict=True):
        labels = torch.from_numpy(data.labels[[row for row, _ in batch]])
        loss = nn.functional.cross_entropy(model(torch.from_numpy(pixels)), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@torch.no_grad()
def _logits(model: nn.Module, data: LabelledPixels, size: int) -> NDArray[np.float32]:
    """Logits (N, C) of all pictures in their first view."""
    batches = batched([(row, 0) for row in range(len(data.labels))], size)
    found = [model(torch.from_numpy(pixels)).numpy() for pixels in data.pixels.batches(batches)]
    return np.concatenate(found)


def _answers(head: Head, logits: NDArray[np.float32], labels: Sequence[str]) -> Facts:
    """Accuracy and negative log-likelihood, nats a picture, on images whose class the head has."""
    targets = np.array([head.labels.index(label) for label in labels], np.intp)
    return {
        "accuracy": float((logits.argmax(axis=1) == targets).mean()),
        "nll": float(row_nll(logits, targets).mean()),
    }


def table(lines: Sequence[Facts]) -> str:
    """All results of one set and model."""
    by_way: dict[str, dict[int, Facts]] = {way: {} for way in WAYS}
    for line in lines:
        by_way[line["way"]][line["seed"]] = line
    rows = [
        "| | seeds | accuracy | interval | range | points to the probe | NLL | seconds | kept |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for way in ("prototypes", "probe", "speed", *STAGES):
        found = by_way[way]
        if not found:
            continue
        values = np.array([each["accuracy"] for each in found.values()])
        probes = by_way["probe"]
        pairs = [each["accuracy"] - probes[seed]["accuracy"] for seed, each in found.items() if seed in probes]
        kept = f"{sum(bool(each['kept']) for each in found.values())} of {len(found)}" if way in STAGES else ""
        told = _interval(100 * np.array(pairs)) if pairs and way != "probe" else ""
        ends = "{:.3f} to {:.3f}".format(*_ends(values)) if len(values) > 1 else ""
        nll, seconds = (np.array([each[fact] for each in found.values()]) for fact in ("nll", "seconds"))
        rows.append(
            f"| {way} | {len(found)} | {values.mean():.3f} | {ends} "
            f"| {values.min():.3f} to {values.max():.3f} | {told} "
            f"| {nll.mean():.3f} | {np.median(seconds):.1f} | {kept} |"
        )
    if pairs := [(by_way["speed"][seed], top) for seed, top in by_way["top"].items() if seed in by_way["speed"]]:
        ratios = [theirs["cpu_s"] / top["cpu_s"] for theirs, top in pairs]
        gains = np.array([100 * (top["accuracy"] - theirs["accuracy"]) for theirs, top in pairs])
        rows += ["", f"Top layers: {np.median(ratios):.1f} times less processor time than as tutorials write it "]
        rows[-1] += f"({min(ratios):.1f} to {max(ratios):.1f}, {len(ratios)} seeds), for {_interval(gains)} points."
    if uneven := by_way["imbalance"].values():
        before, after = (np.array([each[f"balanced_{strength}"] for each in uneven]) for strength in (0, 1))
        rows += ["", f"Uneven classes ({next(iter(uneven))['class_ratio']:.0f} to 1): balanced accuracy "]
        rows[-1] += f"{before.mean():.3f}, adjusted {after.mean():.3f}: {_interval(100 * (after - before))} points."
    if attacked := list(by_way["adversarial"].values()):
        rows += ["", *_attacked_rows(attacked)]
    return "\n".join(rows)


def _attacked_rows(found: Sequence[Facts]) -> list[str]:
    """Accuracy by attack before and after the stage adversarial: means over the seeds, and their range."""
    names = ("probe", "adversarial")
    shares = {  # by attack, a value a seed
        name: {
            attack: [each[f"under_attack_{name}"][attack][0] for each in found]
            for attack in found[0]["under_attack_probe"]
        }
        for name in names
    }
    sizes = {(each["epsilon"], each["num_attacked"]) for each in found}
    told = ", ".join(f"{num} test images within {epsilon:g}/255" for epsilon, num in sorted(sizes))
    rows = [f"{told}, {len(found)} seeds:", "", f"| | {' | '.join(shares['probe'])} |"]
    rows.append("|---" * (1 + len(shares["probe"])) + "|")
    for name in names:
        cells = [f"{np.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in shares[name].values()]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    gains = [
        _interval(100 * (np.array(shares["adversarial"][attack]) - np.array(before)))
        for attack, before in shares["probe"].items()
    ]
    return [*rows, f"| points | {' | '.join(gains)} |"]


def _interval(differences: NDArray[np.float64]) -> str:
    """Mean over the seeds and its Student interval; the interval only from two seeds on."""
    mean = float(differences.mean())
    return f"{mean:+.1f}" if len(differences) < 2 else "{:+.1f} [{:+.1f}, {:+.1f}]".format(mean, *_ends(differences))


def _ends(values: NDArray[np.float64]) -> tuple[float, float]:
    """Student interval of the mean over two seeds or more."""
    mean, num = float(values.mean()), len(values)
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, num - 1)) * float(values.std(ddof=1)) / math.sqrt(num)
    return mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", help="a folder of datasets/")
    parser.add_argument("architecture", help="mobilenet_v2 or squeezenet1_1")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0, help="for machines or cores that share the seeds")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after these nothing new is begun")
    parser.add_argument("--adversarial-epochs", type=int, help="default: as in params.yaml")
    parser.add_argument("--scratch-seconds", type=float, default=180.0, help="what full takes on two cores")
    parser.add_argument("--attacked", type=int, default=128, help="images that are attacked")
    parser.add_argument("--workspace", type=Path, help="keeps features from run to run; default: a temporary folder")
    parser.add_argument("--results", type=Path, default=Path("learning.jsonl"))
    arguments = parser.parse_args()
    began = time.perf_counter()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("tasks").setLevel(logging.INFO)
    material = Path(os.environ.get("TANUKI_MATERIAL", "../shared/material")).resolve()
    weights = material / "weights" / f"{arguments.architecture}_imagenet1k.safetensors"
    what = {"set": arguments.set, "architecture": arguments.architecture}
    known = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    lines = [line for line in map(json.loads, known) if what.items() <= line.items()]
    ways = [way for way in WAYS if way in arguments.only or way == "probe"]
    with tempfile.TemporaryDirectory() as folder:
        root = (arguments.workspace or Path(folder)) / f"{arguments.set}-{arguments.architecture}"
        layout = Layout(root.resolve())
        if not layout.raw.exists():
            lay_out(material / "datasets" / arguments.set, layout.raw)
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            missing = [way for way in ways if (way, seed) not in {(line["way"], line["seed"]) for line in lines}]
            params = settings_of(weights, arguments.architecture, seed, arguments)
            for number, way in enumerate(missing):
                if time.perf_counter() - began > 60 * arguments.minutes:
                    break
                for stage in BEFORE if number == 0 else ():
                    if not (stage == "fetch_backbone" and layout.backbone_card.exists()):
                        run_stage(stage, layout, params)
                lines.append({**what, "way": way, "seed": seed, **run_way(layout, params, way)})
                with arguments.results.open("a") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    if lines:
        sizes = [
            f"{line['num_train']} train, {line['num_val']} val, {line['num_test']} test images (seed {line['seed']})"
            for line in lines
            if "num_train" in line
        ]
        print(", ".join([arguments.set, arguments.architecture, *sizes[:1], f"{available_cores()} cores"]), end="\n\n")
        print(table(lines))


if __name__ == "__main__":
    main()
