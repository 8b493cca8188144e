"""The library under evaluate: slices, corruptions, intervals of means over classes, names that can be drawn."""

import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy.bundle import Bundle
from deploy.predictor import Predictor
from tasks.evaluation.metrics import accuracy_of, balanced_accuracy, class_scores, macro_f1, macro_intervals
from tasks.evaluation.page import inline_png
from tasks.evaluation.plots import drawable_names
from tasks.evaluation.robustness import (
    CLEAN,
    CORRUPTIONS,
    SIDE_PX,
    corrupted,
    robust_answers,
    robustness_of,
    robustness_subset,
)
from tasks.evaluation.slices import slices_by_number, slices_by_source
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded, write_colour_bundle


class Page(HTMLParser):
    """Whether tags are closed in order, and what addresses a page names."""

    VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# Slices.


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(0, 1e6), min_size=1, max_size=80), seed=st.integers(0, 99))
def test_slices_along_a_number_part_the_images(values: list[float], seed: int) -> None:
    right = np.random.default_rng(seed).random(len(values)) < 0.7
    found = slices_by_number({"size": np.array(values)}, right, confidence=0.95, min_images=1)
    assert len(found) in (0, 2, 3)
    if found:
        assert sum(each.num_images for each in found) == len(values)
        assert sum(each.num_images * each.accuracy.accuracy for each in found) == pytest.approx(right.sum(), abs=1e-3)
    else:
        assert np.quantile(values, 1 / 3, method="lower") == max(values)


def test_a_part_that_fares_worse_is_weak_and_small_parts_are_left_out() -> None:
    brightness = np.repeat([10.0, 100.0, 200.0], 100)
    right = np.concatenate([np.arange(100) >= 40, np.ones(200, dtype=bool)])
    found = slices_by_number({"brightness": brightness}, right, confidence=0.95, min_images=20)
    assert [(each.name, each.num_images, each.is_weak) for each in found] == [
        ("up to 10", 100, True),
        ("10 to 100", 100, False),
        ("over 100", 100, False),
    ]
    assert slices_by_number({"brightness": brightness}, right, confidence=0.95, min_images=101) == []


def test_sources_are_the_folders_under_the_label() -> None:
    paths = ["cat/cam1/a.png", "test/cat/cam1/b.png", "cafe\u0301/cam2/day/c.png", "cat/d.png"]
    found = slices_by_source(paths, ["cat", "cat", "café", "cat"], np.ones(4, dtype=bool), confidence=0.9, min_images=1)
    assert [(each.name, each.num_images) for each in found] == [("no folder", 1), ("cam1", 2), ("cam2/day", 1)]
    flat = slices_by_source(["cat/a.png"] * 4, ["cat"] * 4, np.ones(4, dtype=bool), confidence=0.9, min_images=1)
    assert flat == []


# Corruptions.


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Something with edges and colours."""
    y, x = np.mgrid[0:60, 0:90]
    return Image.fromarray(np.stack([x * 2, y * 4, (x // 6 + y // 6) % 2 * 255], axis=2).astype(np.uint8))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_function_of_the_picture_alone(photo: Image.Image, name: str) -> None:
    once = corrupted(photo, name, key="a")
    assert once.shape == (60, 90, 3)
    assert once.dtype == np.uint8
    np.testing.assert_array_equal(once, corrupted(photo, name, key="a"))
    apart = np.abs(once.astype(int) - np.asarray(photo).astype(int)).mean()
    assert 0.5 < apart < 70


def test_noise_and_rotation_differ_from_picture_to_picture(photo: Image.Image) -> None:
    assert (corrupted(photo, "noise", key="a") != corrupted(photo, "noise", key="b")).any()
    turned = {corrupted(photo, "rotation", key=f"{number}").tobytes() for number in range(20)}
    assert len(turned) == 2


def test_the_subset_hardly_changes_where_pictures_come_and_go() -> None:
    hashes = [f"{number:064x}" for number in range(300)]
    before = {hashes[row] for row in robustness_subset(hashes, size=100, seed=0)}
    changed = [*hashes[3:], "f" * 64]
    after = {changed[row] for row in robustness_subset(changed, size=100, seed=0)}
    assert len(before & after) >= 96
    assert len(robustness_subset(hashes, size=1000, seed=0)) == 300
    assert before != {hashes[row] for row in robustness_subset(hashes, size=100, seed=1)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_colour_bundle(tmp_path_factory.mktemp("bundle"))


def test_the_order_of_pictures_changes_no_answer(colours: Bundle) -> None:
    pictures = [encoded(colour_image(LABELS[number % 3], seed=number)) for number in range(20)]
    with Predictor(colours) as predictor:
        found = robust_answers(predictor, pictures)
        turned = robust_answers(predictor, reversed(pictures))
    assert list(found) == [CLEAN, *CORRUPTIONS]
    for name, columns in found.items():
        np.testing.assert_array_equal(columns, turned[name][::-1])
    assert [LABELS[column] for column in found[CLEAN][:3]] == list(LABELS)


def test_large_pictures_are_scaled_down_first(colours: Bundle) -> None:
    large = encoded(colour_image("grün", size=(SIDE_PX * 4, SIDE_PX * 3)))
    with Predictor(colours) as predictor:
        assert {LABELS[columns[0]] for columns in robust_answers(predictor, [large]).values()} == {"grün"}


def test_robustness_is_the_mean_over_the_corruptions() -> None:
    right = {name: np.array([True, False, False, False]) for name in CORRUPTIONS}
    answers = {CLEAN: np.ones(4, dtype=bool), **right, "noise": np.ones(4, dtype=bool)}
    found = robustness_of(answers, confidence=0.95, draws=400, seed=0)
    assert (found.num_images, found.clean.accuracy, found.corruptions["noise"].accuracy) == (4, 1, 1)
    assert found.mean.accuracy == pytest.approx((5 * 0.25 + 1) / 6, abs=1e-6)
    assert found.corruptions["blur"] == accuracy_of(right["blur"], 0.95)


def test_the_interval_over_corruptions_knows_that_a_picture_s_answers_go_together() -> None:
    """Half the pictures right under all: as wide as of one corruption, not of six times the pictures."""
    right = np.arange(100) < 50
    found = robustness_of({CLEAN: right, **dict.fromkeys(CORRUPTIONS, right)}, confidence=0.95, draws=4000, seed=0)
    alone = accuracy_of(right, 0.95)
    assert found.mean.accuracy == 0.5
    assert found.mean.accuracy_low == pytest.approx(alone.accuracy_low, abs=0.02)
    assert found.mean.accuracy_high == pytest.approx(alone.accuracy_high, abs=0.02)


# Intervals of the means over the classes.


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999), num=st.integers(1, 200), num_classes=st.integers(2, 6))
def test_the_intervals_hold_the_means(seed: int, num: int, num_classes: int) -> None:
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, num_classes, num)
    predicted = np.where(generator.random(num) < 0.7, truth, generator.integers(0, num_classes, num))
    scores = class_scores(predicted, truth, num_classes)
    found = macro_intervals(predicted, truth, num_classes, confidence=0.99, draws=400, seed=0)
    assert found.balanced_accuracy_low - 1e-6 <= balanced_accuracy(scores) <= found.balanced_accuracy_high + 1e-6
    assert 0 <= found.macro_f1_low <= found.macro_f1_high <= 1


def test_the_interval_of_balanced_accuracy_is_that_of_the_binomial_distribution() -> None:
    truth = np.repeat([0, 1], 400)
    predicted = truth.copy()
    predicted[:80] = 1  # recall .8 and 1: standard error sqrt(.8 * .2 / 400) / 2 = .01
    found = macro_intervals(predicted, truth, 2, confidence=0.95, draws=4000, seed=0)
    assert found.balanced_accuracy_low == pytest.approx(0.9 - 1.96 * 0.01, abs=2e-3)
    assert found.balanced_accuracy_high == pytest.approx(0.9 + 1.96 * 0.01, abs=2e-3)
    assert found.macro_f1_low < macro_f1(class_scores(predicted, truth, 2)) < found.macro_f1_high


# What people look at.


def test_a_label_that_the_font_cannot_draw_gets_its_number() -> None:
    assert drawable_names(["Zebra", "七", "größer", "日本 7"]) == ["Zebra", "#2", "größer", "#4"]


def test_an_inline_picture_is_a_whole_png(photo: Image.Image) -> None:
    import base64

    address = inline_png(np.asarray(photo))
    data = base64.b64decode(re.sub(r"^data:image/png;base64,", "", address))
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(photo))
