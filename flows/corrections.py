"""Images of data/raw under the wrong label, or that should not be there. Behind `tanuki relabel` and `tanuki remove`.

Everything is checked before anything moves. What will move is written into the log first (flows/raw_log.py), so that
the same command, run again after a kill, knows what it had done and does the rest. DVC is told afterwards, by the
caller.
"""

import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from deploy.files import sha256_bytes
from flows.ingest import remove_empty_folders
from flows.raw_log import Change, Command, read_changes, record
from flows.shards import edit_images
from flows.sources import named_lines, read_rows, refuse, unfit_label
from tasks.data.image_files import SPLIT_FOLDERS, ImageFile, Listing
from tasks.data.image_store import ImageStore, open_images
from tasks.layout import Layout

NOTHING_CHANGED = "{:,} mistake(s), so nothing was changed (name files relative to data/raw, or by their real path)"


@dataclass(frozen=True)
class Wanted:
    """One file that a person named, and the label it should have.

    Args:
        file: As it was written: relative to data/raw, or a path of the file system.
        label: None where the file should go.
        where: Line of the table it comes from; empty for the command line.
    """

    file: Path
    label: str | None
    where: str = ""


@dataclass(frozen=True)
class CorrectionReport:
    """What became of the files that were named.

    Args:
        moved: Path before and path since of what was relabelled.
        removed: Paths of what was removed.
        done_before: Path and what it is by now, where nothing was left to do.
        new_labels: Labels that no image had before.
        emptied_labels: Labels that no image has any more.
    """

    moved: tuple[tuple[str, str], ...]
    removed: tuple[str, ...]
    done_before: tuple[tuple[str, str], ...]
    new_labels: tuple[str, ...]
    emptied_labels: tuple[str, ...]

    def text(self) -> str:
        """The report for a person."""
        lines = []
        if self.moved:
            lines += [f"{len(self.moved):,} relabelled:", *named_lines((old, f"now {new}") for old, new in self.moved)]
        if self.removed:
            lines.append(f"{len(self.removed):,} removed; DVC's cache keeps their bytes, the log their sha256.")
        if self.done_before:
            lines += [f"{len(self.done_before):,} were so already:", *named_lines(self.done_before)]
        if self.new_labels:
            lines.append(f"New as a label: {', '.join(self.new_labels)}.")
        if self.emptied_labels:
            lines.append(f"No image is left of: {', '.join(self.emptied_labels)}.")
        return "\n".join(lines)


def relabel(layout: Layout, wanted: Sequence[Wanted], *, reason: str | None) -> CorrectionReport:
    """Moves images to the folder of another label, each within its official split and never over another file.

    Raises:
        DataError: If any of them cannot be; nothing was moved then.
    """
    return _correct(layout, wanted, "relabel", reason)


def remove(layout: Layout, wanted: Sequence[Wanted], *, reason: str) -> CorrectionReport:
    """Removes images from data/raw.

    Raises:
        DataError: If any of them is not there; nothing was removed then.
    """
    return _correct(layout, wanted, "remove", reason)


def read_wanted(table: Path, *, with_labels: bool) -> list[Wanted]:
    """The files that a table names in its column ``path``, with the labels of its column ``label`` if asked.

    Raises:
        DataError: If it is no such table.
    """
    columns = ("path", "label") if with_labels else ("path",)
    return [
        Wanted(Path(str(row["path"] or "")), str(row["label"] or "") if with_labels else None, where)
        for where, row in read_rows(table, required=columns)
    ]


def _correct(layout: Layout, wanted: Sequence[Wanted], command: Command, reason: str | None) -> CorrectionReport:
    """Checks, records, then moves or removes."""
    store = open_images(layout.raw)
    listing = store.listing()
    log = _last_mentions(read_changes(layout.raw_changes))
    plan = _plan(layout.raw, store, _by_path(layout.raw, wanted), listing, log, command)
    changes = [replace(change, reason=reason) for change in plan.changes]
    record(layout.raw_changes, [change for change in changes if not _is_pending(log, change)])
    moves = {str(change.path): change.moved_to for change in changes}
    if store.layout == "shards":
        edit_images(layout.raw, moves)
    else:
        _move_files(layout.raw, moves)
        remove_empty_folders(layout.raw, ((layout.raw / path).parent for path in plan.paths))
    before, after = ({image.label for image in each.images} for each in (listing, open_images(layout.raw).listing()))
    return CorrectionReport(
        moved=tuple((str(each.path), each.moved_to) for each in changes if each.moved_to is not None),
        removed=tuple(str(each.path) for each in changes if each.moved_to is None),
        done_before=tuple(plan.done_before),
        new_labels=tuple(sorted(after - before)),
        emptied_labels=tuple(sorted(before - after)),
    )


def _move_files(raw: Path, moves: Mapping[str, str | None]) -> None:
    for path, new in moves.items():
        if new is None:
            (raw / path).unlink()
        else:
            (raw / new).parent.mkdir(parents=True, exist_ok=True)
            (raw / path).rename(raw / new)


@dataclass(frozen=True)
class _Plan:
    """What to do: changes without their reason, what was done before, and all paths that were named."""

    changes: list[Change]
    done_before: list[tuple[str, str]]
    paths: list[str]


def _by_path(raw: Path, wanted: Sequence[Wanted]) -> dict[str, str | None]:
    """The label that each file of raw should have, by its path relative to raw.

    Raises:
        DataError: If a file is named under two labels, lies outside of raw, or is not named at all.
    """
    labels: dict[str, str | None] = {}
    mistakes = []
    for each in wanted:
        path = _inside(raw, each.file)
        label = None if each.label is None else unicodedata.normalize("NFC", each.label.strip())
        name = f"{each.where}: {each.file}" if each.where else str(each.file)
        if path is None:
            mistakes.append((name, f"lies outside of {raw}"))
        elif labels.setdefault(path, label) != label:
            mistakes.append((name, f"named with two labels, {labels[path]} and {label}"))
    refuse(mistakes, NOTHING_CHANGED.format(len(mistakes)))
    return labels


def _inside(raw: Path, file: Path) -> str | None:
    """The posix path of a file relative to raw, however it was written; None where it lies elsewhere."""
    real = file.parent.resolve() / file.name  # DVC may have made the file itself a link into its cache
    if not real.is_relative_to(raw):
        real = Path(os.path.normpath(raw / file))
    return real.relative_to(raw).as_posix() if real != raw and real.is_relative_to(raw) else None


def _plan(
    raw: Path,
    store: ImageStore,
    labels: dict[str, str | None],
    listing: Listing,
    log: dict[str, Change],
    command: Command,
) -> _Plan:
    """What to do for each file.

    Raises:
        DataError: Naming every file and label that cannot be.
    """
    images = {image.path: image for image in listing.images}
    plan = _Plan([], [], list(labels))
    mistakes = [(label, why) for label in _new(labels.values()) if (why := _unfit(label, listing)) is not None]
    taken = set(images) if store.layout == "shards" else set[str]()
    for path, label in labels.items():
        image, last = images.get(path), log.get(path)
        if image is None:
            was_done = last is not None and (last.command, last.path, last.to_label) == (command, path, label)
            now = _since(path, last)
            (plan.done_before if was_done else mistakes).append((path, now or _absence(raw, path)))
        elif image.label == label:
            plan.done_before.append((path, f"labelled {label}"))
        else:
            change = _change(raw, store, image, label, last, taken)
            plan.changes.append(change) if isinstance(change, Change) else mistakes.append((path, change))
    refuse(mistakes, NOTHING_CHANGED.format(len(mistakes)))
    return plan


def _change(
    raw: Path, store: ImageStore, image: ImageFile, label: str | None, last: Change | None, taken: set[str]
) -> Change | str:
    """What moving or removing one image comes to, or why it cannot be moved."""
    sha256 = sha256_bytes(store.file(image.path).read_bytes())
    if label is None:
        return Change("remove", image.path, None, image.label, None, sha256)
    parts = list(PurePosixPath(image.path).parts)
    parts[0 if image.split is None else 1] = label
    plain = PurePosixPath(*parts)
    names = [plain, plain.with_name(f"{plain.stem}-{sha256[:12]}{plain.suffix}")]
    if last is not None and last.path == image.path and last.to_label == label and last.moved_to is not None:
        names.insert(0, PurePosixPath(last.moved_to))  # where a run that was killed was about to put it
    for name in names:
        if str(name) not in taken and not os.path.lexists(raw / name):
            if any((raw / parent).is_file() for parent in name.parents):
                return f"{name.parent} is a file, so nothing can be put below it"
            taken.add(str(name))
            return Change("relabel", image.path, str(name), image.label, label, sha256)
    return f"the same bytes are there already, as {names[-1]}: `tanuki remove` this one instead"


def _last_mentions(log: list[Change]) -> dict[str, Change]:
    """The last line about each path, as what was moved or as where it went."""
    return {path: change for change in log for path in (change.path, change.moved_to) if path is not None}


def _is_pending(log: dict[str, Change], change: Change) -> bool:
    """Whether the log says already what is about to be done: a killed run wrote it and came no further."""
    last = log.get(str(change.path))
    return last is not None and replace(last, reason=None) == replace(change, reason=None)


def _since(path: str, change: Change | None) -> str:
    """What became of a file, by the last line about it; empty where that does not tell."""
    if change is None or change.path != path:
        return ""
    return f"now {change.moved_to}" if change.moved_to else f"removed: {change.reason}"


def _absence(raw: Path, path: str) -> str:
    if (raw / path).is_dir():
        return "a folder; name its files"
    return "no image by its name or place" if os.path.lexists(raw / path) else f"is not in {raw}"


def _new(labels: Iterable[str | None]) -> list[str]:
    return sorted({label for label in labels if label is not None})


def _unfit(label: str, listing: Listing) -> str | None:
    """Why no class here may be called so; None where it may."""
    if label.lower() in SPLIT_FOLDERS and listing.official_splits:
        return "is the name of an official split here, and cannot be a label"
    return unfit_label(label)
