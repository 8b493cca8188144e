"""An inbox: a folder, or a prefix of an object store, that others drop labelled images into. Behind `tanuki ingest`.

Four steps in one order: take (into data/raw and DVC), secure (on the default remote, looked at), publish (git), empty.
The inbox loses a file only in the last of them, so it is its own journal: after a kill anywhere the next run finds what
is left, knows by content what data/raw has already, and goes on.
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from flows.ingest import Added, AddReport, add_from
from flows.publication import commit_only, push_data, push_git
from flows.shards import shard_bytes
from flows.sources import SHAPES, Folder, Url, named_lines
from flows.workspace import track_raw
from tasks.data.image_files import ImageFile, Listing
from tasks.errors import DataError
from tasks.layout import Layout


@dataclass(frozen=True)
class Waiting:
    """What lies in an inbox.

    Args:
        source: The inbox.
        settled: What may be taken: files that nobody changed for some time.
        unsettled: Paths of images that may still be written to.
        signatures: By path, what told apart each settled file from any later one of its name.
    """

    source: Folder | Url
    settled: Listing
    unsettled: tuple[str, ...]
    signatures: Mapping[str, object]


@dataclass(frozen=True)
class IngestReport:
    """What became of an inbox.

    Args:
        added: What came into data/raw, what was there, and what was refused.
        unsettled: Paths that are left for the next run, since they may still be written to.
        remote: The DVC remote that has all bytes; None where there is no default remote.
        commit: The git commit of the new data version; None where none was asked for, or nothing had changed.
        pushed_to: The upstream branch that has it.
        emptied: Files that were removed from the inbox.
    """

    added: AddReport
    unsettled: tuple[str, ...]
    remote: str | None = None
    commit: str | None = None
    pushed_to: str | None = None
    emptied: int = 0

    def text(self) -> str:
        """The report for a person."""
        lines = [self.added.text()]
        if self.unsettled:
            lines += [
                f"{len(self.unsettled):,} left for the next run, changed too lately:",
                *named_lines((path, "has not settled") for path in self.unsettled),
            ]
        if self.emptied:
            where = f"the remote {self.remote} has all bytes" if self.remote else "no DVC remote is set, so here only"
            lines.append(f"{self.emptied:,} files removed from the inbox; {where}.")
        if self.commit:
            lines.append(f"Committed as {self.commit}" + (f", pushed to {self.pushed_to}." if self.pushed_to else "."))
        return "\n".join(lines)


def look(inbox: str, *, settle_s: float) -> Waiting:
    """What lies in an inbox.

    Args:
        inbox: A folder, or a URL that fsspec knows.
        settle_s: Seconds without a change after which a file counts as whole.

    Raises:
        DataError: If there is no such inbox.
    """
    if "://" not in inbox and not Path(inbox).is_dir():
        raise DataError(f"{inbox} is no folder. An inbox is a folder or a URL. {SHAPES}")
    source = Url(inbox) if "://" in inbox else Folder(Path(inbox).resolve())
    listing = source.listing()
    signatures = {image.path: source.signature(image) for image in listing.images}
    now = time.time()
    young = {image.path for image in listing.images if now - source.changed_at(image) < settle_s}
    settled = replace(listing, images=tuple(image for image in listing.images if image.path not in young))
    return Waiting(source, settled, tuple(sorted(young)), signatures)


def take(layout: Layout, waiting: Waiting) -> Added:
    """Copies what has settled into data/raw, each image checked and none twice, and puts it under DVC."""
    if isinstance(waiting.source, Folder) and layout.raw.resolve().is_relative_to(waiting.source.root):
        raise DataError(f"{layout.raw} lies in the inbox {waiting.source.root}. An inbox is a folder of its own.")
    added = add_from(
        waiting.source,
        waiting.settled,
        layout.raw,
        replace=False,
        log=layout.raw_changes,
        command="ingest",
        shard_bytes=shard_bytes(layout),
    )
    if added.kept:
        track_raw(layout)
    return added


def secure(layout: Layout) -> str | None:
    """Pushes data/raw to DVC's default remote and looks whether all of it is there; the remote, None where none is set.

    Raises:
        WorkspaceError: If the remote refuses or lacks something.
    """
    raw = str(layout.raw.relative_to(layout.root))
    return push_data(layout, raw, what="the images", kept="The inbox keeps everything")


def publish(layout: Layout) -> tuple[str | None, str | None]:
    """Commits data/raw.dvc and the log, and nothing else that may be staged; pushes where there is an upstream.

    Returns:
        The commit, None where nothing had changed, and the upstream branch that has it, None where there is none.

    Raises:
        WorkspaceError: If git refuses.
    """
    files = [str(file.relative_to(layout.root)) for file in (layout.raw_pointer, layout.raw_changes) if file.is_file()]
    commit = commit_only(layout, files, "Ingest images")
    branch = push_git(layout, kept="The images are committed here and the inbox keeps everything")
    return commit, None if branch is None else branch.name


def empty(waiting: Waiting, added: Added) -> int:
    """Removes from the inbox the files whose bytes are in data/raw, unless they were changed since; how many.

    Raises:
        DataError: If the inbox does not let go of a file.
    """
    os.sync()  # a copy that a power cut could take back is no reason to remove the original
    images = {image.path: image for image in waiting.settled.images}
    gone = [path for path in added.kept if _remove(waiting, images[path])]
    return len(gone)


def _remove(waiting: Waiting, image: ImageFile) -> bool:
    """Removes one file if it is still the one that was read."""
    source = waiting.source
    try:
        if source.signature(image) != waiting.signatures[image.path]:
            return False
        source.remove(image)
    except FileNotFoundError:
        return False  # somebody else was quicker
    except Exception as error:  # each file system raises types of its own
        raise DataError(
            f"{source.name}: {image.path} is in data/raw now, but cannot be removed from the inbox: {error}. Give this "
            "account the right to remove files there, and run the command again."
        ) from error
    return True
