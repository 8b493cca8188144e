"""What becomes of a set: which images are left out and why, what stops the run, what is worth a warning."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tasks.data.complaints import image_remark, images_complaint, quarantine_reason, set_complaint
from tasks.data.expectations import Expectation, Finding, Validator
from tasks.data.set_summary import SetSummary, reference, summarise
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
        offenders: What is wrong with each image that does not meet an expectation, by expectation and path; one may be
            in several.
        summary: Of the accepted rows.
        before: Of the set that they were compared with, if there is one.
        classes: As `set_tables.class_table` gives it.
        stops: Paragraphs on what makes the set unfit; none where it is fit.
        warnings: Paragraphs on what a person should know.
    """

    accepted: "pd.DataFrame"
    quarantined: dict[str, str]
    offenders: dict[Expectation, dict[str, str]]
    summary: SetSummary
    before: SetSummary | None
    classes: "pd.DataFrame"
    stops: list[str]
    warnings: list[str]


def judge(
    manifest: "pd.DataFrame",
    expected: Sequence[Expectation],
    validator: Validator,
    history: Sequence[SetSummary],
    *,
    where: str,
) -> Judgement:
    """Holds the images to what is expected of images, and what is left of them to what is expected of classes and sets.

    Args:
        manifest: As `manifest.read_manifest` gives it.
        expected: As `expectations.expectations` gives them.
        validator: Checks, and remembers for its pages.
        history: The sets that were accepted before, the last one first.
        where: Name of the folder of images, for the messages.
    """
    images = image_table(manifest)
    findings = validator.check("images", images, expected)
    offenders = _offenders(images, findings)
    reasons = _reasons(offenders)
    accepted = images[~images["path"].isin(list(reasons))]
    lost = {
        path for each, paths in offenders.items() if _quarantines(each) and each.name not in LOSSLESS for path in paths
    }
    now = summarise(accepted)
    before = reference(history, now)
    whole = whole_table(images, accepted, num_lost=len(lost), now=now, before=before)
    classes = class_table(images, accepted, now=now, before=before)
    complaints = [
        (each.action, images_complaint(each, paths, where=where))
        for each, paths in offenders.items()
        if not _quarantines(each)
    ]
    found = (
        (whole, validator.check("whole", whole, expected)),
        (classes, validator.check("classes", classes, expected)),
    )
    complaints += [
        (finding.expectation.action, set_complaint(finding, table, where=where))
        for table, findings in found
        for finding in findings
    ]
    return Judgement(
        accepted=accepted[list(manifest.columns)].reset_index(drop=True),
        quarantined=reasons,
        offenders=offenders,
        summary=now,
        before=before,
        classes=classes,
        stops=[text for action, text in complaints if action == "stop"],
        warnings=[text for action, text in complaints if action == "warn"],
    )


def _quarantines(expected: Expectation) -> bool:
    return expected.action == "quarantine"


def _offenders(images: "pd.DataFrame", findings: Sequence[Finding]) -> dict[Expectation, dict[str, str]]:
    """What is wrong with each image that does not meet an expectation."""
    rows = {row["path"]: row for row in images.to_dict("records")}
    return {
        finding.expectation: {
            path: (quarantine_reason if _quarantines(finding.expectation) else image_remark)(
                finding.expectation, rows[path]
            )
            for path in finding.keys
        }
        for finding in findings
    }


def _reasons(offenders: Mapping[Expectation, Mapping[str, str]]) -> dict[str, str]:
    """Why images are left out, by path in order; several reasons of one image are joined."""
    reasons: dict[str, list[str]] = {}
    for expected, paths in offenders.items():
        for path, reason in paths.items() if _quarantines(expected) else ():
            reasons.setdefault(path, []).append(reason)
    return {path: "; ".join(reasons[path]) for path in sorted(reasons)}
