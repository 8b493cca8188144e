"""The gate: may a challenger replace the champion? Pure numbers in, a decision with reasons out.

Both models answer the same test images and are compared image by image. A challenger is promoted if all of this holds:

1. The lower bound (one-sided, ``confidence``) of the paired difference in accuracy, or in balanced accuracy where the
   classes are uneven, lies above ``-margin``. The bound comes from a paired bootstrap stratified by class.
2. The difference itself is not negative, and some image is answered otherwise. A model that is right on exactly the
   same images gains nothing and is refused: a tie never promotes. With images won and as many lost the difference is
   0 and the bound decides, as for any other difference.
3. No class of at least ``min_class_images`` loses more than ``max_class_loss`` with a mid-p below .01.
4. Accuracy, and that of each class of at least ``min_class_images``, lie above their floors. Negative log-likelihood,
   latency and size stay within their ratios to the champion's. Overconfidence (mean confidence less accuracy) exceeds
   the champion's by no more than its limit; being less sure than right is no fault, and the likelihood, a proper score,
   sees to the rest of calibration. Accuracy on corrupted pictures falls by no more than its limit, as far as so many
   pictures can tell (one-sided, ``confidence``).

Where only 1 fails, or where the images are so few that not one lost would still not exclude a loss of ``margin``
(the rule of three) and the challenger is not shown to be better, the outcome is "undecided" with the number of images
that a verdict would need. "Better" is said only where McNemar's one-sided mid-p is below ``1 - confidence``. The first
model of all has nobody to beat: only the floor of 4 applies.

Labels may have changed. An image whose class a model does not know is its miss, so a class that the challenger lost
counts against it and one that it gained counts for it. So that new classes cannot hide a loss on old ones, the bound
must also hold on the images of the shared classes alone; likelihoods and overconfidence are compared on those.

The statistics and their sources are in tasks/evaluation/paired.py. Called by the promotion flow.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tasks.errors import DataError
from tasks.evaluation.paired import (
    SMALLEST_PROBABILITY,
    Bools,
    Paired,
    Texts,
    compare,
    images_by_rule_of_three,
    images_to_exclude_loss,
    is_uneven,
    mcnemar_midp,
)

Outcome = Literal["first", "promote", "refuse", "undecided"]

MAX_CLASS_MIDP = 0.01
AUTO_MARGIN, AUTO_MARGIN_SMALL, AUTO_MARGIN_IMAGES = 0.01, 0.02, 1000

Number = float | int | bool | None


@dataclass(frozen=True)
class Scores:
    """What one model answers for the N test images.

    Args:
        labels: Its classes, in the order of the probabilities.
        probabilities: Of shape (N, C).
        latency_s: Median time of one answer.
        size_bytes: Of the whole graph.
        survived: Share of the corruptions under which each of M pictures is answered right, (M,); None where that was
            not asked.
    """

    labels: tuple[str, ...]
    probabilities: NDArray[np.floating]
    latency_s: float
    size_bytes: int
    survived: NDArray[np.floating] | None = None


@dataclass(frozen=True)
class Decision:
    """What the gate says.

    Args:
        outcome: "first" and "promote" put the challenger into production; "refuse" and "undecided" change nothing.
        better: The challenger is better with confidence, not merely not worse.
        reasons: Whole sentences; the first one is the gist.
        warnings: What a person should know that decided nothing.
        numbers: What the reasons rest on; None where it does not apply. Differences, bounds and margin in 0..1;
            `needed_images` is 0 where no number of test images would decide.
        class_losses: Accuracy that each class lost (negative: gained), in 0..1, of the classes in the test images.
    """

    outcome: Outcome
    better: bool
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    numbers: Mapping[str, Number]
    class_losses: Mapping[str, float]

    @property
    def promotes(self) -> bool:
        """Whether the challenger goes into production."""
        return self.outcome in ("first", "promote")


@dataclass(frozen=True)
class Evidence:
    """All that the rule looks at.

    Args:
        right: Whether the challenger is right, (N,).
        right_before: Whether the champion is, (N,).
        overall: Compared on all images.
        shared: Compared on the images of classes that both know; None where there are none.
        balanced: The metric is balanced accuracy.
        margin: Tolerated loss.
        midp: McNemar's, on all images.
        better: The challenger is better with confidence.
        nll: The challenger's mean negative log-likelihood on the shared images, over the classes where these are judged
            alike; None where there are none.
        champion_nll: The champion's.
        overconfidence: The challenger's mean confidence less its accuracy there; None where there are none.
        champion_overconfidence: The champion's.
    """

    right: Bools
    right_before: Bools
    overall: Paired
    shared: Paired | None
    balanced: bool
    margin: float
    midp: float
    better: bool
    nll: float | None
    champion_nll: float | None
    overconfidence: float | None
    champion_overconfidence: float | None


def decide(
    challenger: Scores,
    champion: Scores | None,
    *,
    truth: Sequence[str],
    seed: int,
    num_uses: int,
    confidence: float,
    margin: float | Literal["auto"],
    draws: int,
    balanced: bool | Literal["auto"],
    max_class_loss: float,
    min_class_images: int,
    max_nll_increase: float,
    max_overconfidence: float,
    max_robustness_loss: float,
    min_accuracy: float,
    min_class_accuracy: float,
    max_latency_ratio: float,
    max_size_ratio: float,
    warn_uses: int,
) -> Decision:
    """Decides whether the challenger may replace the champion; the rule is in the module's docstring.

    Args:
        challenger: Its answers.
        champion: Its answers for the same images, made now; None where nothing is in production yet.
        truth: The N true labels.
        seed: Of the bootstrap.
        num_uses: How often the gate has judged by this test set before.
        confidence: One-sided, in (0.5, 1).
        margin: Tolerated loss in 0..1; "auto" is 0.01, and 0.02 below 1,000 images.
        draws: Of the bootstrap.
        balanced: Judge by balanced accuracy; "auto" does so where the largest class has over 3 times the smallest.
        max_class_loss: Accuracy that no class may lose, in 0..1.
        min_class_images: Classes with fewer images are too small for that.
        max_nll_increase: Relative.
        max_overconfidence: Above the champion's, in 0..1.
        max_robustness_loss: Accuracy on corrupted pictures that may be lost, in 0..1.
        min_accuracy: Absolute floor.
        min_class_accuracy: Absolute floor of each class.
        max_latency_ratio: Challenger over champion.
        max_size_ratio: Challenger over champion.
        warn_uses: Uses of one test set after which it is worn.

    Raises:
        DataError: If there is no test image.
    """
    if not len(truth):
        raise DataError("the gate has no test image to judge by. Add images, or raise index_images.test_fraction.")
    labels = np.asarray(truth, dtype=np.str_)
    right = is_right(challenger, labels)
    floor = tuple(_floor_refusals(right, labels, min_accuracy, min_class_accuracy, min_class_images))
    wear = _wear_warnings(num_uses, warn_uses)
    if champion is None:
        return _first(challenger, right, floor, wear, num_uses)
    found = _evidence(
        challenger,
        champion,
        labels,
        margin=_auto_margin(len(labels)) if margin == "auto" else margin,
        balanced=is_uneven(labels) if balanced == "auto" else balanced,
        confidence=confidence,
        draws=draws,
        seed=seed,
    )
    refusals = (
        *floor,
        *_difference_refusals(found),
        *_class_refusals(found, labels, max_class_loss, min_class_images),
        *_calibration_refusals(found, max_nll_increase, max_overconfidence),
        *_robustness_refusals(challenger, champion, max_robustness_loss, confidence),
        *_cost_refusals(challenger, champion, max_latency_ratio, max_size_ratio),
    )
    needed = _needed_images(found, confidence)
    outcome: Outcome = "refuse" if refusals else "undecided" if needed is not None else "promote"
    return Decision(
        outcome=outcome,
        better=found.better,
        reasons=refusals
        or (_promote_reason(found) if needed is None else _undecided_reason(found, needed, confidence),),
        warnings=(*wear, *_label_warnings(challenger, champion, found, labels)),
        numbers=_numbers(found, challenger, champion) | {"needed_images": needed, "num_uses": num_uses},
        class_losses=class_losses(found.right, found.right_before, labels),
    )


def is_right(scores: Scores, labels: Texts) -> Bools:
    """Whether the most probable class is the true one, (N,); a class the model does not know never is.

    Args:
        scores: Of a model.
        labels: True labels, (N,).
    """
    if scores.probabilities.shape != (len(labels), len(scores.labels)):
        raise ValueError(
            f"{scores.probabilities.shape} probabilities for {len(labels)} images of {len(scores.labels)} classes"
        )
    right: Bools = np.asarray(scores.labels, dtype=np.str_)[scores.probabilities.argmax(axis=1)] == labels
    return right


def mean_nll(scores: Scores, labels: Texts, *, balanced: bool) -> float:
    """Mean negative log-likelihood of the true labels, all of which the model must know.

    Args:
        scores: Of a model.
        labels: True labels, (N,).
        balanced: The mean over the classes of their means, as a model that is judged by balanced accuracy is made for.
    """
    column = {label: index for index, label in enumerate(scores.labels)}
    columns = np.array([column[label] for label in labels])
    likelihoods = scores.probabilities[np.arange(len(labels)), columns].astype(np.float64)
    nll = -np.log(np.maximum(likelihoods, SMALLEST_PROBABILITY))
    if balanced:
        return float(np.mean([nll[labels == label].mean() for label in np.unique(labels)]))
    return float(nll.mean())


def overconfidence(scores: Scores, right: Bools) -> float:
    """Mean probability of the predicted class less the share that is right, in -1..1."""
    return float(scores.probabilities.max(axis=1).astype(np.float64).mean() - right.mean())


def class_losses(right: Bools, right_before: Bools, labels: Texts) -> dict[str, float]:
    """Accuracy that each class lost from champion to challenger, in -1..1."""
    return {
        str(label): float(right_before[labels == label].mean() - right[labels == label].mean())
        for label in np.unique(labels)
    }


def _evidence(
    challenger: Scores,
    champion: Scores,
    labels: Texts,
    *,
    margin: float,
    balanced: bool,
    confidence: float,
    draws: int,
    seed: int,
) -> Evidence:
    right, before = is_right(challenger, labels), is_right(champion, labels)
    shared = np.isin(labels, np.intersect1d(challenger.labels, champion.labels))
    every, some = np.ones_like(shared), shared.any()

    def paired(rows: Bools) -> Paired:
        return compare(
            right[rows],
            before[rows],
            labels[rows],
            balanced=balanced,
            confidence=confidence,
            draws=draws,
            seed=seed,
        )

    overall = paired(every)
    midp = mcnemar_midp(overall.wins, overall.losses)
    return Evidence(
        right=right,
        right_before=before,
        overall=overall,
        shared=(overall if shared.all() else paired(shared)) if some else None,
        balanced=balanced,
        margin=margin,
        midp=midp,
        better=midp < 1 - confidence and overall.difference > 0,
        nll=mean_nll(_rows(challenger, shared), labels[shared], balanced=balanced) if some else None,
        champion_nll=mean_nll(_rows(champion, shared), labels[shared], balanced=balanced) if some else None,
        overconfidence=overconfidence(_rows(challenger, shared), right[shared]) if some else None,
        champion_overconfidence=overconfidence(_rows(champion, shared), before[shared]) if some else None,
    )


def _rows(scores: Scores, rows: Bools) -> Scores:
    return replace(scores, probabilities=scores.probabilities[rows])


def _auto_margin(num_images: int) -> float:
    return AUTO_MARGIN if num_images >= AUTO_MARGIN_IMAGES else AUTO_MARGIN_SMALL


def _first(challenger: Scores, right: Bools, floor: Sequence[str], wear: Sequence[str], num_uses: int) -> Decision:
    """The decision where nothing is in production yet."""
    accuracy = float(right.mean())
    first = (
        f"first model: right on {right.sum():,} of {len(right):,} test images ({accuracy:.1%}), none to compare with"
    )
    return Decision(
        outcome="refuse" if floor else "first",
        better=False,
        reasons=tuple(floor) or (first,),
        warnings=tuple(wear),
        numbers={
            "num_images": len(right),
            "accuracy": accuracy,
            "latency_s": challenger.latency_s,
            "size_bytes": challenger.size_bytes,
            "num_uses": num_uses,
        },
        class_losses={},
    )


def _floor_refusals(
    right: Bools, labels: Texts, min_accuracy: float, min_class_accuracy: float, min_class_images: int
) -> Iterator[str]:
    if right.mean() < min_accuracy:
        yield f"too bad: accuracy {right.mean():.1%} is below the floor, gate.min_accuracy {min_accuracy:.1%}"
    for label in np.unique(labels):
        here = right[labels == label]
        if len(here) >= min_class_images and here.mean() < min_class_accuracy:
            yield (
                f"too bad: class {str(label)!r} is found in {here.mean():.1%} of its {len(here):,} images, below the "
                f"floor, gate.min_class_accuracy {min_class_accuracy:.1%}"
            )


def _difference_refusals(found: Evidence) -> Iterator[str]:
    overall = found.overall
    if not overall.wins and not overall.losses:
        num_right = int(found.right.sum())
        yield f"nothing gained: it is right on the very same {num_right:,} of {overall.num_images:,} test images"
    elif overall.difference < 0:
        yield f"worse: {_gist(found)}"


def _class_refusals(found: Evidence, labels: Texts, max_class_loss: float, min_class_images: int) -> Iterator[str]:
    for label, loss in class_losses(found.right, found.right_before, labels).items():
        right, before = found.right[labels == label], found.right_before[labels == label]
        midp = mcnemar_midp(int((before & ~right).sum()), int((right & ~before).sum()))
        if len(right) >= min_class_images and loss > max_class_loss and midp < MAX_CLASS_MIDP:
            yield (
                f"a class suffers: {label!r} falls from {before.mean():.1%} to {right.mean():.1%} on {len(right):,} "
                f"images, more than gate.max_class_loss {max_class_loss:.0%} (mid-p {midp:.2g})"
            )


def _calibration_refusals(found: Evidence, max_nll_increase: float, max_overconfidence: float) -> Iterator[str]:
    if found.nll is not None and found.champion_nll is not None:
        limit = found.champion_nll * (1 + max_nll_increase)
        if found.nll > limit:
            yield (
                f"less sure of the truth: negative log-likelihood {found.nll:.4f} against {found.champion_nll:.4f}, "
                f"over the limit of {limit:.4f} (gate.max_nll_increase {max_nll_increase:.0%})"
            )
    if found.overconfidence is not None and found.champion_overconfidence is not None:
        limit = max(0.0, found.champion_overconfidence) + max_overconfidence
        if found.overconfidence > limit:
            yield (
                f"boastful: its confidence exceeds its accuracy by {100 * found.overconfidence:.1f} points, over the "
                f"limit of {100 * limit:.1f} (gate.max_overconfidence {max_overconfidence:.0%} above the champion's)"
            )


def _robustness_refusals(
    challenger: Scores, champion: Scores, max_robustness_loss: float, confidence: float
) -> Iterator[str]:
    """Refuses a loss over the limit that chance does not explain; pictures are the units, not their corruptions."""
    if challenger.survived is None or champion.survived is None or len(challenger.survived) < 2:
        return
    losses = champion.survived.astype(np.float64) - challenger.survived
    loss, error = losses.mean(), losses.std(ddof=1) / math.sqrt(len(losses))
    if loss > max_robustness_loss and loss > NormalDist().inv_cdf(confidence) * error:
        yield (
            f"less robust: {challenger.survived.mean():.1%} right on {len(losses):,} corrupted test images against "
            f"{champion.survived.mean():.1%}, more than gate.max_robustness_loss {max_robustness_loss:.0%}"
        )


def _cost_refusals(
    challenger: Scores, champion: Scores, max_latency_ratio: float, max_size_ratio: float
) -> Iterator[str]:
    if challenger.latency_s > champion.latency_s * max_latency_ratio:
        yield (
            f"slower: {challenger.latency_s * 1e3:.1f} ms an image against {champion.latency_s * 1e3:.1f} ms, "
            f"more than gate.max_latency_ratio {max_latency_ratio:g} times"
        )
    if challenger.size_bytes > champion.size_bytes * max_size_ratio:
        yield (
            f"larger: {challenger.size_bytes / 1e6:.1f} MB against {champion.size_bytes / 1e6:.1f} MB, "
            f"more than gate.max_size_ratio {max_size_ratio:g} times"
        )


def _needed_images(found: Evidence, confidence: float) -> int | None:
    """Test images that a verdict would need; None where these suffice. 0: no number of images would do.

    Connor's number for two truly equal models, or the number at which the present difference would do if that is more.
    """
    overall, shared, margin = found.overall, found.shared, found.margin
    unproven = [each for each in (overall, shared or overall) if each.lower_bound <= -margin]
    too_few = margin > 0 and overall.num_images < images_by_rule_of_three(margin, confidence) and not found.better
    if not unproven and not too_few:
        return None
    needed = images_to_exclude_loss(margin, overall.discordance, confidence=confidence)
    for each in unproven:
        room = each.difference + margin
        ratio = ((each.difference - each.lower_bound) / room) ** 2 if room > 0 else math.inf
        needed = max(needed, overall.num_images * ratio)
    return max(math.ceil(needed), overall.num_images + 1) if math.isfinite(needed) else 0


def _gist(found: Evidence) -> str:
    """The comparison in one sentence."""
    overall = found.overall
    metric = "balanced accuracy" if found.balanced else "accuracy"
    return (
        f"{metric} {100 * overall.difference:+.2f} points on {overall.num_images:,} test images "
        f"({overall.wins:,} won, {overall.losses:,} lost; lower bound {100 * overall.lower_bound:+.2f}, "
        f"margin {100 * found.margin:.2f})"
    )


def _promote_reason(found: Evidence) -> str:
    if found.better:
        return f"better: {_gist(found)}, mid-p {found.midp:.3g}"
    return f"not worse: {_gist(found)}; not shown to be better, mid-p {found.midp:.3g}"


def _undecided_reason(found: Evidence, needed: int, confidence: float) -> str:
    overall, shared = found.overall, found.shared
    if overall.lower_bound > -found.margin and shared and shared.lower_bound <= -found.margin:
        gist = (
            f"{_gist(found)}, but on the {shared.num_images:,} images of classes that both know "
            f"{100 * shared.difference:+.2f} points (lower bound {100 * shared.lower_bound:+.2f})"
        )
    else:
        gist = _gist(found)
    more = (
        f"A verdict would need about {needed - overall.num_images:,} more test images"
        if needed
        else "No number of test images would decide this"
    )
    return f"too close to call: {gist} at confidence {confidence:.0%}. {more}"


def _wear_warnings(num_uses: int, warn_uses: int) -> tuple[str, ...]:
    if num_uses < warn_uses:
        return ()
    return (
        f"this test set has judged {num_uses:,} models before; choosing again and again by the same images adapts to "
        "them. Add fresh test images.",
    )


def _label_warnings(challenger: Scores, champion: Scores, found: Evidence, labels: Texts) -> Iterator[str]:
    sides = (
        (challenger, champion, found.right, "new", "the champion", "the challenger"),
        (champion, challenger, found.right_before, "gone", "the challenger", "the champion"),
    )
    for one, other, right, what, whose, whoever in sides:
        if names := sorted(set(one.labels) - set(other.labels)):
            theirs = np.isin(labels, names)
            yield (
                f"{what} classes: {', '.join(map(repr, names))}; their {theirs.sum():,} test images are misses of "
                f"{whose}, and {whoever} is right on {right[theirs].sum():,}."
            )


def _numbers(found: Evidence, challenger: Scores, champion: Scores) -> dict[str, Number]:
    overall, shared = found.overall, found.shared
    return {
        "num_images": overall.num_images,
        "accuracy": float(found.right.mean()),
        "champion_accuracy": float(found.right_before.mean()),
        "balanced": found.balanced,
        "difference": overall.difference,
        "lower_bound": overall.lower_bound,
        "margin": found.margin,
        "wins": overall.wins,
        "losses": overall.losses,
        "discordance": overall.discordance,
        "midp": found.midp,
        "num_shared_images": shared.num_images if shared else 0,
        "shared_difference": shared.difference if shared else None,
        "shared_lower_bound": shared.lower_bound if shared else None,
        "nll": found.nll,
        "champion_nll": found.champion_nll,
        "overconfidence": found.overconfidence,
        "champion_overconfidence": found.champion_overconfidence,
        "robust_accuracy": _mean(challenger.survived),
        "champion_robust_accuracy": _mean(champion.survived),
        "latency_s": challenger.latency_s,
        "champion_latency_s": champion.latency_s,
        "size_bytes": challenger.size_bytes,
        "champion_size_bytes": champion.size_bytes,
    }


def _mean(values: NDArray[np.floating] | None) -> float | None:
    return None if values is None or not len(values) else float(values.mean())
