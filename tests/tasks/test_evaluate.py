"""Evaluation: what ships is what is measured, and measuring twice writes the same bytes."""

import csv
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from PIL import Image
from sklearn import metrics as sklearn_metrics

from deploy.bundle import read_bundle
from deploy.errors import BundleError
from deploy.files import write_json
from deploy.predictor import Predictor
from flows.shards import bring_into
from tasks.data.manifest import read_manifest, write_manifest
from tasks.errors import DataError
from tasks.evaluate import EvaluateReport, run
from tasks.evaluation.metrics import (
    balanced_accuracy,
    class_scores,
    expected_calibration_error,
    macro_f1,
    negative_log_likelihood,
    reliability,
    wilson_interval,
)
from tasks.evaluation.plots import Mistake, draw_confusion, draw_mistakes
from tasks.layout import Layout
from tasks.params import Params, load_params
from tests.tasks.evaluate_workspace import NAMES, build_workspace
from tests.tasks.test_evaluation import Page

NUM_TEST = 133


@pytest.fixture(scope="module")
def params(repository: Path) -> Params:
    """The defaults, with fewer corrupted images: these tests ask whether it is told, not how robust digits are."""
    params = load_params(repository / "params.yaml")
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"robustness_images": 40})})


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, params: Params) -> tuple[Layout, EvaluateReport]:
    layout = Layout(tmp_path_factory.mktemp("evaluate"))
    build_workspace(layout, params)
    return layout, run(layout, seed=params.seed, evaluate=params.evaluate)


@pytest.fixture
def layout(evaluated: tuple[Layout, EvaluateReport], tmp_path: Path) -> Layout:
    """A copy that a test may spoil."""
    shutil.copytree(evaluated[0].root, tmp_path / "workspace")
    return Layout(tmp_path / "workspace")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_report_agrees_with_what_the_bundle_answers(evaluated: tuple[Layout, EvaluateReport]) -> None:
    layout, report = evaluated
    images = read_manifest(layout.accepted)
    test = images[images["split"] == "test"]
    with Predictor(read_bundle(layout.bundle_dir)) as predictor:
        answers = predictor.predict_files([layout.raw / path for path in test["path"]])
    right = [answer.label == label for answer, label in zip(answers, test["label"], strict=True)]
    assert report.num_test == len(test) == NUM_TEST
    assert report.num_classes == 10
    assert report.accuracy == pytest.approx(np.mean(right), abs=1e-6)
    assert 0.85 < report.accuracy < 1
    assert report.accuracy_low < report.accuracy < report.accuracy_high


def test_probe_and_bundle_agree_and_beat_the_prototypes(evaluated: tuple[Layout, EvaluateReport]) -> None:
    """The bundle is the probe's head here, so only the float16 of the stored features is between them."""
    _, report = evaluated
    assert report.linear_probe.accuracy == pytest.approx(report.accuracy, abs=1.5 / NUM_TEST)
    assert 0.5 < report.class_prototypes.accuracy < report.accuracy
    assert report.finetuned is None
    assert report.finetuned_reason == "only 60 val images"


def test_a_fine_tuned_network_is_the_bundle_and_robustness_can_be_left_out(layout: Layout, params: Params) -> None:
    share = {"accuracy": 0.625, "accuracy_low": 0.5, "accuracy_high": 0.75}
    hardened = {"kept": True, "num_attacked": 60, "epsilon": 4 / 255, "robustness_after": {"pgd_20": share}}
    kept = {"kept": ["top", "adversarial"], "reason": None, "stages": [{"kept": True}, hardened]}
    write_json(layout.finetuned_dir / "finetuned.json", kept)
    without = params.evaluate.model_copy(update={"robustness_images": 0})
    report = run(layout, seed=params.seed, evaluate=without)
    assert report.robustness is None
    assert rows_of(layout.robustness) == []
    assert "spoiled" not in layout.model_card.read_text(encoding="utf-8") + layout.evaluation_page.read_text("utf-8")
    assert report.finetuned is not None
    assert report.finetuned.accuracy == report.accuracy
    assert report.finetuned_reason is None
    card = (layout.evaluation_dir / "model_card.md").read_text(encoding="utf-8")
    assert "fine-tuned (top, adversarial)" in card
    assert (
        "of 60 validation images, changed by at most 4 of 255 in each value, it has right pgd_20 62.5% (50.0% to"
        in card
    )


def test_two_runs_write_the_same_bytes_but_for_the_times(
    evaluated: tuple[Layout, EvaluateReport], layout: Layout, params: Params
) -> None:
    assert run(layout, seed=params.seed, evaluate=params.evaluate) == evaluated[1]
    names = {path.name for path in layout.evaluation_dir.iterdir()}
    assert names == {
        "index.html",
        "predictions.parquet",
        "robustness.csv",
        "slices.csv",
        "confusion.csv",
        "reliability.csv",
        "per_class.csv",
        "model_card.md",
        "confusion.png",
        "reliability.png",
        "worst_mistakes.png",
        "latency.json",
    }
    for name in names - {"latency.json"}:
        assert (layout.evaluation_dir / name).read_bytes() == (evaluated[0].evaluation_dir / name).read_bytes(), name


def test_the_files_agree_with_the_report(evaluated: tuple[Layout, EvaluateReport], params: Params) -> None:
    layout, report = evaluated
    table = pq.read_table(layout.evaluation_dir / "predictions.parquet")
    labels = json.loads(table.schema.metadata[b"tanuki.labels"])
    assert labels == sorted(NAMES)
    assert table.column_names == ["path", "sha256", "label", "predicted", "probabilities"]
    rows = table.to_pylist()
    probabilities = np.array([row["probabilities"] for row in rows])
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
    assert [labels[index] for index in probabilities.argmax(axis=1)] == [row["predicted"] for row in rows]

    pairs = [(row["actual"], row["predicted"]) for row in rows_of(layout.evaluation_dir / "confusion.csv")]
    assert pairs == [(row["label"], row["predicted"]) for row in rows]
    assert np.mean([actual == predicted for actual, predicted in pairs]) == pytest.approx(report.accuracy, abs=1e-6)

    classes = rows_of(layout.evaluation_dir / "per_class.csv")
    assert [row["label"] for row in classes] == labels
    assert {row["label"]: int(row["num_test"]) for row in classes} == Counter(actual for actual, _ in pairs)
    slices = rows_of(layout.evaluation_dir / "slices.csv")  # all pictures are 8 by 8, in a folder a class
    assert {row["kind"] for row in slices} == {"brightness"}
    assert sum(int(row["num_images"]) for row in slices) == NUM_TEST
    bins = rows_of(layout.evaluation_dir / "reliability.csv")
    assert sum(int(row["count"]) for row in bins) == NUM_TEST
    latency = json.loads((layout.evaluation_dir / "latency.json").read_text())
    assert 0 < latency["p50_s"] <= latency["p95_s"]
    assert latency["runs"] == params.evaluate.latency_runs
    assert latency["images_per_s"] > 1 / latency["p95_s"] / 10


def test_the_answers_to_corrupted_pictures_are_kept_for_the_gate(
    evaluated: tuple[Layout, EvaluateReport], params: Params
) -> None:
    layout, report = evaluated
    rows = rows_of(layout.robustness)
    assert len(rows) == 7 * params.evaluate.robustness_images
    assert report.robustness is not None
    for corruption, found in {**report.robustness.corruptions, "none": report.robustness.clean}.items():
        right = [row["label"] == row["predicted"] for row in rows if row["corruption"] == corruption]
        assert np.mean(right) == pytest.approx(found.accuracy, abs=1e-6)
        assert found.accuracy_low < found.accuracy < found.accuracy_high or found.accuracy in (0, 1)
    mean = report.robustness.mean
    assert mean.accuracy_low < mean.accuracy < mean.accuracy_high
    assert mean.accuracy < report.robustness.clean.accuracy
    told = f"spoiled, {mean.accuracy:.1%} ({mean.accuracy_low:.1%} to {mean.accuracy_high:.1%}): "
    assert told in layout.model_card.read_text(encoding="utf-8")
    clean = {row["path"]: row["predicted"] for row in rows if row["corruption"] == "none"}
    answered = pq.read_table(layout.predictions).to_pylist()
    assert clean == {row["path"]: row["predicted"] for row in answered if row["path"] in clean}


def test_the_page_is_one_file_that_shows_every_class_and_the_mistakes(
    evaluated: tuple[Layout, EvaluateReport],
) -> None:
    layout, report = evaluated
    text = layout.evaluation_page.read_text(encoding="utf-8")
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert "://" not in text.split("</style>")[1].replace("file:pool", "")
    assert 'name="viewport"' in text
    for label in NAMES:
        assert f"<td>{escape(label)}</td>" in text
    assert '<b>&"' not in text
    num_wrong = round(report.num_test * (1 - report.accuracy))
    assert text.count("<li><img") == min(num_wrong, 18)
    assert f"{report.accuracy:.1%}" in text
    assert report.bundle_digest in text
    assert str(layout.root) not in text
    assert len(text) < 600_000


def test_the_model_card_says_what_matters(evaluated: tuple[Layout, EvaluateReport]) -> None:
    layout, report = evaluated
    card = (layout.evaluation_dir / "model_card.md").read_text(encoding="utf-8")
    for part in (
        report.bundle_digest,
        f"{report.accuracy:.1%} | {report.accuracy_low:.1%} to {report.accuracy_high:.1%}",
        "Drei\\|3",
        '&lt;b>&"8"',
        "七",
        "not stated: find out before you ship",
        "not kept: only 60 val images",
        "Fewer than 30 test images",
        "central square",
        "| precision | fp32 |",
        "| of the backbone | it is cut by the generic rule |",
        "spoiled",
    ):
        assert part in card, part
    assert str(layout.root) not in card


@pytest.mark.parametrize("name", ["confusion.png", "reliability.png", "worst_mistakes.png"])
def test_the_pictures_open_and_carry_no_date(evaluated: tuple[Layout, EvaluateReport], name: str) -> None:
    with Image.open(evaluated[0].evaluation_dir / name) as picture:
        picture.load()
        assert min(picture.size) > 200
        assert set(picture.info) <= {"dpi"}


def test_many_classes_and_no_mistakes_are_drawn_too(tmp_path: Path) -> None:
    labels = [f"a class with quite a long name, number {index} of many" for index in range(70)]
    draw_confusion(tmp_path / "many.png", np.eye(70, dtype=np.int64), labels)
    draw_mistakes(tmp_path / "none.png", [])
    image = np.zeros((1, 900, 3), dtype=np.uint8)
    draw_mistakes(tmp_path / "one.png", [Mistake(image, "a_$b$ " * 20, labels[0], 0.99)])
    for path in tmp_path.iterdir():
        with Image.open(path) as picture:
            assert min(picture.size) > 100


def test_images_in_shards_get_the_same_answers(layout: Layout, params: Params) -> None:
    run(layout, seed=params.seed, evaluate=params.evaluate)
    answers, mistakes = layout.predictions.read_bytes(), (layout.evaluation_dir / "worst_mistakes.png").read_bytes()
    bring_into(layout.raw, "shards", shard_bytes=10_000)
    run(layout, seed=params.seed, evaluate=params.evaluate)
    assert layout.predictions.read_bytes() == answers
    assert (layout.evaluation_dir / "worst_mistakes.png").read_bytes() == mistakes


def test_a_test_image_that_went_missing_is_named(layout: Layout, params: Params) -> None:
    images = read_manifest(layout.accepted)
    gone = layout.raw / images.loc[images["split"] == "test", "path"].iloc[3]
    gone.unlink()
    with pytest.raises(DataError, match=rf"1 images cannot be read: .*{gone.name}.*dvc checkout"):
        run(layout, seed=params.seed, evaluate=params.evaluate)


def test_without_test_images_there_is_nothing_to_measure(layout: Layout, params: Params) -> None:
    images = read_manifest(layout.accepted)
    write_manifest(layout.accepted, images[images["split"] != "test"])
    with pytest.raises(DataError, match="no test images"):
        run(layout, seed=params.seed, evaluate=params.evaluate)


def test_a_class_that_the_bundle_does_not_know_is_named(layout: Layout, params: Params) -> None:
    images = read_manifest(layout.accepted)
    images.loc[images.index[images["split"] == "test"][:2], "label"] = "zehn"
    write_manifest(layout.accepted, images)
    with pytest.raises(DataError, match="does not know 1 classes of the test images: 'zehn'"):
        run(layout, seed=params.seed, evaluate=params.evaluate)


def test_a_damaged_bundle_is_not_measured(layout: Layout, params: Params) -> None:
    (layout.bundle_dir / "back.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"back\.onnx was changed"):
        run(layout, seed=params.seed, evaluate=params.evaluate)


def test_evaluation_needs_no_torch(layout: Layout, repository: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from tasks.__main__ import run_stage
from tasks.layout import Layout
from tasks.params import load_params
run_stage("evaluate", Layout(Path({str(layout.root)!r})), load_params(Path("params.yaml")))
print(sorted({{"torch", "torchvision", "scipy", "sklearn", "prefect", "dvc"}} & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
    report = json.loads(layout.report("evaluate").read_text())
    assert {"accuracy", "linear_probe", "class_prototypes"} <= set(report)
    assert not any("_s" in key[-2:] for key in report)


# The numbers themselves.


@settings(max_examples=60)
@given(seed=st.integers(0, 9999), num=st.integers(2, 200), num_classes=st.integers(2, 6))
def test_class_scores_are_those_of_scikit_learn(seed: int, num: int, num_classes: int) -> None:
    generator = np.random.default_rng(seed)
    truth, predicted = generator.integers(0, num_classes, (2, num))
    found = class_scores(predicted, truth, num_classes)
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(
        truth, predicted, labels=range(num_classes), zero_division=0
    )
    np.testing.assert_allclose([each.precision for each in found], precision, atol=1e-6)
    np.testing.assert_allclose([each.recall for each in found], recall, atol=1e-6)
    np.testing.assert_allclose([each.f1 for each in found], f1, atol=1e-6)
    assert [each.num_test for each in found] == support.tolist()
    present = support > 0
    assert balanced_accuracy(found) == pytest.approx(recall[present].mean(), abs=2e-6)
    assert macro_f1(found) == pytest.approx(f1[present].mean(), abs=2e-6)


def test_likelihood_is_that_of_scikit_learn_and_bounded() -> None:
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(4), 300)
    truth = generator.integers(0, 4, 300)
    expected = sklearn_metrics.log_loss(truth, probabilities, labels=range(4))
    assert negative_log_likelihood(probabilities.astype(np.float32), truth) == pytest.approx(expected, abs=1e-5)
    sure_miss = np.array([[1.0, 0.0]], dtype=np.float32)
    assert negative_log_likelihood(sure_miss, np.array([1])) == pytest.approx(-math.log(1e-7), abs=1e-5)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],  # the last one: Newcombe 1998, table I
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials, 0.95) == pytest.approx((low, high), abs=1e-4)


@settings(max_examples=40)
@given(seed=st.integers(0, 9999), num=st.integers(1, 300), num_bins=st.integers(1, 20))
def test_reliability_covers_every_answer(seed: int, num: int, num_bins: int) -> None:
    generator = np.random.default_rng(seed)
    probabilities = generator.dirichlet(np.full(3, 0.3), num).astype(np.float32)
    probabilities[0] = (1, 0, 0)
    truth = generator.integers(0, 3, num)
    bins = reliability(probabilities, truth, num_bins)
    assert sum(each.count for each in bins) == num
    assert [each.confidence for each in bins] == sorted(each.confidence for each in bins)
    assert 0 <= expected_calibration_error(bins) <= 1


def test_an_honest_model_has_no_calibration_error_and_a_boastful_one_has() -> None:
    generator = np.random.default_rng(0)
    sureness = generator.uniform(0.5, 1, 40_000)
    truth = (generator.random(40_000) > sureness).astype(np.int64)
    honest = np.stack([sureness, 1 - sureness], axis=1).astype(np.float32)
    assert expected_calibration_error(reliability(honest, truth, 15)) < 0.015
    boastful = np.tile(np.array([1.0, 0.0], dtype=np.float32), (40_000, 1))
    assert expected_calibration_error(reliability(boastful, truth, 15)) == pytest.approx(0.25, abs=0.01)
