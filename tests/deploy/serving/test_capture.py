"""Captured answers: there, right, limited, and never in a request's way."""

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from deploy.capture_files import Captured, read_captured
from deploy.errors import ImageError
from deploy.images import decode_image
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


def start_capture(folder: Path, counts: Counter[str], **more: Any) -> Capture:
    settings = {"fraction": 1, "max_bytes": 10**6, "max_age": timedelta(days=1), "pictures": "none", **more}
    return Capture(folder, **settings, on_rows=lambda fate, rows: counts.update({fate: rows}))


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
        assert row["picture"] is None  # unless asked for


def test_a_share_is_kept_and_the_oldest_go(model: LiveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.serving.capture.FILE_ROWS", 50)
    counts: Counter[str] = Counter()
    capture = start_capture(tmp_path, counts, fraction=0.5, max_bytes=20_000)
    for number in range(2000):
        capture.offer(model, [b""], [answer(number % 3)], str(number))
    capture.close()
    assert 800 < counts["kept"] < 1200
    files = sorted(tmp_path.iterdir())
    assert sum(file.stat().st_size for file in files) <= 20_000
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
    capture = start_capture(folder, counts)
    folder.rmdir()
    folder.write_text("in its place")
    for number in range(40):
        capture.offer(model, [b""], [answer(0)], str(number))
    capture.close()
    assert counts == {"dropped": 40}
    assert len(caplog.records) == 1  # told once
    assert folder.read_text() == "in its place"


def test_a_row_that_cannot_be_made_costs_itself_and_nothing_else(
    model: LiveModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counts: Counter[str] = Counter()
    capture = start_capture(tmp_path, counts, pictures="thumbnails")
    for picture in (encoded(colour_image("blau")), b"no picture any more", encoded(colour_image("grün"))):
        capture.offer(model, [picture], [answer(0)], "x")
    capture.close()
    assert counts == {"kept": 2, "dropped": 1}
    assert len(caplog.records) == 1


def test_pictures_are_kept_as_asked(model: LiveModel, tmp_path: Path) -> None:
    photo = encoded(np.asarray(Image.effect_noise((640, 480), 60).convert("RGB")))
    pixels = colour_image(LABELS[1])
    for pictures in ("originals", "thumbnails"):
        capture = start_capture(tmp_path / pictures, Counter(), pictures=pictures, max_bytes=10**8)
        capture.offer(
            model, [photo, pixels, b"no picture"], [another_answer(0), another_answer(1), ImageError("no")], "r"
        )
        capture.close()
    sent, drawn = read(tmp_path / "originals", model, only_with_pictures=True).pictures
    assert sent == photo
    assert drawn is not None
    np.testing.assert_array_equal(decode_image(drawn), pixels)
    small, _ = read(tmp_path / "thumbnails", model).thumbnails
    assert small is not None
    assert decode_image(small).shape == (72, 96, 3)


def test_what_is_too_old_goes_though_nobody_asks_anything(model: LiveModel, tmp_path: Path) -> None:
    capture = start_capture(tmp_path, Counter())
    capture.offer(model, [b""], [answer(0)], "young")
    capture.close()
    (young,) = tmp_path.iterdir()
    old = tmp_path / f"captured-{datetime.now(UTC) - timedelta(days=1, minutes=5):%Y%m%dT%H%M%S}-000001.parquet"
    other = tmp_path / "captured-notes.txt"
    for path in (old, other):
        path.write_bytes(young.read_bytes())
    start_capture(tmp_path, Counter()).close()
    assert set(tmp_path.iterdir()) == {young, other}  # only what a server wrote


def test_pictures_that_wait_are_bounded(model: LiveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.serving.capture.QUEUE_BYTES", 1000)
    counts: Counter[str] = Counter()
    capture = start_capture(tmp_path, counts, pictures="originals")
    capture.offer(model, [b"x" * 900, b"x" * 1100], [answer(0), answer(0)], "r")
    capture.close()
    assert counts == {"kept": 1, "dropped": 1}


def test_a_sample_of_one_bundle_is_read_and_a_broken_file_left_out(model: LiveModel, tmp_path: Path) -> None:
    capture = start_capture(tmp_path, Counter())
    for number in range(50):
        capture.offer(model, [b""], [another_answer(number)], str(number))
    capture.close()
    (tmp_path / "captured-20990101T000000-000001.parquet").write_bytes(b"PAR1 no more")
    found = read(tmp_path, model, limit=20)
    assert (len(found.labels), found.num_found, found.num_others) == (20, 50, 0)
    assert found.request_ids == sorted(found.request_ids, key=int)
    assert found.probabilities.shape == found.embeddings.shape == (20, 3)
    assert found.request_ids == read(tmp_path, model, limit=20).request_ids
    assert read(tmp_path, model, bundle="another").num_others == 50
    assert read(tmp_path, model, since=datetime.now(UTC) + timedelta(hours=1)).num_found == 0


def another_answer(number: int) -> Answer:
    """As of a picture of its own."""
    return Answer(answer(number % 3).probabilities, np.random.default_rng(number).random(3, np.float32))


def test_a_picture_that_is_sent_all_the_time_leaves_room_for_the_others(model: LiveModel, tmp_path: Path) -> None:
    capture = start_capture(tmp_path, Counter(), max_bytes=10**8)
    rng = np.random.default_rng(3000)
    probe = rng.random(3, np.float32)
    for number in range(3000):
        last_digits = rng.normal(1, 3e-7, 3).astype(np.float32)  # as of another batch
        is_probe = number % 30
        given = Answer(answer(0).probabilities, probe * last_digits) if is_probe else another_answer(number)
        capture.offer(model, [b""], [given], "probe" if is_probe else str(number))
    capture.close()
    found = read(tmp_path, model, limit=200)
    assert found.num_found == 3000
    assert {name for name in found.request_ids if name != "probe"} == {str(number) for number in range(0, 3000, 30)}
    assert 1 <= found.request_ids.count("probe") < 20


def read(folder: Path, model: LiveModel, **more: Any) -> Captured:
    since = datetime.now(UTC) - timedelta(hours=1)
    return read_captured(folder, **{"bundle": model.bundle.digest, "since": since, "limit": 1000, "seed": 0, **more})
