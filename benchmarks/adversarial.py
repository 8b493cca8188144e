"""What the adversarial stage brings and costs, on the sample's handwritten digits with the embedded backbone.

    python -m benchmarks.adversarial --epochs 5

runs the stages up to the probe in a temporary workspace, then ``finetune`` with the adversarial stage alone, and prints
accuracy on test images, which neither training nor the choice of an epoch has seen: as they are, under FGSM, PGD-20,
PGD-50 from five starts and, with the extra ``robust``, AutoAttack, within the epsilon of params.yaml; and the seconds.
The accuracies are upper bounds: stronger attacks exist.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import tempfile
import time
from pathlib import Path

from deploy.machine import available_cores
from flows.sample import lay_out_sample
from tasks import finetune
from tasks.__main__ import run_stage
from tasks.attack import attacked_on, classifier, measure, test_images
from tasks.layout import Layout
from tasks.params import load_params
from tasks.training.staged import deterministic_torch

BEFORE = ("fetch_backbone", "index_images", "validate_data", "cache_features", "train_head")


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
        data, size = test_images(layout), params.finetune.batch_size
        work = {"num_images": arguments.images, "epsilon": adversarial.epsilon / 255, "seed": params.seed}
        work |= {"batch_size": size, "confidence": params.evaluate.confidence}
        compute = attacked_on(settings)
        with deterministic_torch(available_cores(), strict=compute.device == "cpu"):
            found = {name: measure(classifier(layout, *files, compute), data, **work) for name, files in models.items()}
    print(f"epsilon {adversarial.epsilon:g}/255, {adversarial.attack}, {report.stages[-1].reason}\n")
    names = next(iter(found.values()))
    print(f"| | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
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
