"""The log of what people did to data/raw: a JSON object a line, only ever appended to, tracked by git beside raw.dvc.

raw.dvc says which bytes a version of the data holds; this says what was moved and why. A line is written before the
change it tells of, so that a kill between the two leaves a line too many and never a change that nobody recorded.
"""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from deploy.event_log import append_lines, whole_lines
from flows.workspace import WorkspaceError

Command = Literal["add", "ingest", "relabel", "remove"]


@dataclass(frozen=True)
class Change:
    """One line: a file that was relabelled or removed, or a whole source that was added.

    Args:
        command: Which command did it.
        path: The file as it was called before, relative to data/raw; None where a source was added.
        moved_to: What it is called since; None where it was removed.
        from_label: Its label before.
        to_label: Its label since.
        sha256: Of its bytes.
        reason: Why, in a person's words.
        source: Folder, table, archive or URL that images were added from.
        added_per_class: Images that were added, by label.
        replaced: Images of the sample set that were removed first.
    """

    command: Command
    path: str | None = None
    moved_to: str | None = None
    from_label: str | None = None
    to_label: str | None = None
    sha256: str | None = None
    reason: str | None = None
    source: str | None = None
    added_per_class: dict[str, int] | None = None
    replaced: int | None = None


def read_changes(log: Path) -> list[Change]:
    """Reads the log, oldest first; empty where there is none.

    Raises:
        WorkspaceError: Naming the first line that is none of ours.
    """
    names = {field.name for field in dataclasses.fields(Change)}
    changes = []
    for number, line in enumerate(whole_lines(log).splitlines(), start=1):
        try:
            told: dict[str, Any] = json.loads(line)
            datetime.fromisoformat(told["time"])
            changes.append(Change(**{name: value for name, value in told.items() if name in names}))
        except (ValueError, TypeError, KeyError) as error:
            raise WorkspaceError(
                f"{log}, line {number} is no change of data/raw: {line[:120].decode(errors='replace')!r}. The log was "
                f"edited or damaged, or a merge left its marks: correct that line, or restore the file with git."
            ) from error
    return changes


def record(log: Path, changes: Iterable[Change]) -> None:
    """Appends changes, all with the time of now, and waits until they are on the disk.

    What the end of the log says already, word for word, is not said again: so a run that was killed right after and is
    begun anew leaves one line.
    """
    new = [_facts(change) for change in changes]
    if not new or [_facts(change) for change in read_changes(log)[-len(new) :]] == new:
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    append_lines(log, "".join(json.dumps({"time": time, **facts}, ensure_ascii=False) + "\n" for facts in new))


def _facts(change: Change) -> dict[str, Any]:
    """What a change says, without what does not apply to it."""
    return {name: value for name, value in dataclasses.asdict(change).items() if value is not None}
