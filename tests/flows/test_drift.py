"""From what a real server captured to a report, and to pictures with labels back in data/raw."""

import csv
import json
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deploy.files import sha256_bytes
from deploy.registry import Registry
from flows.drift_check import look_for_drift
from flows.ingest import add_images
from flows.label_queue import write_label_queue
from flows.scheduled_drift import drift_signal, scheduled_drift
from flows.signals import Signal, watch
from tasks.data.manifest import Facts, Row, rows_to_frame, write_manifest
from tasks.drift.selection import choose_to_label
from tasks.errors import DataError
from tasks.layout import Layout
from tests.conftest import REPOSITORY
from tests.deploy.serving.running import add_version, serving
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded

NUM_TEST, NUM_ASKED = 90, 60


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Test images and a champion, as a retrain leaves them."""
    layout = Layout(tmp_path_factory.mktemp("workspace"))
    for name in ("params.yaml", "dvc.yaml", ".dvc/config"):
        (layout.root / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, layout.root / name)
    subprocess.run(["git", "init", "--quiet", layout.root], check=True)
    layout.params.write_text(layout.params.read_text().replace("permutations: 1000", "permutations: 400"))
    rows = []
    for number in range(NUM_TEST):
        label = LABELS[number % 3]
        data = encoded(colour_image(label, seed=number))
        path = layout.raw / label / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        facts = Facts(sha256=sha256_bytes(data), size_bytes=len(data))
        rows.append(Row(f"{label}/{number}.png", label, facts, "test", False))
    for manifest in (layout.images, layout.accepted):
        manifest.parent.mkdir(parents=True, exist_ok=True)
        write_manifest(manifest, rows_to_frame(rows))
    add_version(layout.registry_dir, layout.root)
    return layout


def ask(layout: Layout, captures: Path, pictures: list[np.ndarray], kept: str = "originals") -> None:
    """Asks a real server about pictures, one that keeps all that it is asked."""
    options = ("--capture-dir", str(captures), "--capture-fraction", "1", "--capture-pictures", kept)
    with serving(layout.registry_dir, layout.root, *options) as running:
        files = [("f", (str(number), encoded(picture))) for number, picture in enumerate(pictures)]
        assert running.client.post("/predict", files=files).status_code == 200
        assert running.stop() == 0


def others(*, dark: float = 1.0) -> list[np.ndarray]:
    """Pictures of the same kind that no test image is, or darker ones."""
    seeds = range(1000, 1000 + NUM_ASKED)
    return [(colour_image(LABELS[seed % 3], seed=seed) * dark).astype(np.uint8) for seed in seeds]


@pytest.fixture(scope="module")
def usual(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captures of pictures like the test images, and of one of those."""
    captures = tmp_path_factory.mktemp("captures") / "usual"
    ask(layout, captures, [*others(), colour_image(LABELS[0], seed=0)])
    return captures


def test_pictures_like_the_test_images_are_no_drift(layout: Layout, usual: Path) -> None:
    report = look_for_drift(layout, usual)
    assert (report.outcome, report.num_compared, report.num_reference) == ("none", NUM_ASKED + 1, NUM_TEST)
    assert not report.shifted
    page = (layout.drift_dir / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64") == 2 + 12  # two drawings, and the most novel pictures
    assert "http" not in page
    assert json.loads((layout.drift_dir / "drift.json").read_text())["tests"]["pictures"]["p_value"] > 0.01


def test_darker_pictures_are_drift_and_the_page_shows_them(layout: Layout, tmp_path: Path) -> None:
    ask(layout, tmp_path, others(dark=0.6), kept="thumbnails")
    report = look_for_drift(layout, tmp_path)
    assert report.outcome == "drift"
    assert "pictures" in report.headline
    assert report.tests["pictures"]["statistic"] > 0.9
    assert report.headline in (layout.drift_dir / "index.html").read_text(encoding="utf-8")
    with pytest.raises(DataError, match="thumbnails are too"):
        write_label_queue(layout, tmp_path / "queue", tmp_path, number=5)


def test_the_reference_is_answered_once(layout: Layout, usual: Path) -> None:
    look_for_drift(layout, usual)
    (kept,) = layout.drift_dir.glob("reference-*.npz")
    before = kept.stat().st_mtime_ns
    look_for_drift(layout, usual)
    assert kept.stat().st_mtime_ns == before


def test_too_few_answers_are_told_and_no_alarm(layout: Layout, usual: Path) -> None:
    later = datetime.now(UTC) + timedelta(days=8)
    report = look_for_drift(layout, usual, now=later)
    assert (report.outcome, report.num_captured, report.tests) == ("too few", 0, {})
    assert "too few" in (layout.drift_dir / "index.html").read_text(encoding="utf-8")


def test_one_picture_sent_again_and_again_is_too_few(layout: Layout, tmp_path: Path) -> None:
    ask(layout, tmp_path, [others()[0]] * NUM_ASKED)
    report = look_for_drift(layout, tmp_path)
    assert (report.outcome, report.num_captured, report.num_compared) == ("too few", NUM_ASKED, 1)
    assert "1 different pictures are too few" in report.text()


def test_another_versions_answers_are_left_out(layout: Layout, usual: Path) -> None:
    second = add_version(layout.registry_dir, layout.root, sharpness=4.0)
    try:
        report = look_for_drift(layout, usual)
        assert (report.version, report.num_captured, report.num_others) == (second, 0, NUM_ASKED + 1)
    finally:
        Registry(layout.registry_dir).rollback("a test")


def test_images_that_were_relabelled_since_the_retrain_are_left_out(
    layout: Layout, usual: Path, caplog: pytest.LogCaptureFixture
) -> None:
    moved = layout.raw.rename(layout.root / "elsewhere")
    try:
        with pytest.raises(DataError, match=r"None of the test images .* Run `tanuki retrain`"):
            look_for_drift(layout, usual)
        shutil.copytree(moved, layout.raw)
        for number in range(6):
            (layout.raw / LABELS[number % 3] / f"{number}.png").rename(layout.raw / LABELS[0] / f"again-{number}.png")
        report = look_for_drift(layout, usual)
        assert (report.outcome, report.num_reference) == ("none", NUM_TEST - 6)
        assert "6 test images were relabelled or removed" in caplog.text
    finally:
        shutil.rmtree(layout.raw, ignore_errors=True)
        moved.rename(layout.raw)


def test_without_captures_the_command_says_what_to_do(layout: Layout, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--capture-dir"):
        look_for_drift(layout, tmp_path / "nowhere")


def test_a_look_by_the_clock_before_the_first_champion_has_nothing_to_do(tmp_path: Path) -> None:
    for name in ("params.yaml", "dvc.yaml", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    (tmp_path / "data" / "captures").mkdir(parents=True)  # `tanuki up --capture-dir` makes it before the first retrain
    state = scheduled_drift.fn(str(tmp_path))
    assert (state.name, state.message.split(",")[0]) == ("Nothing to do", "There is no champion yet")


def test_what_is_put_out_to_label_comes_back_as_data(layout: Layout, usual: Path, tmp_path: Path) -> None:
    queue, raw = tmp_path / "queue", tmp_path / "raw"
    report = write_label_queue(layout, queue, usual, number=10)
    assert (report.num_chosen, report.num_captured, report.num_known) == (10, NUM_ASKED, 1)
    assert (queue / "sheet.png").is_file()
    with pytest.raises(DataError, match="10 row"):  # nobody labelled them yet
        add_images(queue / "labels.csv", raw, log=tmp_path / "log.jsonl")
    with (queue / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with (queue / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "label": row["suggested"]} for row in rows[:7])
    added = add_images(queue / "labels.csv", raw, log=tmp_path / "log.jsonl")
    assert added.added == 7
    with pytest.raises(DataError, match="not empty"):
        write_label_queue(layout, queue, usual, number=10)


def test_what_is_chosen_is_uncertain_and_diverse() -> None:
    generator = np.random.default_rng(0)
    embeddings = np.repeat(generator.normal(size=(4, 16)), 50, axis=0) + 0.01 * generator.normal(size=(200, 16))
    probabilities = np.full((200, 4), 0.002)
    probabilities[np.arange(200), np.arange(200) // 50] = 0.994
    unsure = np.arange(0, 200, 25)  # two of each cloud
    probabilities[unsure] = 0.2
    probabilities[unsure, unsure // 50] = 0.4
    chosen = choose_to_label(probabilities.astype(np.float32), embeddings.astype(np.float32), number=4, seed=0)
    assert set(chosen) <= set(unsure)
    assert set(chosen // 50) == {0, 1, 2, 3}
    everything = choose_to_label(probabilities.astype(np.float32), embeddings.astype(np.float32), number=999, seed=0)
    assert len(set(everything)) == len(everything) <= 200


def test_the_commands_speak_json(layout: Layout, usual: Path, tmp_path: Path) -> None:
    from flows.cli import app

    def told(*words: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(CliRunner().invoke(app, ["--root", str(layout.root), *words]).stdout)
        return answer

    assert told("drift", "--captures", str(usual), "--json")["outcome"] == "none"
    queued = told("label-queue", str(tmp_path / "q"), "-n", "3", "--captures", str(usual), "--json")
    assert queued["num_chosen"] == 3


def test_drift_is_a_reason_to_retrain_that_is_told_once(layout: Layout, usual: Path) -> None:
    calm = drift_signal(look_for_drift(layout, usual))
    test = {"statistic": 0.9, "expected": 0.5, "p_value": 0.001, "adjusted_p_value": 0.003}
    report = replace(look_for_drift(layout, usual), outcome="drift", tests={"pictures": test})
    told: list[Signal] = []
    for signal in (drift_signal(report), drift_signal(report), calm, drift_signal(report)):
        watch(layout, signal, tell=told.append)
    assert len(told) == 2
    assert told[0].text == "version 1: drift in pictures"
