"""What ways to learn come to side by side: paired differences, and sentences that claim no more than they show."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.files import write_json
from flows.commands.learning import ways_lines
from tasks import compare
from tasks.errors import DataError
from tasks.evaluation.comparison import Missing, Outcome, comparison_table, what_is_needed
from tasks.evaluation.paired import difference_interval
from tasks.layout import Layout
from tasks.params import load_params
from tests.deploy.tiny_bundle import COLOURS, colour_image, encoded, write_colour_bundle

PROBE = Outcome(
    name="probe",
    title="feature extraction",
    accuracy=0.9,
    accuracy_low=0.88,
    accuracy_high=0.92,
    difference=0,
    difference_low=0,
    difference_high=0,
    beaten_by=(),
    robust_accuracy=0.0,
    robust_accuracy_low=0.0,
    robust_accuracy_high=0.02,
    trained_parameters=30,
    seconds=2.0,
    latency_s=0.001,
    note="",
)
RECORD: dict[str, Any] = {"kept": False, "epochs": 3, "num_parameters": 500, "val_accuracy_after": 0.9, "reason": ""}


def outcome(name: str, difference: float, low: float, high: float, **more: object) -> Outcome:
    values = {"name": name, "title": name, "difference": difference, "difference_low": low, "difference_high": high}
    return dataclasses.replace(PROBE, **{**values, "accuracy": 0.9 + difference, "seconds": 40.0, **more})


def needs_of(*outcomes: Outcome, missing: Sequence[Missing] = ()) -> tuple[str, ...]:
    return what_is_needed(outcomes, missing, balanced=False)


def test_a_gain_is_claimed_only_where_its_interval_lies_above_zero() -> None:
    needs = needs_of(dataclasses.replace(PROBE, beaten_by=("full",)), outcome("full", 0.031, 0.012, 0.05))
    assert needs[0] == "This data set needs more than feature extraction: full, 93.1%."
    assert needs[1] == "Fine-tuning brings +3.1 [+1.2, +5.0] points for 38.0 s more: a gain."
    needs = needs_of(PROBE, outcome("full", 0.031, -0.002, 0.05))
    assert needs[0] == "This data set needs feature extraction only: 90.0% after 2.0 s."
    assert needs[1].endswith("no difference that these test images could show.")
    needs = needs_of(PROBE, outcome("scratch", -0.2, -0.25, -0.15, seconds=1.0))
    assert needs[0] == "Feature extraction reaches 90.0% after 2.0 s; there is no fine-tuning to compare it with."
    assert needs[1].endswith("brings -20.0 [-25.0, -15.0] points for 1.0 s less: a loss.")


def test_the_cheapest_way_that_none_beats_is_named_and_not_the_one_with_the_largest_difference() -> None:
    probe = dataclasses.replace(PROBE, beaten_by=("top", "full"))
    top, full = outcome("top", 0.03, 0.01, 0.05), outcome("full", 0.035, 0.01, 0.05, seconds=200.0)
    assert needs_of(probe, top, full)[0] == "This data set needs more than feature extraction: top, 93.0%."
    beaten = dataclasses.replace(top, beaten_by=("full",))
    assert needs_of(probe, beaten, full)[0] == "This data set needs more than feature extraction: full, 93.5%."
    by_attacks = dataclasses.replace(top, beaten_by=("adversarial",))
    assert needs_of(probe, by_attacks, full)[0].endswith(": top, 93.0%."), "it is there for another purpose"


def test_robustness_is_told_with_its_start_its_interval_and_as_an_upper_bound() -> None:
    full = outcome("full", 0, 0, 0, robust_accuracy=0.01, robust_accuracy_low=0.002, robust_accuracy_high=0.05)
    hardened = outcome(
        "adversarial", -0.02, -0.04, 0, robust_accuracy=0.55, robust_accuracy_low=0.45, robust_accuracy_high=0.65
    )
    assert needs_of(PROBE, full, hardened)[-1] == (
        "Under attack it is right on 55.0% (45.0% to 65.0%) of the test images, without that training on "
        "1.0% (0.2% to 5.0%); stronger attacks exist."
    )
    missing = [Missing("scratch", "from random weights", "dropped: it diverged")]
    outcomes = [PROBE, full, hardened]
    table = comparison_table(outcomes, missing, 0.95, balanced=False)
    assert [line.count("|") for line in table.splitlines()] == [10] * 6
    assert "| 55.0% (45.0% to 65.0%) |" in table
    assert table.splitlines()[-1].startswith("| from random weights | – |")
    report = {"balanced": True, "outcomes": [dataclasses.asdict(each) for each in outcomes]}
    lines = ways_lines({**report, "missing": [dataclasses.asdict(each) for each in missing]})
    assert lines[0].startswith("way                  balanced  interval")
    assert "55.0% (45.0% to 65.0%)" in lines[3]
    assert lines[4].startswith("from random weights  –")
    assert lines[4].endswith("dropped: it diverged")


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from("abc")), min_size=1, max_size=40), st.booleans()
)
def test_a_paired_interval_holds_its_difference_and_turns_round_with_the_models(
    rows: list[tuple[bool, bool, str]], balanced: bool
) -> None:
    one, other = (np.array([row[column] for row in rows], bool) for column in (0, 1))
    labels = np.array([row[2] for row in rows], np.str_)
    settings: dict[str, Any] = {"balanced": balanced, "confidence": 0.95, "draws": 200, "seed": 0}
    difference, low, high = difference_interval(one, other, labels, **settings)
    assert -1 <= low <= high <= 1
    by_class = [one[labels == label].mean() - other[labels == label].mean() for label in np.unique(labels)]
    assert difference == pytest.approx(np.mean(by_class) if balanced else one.mean() - other.mean())
    back = difference_interval(other, one, labels, **settings)
    assert back == pytest.approx((-difference, -high, -low), abs=1e-9)


def write_way(
    layout: Layout, rows: Sequence[tuple[str, str]], name: str, wrong: Sequence[int], tuned: dict[str, Any]
) -> None:
    """A way as the flow leaves it: a real bundle, and what it is said to have answered to (path, label)."""
    labels, folder = sorted(COLOURS), layout.compare_dir / name
    write_colour_bundle(folder / "bundle")
    predicted = [labels[(labels.index(label) + (row in wrong)) % len(labels)] for row, (_, label) in enumerate(rows)]
    paths, truth = ([row[column] for row in rows] for column in (0, 1))
    table = pa.table([paths, paths, truth, predicted], names=["path", "sha256", "label", "predicted"])
    pq.write_table(table, folder / "predictions.parquet")
    shares = {"accuracy": 1 - len(wrong) / len(rows), "balanced_accuracy": 0.5}
    write_json(folder / "evaluate.json", shares | {f"{key}_{end}": 0.5 for key in shares for end in ("low", "high")})
    withstood = {"accuracy": 0.25, "accuracy_low": 0.1, "accuracy_high": 0.5}
    write_json(folder / "withstand.json", {"num_images": len(rows), "epsilon": 4.0, "accuracy": withstood})
    write_json(folder / "train_head.json", {"method": "probe", "num_classes": 3, "feature_dim": 9})
    write_json(folder / "finetune.json", {"kept": [], "stages": [], "reason": "finetune.enabled is false", **tuned})
    for which, seconds in (("train_head", 1.5), ("finetune", 0.0 if name == "probe" else 20.0)):
        write_json(folder / f"{which}_times.json", {"seconds": seconds})
    known = json.loads(layout.compare_ways.read_text()) if layout.compare_ways.exists() else []
    changes = {"finetune.enabled": "false" if name == "probe" else "true"}
    write_json(layout.compare_ways, [*known, {"name": name, "title": name, "changes": changes}])


def write_pictures(layout: Layout, counts: Mapping[str, int]) -> list[tuple[str, str]]:
    """So many files of each colour: (path, label)."""
    rows = [(f"{label}/{number}.png", label) for label, count in counts.items() for number in range(count)]
    for path, label in rows:
        (layout.raw / path).parent.mkdir(parents=True, exist_ok=True)
        (layout.raw / path).write_bytes(encoded(colour_image(label)))
    return rows


def compared(layout: Layout, repository: Path, *, balanced: bool | Literal["auto"] = "auto") -> compare.CompareReport:
    params = load_params(repository / "params.yaml")
    gate = params.gate.model_copy(update={"balanced": balanced})
    return compare.run(layout, seed=0, evaluate=params.evaluate, gate=gate)


@pytest.fixture
def ways(tmp_path: Path) -> Layout:
    """Two ways, of which the probe is said to have been wrong twice in three test images."""
    layout = Layout(tmp_path)
    rows = write_pictures(layout, dict.fromkeys(sorted(COLOURS), 1))
    write_way(layout, rows, "probe", [0, 1], {})
    write_way(
        layout, rows, "full", [], {"kept": ["top"], "reason": None, "stages": [{**RECORD, "name": "top", "kept": True}]}
    )
    return layout


def test_the_recipe_writes_table_page_and_picture(ways: Layout, repository: Path) -> None:
    report = compared(ways, repository)
    probe, full = report.outcomes
    assert (probe.trained_parameters, full.trained_parameters) == (30, 500)
    assert (probe.seconds, full.seconds) == (1.5, 21.5)
    assert full.difference == pytest.approx(2 / 3)
    assert probe.latency_s > 0
    assert (probe.robust_accuracy, probe.robust_accuracy_low, probe.robust_accuracy_high) == (0.25, 0.1, 0.5)
    assert not report.balanced
    assert (ways.compare_dir / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "Fine-tuning brings +66.7" in (ways.compare_dir / "comparison.md").read_text()
    assert "data:image/png;base64" in (ways.compare_dir / "index.html").read_text()


def test_ways_that_answered_other_images_are_not_compared(ways: Layout, repository: Path) -> None:
    path = ways.compare_dir / "full" / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 2), path)
    with pytest.raises(DataError, match="not answer the same test images"):
        compared(ways, repository)
    assert json.loads(ways.compare_ways.read_text())


def test_ways_that_were_not_tried_or_diverged_have_a_row_that_says_so_and_no_numbers(
    ways: Layout, repository: Path
) -> None:
    rows = [(f"{label}/0.png", label) for label in sorted(COLOURS)]
    few = "20 validation images cannot judge a stage: finetune.min_val_images is 60"
    write_way(ways, rows, "top", [0, 1], {"reason": few})
    diverged = {
        **RECORD,
        "name": "scratch",
        "val_accuracy_after": None,
        "reason": "dropped: it diverged, the loss is nan",
    }
    write_way(ways, rows, "scratch", [0, 1], {"stages": [diverged], "reason": "no stage was kept"})
    costly = {**RECORD, "name": "adversarial", "epochs": 0, "reason": "not tried: finetune.max_tflop affords 3 steps"}
    kept = {**RECORD, "name": "top", "kept": True}
    write_way(ways, rows, "adversarial", [], {"stages": [kept, costly], "kept": ["top"], "reason": None})
    report = compared(ways, repository)
    assert [each.name for each in report.outcomes] == ["probe", "full"]
    assert {each.name: each.reason for each in report.missing} == {
        "top": f"not tried: {few}",
        "scratch": "dropped: it diverged, the loss is nan",
        "adversarial": "not tried: finetune.max_tflop affords 3 steps",
    }
    assert f"Fine-tuning the top layers came to nothing (not tried: {few})." in report.needs
    assert (
        "Training from random weights for as long came to nothing (dropped: it diverged, the loss is nan)."
        in report.needs
    )
    assert not any("for as long brings" in sentence for sentence in report.needs)
    page, table = ((ways.compare_dir / name).read_text() for name in ("index.html", "comparison.md"))
    assert few in page
    assert "| scratch | – | – | – | – | – | – | – | dropped: it diverged, the loss is nan |" in table


def test_a_stage_that_diverged_is_not_said_to_be_dropped_by_validation(ways: Layout, repository: Path) -> None:
    stages = [
        {**RECORD, "name": "top", "val_accuracy_after": None, "reason": "dropped: the loss is nan"},
        {**RECORD, "name": "rest", "epochs": 0, "reason": "not tried: stage top was not kept"},
    ]
    write_json(ways.compare_dir / "full" / "finetune.json", {"kept": [], "stages": stages, "reason": "none"})
    assert compared(ways, repository).outcomes[1].note == "top diverged: the probe ships"
    stages = [
        {**RECORD, "name": "top", "kept": True},
        {**RECORD, "name": "rest", "epochs": 0, "reason": "not tried: finetune.max_tflop affords 3 steps"},
    ]
    write_json(ways.compare_dir / "full" / "finetune.json", {"kept": ["top"], "stages": stages, "reason": None})
    note = compared(ways, repository).outcomes[1].note
    assert note == "rest not tried: finetune.max_tflop affords 3 steps"


def test_uneven_classes_are_compared_as_the_gate_judges_them(tmp_path: Path, repository: Path) -> None:
    """Right on all of the large class and none of the small: accurate, and no better than a guess."""
    layout = Layout(tmp_path)
    large, small = sorted(COLOURS)[:2]
    rows = write_pictures(layout, {large: 40, small: 10})
    write_way(layout, rows, "probe", range(40, 50), {})
    stages = [{**RECORD, "name": "top", "kept": True}]
    write_way(layout, rows, "top", range(10), {"kept": ["top"], "stages": stages, "reason": None})
    report = compared(layout, repository)
    probe, top = report.outcomes
    assert report.balanced
    assert probe.accuracy == 0.5
    assert top.difference == pytest.approx(0.375)
    assert (probe.beaten_by, top.beaten_by) == (("top",), ())
    assert "balanced accuracy" in report.needs[-1]
    assert "balanced accuracy" in (layout.compare_dir / "comparison.md").read_text()
    plain = compared(layout, repository, balanced=False)
    assert plain.outcomes[1].difference == 0
    assert plain.outcomes[0].beaten_by == ()
    assert plain.outcomes[0].accuracy == 0.8
