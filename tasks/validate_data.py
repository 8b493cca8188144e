"""Stage validate_data: holds the manifest to what is expected of a set, leaves bad images out, stops a bad set.

data/manifest/images.parquet → accepted.parquet, quarantine.csv, classes.json, accepted_summary.json, and pages for a
person in data/reports/validation/, which are there also when the stage stops.
"""

import csv
import io
import logging
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.files import atomic_path, remove_leftovers, write_text
from tasks.data.class_map import ClassMap, read_class_map, write_class_map
from tasks.data.complaints import listed
from tasks.data.contact_sheet import Tile, contact_sheet
from tasks.data.expectations import Validator, expectations
from tasks.data.image_store import open_images
from tasks.data.judgement import Judgement, judge
from tasks.data.manifest import read_manifest, write_manifest
from tasks.data.set_summary import read_history, write_history
from tasks.data.splits import SPLITS
from tasks.errors import DataError

if TYPE_CHECKING:
    from tasks.layout import Layout
    from tasks.params import ValidateDataParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidateDataReport:
    """What is trained on, and what was left out.

    Args:
        num_accepted: Images that later stages use.
        num_quarantined: Images left out.
        quarantined_per_expectation: How many images did not meet each expectation; one may be in several.
        num_classes: Labels of accepted images.
        images_per_split: Accepted images of each split.
        flagged_per_expectation: How many images stay although they do not meet each; one may be in several.
        new_classes: Labels that came since the last accepted set.
        vanished_classes: Labels that went.
        renamed_classes: New label to the one that held the same images before.
        warnings: What a person should know and what does not stop the run.
    """

    num_accepted: int
    num_quarantined: int
    quarantined_per_expectation: dict[str, int]
    num_classes: int
    images_per_split: dict[str, int]
    flagged_per_expectation: dict[str, int]
    new_classes: list[str]
    vanished_classes: list[str]
    renamed_classes: dict[str, str]
    warnings: list[str]


def run(layout: "Layout", *, validate_data: "ValidateDataParams") -> ValidateDataReport:
    """Writes the accepted rows, the quarantine, and the pages that show both.

    Raises:
        DataError: If the set is not fit to train on, with every reason in one message; or if the class map or the
            summary of the last accepted set is damaged.
    """
    manifest = read_manifest(layout.images)
    class_map = read_class_map(layout.classes)
    history = read_history(layout.accepted_summary)
    remove_leftovers(layout.accepted.parent)
    layout.accepted.unlink(missing_ok=True)
    shutil.rmtree(layout.validation_dir, ignore_errors=True)
    validator = Validator()
    expected = expectations(**validate_data.model_dump())
    judgement = judge(manifest, expected, validator, history, where=_name(layout, layout.raw))

    pages = layout.validation_dir / "docs"
    validator.write_pages(pages)
    _write_quarantine(layout, judgement.quarantined)
    _write_contact_sheets(layout, judgement)
    left_out = _left_out(layout, judgement.quarantined)
    if judgement.stops:
        raise DataError("\n".join([*judgement.stops, *left_out, f"Look at {_name(layout, pages)}/index.html"]))
    for text in (*left_out, *judgement.warnings):
        logger.warning("%s", text)
    _write_accepted(layout, judgement, class_map)
    return _report(judgement)


def _write_accepted(layout: "Layout", judgement: Judgement, class_map: ClassMap) -> None:
    """The accepted rows with their class ids, and what the next run builds on."""
    class_map = class_map.with_accepted(judgement.summary.images_per_class)
    write_class_map(layout.classes, class_map)
    write_history(layout.accepted_summary, now=judgement.summary, before=judgement.before)
    class_id = judgement.accepted["label"].map(class_map.ids)
    write_manifest(layout.accepted, judgement.accepted.assign(class_id=class_id))


def _report(judgement: Judgement) -> ValidateDataReport:
    splits = Counter(judgement.accepted["split"])
    offenders = [(each.action, each.name, len(paths)) for each, paths in judgement.offenders.items()]
    classes = judgement.classes
    renamed = classes[classes["renamed"] > 0]
    return ValidateDataReport(
        num_accepted=len(judgement.accepted),
        num_quarantined=len(judgement.quarantined),
        quarantined_per_expectation={name: number for action, name, number in offenders if action == "quarantine"},
        num_classes=int(judgement.accepted["label"].nunique()),
        images_per_split={split: splits[split] for split in SPLITS},
        flagged_per_expectation={name: number for action, name, number in offenders if action == "warn"},
        new_classes=list(classes.loc[classes["new"] > 0, "label"]),
        vanished_classes=list(classes.loc[classes["vanished"] > 0, "label"]),
        renamed_classes=dict(zip(renamed["label"], renamed["earlier_label"], strict=True)),
        warnings=judgement.warnings,
    )


def _left_out(layout: "Layout", reasons: Mapping[str, str]) -> list[str]:
    """One paragraph on the images left out; none where none are."""
    if not reasons:
        return []
    names = listed([f"{path} ({reason})" for path, reason in reasons.items()])
    noun = "image is" if len(reasons) == 1 else "images are"
    full = _name(layout, layout.quarantine)
    return [f"{_name(layout, layout.raw)}: {len(reasons):,} {noun} left out: {names}. The full list is in {full}."]


def _name(layout: "Layout", path: Path) -> str:
    """A path as a person in the workspace types it."""
    return path.relative_to(layout.root).as_posix()


def _write_quarantine(layout: "Layout", reasons: Mapping[str, str]) -> None:
    """``path,reason`` of every image left out; the header always."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["path", "reason"])
    writer.writerows(reasons.items())
    write_text(layout.quarantine, buffer.getvalue())


def _write_contact_sheets(layout: "Layout", judgement: Judgement) -> None:
    """A picture of what was left out, and one of the images behind each unmet expectation."""
    sheets = {"quarantine": judgement.quarantined} if judgement.quarantined else {}
    sheets |= {each.name: paths for each, paths in judgement.offenders.items()}
    images = open_images(layout.raw)
    for title, remarks in sheets.items():
        tiles = [Tile(images.file(path), path, remark) for path, remark in remarks.items()]
        with atomic_path(layout.validation_dir / f"{title.replace(' ', '_')}.png") as temporary:
            contact_sheet(tiles, f"not met: {title}" if title != "quarantine" else title).save(temporary, format="PNG")
