"""The parts of `tanuki up` as processes: each in a session of its own, its words in a file, all found again by a mark.

Ctrl-C in a terminal reaches the whole process group; sessions of their own let `tanuki up` decide who ends when. A
worker starts its runs in sessions of theirs, and a run starts DVC: what belongs to us is known by a variable in its
environment, which children inherit, so that nobody is left behind, whoever was killed.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from flows.up.settings import MARK
from tasks.layout import Layout

MAX_LOG_BYTES = 20_000_000
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
SETTLED_S = 60.0  # alive so long, a part is well and the next wait is the shortest again


class Part:
    """One process that is started again when it ends by itself.

    Args:
        name: server, worker or model.
        command: What to run.
        log: Where its words go.
        environment: What it sees.
        root: Where it runs.
    """

    def __init__(self, name: str, command: list[str], *, log: Path, environment: dict[str, str], root: Path) -> None:
        self.name = name
        self.log = log
        self.process: subprocess.Popen[bytes] | None = None
        self._command, self._environment, self._root = command, environment, root
        self._started = self._due = 0.0
        self._wait_s = FIRST_WAIT_S

    def start(self) -> None:
        """Starts the process; its words are appended to the log."""
        self._started = time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                cwd=self._root,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def trim_log(self, max_bytes: int = MAX_LOG_BYTES) -> None:
        """Begins a long log anew and keeps the last one beside it; who writes there appends, so it need not know."""
        if self.log.is_file() and self.log.stat().st_size > max_bytes:
            shutil.copyfile(self.log, self.log.with_suffix(".old.log"))
            os.truncate(self.log, 0)

    def exit_code(self) -> int | None:
        """Its exit code, if it has ended."""
        return None if self.process is None else self.process.poll()

    def plan_restart(self) -> float:
        """Notes that it ended; seconds until it should be started again, longer each time unless it had settled."""
        alive_s = time.monotonic() - self._started
        self._wait_s = FIRST_WAIT_S if alive_s > SETTLED_S else min(2 * self._wait_s, LONGEST_WAIT_S)
        self._due = time.monotonic() + self._wait_s
        self.process = None
        return self._wait_s

    def is_due(self) -> bool:
        """Whether it ended and its time has come."""
        return self.process is None and time.monotonic() >= self._due

    def stop(self, timeout_s: float) -> None:
        """Asks it to end, and makes it after some time."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends it at once, and all that is in its process group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def ours(layout: Layout) -> list[psutil.Process]:
    """Every process that a `tanuki up` of this workspace started, directly or not, but this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(MARK) == str(layout.root):
                found.append(process)
    return found


def runs(layout: Layout) -> list[psutil.Process]:
    """Those of them that carry out a flow run."""
    return [process for process in ours(layout) if "prefect.engine" in " ".join(_command(process))]


def living_runs(layout: Layout) -> set[str]:
    """Ids of the flow runs that a process of ours works for, be it the run's own or one that it left behind."""
    found = set()
    for process in ours(layout):
        with contextlib.suppress(psutil.Error, OSError):
            found.add(process.environ().get("PREFECT__FLOW_RUN_ID", ""))
    return found - {""}


def end(processes: Iterable[psutil.Process]) -> int:
    """Kills processes and waits until they are gone; how many."""
    gone = list(processes)
    for process in gone:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(gone, timeout=10)
    return len(gone)


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
