"""Labels that are wrong are found, labels that are right are left alone, and the files say which."""

import csv

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tasks import cache_features, suspects, train_head
from tasks.errors import DataError, StoreError
from tasks.layout import Layout
from tasks.training.confident_learning import rank_labels
from tests.tasks.feature_workspaces import AUGMENT, FEATURES, GATE, TRAIN_HEAD, make_workspace, put_manifest

FLIPPED = {"a/00007.png": "d", "c/00020.png": "b", "d/00003.png": "c"}


def prepared(root, labels: dict[str, str]) -> Layout:
    layout = make_workspace(root, dict.fromkeys("abcd", 40))
    put_manifest(layout, labels=labels)
    cache_features.run(layout, features=FEATURES, augment=AUGMENT)
    train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=TRAIN_HEAD, gate=GATE)
    return layout


def listed(layout: Layout) -> list[dict[str, str]]:
    with layout.suspects.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return prepared(tmp_path_factory.mktemp("mislabelled"), FLIPPED)


def test_flipped_labels_are_listed_first_with_the_label_they_had(mislabelled: Layout) -> None:
    report = suspects.run(mislabelled, seed=0, train_head=TRAIN_HEAD)
    found = listed(mislabelled)
    first = {row["path"]: row["suggested"] for row in found[: len(FLIPPED)]}
    assert first == {path: path[0] for path in FLIPPED}
    assert report.num_judged == 160
    assert report.num_suspects == len(found) == sum(report.confusions.values())
    assert all(float(row["suggested_probability"]) > float(row["label_probability"]) for row in found[: len(FLIPPED)])


def test_the_picture_shows_them_and_a_second_run_gives_the_same_list(mislabelled: Layout) -> None:
    suspects.run(mislabelled, seed=0, train_head=TRAIN_HEAD)
    before = mislabelled.suspects.read_bytes()
    suspects.run(mislabelled, seed=0, train_head=TRAIN_HEAD)
    assert mislabelled.suspects.read_bytes() == before
    with Image.open(mislabelled.suspects_sheet) as sheet:
        assert sheet.width == 960


def test_without_features_it_says_what_to_run(tmp_path) -> None:
    layout = make_workspace(tmp_path, {"a": 4, "b": 4})
    with pytest.raises(StoreError, match=r"train_head|retrain"):
        suspects.run(layout, seed=0, train_head=TRAIN_HEAD)


def test_nothing_to_hold_out_is_told(tmp_path) -> None:
    layout = make_workspace(tmp_path, {"a": 1, "b": 1})
    cache_features.run(layout, features=FEATURES, augment=AUGMENT)
    train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=TRAIN_HEAD, gate=GATE)
    with pytest.raises(DataError, match="no label can be judged"):
        suspects.run(layout, seed=0, train_head=TRAIN_HEAD)


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_certain_and_right_predictions_make_no_suspect() -> None:
    targets = np.array([0, 1, 2, 0, 1, 2])
    ranking = rank_labels(np.eye(3)[targets] * 0.97 + 0.01, targets)
    assert ranking.num_suspects == 0
    assert sorted(ranking.order) == list(range(6))


def test_another_class_must_be_as_probable_as_it_usually_is() -> None:
    """Class 1 is always told with certainty; a lukewarm 1 for an image of class 0 is no reason to doubt its label."""
    probabilities = np.array([[0.4, 0.6], [0.9, 0.1], [0.02, 0.98], [0.01, 0.99], [0.005, 0.995]])
    ranking = rank_labels(probabilities, np.array([0, 0, 1, 1, 0]))
    assert ranking.num_suspects == 1
    assert ranking.order[0] == 4
    assert ranking.suggested[4] == 1


@given(st.integers(0, 2**32 - 1), st.integers(2, 6), st.integers(0, 40))
def test_every_row_is_ranked_once_and_no_suggestion_is_the_label(seed: int, num_classes: int, extra: int) -> None:
    random = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(num_classes), random.integers(num_classes, size=extra)])
    probabilities = random.dirichlet(np.ones(num_classes), size=len(targets))
    ranking = rank_labels(probabilities, targets)
    assert sorted(ranking.order) == list(range(len(targets)))
    assert (ranking.suggested != targets).all()
    assert 0 <= ranking.num_suspects <= len(targets)
