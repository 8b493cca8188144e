"""Stage index_images: one row an image of data/raw → data/manifest/images.parquet.

Facts are kept by content: a file that was seen before, under whatever name, is not decoded again.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.files import sha256_bytes
from deploy.machine import available_cores
from tasks.data.facts import image_facts
from tasks.data.image_files import ImageFile, Listing
from tasks.data.image_store import ImageStore, open_images, require_layout
from tasks.data.manifest import (
    Facts,
    Row,
    read_known_facts,
    rows_to_frame,
    write_manifest,
)
from tasks.data.splits import SPLITS, assigned_split
from tasks.errors import DataError
from tasks.parallel import ordered_map
from tasks.progress import progress

if TYPE_CHECKING:
    from tasks.layout import Layout
    from tasks.params import DataParams, IndexImagesParams

logger = logging.getLogger(__name__)

SAVE_INTERVAL_S = 30.0
NUM_NAMED = 5


@dataclass(frozen=True)
class IndexImagesReport:
    """What lies in data/raw.

    Args:
        num_images: Files with a row, those that do not decode included.
        num_classes: Labels.
        decoded: Images that had to be looked at in this run.
        reused: Images whose bytes were known from the previous manifest.
        num_errors: Rows that do not decode.
        num_skipped: Files and folders left out by their name or place.
        num_groups: Near-duplicate groups.
        official_splits: Splits that folders of data/raw name.
        images_per_split: Rows of each split.
        images_per_class: Rows of each class and split.
    """

    num_images: int
    num_classes: int
    decoded: int
    reused: int
    num_errors: int
    num_skipped: int
    num_groups: int
    official_splits: list[str]
    images_per_split: dict[str, int]
    images_per_class: dict[str, dict[str, int]]


def run(layout: "Layout", *, seed: int, data: "DataParams", index_images: "IndexImagesParams") -> IndexImagesReport:
    """Writes the manifest of data/raw.

    Raises:
        DataError: If there are no images, or only one class, or they do not lie as ``data.layout`` says.
        StoreError: If a shard is damaged.
    """
    images = open_images(layout.raw)
    require_layout(images, data.layout, layout.raw)
    listing = images.listing()
    _check(listing, layout.raw)
    known = read_known_facts(layout.images_partial) | read_known_facts(layout.images)
    max_pixels = round(index_images.max_megapixels * 1e6)
    facts = _all_facts(layout, images, listing.images, known, max_pixels)
    rows = _rows(listing, facts, seed, index_images.val_fraction, index_images.test_fraction)
    write_manifest(layout.images, rows_to_frame(rows))
    layout.images_partial.unlink(missing_ok=True)
    reused = sum(known.get(each.sha256) is each for each in facts)
    logger.info("%d images: %d decoded, %d known from before", len(facts), len(facts) - reused, reused)
    return _report(rows, listing, reused)


def _rows(listing: Listing, facts: list[Facts], seed: int, val_fraction: float, test_fraction: float) -> list[Row]:
    """A row an image, with its split."""
    rows = []
    for image, each in zip(listing.images, facts, strict=True):
        split = assigned_split(
            each.group,
            image.split,
            listing.official_splits,
            seed=seed,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
        )
        rows.append(Row(image.path, image.label, each, split, official_split=image.split == split))
    return rows


def _check(listing: Listing, raw: Path) -> None:
    """Refuses a folder that cannot train anything, and warns of what is left out."""
    for reason, count in sorted(Counter(reason for _, reason in listing.skipped).items()):
        names = [path for path, why in listing.skipped if why == reason]
        more = ", ..." if count > NUM_NAMED else ""
        logger.warning("%d left out (%s): %s%s", count, reason, ", ".join(names[:NUM_NAMED]), more)
    if listing.empty_classes:
        logger.warning("%d folders hold no image: %s", len(listing.empty_classes), ", ".join(listing.empty_classes))
    labels = sorted({image.label for image in listing.images})
    shapes = "Expected a folder a class, each with images, or train/val/test folders of such folders."
    if not labels:
        skipped = (
            f" {len(listing.skipped)} files or folders there are no images by their name." if listing.skipped else ""
        )
        raise DataError(f"{raw} holds no images.{skipped} {shapes} Add some with `tanuki add PATH`.")
    if len(labels) == 1:
        raise DataError(
            f"{raw} holds one class only: {labels[0]} ({len(listing.images)} images). A classifier needs two or more. "
            f"{shapes} Add images of another class with `tanuki add PATH`."
        )


def _all_facts(
    layout: "Layout", store: ImageStore, images: tuple[ImageFile, ...], known: dict[str, Facts], max_pixels: int
) -> list[Facts]:
    """The facts of every image, in order; saves what it has every half a minute, so that a kill loses little."""
    facts: list[Facts] = []
    saved_at = time.monotonic()
    for each in progress(_map_facts(store, images, known, max_pixels), total=len(images), what="index_images"):
        facts.append(each)
        if time.monotonic() - saved_at > SAVE_INTERVAL_S:
            rows = [
                Row(image.path, image.label, done, "train", False) for image, done in zip(images, facts, strict=False)
            ]
            write_manifest(layout.images_partial, rows_to_frame(rows))
            saved_at = time.monotonic()
    return facts


def _map_facts(
    store: ImageStore, images: tuple[ImageFile, ...], known: dict[str, Facts], max_pixels: int
) -> Iterator[Facts]:
    """Facts of the images in order, on all cores. Threads: decoding and resizing leave the lock."""
    return ordered_map(partial(_facts_of_file, store, known, max_pixels), images, workers=available_cores())


def _facts_of_file(store: ImageStore, known: dict[str, Facts], max_pixels: int, image: ImageFile) -> Facts:
    """Known facts where they still hold under ``max_pixels``, else new ones."""
    data = store.file(image.path).read_bytes()
    facts = known.get(sha256_bytes(data))
    if facts is not None and facts.error is None and facts.width * facts.height <= max_pixels:
        return facts
    return image_facts(data, max_pixels=max_pixels)


def _report(rows: list[Row], listing: Listing, reused: int) -> IndexImagesReport:
    labels = sorted({row.label for row in rows})
    counts = Counter((row.label, row.split) for row in rows)
    splits = Counter(row.split for row in rows)
    return IndexImagesReport(
        num_images=len(rows),
        num_classes=len(labels),
        decoded=len(rows) - reused,
        reused=reused,
        num_errors=sum(row.facts.error is not None for row in rows),
        num_skipped=len(listing.skipped),
        num_groups=len({row.facts.group for row in rows}),
        official_splits=sorted(listing.official_splits),
        images_per_split={split: splits[split] for split in SPLITS},
        images_per_class={label: {split: counts[label, split] for split in SPLITS} for label in labels},
    )
