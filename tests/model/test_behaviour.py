"""How the sample's first champion behaves: what must not change an answer does not, and every class works.

The model is the one that a real retrain on 400 digits made (tests/conftest.py), asked on its own test images.
"""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from deploy.predictor import Predictor
from deploy.registry import Registry


@pytest.fixture(scope="module")
def predictor(retrained: Path):
    with Predictor(Registry(retrained / "data" / "registry").bundle(1)) as predictor:
        yield predictor


@pytest.fixture(scope="module")
def test_images(retrained: Path) -> dict[Path, str]:
    """The digits that nothing was learnt from, and their labels."""
    table = pd.read_parquet(retrained / "data" / "manifest" / "accepted.parquet")
    test = table[(table["split"] == "test") & table["path"].str.contains("digit-")]
    return {retrained / "data" / "raw" / path: label for path, label in zip(test["path"], test["label"], strict=True)}


@pytest.fixture(scope="module")
def examples(retrained: Path, test_images) -> dict[str, np.ndarray]:
    """The mean picture (H, W, 3) of each class's training images."""
    raw = retrained / "data" / "raw"
    paths = {
        label: [path for path in (raw / label).glob("digit-*") if path not in test_images]
        for label in set(test_images.values())
    }
    return {
        label: np.mean([np.asarray(Image.open(path).convert("RGB")) for path in each], axis=0).astype(np.uint8)
        for label, each in paths.items()
    }


def answers(predictor: Predictor, pictures: list[bytes]) -> np.ndarray:
    return np.array([answer.top[0][0] for answer in predictor.predict_bytes([("", picture) for picture in pictures])])


def reencoded(path: Path, **change: object) -> bytes:
    image = Image.open(path)
    if "size" in change:
        image = image.resize((change["size"], change["size"]), Image.Resampling.BICUBIC)
    if "cut" in change:
        cut = int(str(change["cut"]))
        image = image.crop((cut, cut, image.width - cut, image.height - cut))
    if "mode" in change:
        image = image.convert(str(change["mode"]))
    buffer = io.BytesIO()
    image.save(buffer, str(change.get("format", "PNG")), **({"quality": 95} if change.get("format") == "JPEG" else {}))
    return buffer.getvalue()


def test_grey_and_colour_files_of_one_picture_get_the_same_answer(predictor, test_images) -> None:
    given = predictor.score_files(list(test_images)).probabilities
    coloured = predictor.predict([np.asarray(Image.open(path).convert("RGB")) for path in test_images]).probabilities
    np.testing.assert_allclose(coloured, given, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "least"),
    [
        ({"format": "JPEG", "mode": "RGB"}, 0.95),
        ({"format": "WEBP", "mode": "RGB"}, 0.85),
        ({"size": 24}, 0.80),
        ({"size": 64, "cut": 2}, 0.80),
    ],
    ids=["as JPEG", "as lossy WebP", "three times as large", "large and cut a little"],
)
def test_the_label_survives_what_happens_to_files(predictor, test_images, change: dict, least: float) -> None:
    before = answers(predictor, [path.read_bytes() for path in test_images])
    after = answers(predictor, [reencoded(path, **change) for path in test_images])
    assert (before == after).mean() >= least


def test_every_class_is_found_more_often_than_not(predictor, test_images) -> None:
    found = answers(predictor, [path.read_bytes() for path in test_images])
    truth = np.array(list(test_images.values()))
    assert set(truth) == set(predictor.labels)
    assert all((found[truth == label] == label).mean() > 0.5 for label in set(truth))


def test_the_plainest_picture_of_each_class_is_named(predictor, examples: dict[str, np.ndarray]) -> None:
    """Minimum functionality: the mean of a class's training pictures is as plain an example as there is of it."""
    found = predictor.predict(list(examples.values())).probabilities.argmax(axis=1)
    assert dict(zip(examples, (predictor.labels[column] for column in found), strict=True)) == {
        label: label for label in predictor.labels
    }


@pytest.mark.parametrize("change", [{"shade": 0.9}, {"shift": 1}, {"shift": -1}], ids=["darker", "left", "right"])
def test_a_plain_picture_keeps_its_label_when_it_is_darker_or_moves_a_pixel(predictor, examples, change) -> None:
    shown = [
        (np.roll(each, change.get("shift", 0), axis=1) * change.get("shade", 1.0)).astype(np.uint8)
        for each in examples.values()
    ]
    found = predictor.predict(shown).probabilities.argmax(axis=1)
    assert (np.array([predictor.labels[column] for column in found]) == list(examples)).mean() >= 0.8


def test_a_picture_lies_nearer_to_its_own_copy_than_to_any_other(predictor, test_images) -> None:
    paths = list(test_images)[:40]
    embeddings = predictor.score_files(paths).embeddings
    copies = predictor.predict(
        [np.asarray(Image.open(io.BytesIO(reencoded(path, format="JPEG", mode="RGB")))) for path in paths]
    ).embeddings
    distances = np.linalg.norm(embeddings[:, None] - copies[None], axis=2)
    assert (distances.argmin(axis=1) == np.arange(len(paths))).mean() >= 0.9
