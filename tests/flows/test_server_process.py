"""Prefect's server does not stand still where garbage holds a cursor of a connection that waits."""

import subprocess
import sys
from pathlib import Path

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
