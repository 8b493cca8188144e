"""What several processes do in tests, apart from these, whose imports take long."""

import os
import signal
import sys
import time
from pathlib import Path

from tasks.errors import DataError, TanukiError
from tasks.together import end_with, is_worker, run_together, take_part
from tasks.training.processes import is_first, joined, total

STAY_S = 120


def stay(folder: Path) -> None:
    """The first is busy in Python, the second waits in torch for it."""
    total(1)
    (folder / f"pid.{os.environ['RANK']}").write_text(str(os.getpid()))
    if is_first():
        time.sleep(STAY_S)
    total(1)


def end_second(how: str) -> None:
    """The first waits in torch for the second, which does not come."""
    if not is_first():
        if how == "mistake":
            raise DataError("no such pictures")
        if how == "bug":
            raise ZeroDivisionError("of nothing")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)
    total(1)


def main(how: str, *folder: str) -> int:
    try:
        if not is_worker():
            return run_together(("-m", "tests.tasks.process_works", how, *folder), 2)
        take_part()
        with joined():
            stay(Path(*folder)) if how == "stay" else end_second(how)
    except TanukiError as mistake:
        return end_with(str(mistake), 75)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
