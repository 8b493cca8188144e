"""deploy/prefect.yaml and what `tanuki up` makes of it: flows that exist, one at a time, states that are told of."""

import errno
import importlib
import inspect
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect.cli.deploy._models import DeploymentConfig, PrefectYamlModel
from prefect.client.schemas.objects import State
from prefect.events import DeploymentTriggerTypes
from prefect.settings import Settings
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from benchmarks.box import free_port
from deploy.bundle import read_bundle
from deploy.errors import TanukiError
from flows.canary import CHECK, _run, bounded, changes, try_out
from flows.clones import Snapshot, scratch_copy
from flows.run_log import told
from flows.scheduled_retrain import STATES
from flows.signals import RETRAIN_WANTED
from flows.up.parts import Part
from flows.up.provision import OCCASIONS, RETRAIN, deployment_names, end_zombies
from flows.up.settings import WORK_POOL, UpSettings, check, part_environment
from flows.up.supervisor import tend, whatever_comes
from flows.up.terminal import Tail, readable
from tasks.layout import Layout
from tests.conftest import Workspace

REPOSITORY = Path(__file__).resolve().parents[2]
DECLARED: dict[str, Any] = YAML(typ="safe").load(Layout(REPOSITORY).schedules)
DEPLOYMENTS = PrefectYamlModel.model_validate(DECLARED).deployments  # Prefect's own loader
SHORTEST_S = 300  # below that Prefect's automations come a quarter of an hour late (CONTRIBUTING.md)


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda each: str(each.name))
def test_a_deployment_runs_a_flow_that_takes_its_parameters_one_at_a_time(deployment: DeploymentConfig) -> None:
    file, name = str(deployment.entrypoint).split(":")
    flow = getattr(importlib.import_module(file.removesuffix(".py").replace("/", ".")), name)
    given = set(deployment.parameters) | {
        key for trigger in deployment.triggers or [] for key in trigger.get("parameters", {})
    }
    assert given <= set(inspect.signature(flow.fn).parameters)
    assert deployment.work_pool is not None
    assert deployment.work_pool.name == WORK_POOL
    limit = deployment.concurrency_limit
    assert not isinstance(limit, int | None)
    assert (limit.limit, limit.collision_strategy) == (1, "CANCEL_NEW")


def test_no_schedule_is_shorter_than_prefects_automations_bear() -> None:
    intervals = [each["interval"] for one in DECLARED["deployments"] for each in one["schedules"] if "interval" in each]
    assert intervals
    assert min(intervals) >= SHORTEST_S


def test_triggers_are_prefects_and_have_a_cool_down() -> None:
    adapter: TypeAdapter[DeploymentTriggerTypes] = TypeAdapter(DeploymentTriggerTypes)
    found = [adapter.validate_python(each) for one in DEPLOYMENTS for each in one.triggers or []]
    assert {RETRAIN_WANTED, "prefect.flow-run.Crashed"} == {name for each in found for name in each.expect}
    assert all(each.within.total_seconds() >= SHORTEST_S for each in found)


def test_what_a_retrain_comes_to_is_told_unless_it_is_nothing() -> None:
    told = {state for occasion in OCCASIONS for state in occasion.states}
    assert set(STATES.values()) - told == {"Nothing to do"}
    assert RETRAIN in deployment_names(Layout(REPOSITORY))
    assert end_zombies().trigger.within.total_seconds() < 120


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (UpSettings(database="postgres://me:secret@host/db"), r"Expected postgresql\+asyncpg"),
        (UpSettings(notify=("https://example.org", "person@secret.org")), "Address 2 of --notify"),
    ],
)
def test_a_wrong_address_is_refused_without_telling_its_secret(settings: UpSettings, expected: str) -> None:
    with pytest.raises(TanukiError, match=expected) as refused:
        check(settings)
    assert "secret" not in str(refused.value)


def test_prefect_understands_what_a_box_sets_so_that_nothing_grows_or_calls_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in part_environment(Layout(tmp_path), UpSettings()).items():
        monkeypatch.setenv(name, value)
    server = Settings().server
    assert server.services.db_vacuum.enabled_vacuum_types >= {"events", "flow_runs"}
    assert server.services.db_vacuum.retention_period.days == 90
    assert server.concurrency.lease_storage.endswith(".filesystem")
    assert not server.analytics_enabled


def test_a_full_disk_ends_a_run_with_what_to_do_and_a_mistake_of_ours_with_its_traceback() -> None:
    def fail(number: int) -> State:
        raise OSError(number, os.strerror(number))

    state = told(lambda: fail(errno.ENOSPC))
    assert state.name == "Failed"
    assert "No space left on device. Nothing was lost: make room" in str(state.message)
    with pytest.raises(OSError, match="Bad file descriptor"):
        told(lambda: fail(errno.EBADF))


@pytest.mark.parametrize(
    ("part", "line", "shown"),
    [
        ("worker", "03:50:31.649 | INFO    | flows.retrain - [finetune]", "worker  [finetune]"),
        ("worker", "03:50:31.649 | ERROR   | flows.run_log - no room", "worker  ERROR: no room"),
        ("worker", "03:50:31.649 | INFO    | Flow run 'x' - View at http://127.0.0.1", None),
        ("worker", "03:50:31.649 | ERROR   | Flow run 'x' - Engine execution exited with unexpected exception", None),
        ("worker", "Traceback (most recent call last):", None),
        ("worker", "prefect.exceptions.FailedRun: there is no champion yet", None),
        ("worker", "ValueError: what nobody expected", "worker  ValueError: what nobody expected"),
        ("server", "INFO: whatever", None),
        (
            "server",
            "04:16:47.659 | ERROR   | prefect.server - failed",
            "server  04:16:47.659 | ERROR   | prefect.server - failed",
        ),
        (
            "server",
            "13:33:04.281 | WARNING | prefect.server.events.actions - Action failed: 'Failed to set state: Run is "
            "already in terminal state COMPLETED.'",
            None,
        ),
        ("model", '{"level": "info", "message": "version 1 answers"}', "model   version 1 answers"),
        ("model", "tanuki: cannot listen", "model   tanuki: cannot listen"),
    ],
)
def test_the_terminal_shows_what_a_person_needs(part: str, line: str, shown: str | None) -> None:
    assert readable(part, line) == shown


def test_a_log_is_followed_by_whole_lines_and_from_its_start_when_begun_anew(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    tail = Tail(log)
    assert list(tail.new_lines()) == []
    log.write_text("one\ntwo\nthr")
    assert list(tail.new_lines()) == ["one", "two"]
    log.write_text("new\n")
    assert list(tail.new_lines()) == ["new"]


def test_a_long_log_is_begun_anew_under_its_writer(tmp_path: Path) -> None:
    part = Part(
        "worker",
        ["sh", "-c", "echo first; sleep 0.5; echo last"],
        log=tmp_path / "worker.log",
        environment={},
        root=tmp_path,
    )
    part.start()
    assert part.process is not None
    while not part.log.read_text():
        pass
    part.trim_log(max_bytes=3)
    part.process.wait()
    assert (tmp_path / "worker.old.log").read_text() == "first\n"
    assert part.log.read_text() == "last\n"


def test_a_part_that_ends_again_and_again_is_started_less_and_less_often(tmp_path: Path) -> None:
    part = Part("model", ["false"], log=tmp_path / "model.log", environment={}, root=tmp_path)
    waits = []
    for _ in range(8):
        part.start()
        assert part.process is not None
        part.process.wait()
        waits.append(part.plan_restart())
    assert waits == sorted(waits)
    assert waits[-1] == 60


def test_a_part_that_a_full_disk_keeps_from_starting_is_tried_again_and_the_box_goes_on(tmp_path: Path) -> None:
    layout, log = Layout(tmp_path), tmp_path / "model.log"
    part = Part("model", ["sleep", "60"], log=log, environment=dict(os.environ), root=tmp_path)
    said: list[str] = []
    log.mkdir()  # cannot be opened, as a file on a full disk cannot be made
    tend(layout, {"model": part}, said.append)
    assert part.process is None
    assert not part.is_due()
    log.rmdir()
    part._due = 0.0
    tend(layout, {"model": part}, said.append)
    try:
        assert part.exit_code() is None
        assert part.process is not None
        assert [line.split(":")[0] for line in said] == ["model   cannot be started", "model   started again"]
    finally:
        part.kill()


def test_a_box_whose_log_is_collected_says_json(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TANUKI_LOG_FORMAT", "json")
    up = workspace.start(sys.executable, "-m", "flows.cli", "up", "--prefect-port", str(free_port()))
    assert up.stdout is not None
    first = json.loads(up.stdout.readline())
    up.terminate()
    rest = up.communicate(timeout=60)[0].splitlines()
    assert first["message"].startswith("server  starting")
    assert (first["level"], first["logger"]) == ("info", "flows.up")
    assert all(json.loads(line)["message"] for line in rest)


def test_words_for_a_full_disk_do_not_end_the_box() -> None:
    full = Path("/dev/full").open("w")  # noqa: SIM115 - closing it is what raises
    whatever_comes(partial(print, file=full, flush=True))("up")
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_a_canary_knows_what_moved_and_what_is_held_back() -> None:
    assert changes({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "3", "d": "4"}) == [("b", "2", "3")]
    held = set(bounded(REPOSITORY / "pyproject.toml"))
    assert {"fastapi", "sqlalchemy", "torch"} <= held
    assert "numpy" not in held


def test_a_canary_does_not_know_where_production_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TANUKI_ROOT", "TANUKI_REGISTRY", "TANUKI_SIGNING_KEY", "TANUKI_UP", "PREFECT_API_URL"):
        monkeypatch.setenv(name, "production")
    look = [sys.executable, "-c", "import os; print([name for name in os.environ if os.environ[name] == 'production'])"]
    assert _run(Layout(tmp_path), look, 60).stdout == "['TANUKI_UP']\n"  # by which `tanuki up` finds what it started


@pytest.mark.slow
def test_what_a_canary_tries_works_with_what_is_installed(workspace: Workspace, tmp_path: Path) -> None:
    workspace.set_param("finetune.enabled", False)
    commit, head = (
        workspace.run("git", *words).stdout.strip() for words in (["rev-parse", "HEAD"], ["stash", "create"])
    )
    copy = Layout(tmp_path / "copy")
    scratch_copy(Layout(workspace.root), copy, Snapshot(commit, head, None))
    assert try_out.fn(copy, Path(sys.executable), CHECK) is None
    assert len(read_bundle(copy.bundle_dir).labels) == 10
    assert str(try_out.fn(copy, Path(sys.executable), ("-c", "raise SystemExit('newest')"))).endswith("newest")


def test_a_scratch_copy_has_todays_code_and_no_data(tmp_path: Path) -> None:
    main = Layout(tmp_path / "main")
    (main.data / "raw").mkdir(parents=True)
    main.raw_pointer.write_text("outs: []\n")
    (main.root / "code.py").write_text("old")
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=T", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=main.root, check=True)
    (main.root / "code.py").write_text("new")
    copy = Layout(tmp_path / "copy")
    commit, head = (
        subprocess.run(["git", *words], cwd=main.root, capture_output=True, text=True, check=True).stdout
        for words in (["rev-parse", "HEAD"], ["stash", "create"])
    )
    scratch_copy(main, copy, Snapshot(commit.strip(), head.strip(), None))
    assert (copy.root / "code.py").read_text() == "new"
    assert not copy.raw_pointer.exists()
