"""A Prefect server for the time of one command, where PREFECT_API_URL names none.

Prefect would start one itself, but in the terminal's process group: Ctrl-C ends that server first, and the flow then
tries for minutes to tell it what happened. This one has a session of its own, and ends with the command however that
ends. It starts while this process imports Prefect, so import flows inside the block.
"""

import atexit
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flows.server_process import serve_command
from flows.workspace import WorkspaceError, environment
from tasks.layout import Layout

START_TIMEOUT_S = 180.0
POLL_S = 0.1

# Waits for the end of its input, which is the end of the command, `kill -9` included; or of the server.
GUARD = (
    "import os, subprocess, sys, threading\n"
    "server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)\n"
    "threading.Thread(target=lambda: os._exit(server.wait() or 1), daemon=True).start()\n"
    "sys.stdin.read()\n"
    "server.terminate()\n"
)


@contextmanager
def prefect_server(layout: Layout) -> Iterator[None]:
    """The server that flows in this block talk to: the one that is configured, or a temporary one.

    Raises:
        WorkspaceError: If the temporary server does not start; names its log.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    guard = None if os.environ.get("PREFECT_API_URL") else _start(layout, port, url)
    # What a flow needs at once: importing it takes as long as half of the server's start.
    import fastapi.encoders  # noqa: F401
    import prefect.flow_engine
    import prefect.task_engine  # noqa: F401
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    if PREFECT_API_URL.value() or guard is None:  # a profile may name one, too
        if guard is not None:
            _stop(guard)
        yield
        return
    assert guard.stdin is not None
    atexit.register(guard.stdin.close)  # not before: Prefect sends the last lines of its log at exit
    _wait_until_healthy(url, guard, layout)
    # Heartbeats are for whoever watches many runs; the end of a run waits up to a second for the last one.
    with temporary_settings({PREFECT_API_URL: url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield


@contextmanager
def server_on(layout: Layout, home: Path) -> Iterator[str]:
    """A temporary server on the local database of another PREFECT_HOME than this process's.

    Returns:
        The address of its API.

    Raises:
        WorkspaceError: If it does not start; names its log.
    """
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    guard = _start(layout, port, url, {"PREFECT_HOME": str(home)})
    try:
        _wait_until_healthy(url, guard, layout)
        yield url
    finally:
        _stop(guard)


def _start(layout: Layout, port: int, url: str, settings: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    serve = serve_command("--host", "127.0.0.1", "--port", str(port), "--no-services", "--no-ui")
    layout.server_log.parent.mkdir(parents=True, exist_ok=True)
    with layout.server_log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", GUARD, *serve],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**environment(), "PREFECT_API_URL": url, **(settings or {})},
            start_new_session=True,
        )


def _stop(guard: subprocess.Popen[bytes]) -> None:
    assert guard.stdin is not None
    guard.stdin.close()
    guard.wait()


def _wait_until_healthy(url: str, guard: subprocess.Popen[bytes], layout: Layout) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and guard.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(POLL_S)
    raise WorkspaceError(
        f"Prefect's temporary server ended, or did not answer within {START_TIMEOUT_S:.0f} s; its words are in "
        f"{layout.server_log}. Start one yourself (`prefect server start`) and set PREFECT_API_URL, or run "
        "`dvc repro`, which needs none."
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
