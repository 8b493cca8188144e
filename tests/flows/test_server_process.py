"""Prefect's server does not stand still where garbage holds a waiting connection's cursor, and logs no secrets."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.box import free_port
from flows.server_process import masked, serve_command
from tests.end_to_end.listeners import webhook

# One connection has the write lock until the loop commits, another one waits for it on a thread; then a cursor of that
# one becomes garbage, and enough is made on the loop's thread to have a collector look for it there.
SCENE = """
import asyncio, sqlite3, sys, threading
from flows.server_process import collect_aside

def connect():
    return sqlite3.connect(sys.argv[1], timeout=5, check_same_thread=False, isolation_level=None)

def wait_for_lock():
    waiting.set()
    waiter.execute("begin immediate")
    waiter.execute("commit")

async def main():
    asked = asyncio.get_running_loop().run_in_executor(None, wait_for_lock)
    waiting.wait()
    await asyncio.sleep(0.3)
    litter.clear()
    for _ in range(30):
        kept = [[] for _ in range(10_000)]
        await asyncio.sleep(0.01)
    holder.execute("commit")
    await asked

collect_aside(every_s=0.05)
waiting = threading.Event()
holder, waiter = connect(), connect()
holder.execute("begin immediate")
cycle = [waiter.execute("select 1")]  # whose row nobody reads
cycle.append(cycle)
litter = [cycle]
del cycle
asyncio.run(main())
"""


def test_the_loop_goes_on_while_garbage_waits_for_a_connection(tmp_path: Path) -> None:
    scene = [sys.executable, "-c", SCENE, str(tmp_path / "database")]
    ended = subprocess.run(scene, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("told", "clean"),
    [
        (
            "cannot reach postgresql+asyncpg://me:p@ss:w@host:5432/db",
            "cannot reach postgresql+asyncpg://me:***@host:5432/db",
        ),
        ("'410 Gone' for url 'https://hooks.example/T0/secret?a=b'", "'410 Gone' for url 'https://hooks.example/***'"),
        ("GET http://127.0.0.1:4200/api/health 200", "GET http://127.0.0.1:4200/api/health 200"),
    ],
)
def test_secrets_of_addresses_are_masked_and_nothing_else(told: str, clean: str) -> None:
    assert masked(told) == clean


TELL = """
import sys
from prefect.client.orchestration import get_client
from prefect.states import Failed
from flows.up.provision import _automate, _save_blocks
from prefect import flow

@flow
def fails():
    pass

with get_client(sync_client=True) as client:
    _automate(client, _save_blocks(sys.argv[1:]))
    run = client.create_flow_run(fails)
    client.set_flow_run_state(run.id, Failed(message="as asked"), force=True)
"""


@pytest.mark.slow
def test_who_refuses_to_be_told_does_not_get_secrets_into_the_servers_log_and_database(tmp_path: Path) -> None:
    """Of a webhook that answers an error, and of others that are away: Prefect keeps an event of what failed."""
    port, log = free_port(), tmp_path / "server.log"
    apprise = f"json://127.0.0.1:{free_port()}/T0KEN"
    away = f"mailto://me:T0KEN@127.0.0.1:{free_port()}?smtp=127.0.0.1&mode=insecure&from=a@x.org&to=b@x.org"
    url = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": url, "DO_NOT_TRACK": "1"}
    serve = serve_command("--host", "127.0.0.1", "--port", str(port), "--no-ui")
    with webhook(answer=410) as (address, heard), log.open("wb") as words:
        server = subprocess.Popen(serve, env=environment, stdout=words, stderr=subprocess.STDOUT)
        try:
            until(lambda: answers(f"{url}/health"))
            subprocess.run([sys.executable, "-c", TELL, f"{address}/T0KEN", apprise, away], env=environment, check=True)
            until(lambda: heard and "410" in log.read_text())
            until(lambda: database(tmp_path).count(b"Notification failed") >= 2)
            time.sleep(1)
        finally:
            server.terminate()
            server.wait()
    told = log.read_text()
    assert f"{address.rpartition('/')[0]}/***" in told, told
    assert "T0KEN" not in told
    kept = database(tmp_path)
    assert b"prefect.automation.action.failed" in kept
    assert kept.find(b"T0KEN") == -1


def database(prefect_home: Path) -> bytes:
    """All that Prefect's server has written into its database."""
    return b"".join(file.read_bytes() for file in sorted(prefect_home.glob("prefect.db*")))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except (urllib.error.URLError, OSError):
        return False


def until(condition: Callable[[], object], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
