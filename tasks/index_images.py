"""Stage index_images: one row an image of data/raw → data/manifest/images.parquet.

Facts are kept by content: a file that was seen before, under whatever name, is not decoded again, and one that has not
changed since is not even read. Rows go to the manifest a group at a time, so that memory does not follow the number of
images but for their names.
"""

import logging
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from deploy.files import remove_leftovers, sha256_bytes
from deploy.machine import available_cores
from tasks.data.facts import Look, look_at, with_hashes
from tasks.data.image_files import ImageFile, Listing
from tasks.data.image_store import ImageStore, open_images, require_layout
from tasks.data.known_facts import KnownFacts
from tasks.data.manifest import (
    ROWS_PER_GROUP,
    Columns,
    Facts,
    Row,
    columns_to_table,
    facts_to_columns,
    manifest_writer,
    rows_to_table,
)
from tasks.data.splits import SPLITS, assigned_split
from tasks.data.stamps import Stamps
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

    def count(self, columns: Columns) -> None:
        self.errors += sum(error is not None for error in columns["error"])
        self.images.update(zip(columns["label"], columns["split"], strict=True))
        self.groups.extend(int(group[:16], 16) for group in columns["group"])


def run(layout: "Layout", *, seed: int, data: "DataParams", index_images: "IndexImagesParams") -> IndexImagesReport:
    """Writes the manifest of data/raw.

    Raises:
        DataError: If there are no images, or only one class, or they do not lie as ``data.layout`` says.
        StoreError: If a shard is damaged.
    """
    store = open_images(layout.raw)
    require_layout(store, data.layout, layout.raw)
    listing = store.listing()
    _check(listing, layout.raw)
    known = KnownFacts([*sorted(layout.images_partial.glob("*.parquet")), layout.images])
    remove_leftovers(layout.images.parent)
    stamps = Stamps(layout.stamps, store, listing.images)
    max_pixels = round(index_images.max_megapixels * 1e6)
    places = known.places(stamps.sha256, max_pixels=max_pixels)
    unread = np.flatnonzero(places < 0).tolist()
    tally = Tally(reused=len(places) - len(unread))
    fractions = (index_images.val_fraction, index_images.test_fraction)
    with manifest_writer(layout.images) as manifest, threadpool_limits(1, user_api="blas"):
        facts = _read(layout, store, listing.images, unread, known, max_pixels, stamps, tally)
        for start in range(0, len(places), ROWS_PER_GROUP):
            group = slice(start, start + ROWS_PER_GROUP)
            columns = _facts(known, places[group], facts)
            columns |= _paths_and_splits(listing, group, columns["group"], seed, *fractions)
            tally.count(columns)
            manifest.write(columns_to_table(columns))
        next(facts, None)  # there is none left, and the bar is drawn to its end
    stamps.save()
    shutil.rmtree(layout.images_partial, ignore_errors=True)
    num_images = len(listing.images)
    logger.info(
        "%d images: %d decoded, %d known from before, %d of those unchanged and not read",
        num_images,
        num_images - tally.reused,
        tally.reused,
        num_images - len(unread),
    )
    return _report(listing, tally)


def _facts(known: KnownFacts, places: NDArray[np.intp], read: Iterator[Facts]) -> Columns:
    """The facts of a group of images: where they are known, or as those that are read have them."""
    is_known = places >= 0
    found = known.columns(places[is_known])
    if is_known.all():
        return found
    new = facts_to_columns(list(islice(read, int(np.count_nonzero(~is_known)))))
    return {name: _merged(is_known.tolist(), found[name], new[name]) for name in new}


def _merged(is_first: list[bool], first: list[Any], second: list[Any]) -> list[Any]:
    """The values of two lists in turn, as the flags say."""
    one, other = iter(first), iter(second)
    return [next(one) if flag else next(other) for flag in is_first]


def _paths_and_splits(
    listing: Listing, group: slice, groups: list[str], seed: int, val_fraction: float, test_fraction: float
) -> Columns:
    """What a group of images has by its places and near-duplicate groups."""
    images = listing.images[group]
    splits = [
        assigned_split(
            name,
            image.split,
            listing.official_splits,
            seed=seed,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
        )
        for image, name in zip(images, groups, strict=True)
    ]
    return {
        "path": [image.path for image in images],
        "label": [image.label for image in images],
        "split": splits,
        "official_split": [image.split == split for image, split in zip(images, splits, strict=True)],
    }


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


def _read(
    layout: "Layout",
    store: ImageStore,
    images: Sequence[ImageFile],
    places: Sequence[int],
    known: KnownFacts,
    max_pixels: int,
    stamps: Stamps,
    tally: Tally,
) -> Iterator[Facts]:
    """The facts of the images at some places, in order; saves what it has every half a minute: a kill loses little."""
    unsaved: list[Row] = []
    saved_at = time.monotonic()
    unread = [images[place] for place in places]
    seen = _seen(store, unread, known, max_pixels)
    bar = progress(seen, total=len(images), what="index_images", done=len(images) - len(places))
    for place, image, (facts, is_known) in zip(places, unread, bar, strict=True):
        stamps.read(place, facts.sha256)
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
    store: ImageStore, images: Sequence[ImageFile], known: KnownFacts, max_pixels: int
) -> Iterator[tuple[Facts, bool]]:
    """Facts of the images in order, on all cores, and whether they were known. Threads: decoding leaves the lock."""
    workers = available_cores()
    size = max(1, min(IMAGES_PER_TASK, len(images) // (ITEMS_PER_THREAD * workers)))
    tasks = (images[start : start + size] for start in range(0, len(images), size))
    for each in ordered_map(partial(_see, store, known, max_pixels), tasks, workers=workers):
        yield from each


def _see(
    store: ImageStore, known: KnownFacts, max_pixels: int, images: Sequence[ImageFile]
) -> list[tuple[Facts, bool]]:
    """Known facts where they still hold under ``max_pixels``, else new ones."""
    looks: list[Look] = []
    for image in images:
        data = store.read_bytes(image.path)
        sha256 = sha256_bytes(data)
        facts = known.get(sha256, max_pixels=max_pixels)
        looks.append(Look(facts, None, is_known=True) if facts else look_at(data, sha256, max_pixels=max_pixels))
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
