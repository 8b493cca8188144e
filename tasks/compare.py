"""Recipe compare: what each way to learn came to, side by side: one table, one picture, and what this data set needs.

No stage: `tanuki compare` runs it on what its experiments left in data/reports/compare/. All ways answered the same
test images, so differences are paired; latency is measured here, all bundles in turns.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from deploy.bundle import read_bundle
from deploy.files import write_text
from deploy.latency import measure_latency
from deploy.predictor import Predictor
from tasks.data.image_store import open_images
from tasks.errors import DataError
from tasks.evaluation.comparison import Missing, Outcome, comparison_table, draw_comparison, what_is_needed
from tasks.evaluation.metrics import Accuracy
from tasks.evaluation.page import inline_png, render_page
from tasks.evaluation.paired import difference_interval, is_uneven
from tasks.training.schedule import SCRATCH

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tasks.layout import Layout
    from tasks.params import EvaluateParams, GateParams

    Interval = tuple[float, float, float]

LATENCY_PICTURES = 8

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareReport:
    """The ways, in order, and the sentences; seconds and latencies are among them, so this is no stage's report.

    Args:
        num_test: Test images that all ways answered.
        confidence: Of the intervals.
        balanced: Accuracies are balanced ones, as the gate judges.
        outcomes: One a way.
        missing: The ways that trained nothing.
        needs: What the data set needs, in sentences.
    """

    num_test: int
    confidence: float
    balanced: bool
    outcomes: tuple[Outcome, ...]
    missing: tuple[Missing, ...]
    needs: tuple[str, ...]


def run(layout: Layout, *, seed: int, evaluate: EvaluateParams, gate: GateParams) -> CompareReport:
    """Writes data/reports/compare/index.html, comparison.md and comparison.png.

    Raises:
        DataError: If the ways did not answer the same test images.
    """
    ways = json.loads(layout.compare_ways.read_text(encoding="utf-8"))
    reasons = {
        way["name"]: _nothing_trained(way, _report(layout.compare_dir / way["name"], "finetune")) for way in ways
    }
    missing = tuple(Missing(way["name"], way["title"], reason) for way in ways if (reason := reasons[way["name"]]))
    ways = [way for way in ways if not reasons[way["name"]]]
    folders = {way["name"]: layout.compare_dir / way["name"] for way in ways}
    paths, labels, answers = _answers(folders)
    latencies = _latencies(layout, folders, paths, evaluate.latency_runs)
    balanced = is_uneven(labels) if gate.balanced == "auto" else gate.balanced
    settings: dict[str, Any] = {"confidence": evaluate.confidence, "draws": evaluate.draws, "seed": seed}
    against = {  # of the first to the second
        (name, other): difference_interval(answers[name], answers[other], labels, balanced=balanced, **settings)
        for name in folders
        for other in folders
    }
    outcomes = tuple(
        _outcome(
            way,
            folders[way["name"]],
            against[way["name"], "probe"],
            beaten_by=tuple(other for other in folders if against[other, way["name"]][1] > 0),
            latency_s=latencies[way["name"]],
            balanced=balanced,
        )
        for way in ways
    )
    needs = what_is_needed(outcomes, missing, balanced=balanced)
    report = CompareReport(len(paths), evaluate.confidence, balanced, outcomes, missing, needs)
    picture = layout.compare_dir / "comparison.png"
    draw_comparison(picture, outcomes, report.num_test, report.confidence, balanced=balanced)
    table = comparison_table(outcomes, missing, report.confidence, balanced=balanced)
    write_text(layout.compare_dir / "comparison.md", "\n\n".join([table, *report.needs]) + "\n")
    page = render_page("compare.html", report=report, picture=inline_png(picture.read_bytes()))
    write_text(layout.compare_dir / "index.html", page)
    return report


def _nothing_trained(way: dict[str, Any], tuned: dict[str, Any]) -> str | None:
    """Why a way that was to train the network did not come to it, so that another way's model is in its bundle."""
    if way["changes"].get("finetune.enabled") != "true":
        return None
    stages: list[dict[str, Any]] = tuned["stages"]
    if not stages:
        return f"not tried: {tuned['reason']}"
    own = [stage for stage in stages if stage["name"] == way["name"]] or stages
    diverged = way["name"] == SCRATCH and not own[0]["kept"]  # others fall back on validation, and are judged with that
    return str(own[0]["reason"]) if diverged or not any(stage["epochs"] for stage in own) else None


def _answers(folders: dict[str, Path]) -> tuple[list[str], NDArray[np.str_], dict[str, NDArray[np.bool_]]]:
    """Paths and labels of the test images, (N,), and which of them each way has right, (N,).

    Raises:
        DataError: If they are not the same images.
    """
    found: dict[str, NDArray[np.bool_]] = {}
    seen: list[list[tuple[str, str]]] = []
    paths: list[str] = []
    labels = np.array([], np.str_)
    for name, folder in folders.items():
        table = pq.read_table(folder / "predictions.parquet").to_pydict()
        seen.append(list(zip(table["sha256"], table["label"], strict=True)))
        paths, labels = table["path"], np.array(table["label"], np.str_)
        found[name] = labels == np.array(table["predicted"], np.str_)
    if any(each != seen[0] for each in seen):
        raise DataError("The ways did not answer the same test images. Run `tanuki compare` again.")
    return paths, labels, found


def _latencies(layout: Layout, folders: dict[str, Path], paths: list[str], runs: int) -> dict[str, float]:
    """Median seconds of one picture by way, measured in turns."""
    store = open_images(layout.raw)
    few = [store.file(paths[row]).read_bytes() for row in np.linspace(0, len(paths) - 1, LATENCY_PICTURES).astype(int)]
    predictors = [Predictor(read_bundle(folder / "bundle")) for folder in folders.values()]
    try:
        found = measure_latency(predictors, few, runs=runs)
    finally:
        for predictor in predictors:
            predictor.close()
    return {name: each.p50_s for name, each in zip(folders, found, strict=True)}


def _outcome(
    way: dict[str, Any],
    folder: Path,
    difference: Interval,
    *,
    beaten_by: tuple[str, ...],
    latency_s: float,
    balanced: bool,
) -> Outcome:
    """A way's row."""
    head, tuned, evaluated = (_report(folder, stage) for stage in ("train_head", "finetune", "evaluate"))
    robust = Accuracy(**_report(folder, "withstand")["accuracy"])
    accuracy = "balanced_accuracy" if balanced else "accuracy"
    return Outcome(
        name=way["name"],
        title=way["title"],
        accuracy=evaluated[accuracy],
        accuracy_low=evaluated[f"{accuracy}_low"],
        accuracy_high=evaluated[f"{accuracy}_high"],
        difference=difference[0],
        difference_low=difference[1],
        difference_high=difference[2],
        beaten_by=beaten_by,
        robust_accuracy=robust.accuracy,
        robust_accuracy_low=robust.accuracy_low,
        robust_accuracy_high=robust.accuracy_high,
        trained_parameters=_trained_parameters(head, tuned),
        seconds=sum(
            json.loads((folder / f"{stage}_times.json").read_text())["seconds"] for stage in ("train_head", "finetune")
        ),
        latency_s=latency_s,
        note=_note(head, tuned),
    )


def _report(folder: Path, stage: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))
    return report


def _trained_parameters(head: dict[str, Any], tuned: dict[str, Any]) -> int:
    """Numbers of what ships that were trained on these images."""
    moved: list[int] = [stage["num_parameters"] for stage in tuned["stages"] if stage["kept"]]
    of_head: int = head["num_classes"] * (head["feature_dim"] + 1) if head["method"] == "probe" else 0
    return max(of_head, *moved, 0)


def _note(head: dict[str, Any], tuned: dict[str, Any]) -> str:
    """What a reader should know of how it came about."""
    if head["method"] == "own_classes":
        return "its own classifier, by the names of the classes"
    if head["method"] == "prototypes":
        same, num = head["num_same_names"], head["num_classes"]
        return f"class prototypes: {same} of {num} classes bear a name that it knows"
    if SCRATCH in tuned["kept"]:
        return f"{tuned['stages'][0]['steps']:,} steps"
    dropped = [stage for stage in tuned["stages"] if not stage["kept"] and stage["epochs"]]
    fates = {  # of what diverged nothing was left to judge
        "dropped by validation": [stage["name"] for stage in dropped if stage["val_accuracy_after"] is not None],
        "diverged": [stage["name"] for stage in dropped if stage["val_accuracy_after"] is None],
    }
    told = [f"{' and '.join(names)} {fate}" for fate, names in fates.items() if names]
    untried = [stage for stage in tuned["stages"] if not stage["epochs"]]
    told += [f"{each['name']} {each['reason']}" for each in untried if not each["reason"].endswith("was not kept")]
    ships = ": the probe ships" if dropped and not tuned["kept"] else ""
    return "; ".join(told) + ships
