"""Stage index_images: one row an image of data/raw → data/manifest/images.parquet.

Facts are kept by content: a file that was seen before, under whatever name, is not decoded again. Rows go to the
manifest a group at a time, so that memory does not follow the number of images but for their names.
"""

import logging
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from deploy.files import remove_leftovers, sha256_bytes
from deploy.machine import available_cores
from tasks.data.facts import Look, look_at, with_hashes
from tasks.data.image_files import ImageFile, Listing
from tasks.data.image_store import ImageStore, open_images, require_layout
from tasks.data.known_facts import KnownFacts
from tasks.data.manifest import ROWS_PER_GROUP, Facts, Row, manifest_writer, rows_to_table
from tasks.data.splits import SPLITS, assigned_split
from tasks.errors import DataError
from tasks.parallel import ITEMS_PER_THREAD, ordered_map
from tasks.progress import progress

if TYPE_CHECKING:
    from tasks.layout import Layout
    from tasks.params import DataParams, IndexImagesParams

logger = logging.getLogger(__name__)

SAVE_INTERVAL_S = 30.0
IMAGES_PER_TASK = 16
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


@dataclass
class Tally:
    """What is counted while rows go by.

    Args:
        reused: Images whose bytes were known.
        errors: Rows that do not decode.
        images: Rows of each class and split.
        groups: The first 8 bytes of each row's near-duplicate group.
    """

    reused: int = 0
    errors: int = 0
    images: Counter[tuple[str, str]] = field(default_factory=Counter)
    groups: "array[int]" = field(default_factory=lambda: array("Q"))

    def count(self, rows: list[Row]) -> None:
        self.errors += sum(row.facts.error is not None for row in rows)
        self.images.update((row.label, row.split) for row in rows)
        self.groups.extend(int(row.facts.group[:16], 16) for row in rows)


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
    known = KnownFacts([*sorted(layout.images_partial.glob("*.parquet")), layout.images])
    remove_leftovers(layout.images.parent)
    max_pixels = round(index_images.max_megapixels * 1e6)
    tally = Tally()
    with manifest_writer(layout.images) as manifest, threadpool_limits(1, user_api="blas"):
        facts = _all_facts(layout, images, listing.images, known, max_pixels, tally)
        rows = _rows(listing, facts, seed, index_images.val_fraction, index_images.test_fraction)
        while group := list(islice(rows, ROWS_PER_GROUP)):
            tally.count(group)
            manifest.write(rows_to_table(group))
    shutil.rmtree(layout.images_partial, ignore_errors=True)
    num_images = len(listing.images)
    logger.info("%d images: %d decoded, %d known from before", num_images, num_images - tally.reused, tally.reused)
    return _report(listing, tally)


def _rows(
    listing: Listing, facts: Iterable[Facts], seed: int, val_fraction: float, test_fraction: float
) -> Iterator[Row]:
    """A row an image, with its split."""
    for image, each in zip(listing.images, facts, strict=True):
        split = assigned_split(
            each.group,
            image.split,
            listing.official_splits,
            seed=seed,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
        )
        yield Row(image.path, image.label, each, split, official_split=image.split == split)


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
    layout: "Layout",
    store: ImageStore,
    images: tuple[ImageFile, ...],
    known: KnownFacts,
    max_pixels: int,
    tally: Tally,
) -> Iterator[Facts]:
    """The facts of every image, in order; saves what it has every half a minute, so that a kill loses little."""
    unsaved: list[Row] = []
    saved_at = time.monotonic()
    seen = progress(_seen(store, images, known, max_pixels), total=len(images), what="index_images")
    for image, (facts, is_known) in zip(images, seen, strict=True):
        tally.reused += is_known
        unsaved += [] if is_known else [Row(image.path, image.label, facts, "train", False)]
        if len(unsaved) == ROWS_PER_GROUP or (unsaved and time.monotonic() - saved_at > SAVE_INTERVAL_S):
            _save_part(layout.images_partial, unsaved)
            unsaved, saved_at = [], time.monotonic()
        yield facts


def _save_part(folder: Path, rows: list[Row]) -> None:
    """Saves rows beside those that were saved before."""
    with manifest_writer(folder / f"{uuid4().hex}.parquet") as part:
        part.write(rows_to_table(rows))


def _seen(
    store: ImageStore, images: tuple[ImageFile, ...], known: KnownFacts, max_pixels: int
) -> Iterator[tuple[Facts, bool]]:
    """Facts of the images in order, on all cores, and whether they were known. Threads: decoding leaves the lock."""
    workers = available_cores()
    size = max(1, min(IMAGES_PER_TASK, len(images) // (ITEMS_PER_THREAD * workers)))
    tasks = (images[start : start + size] for start in range(0, len(images), size))
    for each in ordered_map(partial(_see, store, known, max_pixels), tasks, workers=workers):
        yield from each


def _see(
    store: ImageStore, known: KnownFacts, max_pixels: int, images: tuple[ImageFile, ...]
) -> list[tuple[Facts, bool]]:
    """Known facts where they still hold under ``max_pixels``, else new ones."""
    looks: list[Look] = []
    for image in images:
        data = store.read_bytes(image.path)
        sha256 = sha256_bytes(data)
        facts = known.get(sha256)
        if facts is not None and facts.width * facts.height <= max_pixels:
            looks.append(Look(facts, None, is_known=True))
        else:
            looks.append(look_at(data, sha256, max_pixels=max_pixels))
    return list(zip(with_hashes(looks), (look.is_known for look in looks), strict=True))


def _report(listing: Listing, tally: Tally) -> IndexImagesReport:
    labels = sorted({label for label, _ in tally.images})
    splits: dict[str, int] = {split: sum(tally.images[label, split] for label in labels) for split in SPLITS}
    return IndexImagesReport(
        num_images=len(listing.images),
        num_classes=len(labels),
        decoded=len(listing.images) - tally.reused,
        reused=tally.reused,
        num_errors=tally.errors,
        num_skipped=len(listing.skipped),
        num_groups=len(np.unique(tally.groups)),
        official_splits=sorted(listing.official_splits),
        images_per_split=splits,
        images_per_class={label: {split: tally.images[label, split] for split in SPLITS} for label in labels},
    )
