"""A checkout of this repository: its lock, and git and DVC as functions. The only caller of either."""

import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from ruamel.yaml import YAML

from deploy.errors import TanukiError
from flows.dvc_files import is_torn, keep_lock, mend
from flows.graph import downstream, read_stages
from tasks import warm
from tasks.data.image_store import is_whole, refuse_damaged, shard_paths
from tasks.layout import Layout

TEMPORARY_FAILURE = 75
"""Exit code of a stage whose trouble may pass by itself, such as a network's (EX_TEMPFAIL of sysexits.h)."""

INTERRUPTED_CODES = (128 + signal.SIGINT, -signal.SIGINT, 252)
"""After a Ctrl-C: a stage's exit code, that of a shell between DVC and the stage, and DVC's own."""

TAIL_LINES = 40
LOCK_POLL_S = 0.2
MAX_TOLD = 50  # files that are not committed, in a lineage
DVC_CHATTER = re.compile(
    r"^$|^Running stage |^> |^Generating lock|^Updating lock|^Use `dvc push`|^Data and pipelines|^Stage '|^Verifying|"
    r"^WARNING: No file hash info found|^Reproducing experiment|^Ran experiment|^Experiment results have been|"
    r"^'.*' didn't change|"
    r"^To track the changes|^To enable auto|^\s+git add|^Skipping run, checking out|^ERROR: failed to (reproduce|run)"
)

logger = logging.getLogger(__name__)


class WorkspaceError(TanukiError):
    """Something about the checkout, git or DVC that a user can mend."""


class BusyError(WorkspaceError):
    """Somebody else is at work in the workspace; it passes by itself."""


class StageError(TanukiError):
    """A stage that stopped.

    Args:
        message: What the stage said.
        exit_code: The stage's own exit code.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class StageRun:
    """What became of one stage.

    Args:
        stage: Its name.
        outcome: Whether it ran, was up to date, or came out of DVC's run cache.
        seconds: Wall time, DVC included.
    """

    stage: str
    outcome: Literal["ran", "up to date", "restored"]
    seconds: float


def find_workspace(start: Path) -> Layout:
    """The workspace at or above a folder.

    Raises:
        WorkspaceError: If there is none, or it is not under git and DVC.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "dvc.yaml").is_file() and (folder / "params.yaml").is_file():
            _require_repositories(folder)
            return Layout(folder)
    raise WorkspaceError(
        f"{start.resolve()} is no tanuki workspace: neither here nor above are dvc.yaml and params.yaml. "
        "Change into your checkout of the repository, or name it with --root."
    )


def _require_repositories(folder: Path) -> None:
    if not (folder / ".git").exists():
        raise WorkspaceError(
            f"{folder} is under no git repository of its own, and DVC keeps its pointers in git. "
            "Run `git init && git add -A && git commit -m 'Start'` there."
        )
    if not (folder / ".dvc" / "config").is_file():
        raise WorkspaceError(f"{folder} has no .dvc/config. Restore it from git, or run `dvc init` there.")


@contextmanager
def exclusive(layout: Layout, what: str, *, wait_s: float = 0) -> Iterator[None]:
    """Holds the workspace's lock; the kernel lets go of it when this process and the DVC it started are gone.

    Whoever gets it mends first what a killed DVC left half written.

    Args:
        layout: The workspace.
        what: For whom: the command's name.
        wait_s: How long to wait for another process to let go of it.

    Raises:
        BusyError: If another process holds it; says which.
    """
    layout.lock.parent.mkdir(parents=True, exist_ok=True)
    with layout.lock.open("a+", encoding="utf-8") as file:
        deadline = time.monotonic() + wait_s
        while not _try_lock(file):
            if time.monotonic() < deadline:
                time.sleep(LOCK_POLL_S)
                continue
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise BusyError(
                f"{layout.root} is busy: {holder} holds it. Wait until that has ended; "
                "to run two at once, use a second clone with a shared DVC cache."
            )
        file.truncate(0)
        file.write(f"`tanuki {what}` (process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')})")
        file.flush()
        os.set_inheritable(file.fileno(), True)
        mend(layout)
        yield


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def holder(layout: Layout) -> str | None:
    """Who holds the workspace's lock, in words; None where it is free."""
    if not is_held(layout.lock):
        return None
    return layout.lock.read_text(encoding="utf-8", errors="replace").strip() or "another process"


def is_held(lock: Path) -> bool:
    """Whether a process holds the kernel's lock on a file, which need not be there."""
    if not lock.is_file():
        return False
    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def environment() -> dict[str, str]:
    """What child processes see: this interpreter's commands first, no telemetry."""
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", "")
    return {
        "GIT_TERMINAL_PROMPT": "0",  # a flow that runs by itself must fail, not wait for a password
        **os.environ,
        "PATH": path if path.split(os.pathsep)[0] == scripts else scripts + os.pathsep + path,
        "DVC_NO_ANALYTICS": "1",
        "DO_NOT_TRACK": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }


def git(layout: Layout, *arguments: str) -> str:
    """Runs git and gives what it printed.

    Raises:
        WorkspaceError: If git is missing or refuses.
    """
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=layout.root, capture_output=True, text=True, check=False, env=environment()
        )
    except FileNotFoundError as error:
        raise WorkspaceError("git is not installed. Install it with your system's package manager.") from error
    if run.returncode != 0:
        raise WorkspaceError(f"`git {' '.join(arguments)}` failed: {run.stderr.strip()}")
    return run.stdout.strip()


def _python(*module: str) -> list[str]:
    """``python -m MODULE...``, by way of the warm process where there is one (flows.warm)."""
    return [sys.executable, "-m", *(["tasks.warm"] if warm.ADDRESS in os.environ else []), *module]


def dvc(layout: Layout, *arguments: str) -> str:
    """Runs dvc and gives what it printed.

    Raises:
        WorkspaceError: If dvc refuses.
    """
    run = subprocess.run(
        _python("dvc", *arguments),
        cwd=layout.root,
        capture_output=True,
        text=True,
        check=False,
        close_fds=False,
        env=environment(),
    )
    if run.returncode != 0:
        said = run.stderr.split("Having any troubles?")[0].strip() or run.stdout.strip()
        raise WorkspaceError(f"`dvc {' '.join(arguments)}` failed: {said}")
    return run.stdout.strip()


def track_raw(layout: Layout) -> None:
    """Puts data/raw as it is now under DVC: the bytes into its cache, the pointer into data/raw.dvc.

    The pointer is staged in git, as the setting core.autostage says, and the log of what people did goes with it.

    Raises:
        StoreError: If a shard was damaged since: DVC would take it for a new version and point at that.
    """
    since = layout.raw_pointer.stat().st_mtime_ns if layout.raw_pointer.is_file() else 0
    changed = [shard for shard in shard_paths(layout.raw) if shard.stat().st_mtime_ns >= since]
    refuse_damaged([shard for shard in changed if not is_whole(shard)])
    dvc(layout, "--wait-for-lock", "add", "--quiet", str(layout.raw.relative_to(layout.root)))
    if layout.raw_changes.is_file():
        git(layout, "add", "--", str(layout.raw_changes.relative_to(layout.root)))


def default_remote(layout: Layout) -> str | None:
    """The name of DVC's default remote; None where none is set.

    Raises:
        WorkspaceError: If DVC's settings cannot be read.
    """
    return dvc_setting(layout, "core", "remote")


def cache_dir(layout: Layout) -> Path:
    """DVC's cache, which may lie outside the workspace."""
    return Path(dvc_setting(layout, "cache", "dir") or layout.root / ".dvc" / "cache")


def dvc_setting(layout: Layout, section: str, key: str) -> str | None:
    """What `dvc config SECTION.KEY` tells, a path in full, without the start of another Python.

    Raises:
        WorkspaceError: If DVC's settings cannot be read.
    """
    try:
        value = _dvc_config(layout)[section].get(key)
    except Exception as error:  # ConfigError, and whatever its parsers raise at a file that is none
        raise WorkspaceError(f"DVC's settings in {layout.root / '.dvc'} cannot be read: {error}") from error
    return None if value is None else str(value)


def set_dvc_remote(layout: Layout, name: str, url: str) -> None:
    """Sets where a remote of this checkout lies, in its local settings; in .dvc/config a path is relative to it."""
    with _dvc_config(layout).edit("local") as settings:
        settings["remote"] = {**settings.get("remote", {})}
        settings["remote"][name] = {**settings["remote"].get(name, {}), "url": url}


def remote_url(layout: Layout, name: str) -> str:
    """Where a remote lies, a path in full."""
    return str(_dvc_config(layout)["remote"][name]["url"])


def set_dvc_cache(layout: Layout, folder: Path, *, link: str | None = None) -> None:
    """Sets where this checkout keeps DVC's cache, and how files are linked to it, in its local settings."""
    with _dvc_config(layout).edit("local") as settings:
        settings["cache"] = {**settings.get("cache", {}), "dir": str(folder.resolve())}
        if link is not None:
            settings["cache"]["type"] = link


def _dvc_config(layout: Layout) -> Any:
    from dvc.config import Config  # here: half of what starts this command has no question of this kind

    return Config(str(layout.root / ".dvc"))


def missing_in_remote(layout: Layout, *targets: str) -> list[str]:
    """Files, by their path in the workspace, that the default remote lacks, each looked for.

    `dvc status --cloud` will not do: it believes the listing of a version and misses files that the remote has lost.

    Args:
        layout: The workspace.
        targets: What of it; all that raw.dvc and dvc.lock name where there are none.

    Raises:
        WorkspaceError: If the remote does not answer.
    """
    told = json.loads(dvc(layout, "data", "status", "--not-in-remote", "--granular", "--json", *targets) or "{}")
    return list(told.get("not_in_remote", []))


@dataclass(frozen=True)
class Upstream:
    """Where a branch is pushed to.

    Args:
        remote: Name of the git remote.
        ref: Branch there, in full.
    """

    remote: str
    ref: str

    @property
    def name(self) -> str:
        return f"{self.remote}/{self.ref.removeprefix('refs/heads/')}"


def upstream(layout: Layout) -> Upstream | None:
    """Where the current branch is pushed to; None where it has no upstream, or no branch is checked out."""
    try:
        branch = git(layout, "symbolic-ref", "--short", "HEAD")
        remote, ref = (git(layout, "config", f"branch.{branch}.{key}") for key in ("remote", "merge"))
    except WorkspaceError:
        return None
    return Upstream(remote, ref)


def data_changed(layout: Layout) -> bool:
    """Whether data/raw.dvc names other data than index_images has read: seen at once, where DVC takes two seconds."""
    if is_torn(layout) or not layout.dvc_lock.is_file():
        return False
    stages = YAML(typ="safe").load(layout.dvc_lock.read_bytes())["stages"]
    raw = layout.raw.relative_to(layout.root).as_posix()
    deps = stages.get("index_images", {}).get("deps", ())
    return any(dep["path"] == raw and dep.get("md5") != data_version(layout) for dep in deps)


def stale_stages(layout: Layout) -> dict[str, list[str]]:
    """The stages that a retrain would run, each with the reasons, in order; empty when nothing changed.

    A stage that only waits for an earlier one has the reason that an earlier one runs.
    """
    if is_torn(layout):
        with exclusive(layout, "status"):
            pass  # mended now, or busy writing
    return out_of_date(layout)


def out_of_date(layout: Layout) -> dict[str, list[str]]:
    """The same, for whoever holds the workspace's lock."""
    told: dict[str, Any] = json.loads(dvc(layout, "status", "--json") or "{}")
    reasons = {name: _reasons(changes) for name, changes in told.items() if not name.endswith(".dvc")}
    if any(name.endswith(".dvc") for name in told):
        reasons.setdefault("index_images", ["data/raw was changed since `dvc add`"])
    stages = read_stages(layout.pipeline)
    return {name: reasons.get(name, ["an earlier stage runs"]) for name in downstream(stages, set(reasons))}


def _reasons(changes: list[Any]) -> list[str]:
    """DVC's nested status of one stage as sentences."""
    sentences = []
    for change in changes:
        if isinstance(change, str):
            sentences.append(change)
            continue
        for where, what in change.items():
            for path, state in what.items():
                keys = ", ".join(state) if isinstance(state, dict) else state
                sentences.append(f"{path}: {keys}" + (" (output)" if where == "changed outs" else ""))
    return sentences


def reproduce(layout: Layout, stage: str, *, timeout_s: float) -> StageRun:
    """Brings one stage up to date through DVC and logs what it prints as it comes.

    Raises:
        StageError: If the stage stopped; the message is the stage's own.
    """
    start = time.perf_counter()
    lines = _stream(layout, stage, ["dvc", "--wait-for-lock", "repro", "--single-item", stage], timeout_s)
    outcome: Literal["ran", "up to date", "restored"] = "ran"
    if any("didn't change, skipping" in line for line in lines):
        outcome = "up to date"
    elif any("is cached - skipping run" in line for line in lines):
        outcome = "restored"
    keep_lock(layout)
    return StageRun(stage, outcome, time.perf_counter() - start)


def run_recipe(layout: Layout, recipe: str, *, timeout_s: float) -> None:
    """Runs a module of tasks that is no stage of the pipeline, and logs what it prints as it comes.

    Raises:
        StageError: If it stopped; the message is its own.
    """
    _stream(layout, recipe, ["tasks", recipe], timeout_s)


def run_experiment(layout: Layout, name: str, changes: Mapping[str, str], *, timeout_s: float) -> None:
    """Runs the pipeline with changed params as a DVC experiment, in the workspace, and logs what it prints.

    Args:
        layout: The workspace; its params.yaml and outputs are then those of the experiment.
        name: Of the experiment; there must be none yet.
        changes: Values by key of params.yaml.
        timeout_s: After so long it is stopped.

    Raises:
        StageError: If a stage stopped; the message is its own.
        KeyboardInterrupt: If one was interrupted.
    """
    words = [word for key, value in changes.items() for word in ("--set-param", f"{key}={value}")]
    _stream(layout, name, ["dvc", "exp", "run", "--name", name, *words], timeout_s)


def run_part(layout: Layout, index: int, count: int, *, timeout_s: float) -> None:
    """Runs the index-th of count parts of cache_features, and logs what it prints as it comes.

    Raises:
        StageError: If it stopped; the message is its own.
        KeyboardInterrupt: If it was interrupted.
    """
    _stream(layout, "cache_features", ["tasks", "cache_features", "--part", f"{index}/{count}"], timeout_s)


def _stream(layout: Layout, name: str, module: list[str], timeout_s: float) -> list[str]:
    """Runs ``python -m MODULE...``, logs its lines and gives the last of them.

    The child inherits the workspace's lock: while it lives, the workspace is busy, whatever became of this process.
    """
    start = time.perf_counter()
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    with subprocess.Popen(
        _python(*module),
        cwd=layout.root,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        close_fds=False,
        env=environment(),
    ) as process:
        watchdog = threading.Timer(timeout_s, process.terminate)
        watchdog.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                text = line.rstrip()
                tail.append(text)
                if not DVC_CHATTER.match(text):
                    logger.info("%s", text)
            process.wait()
        except BaseException:
            process.terminate()
            raise
        finally:
            watchdog.cancel()
    if process.returncode != 0:
        timed_out = time.perf_counter() - start >= timeout_s
        error = _stage_error(name, list(tail), process.returncode, timed_out, timeout_s)
        # A Ctrl-C is for all of them; this process's own may have been lost in a callback.
        if error.exit_code in INTERRUPTED_CODES:
            raise KeyboardInterrupt from error
        raise error
    return list(tail)


def _stage_error(stage: str, tail: list[str], returncode: int, timed_out: bool, timeout_s: float) -> StageError:
    """What the stage said, without DVC's words around it."""
    text = "\n".join(tail)
    if timed_out:
        return StageError(
            f"{stage} was stopped after {timeout_s:.0f} s. What it did is kept; run it again to go on.", 124
        )
    found = re.search(r"exited with (-?\d+)", text)
    exit_code = int(found.group(1)) if found else returncode
    if "is busy" in text or "Unable to acquire lock" in text:
        return StageError(
            f"{stage}: DVC is busy in this workspace: another dvc command runs. Wait until it has ended.", 1
        )
    starts = [number for number, line in enumerate(tail) if line.startswith(f"{stage}: ")]
    said = tail[starts[-1] :] if starts and exit_code in (1, TEMPORARY_FAILURE) else tail
    message = "\n".join(line for line in said if not DVC_CHATTER.match(line)).strip() or text
    number = exit_code - 128 if exit_code > 128 else -exit_code  # as a shell tells of a signal, and as Python does
    if number == signal.SIGKILL:
        message += f"\n{stage} was killed. Where nobody did that, memory ran out: the system's log says so."
    elif number in set(signal.Signals):
        message += f"\n{stage} was ended by {signal.Signals(number).name}."
    return StageError(message, exit_code)


def lineage(layout: Layout) -> dict[str, Any]:
    """Where the workspace stands: git commit, what is not committed, DVC's hash of every output, what names them."""
    changed = [line.split(maxsplit=1)[1] for line in git(layout, "status", "--porcelain").splitlines()]
    pointers = (layout.dvc_lock, layout.raw_pointer, layout.params)
    return {
        "git_commit": _head(layout),
        "git_uncommitted": changed[:MAX_TOLD],
        "data_version": data_version(layout),
        "dvc_outputs": _locked_outputs(layout),
        "pointers": {
            str(file.relative_to(layout.root)): file.read_text(encoding="utf-8") for file in pointers if file.is_file()
        },
    }


def _head(layout: Layout) -> str | None:
    try:
        return git(layout, "rev-parse", "HEAD")
    except WorkspaceError:
        return None  # a repository without a commit


def data_version(layout: Layout) -> str | None:
    """DVC's hash of data/raw, or None before the first `dvc add`."""
    if not layout.raw_pointer.is_file():
        return None
    pointer = YAML(typ="safe", pure=True).load(layout.raw_pointer.read_text(encoding="utf-8"))
    return str(pointer["outs"][0]["md5"])


def _locked_outputs(layout: Layout) -> dict[str, str]:
    if not layout.dvc_lock.is_file():
        return {}
    stages = YAML(typ="safe", pure=True).load(layout.dvc_lock.read_text(encoding="utf-8"))["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", ())}
