"""The registry's log: what happened to which version, when and why. One JSON object a line, only ever appended to.

The log is the truth; the champion pointer is derived from it. A line counts once its newline is on the disk: what a
kill left unfinished at the end is not an event, is passed over in reading, and is cut off by the next append.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from deploy.errors import RegistryError
from deploy.files import sync_directory

Kind = Literal["registered", "promoted", "forced", "rolled_back", "refused", "undecided", "looked_at", "removed"]
KINDS: tuple[str, ...] = get_args(Kind)
MOVES = ("promoted", "forced", "rolled_back")  # the events after which their version is the champion


@dataclass(frozen=True)
class Event:
    """One line of the log.

    Args:
        sequence: 1 for the first event, then one more each.
        time: ISO 8601, UTC.
        kind: What happened.
        version: To which version.
        champion: The version in production after the event; None where there is none.
        reason: Why, in words.
        decision: What the gate said, where it was asked.
        files: sha256 of the files that were put beside the bundle, where the event registers a version.
    """

    sequence: int
    time: str
    kind: Kind
    version: int
    champion: int | None
    reason: str
    decision: Mapping[str, Any] | None = None
    files: Mapping[str, str] | None = None


def read_events(path: Path) -> list[Event]:
    """Reads the log, oldest event first; empty where there is none.

    Raises:
        RegistryError: Naming the line that is no event, or is out of order.
    """
    lines = enumerate(whole_lines(path).splitlines(), start=1)
    return [parse_event(line, number, where=f"{path}, line {number}") for number, line in lines]


def event_line(event: Event) -> str:
    """One event as it stands in the log."""
    return json.dumps(dataclasses.asdict(event), sort_keys=True, ensure_ascii=False) + "\n"


def append_event(path: Path, event: Event) -> None:
    """Appends one event and waits until it is on the disk; cuts off an unfinished line first.

    Raises:
        OSError: If it cannot be written, as on a full disk; the log is then as it was.
    """
    append_lines(path, event_line(event))


def append_lines(path: Path, lines: str) -> None:
    """Appends whole lines and waits until they are on the disk; cuts off an unfinished line first.

    Raises:
        OSError: If they cannot be written, as on a full disk; the log is then as it was.
    """
    end, is_new = len(whole_lines(path)), not path.exists()
    with path.open("ab") as file:
        try:
            file.truncate(end)
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if is_new:
        sync_directory(path.parent)


def whole_lines(path: Path) -> bytes:
    """The log up to its last newline."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return b""
    return data[: data.rfind(b"\n") + 1]


def parse_event(line: bytes, number: int, *, where: str) -> Event:
    """The event of one line, checked: this is where a log that was edited by hand shows.

    Args:
        line: What was read.
        number: Of the event that is expected there.
        where: It was read, for the message.

    Raises:
        RegistryError: If it is no event, or another one.
    """
    try:
        event = Event(**json.loads(line))
        is_whole = (
            event.sequence == number
            and datetime.fromisoformat(event.time).tzinfo is not None
            and event.kind in KINDS
            and isinstance(event.version, int)
            and isinstance(event.champion, int | None)
            and (event.kind not in MOVES or event.champion == event.version)
        )
    except (ValueError, TypeError, AttributeError):
        is_whole = False
    if not is_whole:
        raise RegistryError(
            f"{where} is no event of number {number}: {line[:120].decode(errors='replace')!r}. "
            "The log was edited or damaged: restore it from a backup, or correct that line "
            f"(keys {', '.join(field.name for field in dataclasses.fields(Event))}; sequence counts the events)."
        )
    return event
