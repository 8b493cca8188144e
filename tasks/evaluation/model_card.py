"""The model card: what a model is, how good it is, what it is for and where it ends. Markdown, no dates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tasks.evaluation.metrics import Accuracy, ClassScore, MacroIntervals
from tasks.evaluation.robustness import Robustness
from tasks.evaluation.slices import Slice

MAX_LISTED_CLASSES = 60
FEW_IMAGES = 30
PURPOSE = (
    "Sorting pictures like those it was trained on into the classes above. It answers every picture with one of these "
    "classes: it does not know what it has never seen, and a picture of something else gets a label too."
)


@dataclass(frozen=True)
class Attacked:
    """Accuracy on validation images that were disturbed to mislead the model; an upper bound.

    Args:
        num_images: Validation images.
        epsilon: Largest change of a value in 0..1.
        accuracy: By attack; ``clean`` is none.
    """

    num_images: int
    epsilon: float
    accuracy: Mapping[str, Accuracy]


@dataclass(frozen=True)
class CardFacts:
    """All that the card says.

    Args:
        labels: Classes.
        bundle_digest: Identity of the bundle.
        data_sha256: Of the accepted images' manifest: the data version.
        num_images: By split.
        architecture: Of the backbone.
        backbone_notes: What a reader should know of it.
        weights_source: Where its weights come from.
        weights_licence: Of them; None where nobody said.
        kept_stages: Fine-tuning stages that were kept.
        preprocessing: In words.
        precision: Of the numbers that it answers with: ``fp32`` or ``int8``.
        confidence: Of the intervals.
        measured: What was measured, by the name of the model: the interval of its accuracy, or why there is none.
        balanced_accuracy: Of what ships.
        macro_f1: Of what ships.
        intervals: Of these two.
        nll: Of what ships.
        ece: Of what ships.
        classes: Scores of each class, in the order of the labels.
        slices: Parts of the test images.
        robustness: On corrupted pictures; None where that was not measured.
        attacked: On attacked ones, where it was trained to withstand that; else None.
    """

    labels: Sequence[str]
    bundle_digest: str
    data_sha256: str
    num_images: Mapping[str, int]
    architecture: str
    backbone_notes: Sequence[str]
    weights_source: str
    weights_licence: str | None
    kept_stages: Sequence[str]
    preprocessing: str
    precision: str
    confidence: float
    measured: Mapping[str, Accuracy | str]
    balanced_accuracy: float
    macro_f1: float
    intervals: MacroIntervals
    nll: float
    ece: float
    classes: Sequence[ClassScore]
    slices: Sequence[Slice]
    robustness: Robustness | None
    attacked: Attacked | None


def model_card(facts: CardFacts) -> str:
    """The card's text."""
    return (
        "\n\n".join(
            [
                "# Model card",
                _table(identity(facts)),
                "## How good it is",
                _measured(facts),
                _classes(facts),
                "## What it is for",
                PURPOSE,
                "## Limits",
                "\n".join(f"- {_cell(limit)}" for limit in limits(facts)),
            ]
        )
        + "\n"
    )


def identity(facts: CardFacts) -> list[tuple[str, str]]:
    """What the model is and where it comes from: names and values."""
    tuned = f"fine-tuned ({', '.join(facts.kept_stages)})" if facts.kept_stages else "frozen, with a linear probe on it"
    return [
        ("bundle", facts.bundle_digest),
        ("data version", facts.data_sha256),
        ("images", ", ".join(f"{count:,} {split}" for split, count in facts.num_images.items())),
        (f"classes ({len(facts.labels)})", _listed(facts.labels)),
        ("backbone", f"{facts.architecture}, {tuned}"),
        *([("of the backbone", " ".join(facts.backbone_notes))] if facts.backbone_notes else []),
        ("pretrained weights", facts.weights_source),
        ("licence of the weights", facts.weights_licence or "not stated: find out before you ship"),
        ("input", facts.preprocessing),
        ("precision", facts.precision),
    ]


def limits(facts: CardFacts) -> list[str]:
    """Where the numbers end, in sentences."""
    few = [label for label, score in zip(facts.labels, facts.classes, strict=True) if score.num_test < FEW_IMAGES]
    weak = [f"{each.kind} {each.name} ({each.accuracy.accuracy:.1%})" for each in facts.slices if each.is_weak]
    return [
        "The interval speaks of pictures drawn like the test images; other cameras, places or seasons are another "
        "matter.",
        "Near-duplicates were kept on one side of the split where their hashes agree; likenesses beyond that can "
        "flatter.",
        "Probabilities were calibrated on the training data and hold for such data only.",
        *([f"Fewer than {FEW_IMAGES} test images, so little is known of: {_listed(few)}."] if few else []),
        *([f"Less often right than elsewhere, by {'; by '.join(weak)}."] if weak else []),
    ]


def _measured(facts: CardFacts) -> str:
    header = [
        f"| on the {facts.num_images['test']:,} test images | accuracy | {facts.confidence:.0%} interval |",
        "|---|---|---|",
    ]
    rows = [
        f"| {name} | – | {_cell(found)} |"
        if isinstance(found, str)
        else f"| {name} | {found.accuracy:.1%} | {found.accuracy_low:.1%} to {found.accuracy_high:.1%} |"
        for name, found in facts.measured.items()
    ]
    ranges = facts.intervals
    rest = (
        f"\n\nWhat ships, further: balanced accuracy {facts.balanced_accuracy:.1%} "
        f"({ranges.balanced_accuracy_low:.1%} to {ranges.balanced_accuracy_high:.1%}), macro F1 {facts.macro_f1:.3f} "
        f"({ranges.macro_f1_low:.3f} to {ranges.macro_f1_high:.3f}), negative log-likelihood {facts.nll:.4f} nats, "
        f"calibration error {facts.ece:.1%}{_robust(facts.robustness)}.{_attacked(facts.attacked)} "
        "It was measured as it ships: the exported bundle, through the predictor that serves it."
    )
    return "\n".join([*header, *rows]) + rest


def _robust(found: Robustness | None) -> str:
    if found is None:
        return ""
    each = ", ".join(f"{name} {share.accuracy:.1%}" for name, share in found.corruptions.items())
    return (
        f"; on {found.num_images:,} of the test images, spoiled, {_with_interval(found.mean)}: {each}; "
        f"unspoiled {_with_interval(found.clean)}"
    )


def _with_interval(share: Accuracy) -> str:
    return f"{share.accuracy:.1%} ({share.accuracy_low:.1%} to {share.accuracy_high:.1%})"


def _attacked(found: Attacked | None) -> str:
    if found is None:
        return ""
    names = {"clean": "as they are"}
    each = ", ".join(f"{names.get(name, name)} {_with_interval(share)}" for name, share in found.accuracy.items())
    return (
        f" Trained to withstand attacks: of {found.num_images:,} validation images, changed by at most "
        f"{255 * found.epsilon:.3g} of 255 in each value, it has right {each}; an upper bound: others are stronger."
    )


def _classes(facts: CardFacts) -> str:
    scored = sorted(zip(facts.labels, facts.classes, strict=True), key=lambda pair: pair[1].f1)[:MAX_LISTED_CLASSES]
    rows = [
        f"| {_cell(label)} | {score.num_test:,} | {score.precision:.1%} | {score.recall:.1%} | {score.f1:.3f} |"
        for label, score in scored
    ]
    left_out = len(facts.classes) - len(rows)
    note = [f"| ({left_out} better ones left out) | | | | |"] if left_out else []
    return "\n".join(
        ["| class, worst first | test images | precision | recall | F1 |", "|---|---|---|---|---|", *rows, *note]
    )


def _table(rows: Sequence[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)])


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:MAX_LISTED_CLASSES])
    return shown + (f" and {len(labels) - MAX_LISTED_CLASSES} more" if len(labels) > MAX_LISTED_CLASSES else "")


def _cell(text: str) -> str:
    """Text that cannot break a Markdown table and is no HTML in it."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
