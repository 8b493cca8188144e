"""The gate's decision as files: JSON for a script, and a page for a person who asks why. Written by flows.promotion."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from deploy.files import write_json, write_text
from tasks.evaluation.page import render_page
from tasks.gate import Decision
from tasks.layout import Layout

if TYPE_CHECKING:
    from flows.promotion import Verdict

OUTCOMES = {
    "first": "promoted: the first model",
    "promote": "promoted",
    "refuse": "refused",
    "undecided": "undecided, so not promoted",
    "champion": "nothing to decide",
}

Show = Callable[[Any], str]


def _share(value: float) -> str:
    return f"{value:.1%}"


def _points(value: float) -> str:
    return f"{100 * value:+.2f} points"


SIDE_BY_SIDE: Mapping[str, tuple[str, Show]] = {
    "accuracy": ("accuracy", _share),
    "robust_accuracy": ("accuracy on corrupted pictures", _share),
    "nll": ("negative log-likelihood", "{:.4f}".format),
    "overconfidence": ("confidence less accuracy", _points),
    "latency_s": ("one answer", lambda seconds: f"{seconds * 1e3:.1f} ms"),
    "size_bytes": ("size", lambda size: f"{size / 1e6:.1f} MB"),
}
COMPARISON: Mapping[str, tuple[str, Show]] = {
    "num_images": ("test images", "{:,}".format),
    "difference": ("difference", _points),
    "lower_bound": ("its lower bound", _points),
    "margin": ("tolerated loss", lambda margin: f"{100 * margin:.2f} points"),
    "wins": ("images won", "{:,}".format),
    "losses": ("images lost", "{:,}".format),
    "midp": ("McNemar's mid-p", "{:.3g}".format),
    "num_shared_images": ("images of classes that both know", "{:,}".format),
    "shared_difference": ("difference on those", _points),
    "needed_images": ("test images that a verdict needs", "{:,}".format),
}


def write_decision(layout: Layout, verdict: "Verdict", decision: Decision, *, test_digest: str) -> None:
    """Writes the last decision's JSON and page; the registry keeps all of them."""
    write_json(layout.decision, {**asdict(verdict), "test_digest": test_digest, "class_losses": decision.class_losses})
    numbers = decision.numbers
    uses = int(numbers.get("num_uses") or 0)
    page = render_page(
        "gate.html",
        verdict=verdict,
        promotes=decision.promotes,
        outcome=OUTCOMES[verdict.outcome],
        uses="no verdict" if not uses else f"{uses:,} verdict{'s' * (uses > 1)}",
        rows=[
            (name, _cell(numbers, key, show), _cell(numbers, f"champion_{key}", show))
            for key, (name, show) in SIDE_BY_SIDE.items()
            if numbers.get(key) is not None
        ],
        comparison=[
            (name, show(numbers[key])) for key, (name, show) in COMPARISON.items() if numbers.get(key) is not None
        ],
        losses=sorted(decision.class_losses.items(), key=lambda pair: -pair[1]),
    )
    write_text(layout.decision_page, page)


def _cell(numbers: Mapping[str, Any], key: str, show: Show) -> str:
    value = numbers.get(key)
    return "" if value is None else show(value)
