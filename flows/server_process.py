"""`prefect` for its server, with garbage collected on a thread of its own: see ``serve_command``.

sqlite3 lets go of a cursor only while nothing runs on its connection, and a connection that waits for SQLite's write
lock runs. Where the collector meets such a cursor on the event loop's thread, the loop stands still, with it the
transaction that has the lock, and after a minute everything that waited fails with "database is locked". On a thread of
its own the collector waits, and nothing else.
"""

import gc
import itertools
import sys
import threading
import time

COLLECT_EVERY_S = 1.0
FULL_EVERY = 30  # collections


def serve_command(*options: str) -> list[str]:
    """Of `prefect server start` with these options, as a process of its own."""
    return [sys.executable, "-m", "flows.server_process", "server", "start", *options]


def collect_aside(every_s: float = COLLECT_EVERY_S) -> None:
    """From now on garbage is looked for on a daemon thread alone, and not in what is there already."""
    gc.disable()
    gc.freeze()
    threading.Thread(target=_collect, args=(every_s,), name="garbage", daemon=True).start()


def _collect(every_s: float) -> None:
    for number in itertools.count(1):
        time.sleep(every_s)
        gc.collect(1 if number % FULL_EVERY else 2)


def main() -> None:
    """Does what `prefect` does; imports leave no garbage, and looking for it would take a fifth of a server's start."""
    gc.disable()
    import prefect.server.api.server  # noqa: F401
    from prefect.cli import app

    collect_aside()
    app()


if __name__ == "__main__":
    main()
