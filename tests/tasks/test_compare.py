"""What ways to learn come to side by side: paired differences, and sentences that claim no more than they show."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.files import write_json
from tasks import compare
from tasks.errors import DataError
from tasks.evaluation.comparison import Outcome, comparison_table, what_is_needed
from tasks.evaluation.paired import difference_interval
from tasks.layout import Layout
from tasks.params import load_params
from tests.deploy.tiny_bundle import COLOURS, colour_image, encoded, write_colour_bundle

PROBE = Outcome("probe", "feature extraction", 0.9, 0.88, 0.92, 0, 0, 0, None, 30, 2.0, 0.001, "")


def outcome(name: str, difference: float, low: float, high: float, **more: object) -> Outcome:
    values = {"name": name, "title": name, "difference": difference, "difference_low": low, "difference_high": high}
    return dataclasses.replace(PROBE, **{**values, "accuracy": 0.9 + difference, "seconds": 40.0, **more})


def test_a_gain_is_claimed_only_where_its_interval_lies_above_zero() -> None:
    needs = what_is_needed([PROBE, outcome("full", 0.031, 0.012, 0.05)])
    assert needs[0] == "This data set needs more than feature extraction: full, 93.1%."
    assert needs[1] == "Fine-tuning brings +3.1 [+1.2, +5.0] points for 38.0 s more: a gain."
    needs = what_is_needed([PROBE, outcome("full", 0.031, -0.002, 0.05)])
    assert needs[0] == "This data set needs feature extraction only: 90.0% after 2.0 s."
    assert needs[1].endswith("no difference that these test images could show.")
    needs = what_is_needed([PROBE, outcome("scratch", -0.2, -0.25, -0.15, seconds=1.0)])
    assert needs[1].endswith("brings -20.0 [-25.0, -15.0] points for 1.0 s less: a loss.")


def test_robustness_is_told_with_its_start_and_as_an_upper_bound() -> None:
    full = outcome("full", 0, 0, 0, robust_accuracy=0.01)
    hardened = outcome("adversarial", -0.02, -0.04, 0, robust_accuracy=0.55)
    needs = what_is_needed([PROBE, full, hardened])
    assert "right on 55.0% of the validation images, without that training on 1.0%; stronger attacks exist" in needs[-1]
    table = comparison_table([PROBE, full, hardened], 0.95)
    assert [line.count("|") for line in table.splitlines()] == [10] * 5
    assert "| 55.0% |" in table


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_a_paired_interval_holds_its_difference_and_turns_round_with_the_models(pairs: list[tuple[bool, bool]]) -> None:
    one, other = (np.array(each, bool) for each in zip(*pairs, strict=True))
    settings = {"confidence": 0.95, "draws": 200, "seed": 0}
    difference, low, high = difference_interval(one, other, **settings)
    assert -1 <= low <= high <= 1
    assert difference == pytest.approx(one.mean() - other.mean())
    back = difference_interval(other, one, **settings)
    assert back == pytest.approx((-difference, -high, -low), abs=1e-9)


@pytest.fixture
def ways(tmp_path: Path, repository: Path) -> Layout:
    """Two ways as the flow leaves them: the same real bundle, of which one is said to have been wrong twice."""
    layout = Layout(tmp_path)
    labels = sorted(COLOURS)
    rows = []
    for label in labels:
        path = layout.raw / label / "0.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(encoded(colour_image(label)))
        rows.append((f"{label}/0.png", label, label))
    for name, wrong in (("probe", 2), ("full", 0)):
        folder = layout.compare_dir / name
        write_colour_bundle(folder / "bundle")
        predicted = [
            labels[(labels.index(label) + (row < wrong)) % len(labels)] for row, (_, label, _) in enumerate(rows)
        ]
        columns = [[row[0] for row in rows]] * 2 + [[row[1] for row in rows], predicted]
        pq.write_table(
            pa.table(columns, names=["path", "sha256", "label", "predicted"]), folder / "predictions.parquet"
        )
        write_json(folder / "evaluate.json", {"accuracy": 1 - wrong / 3, "accuracy_low": 0.2, "accuracy_high": 1.0})
        write_json(folder / "train_head.json", {"method": "probe", "num_classes": 3, "feature_dim": 9})
        stage = {"name": "top", "kept": name == "full", "epochs": 1, "num_parameters": 500}
        write_json(
            folder / "finetune.json", {"kept": ["top"] if stage["kept"] else [], "stages": [stage] * (name == "full")}
        )
        for which, seconds in (("train_head", 1.5), ("finetune", 20.0 if name == "full" else 0.0)):
            write_json(folder / f"{which}_times.json", {"seconds": seconds})
    write_json(layout.compare_ways, [{"name": name, "title": name, "changes": {}} for name in ("probe", "full")])
    return layout


def test_the_recipe_writes_table_page_and_picture(ways: Layout, repository: Path) -> None:
    report = compare.run(ways, seed=0, evaluate=load_params(repository / "params.yaml").evaluate)
    probe, full = report.outcomes
    assert (probe.trained_parameters, full.trained_parameters) == (30, 500)
    assert (probe.seconds, full.seconds) == (1.5, 21.5)
    assert full.difference == pytest.approx(2 / 3)
    assert probe.latency_s > 0
    assert (ways.compare_dir / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert "Fine-tuning brings +66.7" in (ways.compare_dir / "comparison.md").read_text()
    assert "data:image/png;base64" in (ways.compare_dir / "index.html").read_text()


def test_ways_that_answered_other_images_are_not_compared(ways: Layout, repository: Path) -> None:
    path = ways.compare_dir / "full" / "predictions.parquet"
    table = pq.read_table(path)
    pq.write_table(table.slice(0, 2), path)
    with pytest.raises(DataError, match="not answer the same test images"):
        compare.run(ways, seed=0, evaluate=load_params(repository / "params.yaml").evaluate)
    assert json.loads(ways.compare_ways.read_text())
