"""`tanuki up` for real: Prefect's server, worker and model server; runs by the clock, by events and after a kill.

One box lives through these tests in order: a scheduled retrain whose worker is killed goes on, promotes, is served and
told of; the same again does nothing; new images in the inbox ask for a retrain, once; a stop leaves no process, and a
start afterwards loses no schedule.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.up.settings import MARK
from tests.conftest import Workspace, clone, make_quick, write_digits
from tests.end_to_end.listeners import mailbox, webhook

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PATIENCE_S = 900.0  # of a busy machine; on a free one nothing here takes more than a minute
CLASSES = 3
QUICK_SCHEDULER = {"PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5"}
SCHEDULE_AHEAD_S = 20


@dataclass
class Box:
    """A workspace with a `tanuki up` that can be started and stopped."""

    workspace: Workspace
    ports: tuple[int, int]
    posted: list[dict]
    mailed: list[tuple[str, str]]
    notify: str
    process: subprocess.Popen[str] | None = None
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.workspace.root.parent / "up.out"

    def start(self, **settings: str) -> None:
        command = ["up", "--port", str(self.ports[0]), "--prefect-port", str(self.ports[1])]
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "flows.cli", *command],
                cwd=self.workspace.root,
                env={**self.workspace.environment, "TANUKI_NOTIFY": self.notify, **QUICK_SCHEDULER, **settings},
                stdout=out,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self.until(lambda: "all parts run" in self.said())

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()

    def stop(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(120)

    def said(self) -> str:
        return self.out.read_text()

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.25)
        return found

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == str(self.workspace.root):
                    found.append(process)
        return found

    def api(self, path: str, body: dict) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.ports[1]}/api{path}",
            json.dumps(body).encode(),
            headers={"content-type": "application/json"},
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:
                if error.code != 503:  # which says that SQLite is locked, and to try again
                    raise
                time.sleep(1)

    def runs(self, deployment: str) -> list[dict]:
        """The runs of a deployment that have begun or should have, the first first."""
        runs = self.api("/flow_runs/filter", {"deployments": {"name": {"any_": [deployment]}}, "limit": 200})
        now = datetime.now(UTC)
        begun = [run for run in runs if datetime.fromisoformat(run["expected_start_time"]) <= now]
        return sorted(begun, key=lambda run: run["expected_start_time"])

    def ended(self, deployment: str, *states: str) -> list[dict]:
        return [run for run in self.runs(deployment) if run["state"]["name"] in states]

    def deployment(self, name: str) -> dict:
        (found,) = self.api("/deployments/filter", {"deployments": {"name": {"any_": [name]}}})
        return found

    def schedule(self, deployment: str, at: datetime) -> None:
        """Adds a schedule, as a person would in Prefect's pages."""
        schedule = {"interval": 31536000, "anchor_date": at.isoformat(), "timezone": "UTC"}
        self.api(
            f"/deployments/{self.deployment(deployment)['id']}/schedules", [{"schedule": schedule, "active": True}]
        )

    def ask(self, deployment: str) -> str:
        """Has a deployment run now; the run's id."""
        id_: str = self.api(f"/deployments/{self.deployment(deployment)['id']}/create_flow_run", {})["id"]
        return id_

    def run(self, deployment: str) -> dict:
        """Runs a deployment now and waits until it has ended."""
        return self.end_of(deployment, self.ask(deployment))

    def end_of(self, deployment: str, id_: str) -> dict:
        """Waits until a run has ended."""

        def ended() -> dict | None:
            (run,) = (run for run in self.runs(deployment) if run["id"] == id_)
            return run if run["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") else None

        return self.until(ended)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def small_set(folder: Path, start: int, stop: int) -> Path:
    write_digits(folder, start, stop)
    for label in range(CLASSES, 10):
        for file in (folder / str(label)).iterdir():
            file.unlink()
        (folder / str(label)).rmdir()
    return folder


@contextmanager
def postgresql() -> Iterator[str]:
    """A PostgreSQL of our own on loopback; its address."""
    programs = [
        shutil.which(name) or next(iter(sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None)
        for name in ("initdb", "postgres")
    ]
    if None in programs:
        pytest.skip("no PostgreSQL here: initdb and postgres are not on the PATH")
    initdb, postgres = map(str, programs)
    user = "postgres" if os.getuid() == 0 else None  # it refuses to run as root
    folder = Path(tempfile.mkdtemp())  # where that user can reach it
    if user:
        shutil.chown(folder, user)
    port = free_port()
    data = str(folder / "data")
    made = subprocess.run(
        [initdb, "-D", data, "-U", "tanuki", "--auth", "trust"], user=user, cwd="/", capture_output=True
    )
    assert made.returncode == 0, made.stderr
    command = [postgres, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", str(folder)]
    with (folder / "postgres.log").open("w") as log:
        server = subprocess.Popen(command, user=user, cwd="/", stdout=log, stderr=log)
    try:
        yield f"postgresql+asyncpg://tanuki@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Iterator[Box]:
    folder = tmp_path_factory.mktemp("up")
    workspace = clone(folder / "workspace", prefect_home)
    make_quick(workspace)
    workspace.set_param("finetune.enabled", False)  # what a retrain does is tested elsewhere
    workspace.set_param("evaluate.robustness_images", 0)
    schedules = workspace.root / "deploy" / "prefect.yaml"
    text = schedules.read_text().replace("settle_s: 60", "settle_s: 0").replace("min_images: 100", "min_images: 3")
    for often in ("interval: 600", "interval: 21600"):  # what runs when is for a test to say
        text = text.replace(often, "interval: 31536000")
    schedules.write_text(text.replace("cron: 30 2 * * *", "cron: 0 0 1 1 *"))
    workspace.tanuki("add", small_set(folder / "digits", 0, 30))
    workspace.run("git", "add", "--all")
    workspace.run("git", "commit", "--quiet", "--message", "Digits")
    with ExitStack() as stack:
        hook, posted = stack.enter_context(webhook())
        smtp, mailed = stack.enter_context(mailbox())
        notify = f"{hook} mailto://127.0.0.1:{smtp}?from=tanuki@example.org&to=person@example.org&mode=insecure"
        box = Box(workspace, (free_port(), free_port()), posted, mailed, notify)
        try:
            box.start()
            yield box
        finally:
            box.kill()


def test_a_retrain_whose_worker_is_killed_goes_on_promotes_is_served_and_told_of(box: Box) -> None:
    box.ask("retrain")
    log = box.workspace.root / ".tanuki" / "logs" / "worker.log"
    box.until(lambda: "validate_data starts" in (log.read_text() if log.is_file() else ""))
    worker = json.loads((box.workspace.root / ".tanuki" / "up.json").read_text())["parts"]["worker"]["pid"]
    victims = [each for each in box.processes() if {"prefect.engine", "tasks", "dvc"} & set(each.cmdline())]
    os.killpg(worker, signal.SIGKILL)
    for victim in victims:
        victim.kill()
    (promoted,) = box.until(lambda: box.ended("retrain", "Promoted"))
    assert promoted["name"] == "retrain: going on after a crash"
    assert len(box.ended("retrain", "Crashed")) == 1
    with urllib.request.urlopen(f"http://127.0.0.1:{box.ports[0]}/v2/models/tanuki/versions/1/ready") as answer:
        assert answer.status == 200
    status = json.loads(box.workspace.tanuki("up", "--status", "--json").stdout)
    assert status["is_well"], status
    assert "tanuki: end zombie runs" in status["automations"]
    for subject in ("tanuki: retrain failed", "tanuki: a new model answers"):
        told = box.until(lambda subject=subject: [each for each in box.posted if each["subject"] == subject])
        mailed = box.until(lambda subject=subject: [each for each in box.mailed if each[0] == subject])
        assert told  # at least once: when SQLite is locked, Prefect carries out an action again
        assert mailed
    assert "Version 1: first model" in told[0]["body"]
    assert "Version 1: first model" in mailed[0][1]
    assert "flow-run" in told[0]["body"]


def test_the_same_again_does_nothing_and_says_so(box: Box) -> None:
    commit = box.workspace.run("git", "rev-parse", "HEAD").stdout
    # Prefect's automations see what became of a run only a quarter of an hour later, if the clock planned it less than
    # five minutes ahead: it "follows" an event that is never sent. So it is this run that the clock starts.
    box.schedule("retrain", datetime.now(UTC) + timedelta(seconds=SCHEDULE_AHEAD_S))
    started = box.until(lambda: [run for run in box.runs("retrain") if run["auto_scheduled"]])
    again = box.end_of("retrain", started[0]["id"])
    assert again["name"] == "retrain: by the clock"
    assert again["state"]["name"] == "Nothing to do"
    assert "version 1 stays champion" in again["state"]["message"]
    assert again["total_run_time"] < 20
    assert json.loads(box.workspace.tanuki("status", "--json").stdout)["would_run"] == {}
    assert box.workspace.run("git", "rev-parse", "HEAD").stdout == commit


def test_new_images_in_the_inbox_ask_for_one_retrain(box: Box, tmp_path: Path) -> None:
    small_set(tmp_path / "new", 30, 34)
    for label in range(CLASSES):
        (tmp_path / "new" / str(label)).rename(box.workspace.root / "data" / "inbox" / str(label))
    taken = box.run("ingest")
    assert taken["state"]["message"].startswith("12 images added. A retrain was asked for: 12 new images")
    asked = box.until(lambda: [run for run in box.runs("retrain") if "12 new images" in run["name"]])
    box.until(lambda: box.ended("retrain", "Refused", "Undecided", "Promoted", "Nothing to do")[2:])
    assert box.run("ingest")["state"]["message"] == "Nothing lies in data/inbox."
    assert len(asked) == 1
    box.until(lambda: [each for each in box.posted if "Version 2: " in each["body"]])  # better, or not with its reason


def test_a_stop_leaves_no_process_and_a_start_loses_no_schedule(box: Box) -> None:
    before = {name: box.deployment(name)["schedules"] for name in ("retrain", "ingest")}
    assert box.stop() == 0
    assert box.processes() == []
    box.start()
    assert "has the deployments" not in box.said()
    for name, schedules in before.items():
        assert box.deployment(name)["schedules"] == schedules
    assert len(box.api("/automations/filter", {})) == 7
    told = box.workspace.tanuki("up", check=False)
    assert told.returncode == 1
    assert "runs in" in told.stderr
    assert box.stop() == 0
    assert box.processes() == []


def test_with_postgresql_by_one_setting(tmp_path: Path, prefect_home: Path) -> None:
    workspace = clone(tmp_path / "workspace", prefect_home)
    box = Box(workspace, (free_port(), free_port()), [], [], "")
    with postgresql() as address:
        try:
            box.start(TANUKI_DATABASE=address)
            assert box.run("ingest")["state"]["message"] == "Nothing lies in data/inbox."
            assert not list(workspace.root.rglob("prefect.db"))
            assert box.stop() == 0
        finally:
            box.kill()
