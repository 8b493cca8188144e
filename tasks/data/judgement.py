"""What becomes of a set: which images are left out and why, what stops the run, what is worth a warning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.data.complaints import quarantine_reason, set_complaint
from tasks.data.expectations import Expectation, Finding, Validator
from tasks.data.set_tables import class_table, image_table, whole_table

if TYPE_CHECKING:
    import pandas as pd

# A copy that is left out takes nothing from the set: its content stays. These do not count towards the budget.
LOSSLESS = frozenset({"in one split", "no copy"})


@dataclass(frozen=True)
class Judgement:
    """A manifest held to what is expected of it.

    Args:
        accepted: The rows to train on, with the manifest's columns.
        quarantined: Why images are left out, by path, in order.
        quarantined_per_expectation: How many images do not meet each; one may be in several.
        stops: Paragraphs on what makes the set unfit; none where it is fit.
        warnings: Paragraphs on what a person should know.
    """

    accepted: "pd.DataFrame"
    quarantined: dict[str, str]
    quarantined_per_expectation: dict[str, int]
    stops: list[str]
    warnings: list[str]


def judge(manifest: "pd.DataFrame", expected: Sequence[Expectation], validator: Validator, *, where: str) -> Judgement:
    """Holds the images to what is expected of images, and what is left of them to what is expected of classes and sets.

    Args:
        manifest: As `manifest.read_manifest` gives it.
        expected: As `expectations.expectations` gives them.
        validator: Checks, and remembers for its pages.
        where: Name of the folder of images, for the messages.
    """
    images = image_table(manifest)
    findings = validator.check("images", images, expected)
    reasons = _reasons(images, findings)
    accepted = images[~images["path"].isin(list(reasons))]
    lost = {path for finding in findings if finding.expectation.name not in LOSSLESS for path in finding.keys}
    whole = whole_table(images, accepted, num_lost=len(lost))
    classes = class_table(images, accepted)
    complaints = [
        (finding.expectation.action, set_complaint(finding, table, where=where))
        for table, found in (
            (whole, validator.check("whole", whole, expected)),
            (classes, validator.check("classes", classes, expected)),
        )
        for finding in found
    ]
    return Judgement(
        accepted=accepted[list(manifest.columns)].reset_index(drop=True),
        quarantined=reasons,
        quarantined_per_expectation={finding.expectation.name: len(finding.keys) for finding in findings},
        stops=[text for action, text in complaints if action == "stop"],
        warnings=[text for action, text in complaints if action == "warn"],
    )


def _reasons(images: "pd.DataFrame", findings: Sequence[Finding]) -> dict[str, str]:
    """Why images are left out, by path in order; several reasons of one image are joined."""
    rows = {row["path"]: row for row in images.to_dict("records")}
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        for path in finding.keys:
            reasons.setdefault(path, []).append(quarantine_reason(finding.expectation, rows[path]))
    return {path: "; ".join(reasons[path]) for path in sorted(reasons)}
