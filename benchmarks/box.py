"""A workspace with a `tanuki up` of its own, started, asked and stopped from outside as a person or a machine would.

What benchmarks/soak.py and tests/end_to_end/test_up.py live in.
"""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil

from flows.up.settings import MARK

PATIENCE_S = 900.0  # of a busy machine; on a free one nothing here takes more than a minute
POLL_S = 0.25
API_S = 60.0
QUICK_SCHEDULER = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5"}
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

Found = TypeVar("Found")


class Box:
    """A `tanuki up` that can be started and stopped.

    Args:
        root: The workspace.
        environment: What its processes see.
        options: Of `tanuki up`, besides the ports.
    """

    def __init__(self, root: Path, environment: Mapping[str, str], options: Sequence[str] = ()) -> None:
        self.root = root
        self.ports = (free_port(), free_port())  # of the model server and of Prefect's
        self.process: subprocess.Popen[str] | None = None
        self._environment = dict(environment)
        self._options = tuple(options)
        self._out = root.parent / "up.out"

    def start(self, **settings: str) -> None:
        """Starts it and waits until all parts run."""
        command = ["up", "--port", str(self.ports[0]), "--prefect-port", str(self.ports[1]), *self._options]
        with self._out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *command],
                cwd=self.root,
                env={**self._environment, **QUICK_SCHEDULER, **settings},
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.until(lambda: "all parts run" in self.said())

    def stop(self) -> int:
        """Ctrl-C; its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)

    def kill(self) -> None:
        """Ends it and all that it started, at once."""
        if self.process:
            self.process.kill()
            self.process.wait()
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def said(self) -> str:
        return self._out.read_text()

    def until(self, condition: Callable[[], Found]) -> Found:
        """Waits until something holds; what it gave."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(POLL_S)
        return found

    def processes(self) -> list[psutil.Process]:
        """All that bears its mark."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == str(self.root):
                    found.append(process)
        return found

    def model(self, path: str, body: bytes | None = None) -> Any:
        """What the model server answers."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[0]}{path}", data=body, timeout=30) as response:
            return json.load(response)

    def api(self, path: str, body: dict[str, Any] | list[Any]) -> Any:
        """What Prefect's server answers; asked again while it says that SQLite is locked."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[1]}/api{path}",
            json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=API_S) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code != 503:
                    raise
                time.sleep(1)

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        """The runs of a deployment that have begun or should have, the first first."""
        runs = self.api("/flow_runs/filter", {"deployments": {"name": {"any_": [deployment]}}, "limit": 200})
        now = datetime.now(UTC)
        begun = [run for run in runs if datetime.fromisoformat(run["expected_start_time"]) <= now]
        return sorted(begun, key=lambda run: run["expected_start_time"])

    def ended(self, deployment: str, *states: str) -> list[dict[str, Any]]:
        return [run for run in self.runs(deployment) if run["state"]["name"] in states]

    def deployment(self, name: str) -> dict[str, Any]:
        (found,) = self.api("/deployments/filter", {"deployments": {"name": {"any_": [name]}}})
        return dict(found)

    def ask(self, deployment: str) -> str:
        """Has a deployment run now; the run's id."""
        id_: str = self.api(f"/deployments/{self.deployment(deployment)['id']}/create_flow_run", {})["id"]
        return id_

    def run(self, deployment: str) -> dict[str, Any]:
        """Runs a deployment now and waits until it has ended."""
        return self.end_of(deployment, self.ask(deployment))

    def end_of(self, deployment: str, id_: str) -> dict[str, Any]:
        """Waits until a run has ended."""
        return self.until(lambda: self.has_ended(deployment, id_)) or {}

    def has_ended(self, deployment: str, id_: str) -> dict[str, Any] | None:
        """A run that has ended, else None."""
        (run,) = (run for run in self.runs(deployment) if run["id"] == id_)
        return run if run["state"]["type"] in FINAL else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
