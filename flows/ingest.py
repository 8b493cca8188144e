"""Labelled images in: checked, told apart by content, and copied into data/raw. Behind `tanuki add`.

Kill-safe: a file appears under its name only when it is whole, and a second run goes on where the first stopped. DVC is
told afterwards, by the caller.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath

from deploy.errors import ImageError
from deploy.files import sha256_bytes, sha256_file
from deploy.images import decode_image
from deploy.machine import available_cores
from flows.raw_log import Change, Command, record
from flows.sample import LABELS as SAMPLE_LABELS
from flows.sample import MAX_FILE_BYTES, is_sample
from flows.shards import ShardWriter, free_path, remove_shards
from flows.sources import NUM_NAMED, SHAPES, Folder, LabelTable, Source, copy_file, named_lines, open_source
from tasks.data.image_files import SPLIT_FOLDERS, ImageFile, Listing
from tasks.data.image_store import ImageStore, open_images
from tasks.errors import DataError
from tasks.parallel import ordered_map
from tasks.progress import progress

PART_PREFIX = ".tanuki-add-"
# A copy in train of a test image must not be the one that stays.
SPLIT_RANK = {"test": 0, "val": 1, "train": 2, None: 2}


@dataclass(frozen=True)
class AddReport:
    """What became of the images of a folder.

    Args:
        added: Images copied.
        known: Images that were there already, under the same label.
        repeated: Further copies, within the folder, of an image of the same label.
        added_per_class: Images copied, by label.
        disputed: Path and reason of images that the folder holds under two labels: copied, for validation to tell.
        refused: Path and reason of images that were not copied and that a person should look at.
        left_out: Path and reason of files and folders that are no images by their name or place.
        empty_classes: Class folders without one image.
        replaced: Images of the sample set that were removed.
    """

    added: int
    known: int
    repeated: int
    added_per_class: dict[str, int]
    disputed: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str], ...]
    empty_classes: tuple[str, ...]
    replaced: int

    def text(self) -> str:
        """The report for a person."""
        classes = ", ".join(f"{label} {count:,}" for label, count in self.added_per_class.items())
        lines = [f"{self.added:,} images added" + (f": {classes}." if classes else ".")]
        if self.replaced:
            lines.append(f"The sample set ({self.replaced:,} images) was removed.")
        if self.known:
            lines.append(f"{self.known:,} were there already, under the same label.")
        if self.repeated:
            lines.append(f"{self.repeated:,} were copies of another image of the same label.")
        if self.disputed:
            lines += [
                f"{len(self.disputed):,} lie under two labels; no model is trained on them until one copy is removed:",
                *named_lines(self.disputed),
            ]
        if self.refused:
            lines += [f"{len(self.refused):,} not added:", *named_lines(self.refused)]
        if self.left_out:
            lines += [
                f"{len(self.left_out):,} left out, no images by their name or place:",
                *named_lines(self.left_out),
            ]
        if self.empty_classes:
            lines.append(f"Folders without an image: {', '.join(self.empty_classes)}.")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Checked:
    """An image of the source, read once."""

    image: ImageFile
    sha256: str
    error: str | None


@dataclass
class _Choice:
    """What to do with the images of the source."""

    copied: list[_Checked] = field(default_factory=list)
    disputed: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    known: int = 0
    repeated: int = 0


@dataclass(frozen=True)
class Added:
    """What `add_from` did.

    Args:
        report: For a person.
        kept: sha256 of each image of the source whose bytes are in raw under its label now, by its path in the source.
    """

    report: AddReport
    kept: dict[str, str]


def add_images(
    source: Path | str, raw: Path, *, replace: bool = False, log: Path | None = None, shard_bytes: int | None = None
) -> AddReport:
    """Copies the images of a source into ``raw``, each at most once and never over another.

    Args:
        source: A folder, a table, tar shards or a URL (flows/sources.py). Stays as it is.
        raw: Becomes ``raw/LABEL/...`` or ``raw/SPLIT/LABEL/...``.
        replace: Drop the sample set first, where ``raw`` holds nothing else.
        log: Where to record it, before anything is copied.
        shard_bytes: Write new shards of this size; None: a file an image.

    Raises:
        DataError: If the source holds no image that can be added, or would mix with what is in ``raw``.
    """
    opened = open_source(source)
    listing = _listing(opened, raw)
    return add_from(opened, listing, raw, replace=replace, log=log, command="add", shard_bytes=shard_bytes).report


def add_from(
    source: Source,
    listing: Listing,
    raw: Path,
    *,
    replace: bool,
    log: Path | None,
    command: Command,
    shard_bytes: int | None = None,
) -> Added:
    """Copies the listed images of a source into ``raw``; see `add_images`."""
    store = open_images(raw)
    present = store.listing()
    sample = _sample_to_replace(listing, present, raw, store, replace=replace)
    _check_split_names(listing, present)
    existing = {} if sample else _labels_by_content(store, present, {source.size(image) for image in listing.images})
    checked = _check_all(source, listing.images, frozenset(existing))
    choice = _choose(checked, existing)
    if not choice.copied and not choice.known and command == "add":
        raise DataError(f"No image of {source.name} can be added:\n" + "\n".join(named_lines(choice.refused)))
    if log is not None and (choice.copied or sample):
        planned = dict(sorted(Counter(each.image.label for each in choice.copied).items()))
        record(log, [Change(command, source=source.name, added_per_class=planned, replaced=len(sample) or None)])
    remove_files(raw, _parts(raw))
    if sample and store.layout == "shards":
        remove_shards(raw)
    else:
        remove_files(raw, (raw / image.path for image in sample))
    if shard_bytes is None:
        copies = progress(_in_order(source, choice.copied), total=len(choice.copied), what="copying")
        changed = {each.image.path for each in copies if not _copy(source, raw, each)}
    else:
        taken = {image.path for image in present.images} - {image.path for image in sample}
        changed = _copy_to_shards(source, raw, choice.copied, taken, shard_bytes)
    counts = Counter(each.image.label for each in choice.copied if each.image.path not in changed)
    report = AddReport(
        added=sum(counts.values()),
        known=choice.known,
        repeated=choice.repeated,
        added_per_class=dict(sorted(counts.items())),
        disputed=tuple(sorted(choice.disputed)),
        refused=tuple(sorted([*choice.refused, *((path, "changed while it was read") for path in changed)])),
        left_out=listing.skipped,
        empty_classes=listing.empty_classes,
        replaced=len(sample),
    )
    stays = {path for path, _ in report.refused}
    lost = {(each.sha256, each.image.label) for each in choice.copied if each.image.path in changed}
    kept = {each.image.path: each.sha256 for each in checked if (each.sha256, each.image.label) not in lost}
    return Added(report, {path: sha256 for path, sha256 in kept.items() if path not in stays})


def _listing(source: Source, raw: Path) -> Listing:
    """The labelled images of the source.

    Raises:
        DataError: If it overlaps ``raw``, or holds no labelled image.
    """
    if isinstance(source, Folder) and not isinstance(source, LabelTable):
        here, there = source.root.resolve(), raw.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise DataError(
                f"{source.root} and {raw} lie within each other. Add images from a folder outside of {raw}."
            )
    listing = source.listing()
    if not listing.images:
        left_out = "\n".join(["", "Left out:", *named_lines(listing.skipped)]) if listing.skipped else ""
        raise DataError(f"{source.name} holds no labelled images. {SHAPES}{left_out}")
    return listing


def _sample_to_replace(
    listing: Listing, present: Listing, raw: Path, store: ImageStore, *, replace: bool
) -> tuple[ImageFile, ...]:
    """The sample set's images to remove; none where it is not there or may stay.

    Raises:
        DataError: If other classes would be mixed with the sample set, or ``replace`` would remove somebody's images.
    """
    sample = tuple(
        image
        for image in present.images
        if image.label in SAMPLE_LABELS
        and store.size_bytes(image.path) <= MAX_FILE_BYTES
        and is_sample(store.file(image.path).read_bytes())
    )
    if not sample:
        return ()
    others = sorted({image.path for image in present.images} - {image.path for image in sample})
    if replace:
        if others:
            raise DataError(
                f"{raw} holds {len(others):,} images that are not of the sample set: {', '.join(others[:NUM_NAMED])}. "
                "--replace removes the sample set only where nothing else is there. Nothing was removed or added."
            )
        return sample
    new_labels = sorted({image.label for image in listing.images} - SAMPLE_LABELS)
    if not others and new_labels:
        raise DataError(
            f"{raw} holds the sample set, handwritten digits, and {', '.join(new_labels[:NUM_NAMED])} would become "
            "classes beside them. Say --replace to drop the sample set (`tanuki sample` brings it back). Nothing was "
            "added."
        )
    return ()


def _check_split_names(listing: Listing, present: Listing) -> None:
    """Refuses a class called train, val or test beside official splits: nobody could tell them apart afterwards."""
    images = (*listing.images, *present.images)
    names = sorted({image.label for image in images if image.split is None and image.label.lower() in SPLIT_FOLDERS})
    if names and (listing.official_splits or present.official_splits):
        raise DataError(
            f"{', '.join(names)}: images lie directly in this folder, as in a class, while other folders are official "
            "splits (train/val/test folders of classes). Expected one or the other. Nothing was added."
        )


def _labels_by_content(store: ImageStore, present: Listing, sizes: set[int | None]) -> dict[str, dict[str, str]]:
    """By sha256, the labels that raw has these bytes under, each with a path; files of other sizes are not read."""
    alike = [image for image in present.images if None in sizes or store.size_bytes(image.path) in sizes]
    found: dict[str, dict[str, str]] = {}
    digests = ordered_map(
        lambda image: sha256_bytes(store.file(image.path).read_bytes()), alike, workers=available_cores()
    )
    for image, sha256 in zip(alike, progress(digests, total=len(alike), what="what is there"), strict=True):
        found.setdefault(sha256, {}).setdefault(image.label, image.path)
    return found


def _check_all(source: Source, images: tuple[ImageFile, ...], known: frozenset[str]) -> list[_Checked]:
    """Reads and decodes every image, on all cores; the copy that should stay of several comes first."""
    ordered = sorted(images, key=source.position)
    results = ordered_map(partial(_check, source, known), ordered, workers=1 if source.in_order else available_cores())
    checked = list(progress(results, total=len(ordered), what="checking"))
    return sorted(checked, key=lambda each: (SPLIT_RANK[each.image.split], each.image.path))


def _in_order(source: Source, checked: list[_Checked]) -> list[_Checked]:
    return sorted(checked, key=lambda each: source.position(each.image))


def _check(source: Source, known: frozenset[str], image: ImageFile) -> _Checked:
    try:
        data = source.read(image)
    except DataError as error:
        return _Checked(image, "", str(error))
    except OSError as error:
        return _Checked(image, "", f"cannot be read: {error.strerror}")
    sha256 = sha256_bytes(data)
    if sha256 in known:
        return _Checked(image, sha256, None)
    try:
        decode_image(data)
    except ImageError as error:
        return _Checked(image, sha256, str(error))
    return _Checked(image, sha256, None)


def _choose(checked: list[_Checked], existing: dict[str, dict[str, str]]) -> _Choice:
    """What to do with each image.

    The same bytes under two labels of the source are copied under both, so that a run that was killed halfway and begun
    again does not decide which is right; validate_data leaves all of them out.
    """
    here: dict[str, dict[str, str]] = {}
    for each in checked:
        if each.error is None:
            here.setdefault(each.sha256, {}).setdefault(each.image.label, each.image.path)
    choice = _Choice()
    seen: set[tuple[str, str]] = set()
    for each in checked:
        path, label = each.image.path, each.image.label
        if each.error is not None:
            choice.refused.append((path, each.error))
            continue
        there = existing.get(each.sha256, {})
        rival = next((at for other, at in there.items() if other not in here[each.sha256]), None)
        twin = next((at for other, at in here[each.sha256].items() if other != label), None)
        if twin is not None:
            choice.disputed.append((path, f"the same bytes as {twin}"))
        if label in there:
            choice.known += 1
        elif rival is not None:
            choice.refused.append((path, f"the same bytes are there under another label: {rival}"))
        elif (each.sha256, label) in seen:
            choice.repeated += 1
        else:
            choice.copied.append(each)
        seen.add((each.sha256, label))
    return choice


def _copy(source: Source, raw: Path, checked: _Checked) -> bool:
    """Copies one image to its place; False where its bytes are no longer those that were checked."""
    target = raw / _place(checked.image)
    if target.exists():
        target = target.with_name(f"{target.stem}-{checked.sha256[:12]}{target.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{PART_PREFIX}{checked.sha256[:12]}")
    try:
        if isinstance(source, Folder):
            copy_file(source.file(checked.image), part)
        else:
            part.write_bytes(source.read(checked.image))
        if sha256_file(part) != checked.sha256:
            return False
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    return True


def _copy_to_shards(source: Source, raw: Path, checked: list[_Checked], taken: set[str], shard_bytes: int) -> set[str]:
    """Writes images into new shards, in the order of their places; paths of those that are no longer what was checked.

    The order is that of a run which was never killed: what is left of it fills the same shards.
    """
    ordered = sorted(checked, key=lambda each: str(_place(each.image)))
    changed: set[str] = set()
    with ShardWriter(raw, shard_bytes=shard_bytes) as writer:
        for each in progress(ordered, total=len(ordered), what="copying"):
            data = source.read(each.image)
            if sha256_bytes(data) != each.sha256:
                changed.add(each.image.path)
                continue
            path = free_path(_place(each.image), data, taken)
            taken.add(path)
            writer.add(path, data)
    return changed


def _place(image: ImageFile) -> PurePosixPath:
    """Where an image belongs, relative to raw: one spelling of the split and the label, then what lies below them.

    A source that keeps its labels elsewhere than in folders gives the file's name alone.
    """
    top = PurePosixPath(image.label) if image.split is None else PurePosixPath(image.split, image.label)
    parts = PurePosixPath(image.path).parts
    for number, part in enumerate(parts[:-1]):
        above = SPLIT_FOLDERS.get(parts[number - 1].lower()) if number else None
        if unicodedata.normalize("NFC", part) == image.label and image.split in (None, above):
            return top.joinpath(*parts[number + 1 :])
    return top / parts[-1]


def _parts(raw: Path) -> Iterator[Path]:
    """What a killed run had not finished."""
    for folder, _, names in os.walk(raw):
        yield from (Path(folder, name) for name in names if name.startswith(PART_PREFIX))


def remove_files(raw: Path, files: Iterable[Path]) -> None:
    """Removes files, and the folders in raw that this empties."""
    gone = list(files)
    for file in gone:
        file.unlink()
    remove_empty_folders(raw, (file.parent for file in gone))


def remove_empty_folders(raw: Path, folders: Iterable[Path]) -> None:
    """Removes those of the folders in raw that hold nothing, and what that empties above them."""
    for folder in sorted(set(folders), reverse=True):
        while folder != raw and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
