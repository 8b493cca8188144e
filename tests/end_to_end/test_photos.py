"""Real photos with weights made on ImageNet, end to end: `tanuki add`, retrain, and what the probe reaches.

The bounds are those of the last features with scikit-learn's logistic regression (.753 with a standard deviation of .02
on trashnet6_dev, .924 on grocery8's official split), less what chance may take. The probe sees `features.depths` of
params.yaml, as yours does.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from deploy.bundle import read_bundle
from deploy.images import decode_image
from deploy.predictor import Predictor
from tasks.layout import Layout
from tests.conftest import Workspace, clone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def retrain_on(workspace: Workspace, photos: Path, weights: Path, *, finetune: bool) -> dict:
    workspace.set_param("backbone.source", f"file:{weights}")
    workspace.set_param("backbone.architecture", "mobilenet_v2")
    workspace.set_param("backbone.licence", "Apache-2.0")
    workspace.set_param("augment.hflip", True)
    workspace.set_param("finetune.enabled", finetune)
    workspace.set_param("finetune.epochs", 1)
    workspace.tanuki("add", photos)
    return json.loads(workspace.tanuki("retrain", "--json").stdout)


@pytest.fixture
def weights(material: Path) -> Path:
    return material / "weights" / "mobilenet_v2_imagenet1k.safetensors"


def test_trashnet_retrains_end_to_end(material: Path, weights: Path, tmp_path: Path, prefect_home: Path) -> None:
    workspace = clone(tmp_path / "trashnet", prefect_home)
    summary = retrain_on(workspace, material / "datasets" / "trashnet6_dev", weights, finetune=True)
    assert summary["classes"] == 6
    assert summary["accuracy"]["linear_probe"]["accuracy"] >= 0.72
    assert summary["decision"]["outcome"] == "first"
    # Three pairs of photos are the same bytes under two labels.
    quarantined = pd.read_csv(workspace.root / "data" / "manifest" / "quarantine.csv")
    assert {"metal/metal91.jpg", "glass/glass115.jpg"} <= set(quarantined["path"])
    assert len(quarantined) == 6
    assert_answers_survive_mirrors_and_small_crops(Layout(workspace.root))


def assert_answers_survive_mirrors_and_small_crops(layout: Layout) -> None:
    """What augment.hflip and augment.min_area_fraction say must not matter to a label, hardly does."""
    table = pd.read_parquet(layout.accepted)
    photos = [decode_image((layout.raw / path).read_bytes()) for path in table.loc[table["split"] == "test", "path"]]
    cuts = [photo[photo.shape[0] // 50 :, : photo.shape[1] - photo.shape[1] // 50] for photo in photos]
    with Predictor(read_bundle(layout.bundle_dir)) as predictor:
        given, mirrored, cut = (
            predictor.predict(shown).probabilities.argmax(axis=1)
            for shown in (photos, [np.ascontiguousarray(photo[:, ::-1]) for photo in photos], cuts)
        )
    assert (given == mirrored).mean() >= 0.85
    assert (given == cut).mean() >= 0.90


def test_grocery_keeps_its_official_splits(material: Path, weights: Path, tmp_path: Path, prefect_home: Path) -> None:
    workspace = clone(tmp_path / "grocery", prefect_home)
    photos = material / "datasets" / "grocery8"
    summary = retrain_on(workspace, photos, weights, finetune=False)
    manifest = pd.read_parquet(workspace.root / "data" / "manifest" / "images.parquet")
    assert manifest["official_split"].all()
    for split in ("train", "val", "test"):
        given = {path.relative_to(photos).as_posix() for path in (photos / split).rglob("*.jpg")}
        assert set(manifest.loc[manifest["split"] == split, "path"]) <= given
    assert summary["accuracy"]["linear_probe"]["accuracy"] >= 0.90
