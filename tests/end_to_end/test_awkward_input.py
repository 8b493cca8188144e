"""Odd labels and broken files in data/raw, nothing committed, nobody known to git: what can be learnt is, and told."""

import base64
import io
import json
import shutil
import sqlite3
import struct
import subprocess
import sys
import zlib
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.conftest import Workspace, clone, make_quick

LABELS = {"0": "no", "1": "1e-3", "2": "two words", "3": "たぬき"}
EXIF_ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def enormous_png() -> bytes:
    """A few bytes that claim 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def awkward_files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Pictures in odd formats that must be learnt from, and files that must be left out."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    picture = Image.fromarray(noise)
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = 6
    frames = [Image.fromarray(np.roll(noise, shift, 0)) for shift in range(3)]
    good = {
        "cmyk.jpg": encoded(Image.fromarray(noise[::-1]).convert("CMYK"), "JPEG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "sixteen.png": encoded(Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257), "PNG"),
        "turned.jpg": encoded(picture, "JPEG", exif=turned),
    }
    bad = {
        "unreadable.png": b"this is no picture",
        "empty.jpg": b"",
        "truncated.jpg": encoded(picture, "JPEG")[:700],
        "enormous.png": enormous_png(),
    }
    return good, bad


@pytest.fixture(scope="module")
def awkward(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path, digits: Path) -> Workspace:
    workspace = clone(tmp_path_factory.mktemp("awkward") / "work space", prefect_home)
    make_quick(workspace)
    workspace.set_param("finetune.enabled", False)
    raw = workspace.root / "data" / "raw"
    for digit, label in LABELS.items():
        shutil.copytree(digits / digit, raw / label)
    shutil.copytree(digits / "4", raw / ".hidden")
    good, bad = awkward_files()
    for name, data in {**good, **bad}.items():
        (raw / "no" / name).write_bytes(data)
    return workspace


def retrain(workspace: Workspace, *options: str) -> subprocess.CompletedProcess[str]:
    """A retrain by somebody whom git does not know."""
    identity = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
    environment = {name: value for name, value in workspace.environment.items() if name not in identity}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "retrain", *options],
        cwd=workspace.root,
        env={**environment, "HOME": str(workspace.root.parent), "GIT_CONFIG_NOSYSTEM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def summary(awkward: Workspace) -> dict:
    run = retrain(awkward, "--json")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_labels_stay_text_and_a_hidden_folder_is_no_label(awkward: Workspace, summary: dict) -> None:
    bundle = json.loads((awkward.root / "data" / "bundle" / "bundle.json").read_text())
    assert bundle["labels"] == sorted(LABELS.values())
    assert summary["champion"]["id"] == 1


def test_what_can_be_decoded_is_learnt_from_and_the_rest_is_named_with_a_reason(
    awkward: Workspace, summary: dict
) -> None:
    good, bad = awkward_files()
    manifest = awkward.root / "data" / "manifest"
    accepted = {Path(path).name for path in pd.read_parquet(manifest / "accepted.parquet")["path"]}
    left_out = pd.read_csv(manifest / "quarantine.csv", keep_default_na=False).set_index("path")["reason"]
    assert set(good) <= accepted
    assert set(left_out.index) == {f"no/{name}" for name in bad}
    assert all(left_out)


def test_the_prefect_run_shows_what_was_left_out_what_the_gate_said_and_links_the_data_docs(
    awkward: Workspace, summary: dict
) -> None:
    with closing(sqlite3.connect(awkward.prefect_home / "prefect.db")) as database:
        rows = database.execute("select key, data from artifact order by created").fetchall()
    artifacts = dict(rows)
    picture = json.loads(artifacts["data-quarantine"]).removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        assert image.width > 100
    assert "validation/docs/index.html" in artifacts["data-docs"]
    assert "num_quarantined" in artifacts["data-validation"]
    decisions = [json.loads(data).strip("`").removeprefix("json") for key, data in rows if key == "retrain-decision"]
    assert summary["decision"] in map(json.loads, decisions)


def test_the_champion_answers_what_it_can_and_names_what_it_cannot(awkward: Workspace, summary: dict) -> None:
    good, bad = awkward_files()
    files = [awkward.root / "data" / "raw" / "no" / name for name in (*good, *bad)]
    run = awkward.tanuki("predict", *files, "--json", check=False)
    answers = {Path(answer["source"]).name: answer for answer in json.loads(run.stdout)}
    assert run.returncode == 1
    assert {name for name, answer in answers.items() if answer["error"] is None} == set(good)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("file:nowhere.safetensors", "nowhere.safetensors"),
        ("file:corrupt.safetensors", "corrupt.safetensors"),
        ("file:other.safetensors", "do not fit the architecture"),
        ("embedded:raccoons", "raccoons"),
    ],
)
def test_weights_that_are_missing_wrong_or_corrupt_cost_one_paragraph_and_leave_the_backbone_as_it_was(
    awkward: Workspace, summary: dict, source: str, told: str
) -> None:
    backbone = awkward.root / "data" / "backbone"
    own, card = (backbone / "weights.safetensors").read_bytes(), (backbone / "backbone.json").read_bytes()
    (awkward.root / "corrupt.safetensors").write_bytes(own[: len(own) // 2])
    (awkward.root / "other.safetensors").write_bytes(own)
    before = (awkward.root / "params.yaml").read_bytes()
    awkward.set_param("backbone.source", source)
    awkward.set_param("backbone.architecture", None if source.startswith("embedded") else "mobilenet_v2")
    run = awkward.run(sys.executable, "-m", "tasks", "fetch_backbone", check=False)
    (awkward.root / "params.yaml").write_bytes(before)
    assert run.returncode == 1
    assert told in run.stderr
    assert "Traceback" not in run.stderr
    assert (backbone / "weights.safetensors").read_bytes() == own
    assert (backbone / "backbone.json").read_bytes() == card


def test_a_set_that_cannot_be_learnt_from_stops_the_retrain_and_the_champion_stays(
    awkward: Workspace, summary: dict
) -> None:
    raw, aside = awkward.root / "data" / "raw", awkward.root / "aside"
    aside.mkdir()
    moved = [label for label in LABELS.values() if label != "no"]
    for label in moved:
        (raw / label).rename(aside / label)
    run = retrain(awkward)
    for label in moved:
        (aside / label).rename(raw / label)
    told = run.stderr[run.stderr.rindex("tanuki: ") :]
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "holds one class only: no" in told
    assert "\n\n" not in told.strip()
    assert json.loads(awkward.tanuki("status", "--json").stdout)["champion"]["id"] == 1
