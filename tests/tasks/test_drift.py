"""The tests for drift: they hold their level, see what is there, and name it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tasks.drift.compare import Answers, Comparison, compare
from tasks.drift.two_sample import classifier_test, distance_test, holm, mix_test, permuted_windows

LABELS = ("ant", "bee", "cat", "dog")
WIDTH = 24


def answers(
    number: int, seed: int, *, shift: float = 0.0, mix: tuple[float, ...] = (0.25,) * 4, unsure: float = 1.0
) -> Answers:
    """Clouds of embeddings, one a class, and a model that knows the clouds."""
    centres = 2 * np.random.default_rng(1).normal(size=(len(LABELS), WIDTH))
    generator = np.random.default_rng(seed)
    truth = generator.choice(len(LABELS), number, p=mix)
    embeddings = centres[truth] + generator.normal(size=(number, WIDTH))
    logits = (embeddings @ centres.T - (centres**2).sum(axis=1) / 2) / (30 * unsure)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    moved = embeddings + shift * np.random.default_rng(2).normal(size=WIDTH)
    return Answers(probabilities.astype(np.float32), moved.astype(np.float32))


def compared(window: Answers, *, seed: int = 0, level: float = 0.05) -> Comparison:
    return compare(answers(200, 100 + seed), window, LABELS, level=level, permutations=200, neighbours=5, seed=seed)


def found(comparison: Comparison, level: float = 0.05) -> set[str]:
    return {name for name, test in comparison.tests.items() if test.adjusted_p_value <= level}


def test_without_drift_the_alarm_keeps_its_level() -> None:
    alarms = sum(compared(answers(80, 1000 + seed), seed=seed, level=0.1).is_drift for seed in range(40))
    assert alarms <= 9  # of a level of 0.1 forty times: more has a chance of 0.5 %


def test_each_kind_of_drift_is_told_by_its_own_test() -> None:
    assert found(compared(answers(80, 5, shift=0.5))) >= {"pictures"}
    other_mix = compared(answers(80, 9, mix=(0.7, 0.1, 0.1, 0.1)), seed=9)
    assert found(other_mix) == {"predictions"}  # and no other: the pictures of each class are as they were
    assert other_mix.classes[0].label == "ant"
    assert other_mix.classes[0].is_shifted
    assert found(compared(answers(80, 7, unsure=2.0))) >= {"confidence"}


def test_a_picture_sent_again_and_again_is_no_drift() -> None:
    """Such as a probe's; its numbers differ in their last digits, with the batch that it was answered in."""
    window = answers(60, 8)
    alone = compared(window)
    again = window.of(np.concatenate([np.arange(60), np.zeros(600, dtype=np.int64)]))
    noise = 1e-6 * np.random.default_rng(0).normal(size=again.embeddings.shape).astype(np.float32)
    comparison = compared(Answers(again.probabilities, again.embeddings + noise))
    assert comparison.window_rows.tolist() == list(range(60))
    assert not comparison.is_drift
    assert comparison.tests["predictions"] == alone.tests["predictions"]
    assert comparison.tests["pictures"].statistic == pytest.approx(alone.tests["pictures"].statistic, abs=1e-3)


def test_the_most_novel_picture_is_the_one_unlike_all_others() -> None:
    window = answers(60, 9)
    window.embeddings[17] += 30
    comparison = compared(window)
    assert comparison.window_rows[comparison.most_novel[0]] == 17
    assert comparison.novelty[comparison.most_novel[0]] == 1
    assert comparison.projection.shape == (260, 2)


@given(st.integers(1, 12), st.integers(1, 12), st.lists(st.integers(0, 3), min_size=24, max_size=24))
def test_permutations_move_rows_within_their_stratum_only(reference: int, window: int, groups: list[int]) -> None:
    strata = np.array(groups[: reference + window], dtype=np.int64)
    masks = permuted_windows(reference, window, permutations=20, seed=0, strata=strata)
    assert masks[:reference, 0].sum() == 0
    for group in range(4):
        counts = masks[strata == group].sum(axis=0)
        assert (counts == counts[0]).all()


@given(st.integers(0, 2**32 - 1))
def test_p_values_do_not_depend_on_scale_or_names(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values, groups = generator.normal(size=40).round(1), generator.integers(0, 3, 40)
    masks = permuted_windows(25, 15, permutations=50, seed=seed)
    assert distance_test(values, masks) == distance_test(7 * values - 3, masks)
    assert mix_test(groups, masks).p_value == mix_test(2 - groups, masks).p_value
    assert 0 < mix_test(groups, masks).p_value <= 1


def test_a_classifier_tells_apart_what_has_one_mean_and_two_spreads() -> None:
    generator = np.random.default_rng(3)
    samples = np.concatenate([generator.normal(size=(150, 8)), 2 * generator.normal(size=(80, 8))])
    test = classifier_test(samples, permuted_windows(150, 80, permutations=200, seed=0), seed=0)
    assert test.p_value < 0.01
    assert test.statistic > 0.8
    assert 0.4 < test.expected < 0.6


def test_all_alike_is_no_drift() -> None:
    same: NDArray[np.float64] = np.ones((60, 5))
    assert classifier_test(same, permuted_windows(40, 20, permutations=50, seed=0), seed=0).p_value > 0.1


@pytest.mark.parametrize(
    ("given_", "adjusted"),
    [({"a": 0.01, "b": 0.04, "c": 0.03}, {"a": 0.03, "b": 0.06, "c": 0.06}), ({"a": 0.9, "b": 0.8}, {"a": 1, "b": 1})],
)
def test_holms_p_values(given_: dict[str, float], adjusted: dict[str, float]) -> None:
    assert holm(given_) == pytest.approx(adjusted)
