"""Ways to learn side by side: the table, the picture, and in plain sentences what a data set needs.

A difference is told of as a gain or a loss only where its interval lies on one side of zero. Called by tasks.compare.
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
        robust_accuracy: On attacked validation images, an upper bound; None where that was not measured.
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
    robust_accuracy: float | None
    trained_parameters: int
    seconds: float
    latency_s: float
    note: str


def comparison_table(outcomes: Sequence[Outcome], confidence: float) -> str:
    """The table as Markdown."""
    lines = [
        f"| way | accuracy | {confidence:.0%} interval | against feature extraction, points | under attack | "
        "trained parameters | seconds | ms a picture | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in outcomes:
        robust = "–" if each.robust_accuracy is None else f"{each.robust_accuracy:.1%}"
        difference = "–" if each.name == "probe" else points(each)
        lines.append(
            f"| {each.title} | {each.accuracy:.1%} | {each.accuracy_low:.1%} to {each.accuracy_high:.1%} "
            f"| {difference} | {robust} "
            f"| {each.trained_parameters:,} | {each.seconds:.1f} | {each.latency_s * 1e3:.1f} | {each.note} |"
        )
    return "\n".join(lines)


def points(outcome: Outcome) -> str:
    """The paired difference in percentage points, with its interval."""
    low, high = 100 * outcome.difference_low, 100 * outcome.difference_high
    return f"{100 * outcome.difference:+.1f} [{low:+.1f}, {high:+.1f}]"


def what_is_needed(outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    """Plain sentences: the way to take, then what each of the others brings and costs."""
    by_name = {each.name: each for each in outcomes}
    probe = by_name.get("probe")
    if probe is None:
        return ()
    tuned = [by_name[name] for name in ("top", "full") if name in by_name]
    sentences = [_choice(probe, tuned)]
    for name, subject in (
        ("as_is", "The pretrained model without training"),
        ("scratch", "Training from random weights for as long"),
        ("full", "Fine-tuning"),
        ("adversarial", "Fine-tuning against attacks"),
    ):
        if name in by_name:
            sentences.append(_brings(subject, by_name[name], probe))
    start, hardened = by_name.get("full"), by_name.get("adversarial")
    if hardened and hardened.robust_accuracy is not None and start and start.robust_accuracy is not None:
        sentences.append(
            f"Under attack it is right on {hardened.robust_accuracy:.1%} of the validation images, without that "
            f"training on {start.robust_accuracy:.1%}; stronger attacks exist."
        )
    return tuple(sentences)


def _choice(probe: Outcome, tuned: Sequence[Outcome]) -> str:
    """The cheapest way that nothing beats beyond noise."""
    better = [each for each in tuned if each.difference_low > 0]
    if not better:
        return f"This data set needs feature extraction only: {probe.accuracy:.1%} after {probe.seconds:.1f} s."
    best = max(better, key=lambda each: each.difference)
    return f"This data set needs more than feature extraction: {best.title}, {best.accuracy:.1%}."


def _brings(subject: str, outcome: Outcome, probe: Outcome) -> str:
    """What a way brings over the probe for which time."""
    if outcome.difference_low <= 0 <= outcome.difference_high:
        verdict = "no difference that these test images could show"
    else:
        verdict = "a gain" if outcome.difference > 0 else "a loss"
    more = outcome.seconds - probe.seconds
    price = f"for {more:.1f} s more" if more > 0 else f"for {-more:.1f} s less"
    return f"{subject} brings {points(outcome)} points {price}: {verdict}."


def draw_comparison(path: Path, outcomes: Sequence[Outcome], num_test: int, confidence: float) -> None:
    """Accuracy with its interval over the seconds of learning, a dot a way.

    Args:
        path: A PNG.
        outcomes: The ways.
        num_test: Test images.
        confidence: Of the intervals.
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
    axes.set_xlabel(f"accuracy on {num_test:,} test images, with {confidence:.0%} intervals; seconds of learning")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
