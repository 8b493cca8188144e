"""The image files of a folder of labelled images, and what their folders say: label and official split.

Two layouts, which may be mixed: ``LABEL/...`` and ``train|val|valid|validation|test/LABEL/...``. Folders below the
label are only part of the path. Used by index_images on data/raw and by flows.ingest on a person's folder.
"""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tasks.data.splits import Split

SPLIT_FOLDERS: dict[str, Split] = {
    "train": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}
NO_IMAGE_NAMES = frozenset({"thumbs.db", "desktop.ini", "icon\r", "license", "licence", "readme", "makefile"})
NO_IMAGE_FOLDERS = frozenset({"__macosx"})
NO_IMAGE_SUFFIXES = re.compile(
    r"\.(txt|md|rst|csv|tsv|jsonl?|xml|ya?ml|toml|html?|pdf|docx?|xlsx?|log|ini|db|sqlite|dvc|lnk|url"
    r"|py|ipynb|sh|bat|js|css|npy|npz|mat|h5|parquet|pkl|zip|tar|t?gz|bz2|xz|7z|rar|mp4|mov|avi|mkv|webm|mp3|wav)$"
)


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file that should be an image.

    Args:
        path: Posix, relative to the folder that was listed, as it is on disk.
        label: Name of its class folder, NFC-normalised text.
        split: The official split its folder names, or None.
    """

    path: str
    label: str
    split: Split | None


@dataclass(frozen=True)
class Listing:
    """What a folder of labelled images holds.

    Args:
        images: Sorted by path.
        skipped: Posix paths that are not images by their name or place, with the reason, sorted by path.
        empty_classes: Class folders without one image.
    """

    images: tuple[ImageFile, ...]
    skipped: tuple[tuple[str, str], ...]
    empty_classes: tuple[str, ...]

    @cached_property  # asked for each row of a manifest
    def official_splits(self) -> frozenset[Split]:
        return frozenset(image.split for image in self.images if image.split is not None)


def list_images(root: Path) -> Listing:
    """Lists the labelled images under ``root``. File links are followed (DVC makes them), folder links are not."""
    images: list[ImageFile] = []
    skipped: list[tuple[str, str]] = []
    empty: list[str] = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name) if root.is_dir() else []:
        reason = _skip_reason(entry)
        if reason is None and not entry.is_dir():
            reason = "lies beside the class folders, so it has no label"
        if reason is not None:
            skipped.append((_printable(entry.name), reason))
            continue
        for folder, split in _class_folders(Path(entry.path), skipped, root):
            label = unicodedata.normalize("NFC", folder.name)
            before = len(images)
            start = len(str(folder)) - len(str(folder.relative_to(root)))
            images += [ImageFile(path, label, split) for path in _walk(str(folder), skipped, start)]
            if len(images) == before:
                empty.append(folder.relative_to(root).as_posix())
    images.sort(key=lambda image: image.path)
    return Listing(tuple(images), tuple(sorted(skipped)), tuple(empty))


def labelled_images(paths: Iterable[str]) -> tuple[ImageFile, ...]:
    """The images of these paths, sorted, with what their folders say: as `list_images` would find them on a disk.

    Args:
        paths: Of all images of a set; posix, with a folder at least.
    """
    parts_of = {path: path.split("/") for path in paths}
    classes = {parts[0] for parts in parts_of.values() if len(parts) == 2}  # images lie directly in these
    images = []
    for path, parts in parts_of.items():
        split = None if parts[0] in classes else SPLIT_FOLDERS.get(parts[0].lower())
        images.append(ImageFile(path, unicodedata.normalize("NFC", parts[0 if split is None else 1]), split))
    return tuple(sorted(images, key=lambda image: image.path))


def _class_folders(folder: Path, skipped: list[tuple[str, str]], root: Path) -> Iterator[tuple[Path, Split | None]]:
    """The class folders that a top-level folder is or holds, each with its official split."""
    split = SPLIT_FOLDERS.get(folder.name.lower())
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    if split is None or any(_skip_reason(entry) is None and not entry.is_dir() for entry in entries):
        yield folder, None
        return
    for entry in entries:
        reason = _skip_reason(entry)
        if reason is None:
            yield Path(entry.path), split
        else:
            skipped.append((_printable(str(Path(entry.path).relative_to(root))), reason))


def _walk(folder: str, skipped: list[tuple[str, str]], start: int) -> Iterator[str]:
    """Posix paths of the images in and below a class folder, from their character ``start`` on: what comes after root.

    As text: pathlib takes as long for a path as the rest of the work.
    """
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        reason = _skip_reason(entry)
        if reason is not None:
            skipped.append((_printable(entry.path[start:]), reason))
        elif entry.is_dir():
            yield from _walk(entry.path, skipped, start)
        else:
            yield entry.path[start:]


def _skip_reason(entry: os.DirEntry[str]) -> str | None:
    """Why an entry cannot be an image or hold some, judged by its name and kind; None where it can."""
    reason = no_image_reason(entry.name, is_folder=entry.is_dir())
    if reason is not None:
        return reason
    if entry.is_dir():
        return "a link to a folder" if entry.is_symlink() else None
    return None if entry.is_file() else "a broken link or no plain file"


def no_image_reason(name: str, *, is_folder: bool = False) -> str | None:
    """Why a file of this name cannot be an image, or a folder hold some; None where it can."""
    lower = name.lower()
    if lower.startswith("."):
        return "hidden"
    if name != _printable(name):
        return "its name is no UTF-8 text"
    if is_folder:
        return "no folder of images" if lower in NO_IMAGE_FOLDERS else None
    if lower in NO_IMAGE_NAMES or NO_IMAGE_SUFFIXES.search(lower):
        return "no image by its name"
    return None


def _printable(name: str) -> str:
    """A name that can be encoded as UTF-8."""
    return name.encode(errors="replace").decode()
