"""How often `tanuki drift` cries wolf, and what it sees: on the sample's handwritten digits with the embedded backbone.

    python -m benchmarks.drift

runs the stages up to the bundle's export without fine-tuning in a temporary workspace, lets the bundle answer the
images that nobody trained on, and draws windows of them. **False alarms**: each of the 200 windows is drawn together
with its reference, anew, so that both are of one distribution whatever the images are; the share of alarms must be the
level of params.yaml. **Detection**: 40 windows of images spoiled by a corruption of tasks/evaluation/robustness.py,
blended in by a growing strength, and 40 whose class mix is swapped: a share of one half of the classes gives way to the
other half.
"""

import argparse
import logging
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.bundle import read_bundle
from deploy.images import decode_image
from deploy.predictor import Predictor
from flows.sample import lay_out_sample
from tasks.__main__ import STAGES, run_stage
from tasks.data.manifest import read_manifest
from tasks.drift.compare import Answers, Comparison, compare
from tasks.evaluation.metrics import wilson_interval
from tasks.evaluation.robustness import CORRUPTIONS, corrupted
from tasks.layout import Layout
from tasks.params import DriftParams, Params, load_params

STRENGTHS = (0.05, 0.1, 0.2, 0.4, 0.8)
MIXES = (0.1, 0.2, 0.4, 0.8)
TESTS = ("pictures", "predictions", "confidence")


def held_out(layout: Layout) -> tuple[list[str], list[NDArray[np.uint8]]]:
    """Hash and pixels of the images of the validation and test splits, of all in one order that tells nothing."""
    rows = read_manifest(layout.accepted).query("split != 'train'").sort_values("sha256")
    return list(rows["sha256"]), [decode_image((layout.raw / path).read_bytes()) for path in rows["path"]]


def spoiled(hashes: list[str], images: list[NDArray[np.uint8]], name: str, strength: float) -> list[NDArray[np.uint8]]:
    """The images, so much of the way to their corruption."""
    worst = [corrupted(Image.fromarray(each), name, key=key) for key, each in zip(hashes, images, strict=True)]
    return [
        np.rint(one + strength * (other - one.astype(float))).astype(np.uint8)
        for one, other in zip(images, worst, strict=True)
    ]


def answers_of(predictor: Predictor, images: list[NDArray[np.uint8]]) -> Answers:
    found = predictor.predict(images)
    return Answers(found.probabilities, found.embeddings)


def compared(reference: Answers, window: Answers, labels: tuple[str, ...], drift: DriftParams, seed: int) -> Comparison:
    return compare(
        reference,
        window,
        labels,
        level=drift.level,
        permutations=drift.permutations,
        neighbours=drift.neighbours,
        seed=seed,
    )


def swapped(
    predicted: NDArray[np.int64], rows: NDArray[np.int64], size: int, share: float, seed: int
) -> NDArray[np.int64]:
    """A window's rows in which a share of the upper half of the classes gives way to the lower half."""
    generator = np.random.default_rng(seed)
    is_upper = predicted[rows] >= (predicted.max() + 1) / 2
    weight = np.where(is_upper, 1 - share, 1 + share)
    return generator.choice(rows, size, replace=False, p=weight / weight.sum())


def line(name: str, found: list[Comparison], level: float) -> str:
    alarms = sum(each.is_drift for each in found)
    low, high = wilson_interval(alarms, len(found), 0.95)
    told = Counter(test for each in found for test in TESTS if each.tests[test].adjusted_p_value <= level)
    area = float(np.median([each.tests["pictures"].statistic for each in found]))
    cells = " | ".join(f"{told[test] / len(found):.0%}" for test in TESTS)
    return f"| {name} | {alarms / len(found):.1%} ({low:.1%} to {high:.1%}) | {cells} | {area:.2f} |"


def prepare(layout: Layout, params: Params) -> None:
    layout.raw.mkdir(parents=True)
    lay_out_sample(layout.raw)
    finetune = params.finetune.model_copy(update={"enabled": False})
    for stage in STAGES[:-1]:  # all but evaluate
        run_stage(stage, layout, params.model_copy(update={"finetune": finetune}))


def measure(
    layout: Layout, params: Params, *, windows: int, detections: int, size: int, corruptions: list[str], mixes: bool
) -> None:
    bundle = read_bundle(layout.bundle_dir)
    hashes, images = held_out(layout)
    generator = np.random.default_rng(params.seed)
    level = params.drift.level
    print(f"{len(images)} images nobody trained on; windows of {size}, all others the reference; level {level}\n")
    print(f"| | alarms (95 % interval) | {' | '.join(TESTS)} | area under ROC |\n|---|---|---|---|---|---|", flush=True)
    with Predictor(bundle) as predictor:
        clean = answers_of(predictor, images)
        draws = [generator.permutation(len(images)) for _ in range(max(windows, detections))]
        none = [
            compared(clean.of(rows[size:]), clean.of(rows[:size]), bundle.labels, params.drift, seed)
            for seed, rows in enumerate(draws[:windows])
        ]
        if none:
            print(line(f"no drift, {windows} windows", none, level), flush=True)
        draws = draws[:detections]
        for corruption in corruptions:
            for strength in STRENGTHS:
                worse = answers_of(predictor, spoiled(hashes, images, corruption, strength))
                found = [
                    compared(clean.of(rows[size:]), worse.of(rows[:size]), bundle.labels, params.drift, seed)
                    for seed, rows in enumerate(draws)
                ]
                print(line(f"{corruption}, strength {strength:g}", found, level), flush=True)
        for share in MIXES if mixes else ():
            found = []
            for seed, rows in enumerate(draws):
                window = swapped(clean.predicted, rows[: len(rows) // 2], size, share, seed)
                found.append(
                    compared(clean.of(rows[len(rows) // 2 :]), clean.of(window), bundle.labels, params.drift, seed)
                )
            print(line(f"class mix, {share:.0%} swapped", found, level), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=200, help="windows without drift")
    parser.add_argument("--detections", type=int, default=40, help="windows of each kind of drift")
    parser.add_argument("--size", type=int, default=150, help="images of a window")
    parser.add_argument("--corruptions", nargs="*", choices=list(CORRUPTIONS), default=list(CORRUPTIONS))
    parser.add_argument("--no-mixes", action="store_true", help="leave out the swapped class mixes")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    params = load_params(Path("params.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder))
        prepare(layout, params)
        measure(
            layout,
            params,
            windows=arguments.windows,
            detections=arguments.detections,
            size=arguments.size,
            corruptions=arguments.corruptions,
            mixes=not arguments.no_mixes,
        )


if __name__ == "__main__":
    main()
