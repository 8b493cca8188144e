"""Starts the parts, keeps them running, ends them together.

Prefect's server comes first, then what it is to know, then the worker and the model server; a part that ends by itself
is started again, at longer and longer intervals. A stop kills runs instead of asking them: that is what a power cut
does, nothing is lost by it, and the next start takes up what it cut short in one and the same way.
"""

import fcntl
import logging
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from types import FrameType

from deploy.files import write_json
from flows.registries import registry_place
from flows.server_process import serve_command
from flows.up.parts import Part, end, living_runs, ours, runs
from flows.up.settings import WORK_POOL, UpSettings, check, part_environment
from flows.up.terminal import Tail, readable
from flows.workspace import BusyError, WorkspaceError
from tasks.layout import Layout

START_TIMEOUT_S = 180.0
TICK_S = 0.25
BURY_S = 60.0
GRACE_S = {"model": 25.0, "server": 15.0}

logger = logging.getLogger(__name__)

Say = Callable[[str], None]


def run_up(layout: Layout, settings: UpSettings, say: Say) -> None:
    """Runs everything until Ctrl-C or SIGTERM.

    Raises:
        BusyError: If it runs already.
        WorkspaceError: If the server does not start, or refuses the deployments.
    """
    check(settings)
    say = whatever_comes(say)
    environment = part_environment(layout, settings)
    with _alone(layout), _until_told() as stop:
        if left := end(ours(layout)):
            say(f"{left} processes of a `tanuki up` that was killed are ended")
        parts = make_parts(layout, settings, environment)
        tails = {name: Tail(part.log) for name, part in parts.items()}
        try:
            parts["server"].start()
            say(f"server  starting; its words are in {parts['server'].log}")
            if not _wait_for_server(parts["server"], settings, stop):
                return
            _prepare(layout, settings, environment, say)
            parts["worker"].start()
            parts["model"].start()
            noted = _note(layout, settings, parts)
            say(f"server  {settings.ui_url}")
            say(f"model   {settings.model_url}")
            say("up      all parts run; Ctrl-C ends them")
            looks_at = time.monotonic() + BURY_S
            while not stop.wait(TICK_S):
                _show(tails, say)
                tend(layout, parts, say)
                if time.monotonic() >= looks_at:
                    if answers(f"{settings.api_url}/health"):
                        _bury(layout, say, silent_s=BURY_S)
                    looks_at = time.monotonic() + BURY_S
                if noted != _pids(parts):
                    with suppress(OSError):  # a full disk: at the next tick
                        noted = _note(layout, settings, parts)
        finally:
            _stop(layout, parts, say)
            _show(tails, say)


def make_parts(layout: Layout, settings: UpSettings, environment: Mapping[str, str]) -> dict[str, Part]:
    """The three of them, not started yet."""
    worker = ["worker", "start", "--pool", WORK_POOL, "--type", "process", "--name", "box"]
    model = ["--registry", registry_place(layout), "--host", settings.host, "--port", str(settings.port)]
    commands = {
        "server": serve_command("--host", settings.prefect_host, "--port", str(settings.prefect_port)),
        "worker": [sys.executable, "-m", "prefect", *worker],
        "model": [sys.executable, "-m", "deploy.serving", *model, *settings.serve_options],
    }
    return {
        name: Part(name, command, log=layout.logs_dir / f"{name}.log", environment=dict(environment), root=layout.root)
        for name, command in commands.items()
    }


def _prepare(layout: Layout, settings: UpSettings, environment: Mapping[str, str], say: Say) -> None:
    """Everything between a server that answers and a worker that asks it."""
    os.environ.update(environment)  # Prefect reads it when it is imported
    from flows.up.provision import drop_missed_runs, provision, take_up

    for folder in (layout.inbox, layout.registry_dir):  # a model server may start before the first retrain
        folder.mkdir(parents=True, exist_ok=True)
    if provision(layout, settings, environment):
        say("server  has the deployments, their schedules and the automations")
    if stopped := take_up():
        say(f"server  cut short by the last stop: {', '.join(stopped)}; a retrain goes on")
    if missed := drop_missed_runs():
        say(f"server  {missed} missed runs are dropped; the last one of each schedule stands in for them")


def whatever_comes(say: Say) -> Say:
    """Says what can be said: the box goes on where its words go to a full disk, or to nobody any more."""

    def saying(line: str) -> None:
        with suppress(OSError):
            say(line)

    return saying


def tend(layout: Layout, parts: Mapping[str, Part], say: Say) -> None:
    """Starts again what has ended, and keeps the logs short; what a full disk prevents is tried again."""
    for part in parts.values():
        with suppress(OSError):
            part.trim_log()
        if (code := part.exit_code()) is not None:
            wait_s = part.plan_restart()
            say(f"{part.name:<7} ended ({_how(code)}); {part.log} says why; it starts again in {wait_s:.0f} s")
        if part.is_due():
            if part.name == "worker":
                _bury(layout, say)
            try:
                part.start()
            except OSError as error:
                say(f"{part.name:<7} cannot be started: {error}; tried again in {part.plan_restart():.0f} s")
            else:
                say(f"{part.name:<7} started again")


def _bury(layout: Layout, say: Say, *, silent_s: float = 0.0) -> None:
    """Tells the server of runs that died without a word: a killed worker's, or what a full disk kept from telling.

    As long as they seem to run they hold their slot, and no other retrain begins.
    """
    from flows.up.provision import bury_the_dead

    try:
        dead = bury_the_dead(living_runs(layout), silent_s=silent_s)
    except Exception as error:  # noqa: BLE001 - the server may be away too; the next look ends them
        logger.warning("the server cannot be told which runs died: %s", error)
        return
    if dead:
        say(f"worker  died without a word: {', '.join(dead)}")


def _how(code: int) -> str:
    return f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _wait_for_server(server: Part, settings: UpSettings, stop: threading.Event) -> bool:
    """Waits until the server answers; False where a stop came first."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not stop.wait(TICK_S):
        if server.exit_code() is not None or time.monotonic() > deadline:
            raise WorkspaceError(
                f"Prefect's server did not start on {settings.ui_url}; its words are in {server.log}. Is the port "
                "taken? Choose another with --prefect-port."
            )
        if answers(f"{settings.api_url}/health"):
            return True
    return False


def answers(url: str) -> bool:
    """Whether a GET of an address on this machine succeeds."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


def _stop(layout: Layout, parts: Mapping[str, Part], say: Say) -> None:
    """The worker first, so that no run is started any more, then runs, then the servers."""
    say("up      stopping")
    parts["worker"].kill()
    end(runs(layout))
    parts["model"].stop(GRACE_S["model"])
    parts["server"].stop(GRACE_S["server"])
    end(ours(layout))
    layout.up_facts.unlink(missing_ok=True)
    say("up      everything has ended")


def _pids(parts: Mapping[str, Part]) -> dict[str, int | None]:
    return {name: part.process.pid if part.process else None for name, part in parts.items()}


def _note(layout: Layout, settings: UpSettings, parts: Mapping[str, Part]) -> dict[str, int | None]:
    """For `tanuki up --status`; the processes that were noted."""
    pids = _pids(parts)
    facts = {
        "pid": os.getpid(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "api": settings.api_url,
        "ui": settings.ui_url,
        "model": settings.model_url,
        "parts": {name: {"pid": pids[name], "log": str(part.log)} for name, part in parts.items()},
    }
    write_json(layout.up_facts, facts)
    return pids


def _show(tails: Mapping[str, Tail], say: Say) -> None:
    for name, tail in tails.items():
        for line in tail.new_lines():
            if (text := readable(name, line)) is not None:
                say(text)


@contextmanager
def _alone(layout: Layout) -> Iterator[None]:
    """Holds the lock of `tanuki up`, which its parts do not inherit."""
    layout.up_lock.parent.mkdir(parents=True, exist_ok=True)
    with layout.up_lock.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise BusyError(
                f"`tanuki up` runs in {layout.root} already (process {file.read().strip()}). `tanuki up --status` "
                "shows it; stop it first, with Ctrl-C where it runs or SIGTERM."
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


@contextmanager
def _until_told() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; the second one interrupts."""
    stop = threading.Event()

    def tell(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
