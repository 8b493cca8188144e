"""`prefect` for its server, with garbage collected on a thread of its own and no secrets in its log.

sqlite3 lets go of a cursor only while nothing runs on its connection, and a connection that waits for SQLite's write
lock runs. Where the collector meets such a cursor on the event loop's thread, the loop stands still, with it the
transaction that has the lock, and after a minute everything that waited fails with "database is locked". On a thread of
its own the collector waits, and nothing else.

A webhook's address is its password, and httpx tells all of it when the webhook answers an error. Addresses are masked
by their form, so that those are too which somebody gave to Prefect in its pages. In its database Prefect keeps, of a
webhook that answered an error, nothing; of what Apprise sends (e-mail, json://), Apprise's warnings, which name no
address (tested with these three; Apprise's other services word their own).
"""

import gc
import itertools
import logging
import re
import sys
import threading
import time
import traceback
from typing import Any

COLLECT_EVERY_S = 1.0
FULL_EVERY = 30  # collections
PASSWORD = re.compile(r"(\w://[^\s:/@'\"]*):[^\s/'\"]+@")
ADDRESS = re.compile(r"(?<=for url ')(\w+://[^\s/'\"]+)/[^\s'\"\\]+")  # of httpx's HTTPStatusError


def serve_command(*options: str) -> list[str]:
    """Of `prefect server start` with these options, as a process of its own."""
    return [sys.executable, "-m", "flows.server_process", "server", "start", *options]


def collect_aside(every_s: float = COLLECT_EVERY_S) -> None:
    """From now on garbage is looked for on a daemon thread alone, and not in what is there already."""
    gc.disable()
    gc.freeze()
    threading.Thread(target=_collect, args=(every_s,), name="garbage", daemon=True).start()


def masked(text: str) -> str:
    """A text without passwords, and of the address that answered an error the host alone."""
    return ADDRESS.sub(r"\1/***", PASSWORD.sub(r"\1:***@", text))


def mask_log() -> None:
    """From now on every line that this process logs is masked, whichever handler writes it."""
    make = logging.getLogRecordFactory()

    def make_masked(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = make(*arguments, **named)
        _mask(record)
        return record

    logging.setLogRecordFactory(make_masked)


def _mask(record: logging.LogRecord) -> None:
    """Where there is nothing to mask, a record stays as it is: uvicorn's formatter looks at the arguments."""
    told = record.getMessage()
    if (clean := masked(told)) != told:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[1] is not None:
        told = "".join(traceback.format_exception(record.exc_info[1]))
        if (clean := masked(told)) != told:
            record.exc_text, record.exc_info = clean.rstrip(), None


def _collect(every_s: float) -> None:
    for number in itertools.count(1):
        time.sleep(every_s)
        gc.collect(1 if number % FULL_EVERY else 2)


def main() -> None:
    """Does what `prefect` does; imports leave no garbage, and looking for it would take a fifth of a server's start."""
    gc.disable()
    mask_log()
    import prefect.server.api.server  # noqa: F401
    from prefect.cli import app

    collect_aside()
    app()


if __name__ == "__main__":
    main()
