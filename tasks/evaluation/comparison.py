"""Ways to learn side by side: the table, the picture, and in plain sentences what a data set needs.

A difference is told of as a gain or a loss only where its interval lies on one side of zero. Where the gate judges by
balanced accuracy, accuracy means that here, too. Called by tasks.compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from deploy.files import atomic_path

DOTS_PER_INCH = 110
INK, ACCENT, FAINT = "#222222", "#b5432a", "#c9c9c9"


@dataclass(frozen=True)
class Outcome:
    """What a way to learn came to on the test images.

    Args:
        name: One word.
        title: For people.
        accuracy: With accuracy_low and accuracy_high.
        difference: To feature extraction, paired, with difference_low and difference_high.
        beaten_by: Names of the ways that are better beyond noise on the same test images.
        robust_accuracy: On attacked test images, an upper bound, with robust_accuracy_low and robust_accuracy_high.
        trained_parameters: Numbers of what ships that were trained.
        seconds: Of head and fine-tuning; features are shared and not counted.
        latency_s: Median of one picture.
        note: How it came about.
    """

    name: str
    title: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    difference: float
    difference_low: float
    difference_high: float
    beaten_by: tuple[str, ...]
    robust_accuracy: float
    robust_accuracy_low: float
    robust_accuracy_high: float
    trained_parameters: int
    seconds: float
    latency_s: float
    note: str


@dataclass(frozen=True)
class Missing:
    """A way that trained nothing to compare: the model of its experiment is another way's.

    Args:
        name: One word.
        title: For people.
        reason: What happened.
    """

    name: str
    title: str
    reason: str


def metric_name(*, balanced: bool) -> str:
    """What is compared, in words."""
    return "balanced accuracy" if balanced else "accuracy"


def comparison_table(
    outcomes: Sequence[Outcome], missing: Sequence[Missing], confidence: float, *, balanced: bool
) -> str:
    """The table as Markdown."""
    lines = [
        f"| way | {metric_name(balanced=balanced)} | {confidence:.0%} interval | against feature extraction, points "
        "| under attack | trained parameters | seconds | ms a picture | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        difference = "–" if each.name == "probe" else points(each)
        lines.append(
            f"| {each.title} | {each.accuracy:.1%} | {each.accuracy_low:.1%} to {each.accuracy_high:.1%} "
            f"| {difference} | {under_attack(each)} "
            f"| {each.trained_parameters:,} | {each.seconds:.1f} | {each.latency_s * 1e3:.1f} | {each.note} |"
        )
    lines += [f"| {each.title} |{' – |' * 7} {each.reason} |" for each in missing]
    return "\n".join(lines)


def under_attack(outcome: Outcome) -> str:
    """Accuracy on attacked images with its interval."""
    return f"{outcome.robust_accuracy:.1%} ({outcome.robust_accuracy_low:.1%} to {outcome.robust_accuracy_high:.1%})"


def points(outcome: Outcome) -> str:
    """The paired difference in percentage points, with its interval."""
    low, high = 100 * outcome.difference_low, 100 * outcome.difference_high
    return f"{100 * outcome.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def what_is_needed(outcomes: Sequence[Outcome], missing: Sequence[Missing], *, balanced: bool) -> tuple[str, ...]:
    """Plain sentences: the way to take, then what each of the others brings and costs.

    Args:
        outcomes: The ways that came to something, feature extraction among them.
        missing: The others.
        balanced: Accuracies are balanced ones.
    """
    by_name = {each.name: each for each in outcomes}
    reasons = {each.name: each.reason for each in missing}
    probe = by_name["probe"]
    sentences = [_choice(probe, [by_name[name] for name in ("top", "full") if name in by_name])]
    for name, subject in (
        ("as_is", "The pretrained model without training"),
        ("scratch", "Training from random weights for as long"),
        ("top", "Fine-tuning the top layers"),
        ("full", "Fine-tuning"),
        ("adversarial", "Fine-tuning against attacks"),
    ):
        if name in by_name:
            sentences.append(_brings(subject, by_name[name], probe))
        elif name in reasons:
            sentences.append(f"{subject} came to nothing ({reasons[name]}).")
    if hardened := by_name.get("adversarial"):
        start = by_name.get("full", probe)
        sentences.append(
            f"Under attack it is right on {under_attack(hardened)} of the test images, without that training on "
            f"{under_attack(start)}; stronger attacks exist."
        )
    if balanced:
        sentences.append(
            "Accuracy is balanced accuracy here, the mean over the classes: that is what the gate judges by."
        )
    return tuple(sentences)


def _choice(probe: Outcome, tuned: Sequence[Outcome]) -> str:
    """The cheapest way, in seconds, that none of the others beats beyond noise."""
    if not tuned:
        return (
            f"Feature extraction reaches {probe.accuracy:.1%} after {probe.seconds:.1f} s; "
            "there is no fine-tuning to compare it with."
        )
    names = {each.name for each in (probe, *tuned)}
    unbeaten = [each for each in (probe, *tuned) if not names & set(each.beaten_by)]
    found = min(unbeaten, key=lambda each: each.seconds)
    if found is probe:
        return f"This data set needs feature extraction only: {probe.accuracy:.1%} after {probe.seconds:.1f} s."
    return f"This data set needs more than feature extraction: {found.title}, {found.accuracy:.1%}."


def _brings(subject: str, outcome: Outcome, probe: Outcome) -> str:
    """What a way brings over the probe for which time."""
    if outcome.difference_low <= 0 <= outcome.difference_high:
        verdict = "no difference that these test images could show"
    else:
        verdict = "a gain" if outcome.difference > 0 else "a loss"
    more = outcome.seconds - probe.seconds
    price = f"for {more:.1f} s more" if more > 0 else f"for {-more:.1f} s less"
    return f"{subject} brings {points(outcome)} points {price}: {verdict}."


def draw_comparison(
    path: Path, outcomes: Sequence[Outcome], num_test: int, confidence: float, *, balanced: bool
) -> None:
    """Accuracy with its interval over the seconds of learning, a dot a way.

    Args:
        path: A PNG.
        outcomes: The ways.
        num_test: Test images.
        confidence: Of the intervals.
        balanced: Accuracies are balanced ones.
    """
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.add_subplot()
    rows = np.arange(len(outcomes))[::-1]
    for row, each in zip(rows, outcomes, strict=True):
        axes.plot([each.accuracy_low, each.accuracy_high], [row, row], color=FAINT, linewidth=6, solid_capstyle="round")
        axes.plot(each.accuracy, row, "o", color=ACCENT if each.name == "probe" else INK)
        told = f"{each.accuracy:.1%}, {each.seconds:.1f} s"
        axes.annotate(
            told, (each.accuracy, row), (0, 8), textcoords="offset points", ha="center", color=INK, fontsize=9
        )
    axes.set_yticks(rows, [each.title for each in outcomes])
    axes.set_ylim(-0.6, len(outcomes) - 0.3)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    metric = metric_name(balanced=balanced)
    axes.set_xlabel(f"{metric} on {num_test:,} test images, with {confidence:.0%} intervals; seconds of learning")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
