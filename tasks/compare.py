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
from tasks.evaluation.comparison import Outcome, comparison_table, draw_comparison, what_is_needed
from tasks.evaluation.page import inline_png, render_page
from tasks.evaluation.paired import difference_interval

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tasks.layout import Layout
    from tasks.params import EvaluateParams

LATENCY_PICTURES = 8
ROBUST = "pgd_20"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompareReport:
    """The ways, in order, and the sentences; seconds and latencies are among them, so this is no stage's report.

    Args:
        num_test: Test images that all ways answered.
        confidence: Of the intervals.
        outcomes: One a way.
        needs: What the data set needs, in sentences.
    """

    num_test: int
    confidence: float
    outcomes: tuple[Outcome, ...]
    needs: tuple[str, ...]


def run(layout: Layout, *, seed: int, evaluate: EvaluateParams) -> CompareReport:
    """Writes data/reports/compare/index.html, comparison.md and comparison.png.

    Raises:
        DataError: If the ways did not answer the same test images.
    """
    ways = json.loads(layout.compare_ways.read_text(encoding="utf-8"))
    folders = {way["name"]: layout.compare_dir / way["name"] for way in ways}
    paths, answers = _answers(folders)
    latencies = _latencies(layout, folders, paths, evaluate.latency_runs)
    baseline = "probe" if "probe" in folders else ways[0]["name"]
    outcomes = tuple(
        _outcome(
            way,
            folders[way["name"]],
            _robustness(folders, way["name"]),
            difference_interval(
                answers[way["name"]],
                answers[baseline],
                confidence=evaluate.confidence,
                draws=evaluate.draws,
                seed=seed,
            ),
            latencies[way["name"]],
        )
        for way in ways
    )
    report = CompareReport(len(paths), evaluate.confidence, outcomes, what_is_needed(outcomes))
    picture = layout.compare_dir / "comparison.png"
    draw_comparison(picture, outcomes, report.num_test, report.confidence)
    table = comparison_table(outcomes, report.confidence)
    write_text(layout.compare_dir / "comparison.md", "\n\n".join([table, *report.needs]) + "\n")
    page = render_page("compare.html", report=report, picture=inline_png(picture.read_bytes()))
    write_text(layout.compare_dir / "index.html", page)
    return report


def _answers(folders: dict[str, Path]) -> tuple[list[str], dict[str, NDArray[np.bool_]]]:
    """Paths of the test images, and which of them each way has right, (N,).

    Raises:
        DataError: If they are not the same images.
    """
    found: dict[str, NDArray[np.bool_]] = {}
    seen: list[list[tuple[str, str]]] = []
    paths: list[str] = []
    for name, folder in folders.items():
        table = pq.read_table(folder / "predictions.parquet").to_pydict()
        seen.append(list(zip(table["sha256"], table["label"], strict=True)))
        found[name] = np.array(table["label"], np.str_) == np.array(table["predicted"], np.str_)
        paths = table["path"]
    if any(each != seen[0] for each in seen):
        raise DataError("The ways did not answer the same test images. Run `tanuki compare` again.")
    return paths, found


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
    robust_accuracy: float | None,
    difference: tuple[float, float, float],
    latency_s: float,
) -> Outcome:
    """A way's row."""
    head, tuned, evaluated = (_report(folder, stage) for stage in ("train_head", "finetune", "evaluate"))
    return Outcome(
        name=way["name"],
        title=way["title"],
        accuracy=evaluated["accuracy"],
        accuracy_low=evaluated["accuracy_low"],
        accuracy_high=evaluated["accuracy_high"],
        difference=difference[0],
        difference_low=difference[1],
        difference_high=difference[2],
        robust_accuracy=robust_accuracy,
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
    if "scratch" in tuned["kept"]:
        return f"{tuned['stages'][0]['steps']:,} steps"
    dropped = [stage["name"] for stage in tuned["stages"] if not stage["kept"] and stage["epochs"]]
    if dropped and not tuned["kept"]:
        return f"{' and '.join(dropped)} dropped by validation: the probe ships"
    return f"{' and '.join(dropped)} dropped by validation" if dropped else ""


def _robustness(folders: dict[str, Path], name: str) -> float | None:
    """Accuracy on attacked validation images: the adversarial stage measures its start and its end."""
    if "adversarial" not in folders or name not in ("adversarial", "full"):
        return None
    stages: Sequence[dict[str, Any]] = _report(folders["adversarial"], "finetune")["stages"]
    record = next((stage for stage in stages if stage["name"] == "adversarial"), None)
    if record is None or record["robustness_before"] is None:
        return None
    found = record["robustness_after"] if name == "adversarial" and record["kept"] else record["robustness_before"]
    return float(found[ROBUST]["accuracy"])
