"""`tanuki up` for real: Prefect's server, worker and model server; runs by the clock, by events and after a kill.

One box lives through these tests in order: a scheduled retrain whose worker is killed goes on, promotes, is served and
told of; the same again does nothing; new images in the inbox ask for a retrain, once; a stop leaves no process, and a
start afterwards loses no schedule.
"""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from benchmarks.box import Box, free_port
from tests.conftest import Workspace, clone, make_quick, write_digits
from tests.end_to_end.listeners import mailbox, webhook

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CLASSES = 3
SCHEDULE_AHEAD_S = 20


class ListenedTo(Box):
    """A box whose messages somebody keeps."""

    def __init__(self, workspace: Workspace, posted: list[dict], mailed: list[tuple[str, str]], notify: str) -> None:
        super().__init__(workspace.root, {**workspace.environment, "TANUKI_NOTIFY": notify})
        self.workspace, self.posted, self.mailed = workspace, posted, mailed

    def schedule(self, deployment: str, at: datetime) -> None:
        """Adds a schedule, as a person would in Prefect's pages."""
        schedule = {"interval": 31536000, "anchor_date": at.isoformat(), "timezone": "UTC"}
        id_ = self.deployment(deployment)["id"]
        self.api(f"/deployments/{id_}/schedules", [{"schedule": schedule, "active": True}])


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
def box(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Iterator[ListenedTo]:
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
        box = ListenedTo(workspace, posted, mailed, notify)
        try:
            box.start()
            yield box
        finally:
            box.kill()


def test_a_retrain_whose_worker_is_killed_goes_on_promotes_is_served_and_told_of(box: ListenedTo) -> None:
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


def test_the_same_again_does_nothing_and_says_so(box: ListenedTo) -> None:
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


def test_new_images_in_the_inbox_ask_for_one_retrain(box: ListenedTo, tmp_path: Path) -> None:
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


def test_a_run_that_died_without_a_word_gives_its_slot_back(box: ListenedTo) -> None:
    """As one does that begins on a full disk, where Prefect's server can write nothing down."""
    deployment = box.deployment("drift")["id"]
    dead = box.api(f"/deployments/{deployment}/create_flow_run", {"state": {"type": "PENDING"}})["id"]
    assert box.end_of("drift", dead)["state"]["type"] == "CRASHED"
    assert "died without a word" in box.said()
    assert box.run("drift")["state"]["type"] == "COMPLETED"


def test_a_stop_leaves_no_process_and_a_start_loses_no_schedule(box: ListenedTo) -> None:
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
    box = ListenedTo(workspace, [], [], "")
    with postgresql() as address:
        try:
            box.start(TANUKI_DATABASE=address)
            assert box.run("ingest")["state"]["message"] == "Nothing lies in data/inbox."
            assert not list(workspace.root.rglob("prefect.db"))
            assert box.stop() == 0
        finally:
            box.kill()
