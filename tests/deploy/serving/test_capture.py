"""Captured answers: there, right, limited, and never in a request's way."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from deploy.predictor import Predictor
from deploy.serving.batcher import Answer
from deploy.serving.capture import Capture
from deploy.serving.live_model import LiveModel
from tests.deploy.serving.running import add_version, serving
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded, write_colour_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveModel]:
    bundle = write_colour_bundle(tmp_path_factory.mktemp("capture") / "bundle")
    with Predictor(bundle, threads=1) as predictor:
        yield LiveModel(3, bundle, predictor, {}, None)


def answer(best: int) -> Answer:
    probabilities = np.full(3, 0.1, np.float32)
    probabilities[best] = 0.8
    return Answer(probabilities, np.arange(3, dtype=np.float32))


def test_what_was_answered_is_in_the_folder(tmp_path: Path) -> None:
    add_version(tmp_path / "registry", tmp_path)
    folder = tmp_path / "spool" / "here"
    with serving(tmp_path / "registry", tmp_path, "--capture-dir", str(folder), "--capture-fraction", "1") as running:
        files = [("f", (label, encoded(colour_image(label)))) for label in LABELS]
        said = running.client.post("/predict", files=[*files, ("f", ("bad", b"no picture"))]).json()
        assert running.stop() == 0
    (file,) = folder.iterdir()
    rows = pq.read_table(file).to_pylist()
    assert [row["label"] for row in rows] == list(LABELS)  # a picture that cannot be read has no answer
    for row, prediction in zip(rows, said["predictions"], strict=False):
        assert row["probability"] == pytest.approx(prediction["probability"], abs=1e-5)
        assert row["request_id"] == said["request_id"]
        assert (row["version"], len(row["bundle"])) == (1, 64)
        assert sum(row["probabilities"]) == pytest.approx(1, abs=1e-5)
        assert len(row["embedding"]) == 3


def test_a_share_is_kept_and_the_oldest_go(model: LiveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.serving.capture.FILE_ROWS", 50)
    counts: Counter[str] = Counter()
    capture = Capture(tmp_path, fraction=0.5, max_bytes=12_000, on_rows=lambda fate, rows: counts.update({fate: rows}))
    for number in range(2000):
        capture.offer(model, [answer(number % 3)], str(number))
    capture.close()
    assert 800 < counts["kept"] < 1200
    files = sorted(tmp_path.iterdir())
    assert sum(file.stat().st_size for file in files) <= 12_000
    left = [row["request_id"] for file in files for row in pq.read_table(file).to_pylist()]
    assert left == sorted(left, key=int)
    assert int(left[0]) > 500
    assert int(left[-1]) > 1990


def test_a_folder_that_went_away_costs_rows_and_nothing_else(
    model: LiveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deploy.serving.capture.FILE_ROWS", 10)
    counts: Counter[str] = Counter()
    folder = tmp_path / "spool"
    capture = Capture(folder, fraction=1, max_bytes=10**6, on_rows=lambda fate, rows: counts.update({fate: rows}))
    folder.rmdir()
    folder.write_text("in its place")
    for number in range(40):
        capture.offer(model, [answer(0)], str(number))
    capture.close()
    assert counts == {"dropped": 40}
    assert len(caplog.records) == 1  # told once
    assert folder.read_text() == "in its place"
