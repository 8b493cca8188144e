"""Stage validate_data: holds the manifest to what is expected of a set, leaves bad images out, stops a bad set.

data/manifest/images.parquet → accepted.parquet, quarantine.csv, and pages for a person in data/reports/validation/,
which are there also when the stage stops.
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

from deploy.files import atomic_path, write_text
from tasks.data.complaints import listed
from tasks.data.contact_sheet import Tile, contact_sheet
from tasks.data.expectations import Validator, expectations
from tasks.data.image_store import open_images
from tasks.data.judgement import judge
from tasks.data.manifest import read_manifest, write_manifest
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
        warnings: What a person should know and what does not stop the run.
    """

    num_accepted: int
    num_quarantined: int
    quarantined_per_expectation: dict[str, int]
    num_classes: int
    images_per_split: dict[str, int]
    warnings: list[str]


def run(layout: "Layout", *, validate_data: "ValidateDataParams") -> ValidateDataReport:
    """Writes the accepted rows, the quarantine, and the pages that show both.

    Raises:
        DataError: If the set is not fit to train on; every reason in one message.
    """
    manifest = read_manifest(layout.images)
    layout.accepted.unlink(missing_ok=True)
    shutil.rmtree(layout.validation_dir, ignore_errors=True)
    validator = Validator()
    expected = expectations(**validate_data.model_dump())
    judgement = judge(manifest, expected, validator, where=_name(layout, layout.raw))

    pages = layout.validation_dir / "docs"
    validator.write_pages(pages)
    _write_quarantine(layout, judgement.quarantined)
    _write_contact_sheet(layout, judgement.quarantined)
    left_out = _left_out(layout, judgement.quarantined)
    if judgement.stops:
        raise DataError("\n".join([*judgement.stops, *left_out, f"Look at {_name(layout, pages)}/index.html"]))
    for text in (*left_out, *judgement.warnings):
        logger.warning("%s", text)
    write_manifest(layout.accepted, judgement.accepted)
    splits = Counter(judgement.accepted["split"])
    return ValidateDataReport(
        num_accepted=len(judgement.accepted),
        num_quarantined=len(judgement.quarantined),
        quarantined_per_expectation=judgement.quarantined_per_expectation,
        num_classes=int(judgement.accepted["label"].nunique()),
        images_per_split={split: splits[split] for split in SPLITS},
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


def _write_contact_sheet(layout: "Layout", reasons: Mapping[str, str]) -> None:
    """A picture of what was left out, where anything was."""
    if not reasons:
        return
    images = open_images(layout.raw)
    tiles = [Tile(images.file(path), path, reason) for path, reason in reasons.items()]
    with atomic_path(layout.validation_dir / "quarantine.png") as temporary:
        contact_sheet(tiles).save(temporary, format="PNG")
