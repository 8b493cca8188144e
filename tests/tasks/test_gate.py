"""The gate: better or nothing, with the confidence that METHOD.md states."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.errors import DataError
from tasks.evaluation.paired import (
    compare,
    images_by_rule_of_three,
    images_to_exclude_loss,
    images_to_show_gain,
    mcnemar_midp,
)
from tasks.gate import Decision, Scores, decide
from tasks.params import load_params

LABELS = ("a", "b", "c")
RULE: dict[str, Any] = {
    "seed": 0,
    "num_uses": 0,
    "confidence": 0.95,
    "margin": "auto",
    "draws": 400,
    "balanced": False,
    "max_class_loss": 0.10,
    "min_class_images": 30,
    "max_nll_increase": 0.10,
    "max_overconfidence": 1.0,
    "max_robustness_loss": 0.05,
    "min_accuracy": 0.0,
    "min_class_accuracy": 0.0,
    "max_latency_ratio": 4.0,
    "max_size_ratio": 4.0,
    "warn_uses": 20,
}


def scores(predicted: list[str] | np.ndarray, labels: tuple[str, ...] = LABELS, sureness: float = 0.8) -> Scores:
    """A model that says this, with this probability; the rest is shared alike."""
    columns = np.array([labels.index(label) for label in predicted])
    probabilities = np.full((len(columns), len(labels)), (1 - sureness) / (len(labels) - 1), dtype=np.float32)
    probabilities[np.arange(len(columns)), columns] = sureness
    return Scores(labels=labels, probabilities=probabilities, latency_s=0.01, size_bytes=1000)


def wrong(label: str) -> str:
    return LABELS[(LABELS.index(label) + 1) % 3]


def answers(truth: list[str], right: np.ndarray) -> list[str]:
    return [label if is_right else wrong(label) for label, is_right in zip(truth, right, strict=True)]


def truth_of(num: int) -> list[str]:
    return [LABELS[index % 3] for index in range(num)]


def judged(right: np.ndarray, right_before: np.ndarray, **changes: Any) -> Decision:
    truth = truth_of(len(right))
    return decide(scores(answers(truth, right)), scores(answers(truth, right_before)), truth=truth, **RULE | changes)


def outcomes_apart(num: int, wins: int, losses: int, both_right: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Right answers of two models on ``num`` images, spread over the classes."""
    right, before = np.zeros(num, dtype=bool), np.zeros(num, dtype=bool)
    order = np.random.default_rng(1).permutation(num)
    right[order[:wins]] = True
    before[order[wins : wins + losses]] = True
    both = order[wins + losses :][: int(both_right * num)]
    right[both] = before[both] = True
    return right, before


# Sample sizes and tests against METHOD.md's tables.


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (0.01, [1235, 2471, 3708, 6181, 9272]),
        (0.02, [308, 617, 926, 1544, 2317]),
        (0.03, [math.inf, 273, 411, 685, 1029]),
        (0.05, [math.inf, math.inf, 147, 246, 369]),
    ],
)
def test_images_to_show_a_gain_are_those_of_the_method(gain: float, expected: list[float]) -> None:
    found = [images_to_show_gain(gain, each, confidence=0.95) for each in (0.02, 0.04, 0.06, 0.10, 0.15)]
    assert found == expected


@pytest.mark.parametrize(
    ("margin", "expected"), [(0.01, [1237, 2474, 3710, 6183, 9274]), (0.02, [310, 619, 928, 1546, 2319])]
)
def test_images_to_exclude_a_loss_are_those_of_the_method(margin: float, expected: list[float]) -> None:
    found = [images_to_exclude_loss(margin, each, confidence=0.95) for each in (0.02, 0.04, 0.06, 0.10, 0.15)]
    assert found == expected


def test_the_rule_of_three() -> None:
    assert images_by_rule_of_three(0.01, 0.95) == 299
    assert images_by_rule_of_three(0.02, 0.95) == 149
    assert images_to_exclude_loss(0.02, 0.0, confidence=0.95) == 149
    assert images_to_exclude_loss(0.0, 0.1, confidence=0.95) == math.inf


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (5, 2), (30, 41), (700, 650)])
def test_midp_is_that_of_the_binomial_distribution(wins: int, losses: int) -> None:
    num = wins + losses
    exact = sum(math.comb(num, k) for k in range(wins + 1, num + 1)) / 2**num + math.comb(num, wins) / 2**num / 2
    assert mcnemar_midp(wins, losses) == pytest.approx(exact, rel=1e-9)
    assert mcnemar_midp(wins, losses) + mcnemar_midp(losses, wins) == pytest.approx(1)


RATES = [
    (100, 0.0, 0.42, 0.12, 0.04),
    (100, -0.01, 0.26, 0.06, 0.01),
    (100, 0.01, 0.58, 0.22, 0.08),
    (500, 0.0, 0.46, 0.23, 0.05),
    (500, -0.01, 0.15, 0.05, 0.00),
    (500, 0.01, 0.80, 0.58, 0.23),
    (2000, 0.0, 0.48, 0.57, 0.05),
    (2000, -0.01, 0.03, 0.05, 0.00),
    (2000, 0.01, 0.97, 0.98, 0.58),
    (5000, 0.0, 0.49, 0.90, 0.05),
    (5000, -0.01, 0.00, 0.05, 0.00),
    (5000, 0.01, 1.0, 1.0, 0.89),
]


@pytest.mark.parametrize(
    ("num", "gain", "more", "not_worse", "better"),
    [pytest.param(*row, marks=[pytest.mark.slow] if row[0] > 500 else []) for row in RATES],
)
def test_promotion_rates_are_those_of_the_method(
    num: int, gain: float, more: float, not_worse: float, better: float
) -> None:
    """METHOD.md, "Simulated promotion probability": discordance .06, margin 1 point.

    Naive ">", the bound alone, McNemar's mid-p alone; and of the whole rule, that it never promotes where the bound
    alone would not.
    """
    discordance, simulations = 0.06, 400
    generator = np.random.default_rng(7)
    labels = np.array(truth_of(num))
    shown = np.zeros((simulations, 3))
    for index in range(simulations):
        drawn = generator.choice(3, num, p=((discordance + gain) / 2, (discordance - gain) / 2, 1 - discordance))
        paired = compare(drawn == 0, drawn == 1, labels, balanced=False, confidence=0.95, draws=300, seed=index)
        shown[index] = (
            paired.difference > 0,
            paired.lower_bound > -0.01,
            mcnemar_midp(paired.wins, paired.losses) < 0.05,
        )
        if index < 20:
            verdict = judged(drawn != 1, drawn != 0, margin=0.01, draws=300, seed=index)
            assert shown[index, 1] or not verdict.promotes
    for found, expected in zip(shown.mean(axis=0), (more, not_worse, better), strict=True):
        # Three standard errors, and .02 for the table's own: 3,000 simulations of each cell came to within .022 of it.
        assert found == pytest.approx(
            expected, abs=3 * math.sqrt(max(expected * (1 - expected), 0.01) / simulations) + 0.02
        )


# The rule.


def test_the_first_model_has_only_the_floor_to_pass() -> None:
    truth = truth_of(30)
    first = decide(scores(truth), None, truth=truth, **RULE)
    assert (first.outcome, first.promotes, first.better) == ("first", True, False)
    assert first.numbers["accuracy"] == 1
    refused = decide(scores([wrong(label) for label in truth]), None, truth=truth, **RULE | {"min_accuracy": 0.5})
    assert (refused.outcome, refused.promotes) == ("refuse", False)
    assert "below the floor" in refused.reasons[0]


def test_a_clear_gain_is_promoted_and_called_better() -> None:
    decision = judged(*outcomes_apart(1000, wins=40, losses=10))
    assert (decision.outcome, decision.better) == ("promote", True)
    assert decision.numbers["difference"] == pytest.approx(0.03)
    assert decision.reasons[0].startswith("better: accuracy +3.00 points on 1,000 test images (40 won, 10 lost")


def test_a_model_that_is_not_worse_is_promoted_without_being_called_better() -> None:
    decision = judged(*outcomes_apart(3000, wins=30, losses=28))
    assert (decision.outcome, decision.better) == ("promote", False)
    assert decision.reasons[0].startswith("not worse")


def test_equal_accuracy_with_some_images_won_and_lost_follows_the_bound() -> None:
    assert judged(*outcomes_apart(3000, wins=20, losses=20)).outcome == "promote"
    assert judged(*outcomes_apart(300, wins=20, losses=20)).outcome == "undecided"


def test_a_worse_model_is_refused() -> None:
    decision = judged(*outcomes_apart(1000, wins=10, losses=40))
    assert (decision.outcome, decision.better) == ("refuse", False)
    assert decision.reasons[0].startswith("worse: accuracy -3.00 points")


def test_too_few_images_are_undecided_and_say_how_many_are_missing() -> None:
    decision = judged(*outcomes_apart(360, wins=14, losses=14))
    assert decision.outcome == "undecided"
    # Connor: (1.645 + 0.842)^2 * 28 / 360 / .02^2 = 1,202.2.
    assert decision.numbers["needed_images"] == 1203
    assert "about 843 more test images" in decision.reasons[0]
    assert not decision.promotes


def test_a_handful_of_images_cannot_exclude_a_loss_however_well_it_goes() -> None:
    decision = judged(*outcomes_apart(40, wins=2, losses=0))
    assert decision.outcome == "undecided"
    assert decision.numbers["lower_bound"] > -0.02
    assert judged(*outcomes_apart(40, wins=12, losses=0, both_right=0.5)).outcome == "promote"


def test_without_a_margin_only_a_gain_promotes() -> None:
    assert judged(*outcomes_apart(3000, wins=60, losses=20), margin=0.0).outcome == "promote"
    tied = judged(*outcomes_apart(3000, wins=20, losses=20), margin=0.0)
    assert (tied.outcome, tied.numbers["needed_images"]) == ("undecided", 0)
    assert "No number of test images" in tied.reasons[0]


def test_a_class_that_suffers_stops_a_better_model() -> None:
    truth = ["a"] * 40 + ["b"] * 900
    before = np.ones(940, dtype=bool)
    before[40:140] = False
    right = before.copy()
    right[:10] = False  # a falls from 100 % to 75 %
    right[40:140] = True
    decision = decide(scores(answers(truth, right)), scores(answers(truth, before)), truth=truth, **RULE)
    assert (decision.outcome, decision.better) == ("refuse", True)
    assert "'a' falls from 100.0% to 75.0% on 40 images" in decision.reasons[0]
    assert decision.class_losses == {"a": pytest.approx(0.25), "b": pytest.approx(-1 / 9)}
    relaxed = decide(
        scores(answers(truth, right)), scores(answers(truth, before)), truth=truth, **RULE | {"min_class_images": 41}
    )
    assert relaxed.outcome == "promote"


def test_likelihood_latency_and_size_have_limits_and_all_reasons_are_given() -> None:
    right, before = outcomes_apart(1000, wins=40, losses=10)
    truth = truth_of(1000)
    sloppy = scores(answers(truth, right), sureness=0.4)
    sloppy = replace(sloppy, latency_s=0.05, size_bytes=5000)
    decision = decide(sloppy, scores(answers(truth, before)), truth=truth, **RULE)
    assert decision.outcome == "refuse"
    assert [reason.split(":")[0] for reason in decision.reasons] == ["less sure of the truth", "slower", "larger"]


def test_a_class_below_its_floor_stops_even_the_first_model() -> None:
    truth = ["a"] * 100 + ["b"] * 40 + ["c"] * 20
    said = ["a"] * 100 + ["a"] * 16 + ["b"] * 24 + ["a"] * 20
    refused = decide(scores(said), None, truth=truth, **RULE | {"min_class_accuracy": 0.7})
    assert refused.outcome == "refuse"
    assert refused.reasons == (
        "too bad: class 'b' is found in 60.0% of its 40 images, below the floor, gate.min_class_accuracy 70.0%",
    )
    assert decide(scores(said), None, truth=truth, **RULE | {"min_class_accuracy": 0.6}).outcome == "first"


def test_a_boastful_model_is_refused_and_a_modest_one_is_not() -> None:
    right, before = outcomes_apart(1000, wins=40, losses=10, both_right=0.75)  # 79 % against 76 %
    truth = truth_of(1000)
    champion = scores(answers(truth, before), sureness=0.78)
    limits = RULE | {"max_overconfidence": 0.05, "max_nll_increase": 9.0}
    boastful = decide(scores(answers(truth, right), sureness=0.88), champion, truth=truth, **limits)
    assert boastful.outcome == "refuse"
    assert "confidence exceeds its accuracy by 9.0 points, over the limit of 7.0" in boastful.reasons[0]
    modest = decide(scores(answers(truth, right), sureness=0.5), champion, truth=truth, **limits)
    assert modest.outcome == "promote"
    assert modest.numbers["overconfidence"] == pytest.approx(-0.29)


def test_where_classes_are_judged_alike_their_likelihoods_are_too() -> None:
    """Surer of ten rare pictures and less sure of a thousand common ones, as a logit adjustment makes a model."""
    truth = ["a"] * 1000 + ["b"] * 10 + ["c"] * 10
    champion, challenger = scores(truth), scores(truth)
    for model, common, rare in ((champion, 0.95, 0.4), (challenger, 0.85, 0.8)):
        sure = np.where(np.array(truth) == "a", common, rare)
        model.probabilities[:] = (1 - sure[:, None]) / 2
        model.probabilities[np.arange(len(truth)), [LABELS.index(label) for label in truth]] = sure
    plain = decide(challenger, champion, truth=truth, **RULE)
    assert plain.outcome == "refuse"
    assert any(reason.startswith("less sure of the truth") for reason in plain.reasons)
    alike = decide(challenger, champion, truth=truth, **RULE | {"balanced": True})
    assert alike.numbers["nll"] == pytest.approx(-(np.log(0.85) + 2 * np.log(0.8)) / 3, rel=1e-5)
    assert not any("less sure of the truth" in reason for reason in alike.reasons)


def test_a_model_that_breaks_on_spoiled_pictures_is_refused() -> None:
    right, before = outcomes_apart(1000, wins=40, losses=10)
    truth = truth_of(1000)
    generator = np.random.default_rng(0)

    def verdict(share: float, share_before: float, num: int) -> Decision:
        one, other = (generator.binomial(6, each, num) / 6 for each in (share, share_before))
        challenger = replace(scores(answers(truth, right)), survived=one)
        return decide(challenger, replace(scores(answers(truth, before)), survived=other), truth=truth, **RULE)

    refused = verdict(0.6, 0.8, 100)
    assert refused.outcome == "refuse"
    assert refused.reasons[0].startswith("less robust: ")
    assert refused.numbers["robust_accuracy"] < refused.numbers["champion_robust_accuracy"]
    assert verdict(0.78, 0.8, 100).outcome == "promote"  # within the budget
    assert verdict(0.9, 0.8, 100).outcome == "promote"
    lone = replace(scores(answers(truth, right)), survived=np.array([0.0, 1.0]))
    unlucky = decide(lone, replace(scores(answers(truth, before)), survived=np.array([1.0, 0.9])), truth=truth, **RULE)
    assert unlucky.outcome == "promote"  # two pictures prove nothing


def test_uneven_classes_are_judged_by_balanced_accuracy() -> None:
    truth = ["a"] * 1000 + ["b"] * 200
    before = np.ones(1200, dtype=bool)
    before[:30] = False
    right = np.ones(1200, dtype=bool)
    right[-20:] = False
    one, other = scores(answers(truth, right)), scores(answers(truth, before))
    decision = decide(one, other, truth=truth, **RULE | {"balanced": "auto"})
    assert decision.numbers["balanced"] is True
    assert decision.numbers["difference"] == pytest.approx((30 / 1000 - 20 / 200) / 2)
    assert decision.outcome == "refuse"
    assert "balanced accuracy -3.50 points" in decision.reasons[0]
    assert decide(one, other, truth=truth, **RULE).numbers["difference"] == pytest.approx(10 / 1200)


def test_a_worn_test_set_is_warned_of() -> None:
    right, before = outcomes_apart(1000, wins=40, losses=10)
    assert judged(right, before, num_uses=19).warnings == ()
    assert "has judged 20 models" in judged(right, before, num_uses=20).warnings[0]


def test_without_test_images_there_is_no_verdict() -> None:
    with pytest.raises(DataError, match="no test image"):
        decide(replace(scores(["a"]), probabilities=np.empty((0, 3))), None, truth=[], **RULE)


# Changed labels.


def test_a_new_class_counts_for_the_challenger() -> None:
    truth = ["a"] * 300 + ["b"] * 300 + ["new"] * 60
    challenger = scores(truth, ("a", "b", "new"))
    champion = scores(["a"] * 300 + ["b"] * 360, ("a", "b"))
    decision = decide(challenger, champion, truth=truth, **RULE)
    assert (decision.outcome, decision.better) == ("promote", True)
    assert (decision.numbers["wins"], decision.numbers["num_shared_images"]) == (60, 600)
    assert decision.numbers["shared_difference"] == 0
    assert (
        "new classes: 'new'; their 60 test images are misses of the champion, and the challenger is right on 60."
        in (decision.warnings)
    )


def test_a_new_class_does_not_hide_a_loss_on_the_old_ones() -> None:
    truth = ["a"] * 300 + ["b"] * 300 + ["new"] * 200
    said = list(truth)
    said[:12] = ["b"] * 12
    said[300:312] = ["a"] * 12
    decision = decide(
        scores(said, ("a", "b", "new")), scores(["a"] * 300 + ["b"] * 500, ("a", "b")), truth=truth, **RULE
    )
    assert decision.numbers["difference"] > 0.2
    assert decision.numbers["shared_difference"] == pytest.approx(-0.04)
    assert decision.outcome != "promote"


def test_a_lost_class_counts_against_the_challenger() -> None:
    truth = ["a"] * 300 + ["b"] * 300 + ["c"] * 40
    decision = decide(scores(["a"] * 300 + ["b"] * 340, ("a", "b")), scores(truth), truth=truth, **RULE)
    assert decision.outcome == "refuse"
    assert any("'c' falls from 100.0% to 0.0%" in reason for reason in decision.reasons)
    assert "gone classes: 'c'; their 40 test images are misses of the challenger, and the champion is right on 40." in (
        decision.warnings
    )


def test_another_task_altogether_is_judged_on_what_the_challenger_knows() -> None:
    truth = ["cat", "dog"] * 200
    decision = decide(scores(truth, ("cat", "dog")), scores(truth_of(400)), truth=truth, **RULE)
    assert (decision.outcome, decision.better) == ("promote", True)
    assert decision.numbers["num_shared_images"] == 0
    assert decision.numbers["nll"] is None


def test_the_order_of_labels_does_not_matter() -> None:
    right, before = outcomes_apart(600, wins=30, losses=12)
    truth = truth_of(600)
    one, other = scores(answers(truth, right)), scores(answers(truth, before))
    turned = Scores(LABELS[::-1], other.probabilities[:, ::-1], other.latency_s, other.size_bytes)
    assert decide(one, turned, truth=truth, **RULE) == decide(one, other, truth=truth, **RULE)


# Laws.

pairs = st.integers(1, 400).flatmap(
    lambda num: st.tuples(st.just(num), st.integers(0, num), st.floats(0, 1), st.integers(0, 2**32 - 1))
)


def drawn_pair(num: int, discordant: int, won: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    right = generator.random(num) < 0.7
    before = right.copy()
    apart = generator.permutation(num)[:discordant]
    right[apart] = generator.random(discordant) < won
    before[apart] = ~right[apart]
    return right, before


@settings(max_examples=60)
@given(pair=pairs, balanced=st.booleans())
def test_swapping_the_models_turns_the_verdict(pair: tuple[int, int, float, int], balanced: bool) -> None:
    right, before = drawn_pair(*pair)
    one = judged(right, before, draws=100, balanced=balanced)
    other = judged(before, right, draws=100, balanced=balanced)
    assert one.numbers["difference"] == -other.numbers["difference"]
    assert (one.numbers["wins"], one.numbers["losses"]) == (other.numbers["losses"], other.numbers["wins"])
    assert one.numbers["midp"] + other.numbers["midp"] == pytest.approx(1)
    assert not (one.better and other.better)
    if one.numbers["difference"]:
        assert not (one.promotes and other.promotes)


@settings(max_examples=60)
@given(pair=pairs, place=st.floats(0, 1, exclude_max=True), balanced=st.booleans())
def test_one_more_image_answered_right_never_hurts(
    pair: tuple[int, int, float, int], place: float, balanced: bool
) -> None:
    right, before = drawn_pair(*pair)
    order = {"refuse": 0, "undecided": 1, "promote": 2}
    worse = judged(right, before, draws=100, balanced=balanced, max_overconfidence=0.05)
    improved = right.copy()
    improved[int(place * len(right))] = True
    better = judged(improved, before, draws=100, balanced=balanced, max_overconfidence=0.05)
    assert better.numbers["lower_bound"] >= worse.numbers["lower_bound"]
    assert better.numbers["midp"] <= worse.numbers["midp"]
    assert better.better >= worse.better
    if before.tolist() != improved.tolist():
        assert order[better.outcome] >= order[worse.outcome]


@settings(max_examples=40)
@given(num=st.integers(1, 5000), seed=st.integers(0, 99), sureness=st.floats(0.4, 0.99))
def test_a_tie_never_promotes(num: int, seed: int, sureness: float) -> None:
    right = np.random.default_rng(seed).random(num) < 0.8
    truth = truth_of(num)
    challenger = scores(answers(truth, right), sureness=sureness)
    decision = decide(challenger, scores(answers(truth, right)), truth=truth, **RULE | {"draws": 100})
    assert decision.outcome == "refuse"
    assert not decision.better
    assert "nothing gained" in decision.reasons[0]


@settings(max_examples=40)
@given(counts=st.lists(st.integers(1, 60), min_size=3, max_size=3), seed=st.integers(0, 99), balanced=st.booleans())
def test_a_challenger_worse_on_every_class_is_never_promoted(counts: list[int], seed: int, balanced: bool) -> None:
    generator = np.random.default_rng(seed)
    truth, right, before = [], [], []
    for label, count in zip(LABELS, counts, strict=True):
        before_here = generator.random(count) < 0.7
        before_here[0] = True
        right_here = before_here & (generator.random(count) < 0.9)
        right_here[0] = False
        truth += [label] * count
        right += right_here.tolist()
        before += before_here.tolist()
    decision = decide(
        scores(answers(truth, np.array(right))),
        scores(answers(truth, np.array(before))),
        truth=truth,
        **RULE | {"balanced": balanced, "draws": 100},
    )
    assert decision.outcome == "refuse"
    assert not decision.better


def test_the_same_scores_get_the_same_decision() -> None:
    right, before = outcomes_apart(500, wins=20, losses=12)
    assert judged(right, before) == judged(right, before)


def test_the_section_gate_of_the_params_is_what_it_takes(repository: Path) -> None:
    rule = load_params(repository / "params.yaml").gate.model_dump()
    truth = truth_of(60)
    assert decide(scores(truth), None, truth=truth, seed=0, num_uses=0, **rule).outcome == "first"


def test_it_needs_nothing_heavy(repository: Path) -> None:
    heavy = ("torch", "pandas", "pyarrow", "scipy", "sklearn", "onnxruntime", "matplotlib")
    script = f"import sys, tasks.gate; print(sorted(set({heavy}) & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
