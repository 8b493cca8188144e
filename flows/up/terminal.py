"""One readable stream out of the parts' logs, which stay whole in their files."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from deploy.json_log import JsonFormatter

SERIOUS = re.compile(r"\b(WARNING|ERROR|CRITICAL)\b|^\w+(?:\.\w+)*(?:Error|Exception): ")
PREFECT_LINE = re.compile(r"^(\d\d:\d\d:\d\d)\.\d+ \| (\w+)\s*\| (.*)$")
OWN_BUSINESS = re.compile(  # Prefect's talk of how it goes about it
    r"^prefect\.|^Worker '|"
    r"^Flow run '.*' - (Running \d+ deployment|Executing deployment|Deployment step|All deployment|View at)"
)
TOLD_ALREADY = "Engine execution exited with unexpected exception"  # of a run that failed with a message of its own
TOO_LATE = "Run is already in terminal state"  # a sign of life came after the end, and was waited for in vain
OF_MODULE = re.compile(r"^(?:flows|tasks|deploy)\.[\w.]+ - ")


class Tail:
    """What is new in a log file since the last look.

    Args:
        path: The file, which may not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = path.stat().st_size if path.is_file() else 0

    def new_lines(self) -> Iterator[str]:
        """Whole lines only."""
        if not self._path.is_file():
            return
        if self._path.stat().st_size < self._position:
            self._position = 0
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        yield from whole.decode("utf-8", "replace").splitlines()


def readable(part: str, line: str) -> str | None:
    """A log line as the terminal shows it; None where a person need not see it."""
    told = {"server": _of_server, "worker": _of_worker, "model": _of_model}[part](line)
    return None if told is None else f"{part:<7} {told}"


def print_json_line(text: str) -> None:
    """A line of the terminal as JSON, for a box whose log is collected (TANUKI_LOG_FORMAT=json)."""
    serious = SERIOUS.search(text)
    level = serious[1] or "ERROR" if serious else "INFO"
    record = logging.makeLogRecord({"name": "flows.up", "levelname": level, "msg": text})
    print(JsonFormatter().format(record), flush=True)


def _of_server(line: str) -> str | None:
    return line if SERIOUS.search(line) and TOO_LATE not in line else None


def _of_worker(line: str) -> str | None:
    found = PREFECT_LINE.match(line)
    if found is None:
        return line if SERIOUS.search(line) else None
    _, level, text = found.groups()
    if (level == "INFO" and OWN_BUSINESS.match(text)) or text.endswith(TOLD_ALREADY):
        return None
    text = OF_MODULE.sub("", text)
    return text if level == "INFO" else f"{level}: {text}"


def _of_model(line: str) -> str | None:
    try:
        told = json.loads(line)
        return str(told["message"]) if told["level"] == "info" else f"{told['level'].upper()}: {told['message']}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return line or None
