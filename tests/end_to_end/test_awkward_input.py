"""Odd labels and broken files in data/raw, nobody known to git: what can be learnt is, and told."""

import base64
import io
import json
import shutil
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from tests.awkward import LABELS, awkward_files
from tests.conftest import Workspace, retrain_unknown


@pytest.fixture(scope="module")
def awkward(lived_in: Workspace, retrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("awkward") / "work space"
    shutil.copytree(retrained, root, symlinks=True)
    return Workspace(root, lived_in.prefect_home)


def test_labels_stay_text_and_a_hidden_folder_is_no_label(awkward: Workspace, first_retrain: dict) -> None:
    bundle = json.loads((awkward.root / "data" / "bundle" / "bundle.json").read_text())
    assert bundle["labels"] == sorted([*LABELS.values(), *"456789"])
    assert first_retrain["champion"]["id"] == 1


def test_what_can_be_decoded_is_learnt_from_and_the_rest_is_named_with_a_reason(
    awkward: Workspace, first_retrain: dict
) -> None:
    good, bad = awkward_files()
    manifest = awkward.root / "data" / "manifest"
    accepted = {Path(path).name for path in pd.read_parquet(manifest / "accepted.parquet")["path"]}
    left_out = pd.read_csv(manifest / "quarantine.csv", keep_default_na=False).set_index("path")["reason"]
    assert set(good) <= accepted
    assert set(left_out.index) == {f"no/{name}" for name in bad}
    assert all(left_out)


def test_the_prefect_run_shows_what_was_left_out_what_the_gate_said_and_links_the_data_docs(
    awkward: Workspace, first_retrain: dict
) -> None:
    with closing(sqlite3.connect(awkward.prefect_home / "prefect.db")) as database:
        rows = database.execute("select key, data from artifact order by created").fetchall()
    artifacts = dict(rows)
    picture = json.loads(artifacts["data-quarantine"]).removeprefix("data:image/jpeg;base64,")
    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        assert image.width > 100
    assert "validation/docs/index.html" in artifacts["data-docs"]
    assert "num_quarantined" in artifacts["data-validation"]
    assert {"model-confusion", "model-reliability"} <= artifacts.keys()
    assert "evaluation/index.html" in artifacts["model-evaluation"]
    assert "gate/index.html" in artifacts["model-decision"]
    decisions = [json.loads(data).strip("`").removeprefix("json") for key, data in rows if key == "retrain-decision"]
    assert first_retrain["decision"] in map(json.loads, decisions)


def test_the_champion_answers_what_it_can_and_names_what_it_cannot(awkward: Workspace, first_retrain: dict) -> None:
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
    awkward: Workspace, first_retrain: dict, source: str, told: str
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
    awkward: Workspace, first_retrain: dict
) -> None:
    raw, aside = awkward.root / "data" / "raw", awkward.root / "aside"
    aside.mkdir()
    moved = [folder.name for folder in raw.iterdir() if folder.name not in ("no", ".hidden")]
    for label in moved:
        (raw / label).rename(aside / label)
    run = retrain_unknown(awkward)
    for label in moved:
        (aside / label).rename(raw / label)
    told = run.stderr[run.stderr.rindex("tanuki: ") :]
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    assert "holds one class only: no" in told
    assert "\n\n" not in told.strip()
    assert json.loads(awkward.tanuki("status", "--json").stdout)["champion"]["id"] == 1
