"""Progress of long work: a bar where a person looks, lines where a log is kept, and every item in either."""

import logging
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from tasks.progress import progress

WORK = """
import logging, sys, time
from tasks.progress import progress
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
done = int(sys.argv[1])
for item in progress(iter(range(done, 5)), total=5, what="top", unit="step", done=done):
    time.sleep(0.4)
    print(item)
"""


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Clock:
    caplog.set_level(logging.INFO, logger="tasks")
    clock = Clock()
    monkeypatch.setattr("tasks.progress.time", SimpleNamespace(monotonic=clock.monotonic))
    return clock


def on_a_terminal(repository: Path, done: int) -> tuple[str, str]:
    """What WORK prints, and what it shows on a real terminal of 80 columns."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    command = [sys.executable, "-c", WORK, str(done)]
    with subprocess.Popen(command, cwd=repository, stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while part := _read(ours):
            shown += part
        printed = process.communicate(timeout=60)[0]
    os.close(ours)
    assert process.returncode == 0, shown
    return printed.decode(), shown.decode()


def _read(terminal: int) -> bytes:
    """Nothing once the other side is closed, which Linux calls an error."""
    try:
        return os.read(terminal, 4096)
    except OSError:
        return b""


def test_a_terminal_shows_a_bar_that_stays_when_the_work_is_done(repository: Path) -> None:
    printed, shown = on_a_terminal(repository, 0)
    assert printed.split() == ["0", "1", "2", "3", "4"]
    *_, last = shown.rstrip().split("\r")
    assert last.startswith("top: 100%|")
    assert "| 5/5 [" in last
    assert "step" in last
    assert "a second" not in shown, "no lines between"


def test_work_that_goes_on_shows_a_bar_from_where_it_was_and_takes_it_away(repository: Path) -> None:
    printed, shown = on_a_terminal(repository, 2)
    assert printed.split() == ["2", "3", "4"]
    assert "| 4/5 [" in shown
    assert "| 0/5 [" not in shown
    assert not shown.split("\r")[-1].strip()
    assert not shown.split("\r")[-2].strip(), "the bar is wiped out with blanks"


def test_a_log_has_no_bar(repository: Path) -> None:
    work = subprocess.run([sys.executable, "-c", WORK, "0"], cwd=repository, capture_output=True, text=True, check=True)
    assert work.stdout.split() == ["0", "1", "2", "3", "4"]
    assert work.stderr == "", "it is done before a line is due"


def test_a_log_has_a_line_every_few_seconds_with_speed_and_what_is_left(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    seen = []
    for item in progress("efghij", total=10, what="top", unit="step", done=4):
        seen.append(item)
        clock.now += 2
    assert seen == list("efghij")
    assert caplog.messages == ["top: 7 of 10 step, 0.5 a second, 6 s to go"]
    for _ in progress(range(4), total=4, what="evaluate"):
        clock.now += 6
    assert caplog.messages[1:] == [
        "evaluate: 1 of 4 img, 0.167 a second, 18 s to go",
        "evaluate: 2 of 4 img, 0.167 a second, 12 s to go",
        "evaluate: 3 of 4 img, 0.167 a second, 6 s to go",
    ]


def test_a_first_item_that_is_long_in_coming_says_nothing_of_the_rest(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    def slow() -> Iterator[int]:
        clock.now += 30
        yield 0

    assert list(progress(slow(), total=9, what="top", unit="batch")) == [0]
    assert caplog.messages == ["top: 0 of 9 batch"]


def test_what_goes_wrong_with_an_item_reaches_who_asked(clock: Clock) -> None:
    def broken() -> Iterator[int]:
        yield 0
        raise OSError("gone")

    work = progress(broken(), total=2, what="top")
    assert next(work) == 0
    with pytest.raises(OSError, match="gone"):
        next(work)
