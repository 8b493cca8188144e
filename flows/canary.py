"""The flow `canary`: would the newest versions of what we build on still work? It only reports.

In a scratch environment of its own and a scratch copy of the workspace, it installs the newest versions that
pyproject.toml allows (or all newest ones, upper bounds or not), retrains the sample there without promoting, and says
which versions moved and whether that worked. Needs a package index; nothing that anybody uses is touched.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.clones import scratch_copy, take_snapshot
from flows.run_log import told
from flows.up.settings import MARK
from flows.workspace import WorkspaceError, environment, exclusive, find_workspace
from tasks.layout import Layout

INSTALL_TIMEOUT_S, CHECK_TIMEOUT_S = 1800.0, 3600.0
PATIENCE_S = 300.0
EXTRAS = ("serve", "grpc", "capture", "train", "flows", "sign")
CHECK = ("-m", "flows.cli", "retrain", "--sample", "--no-promote", "--json")
NUM_LINES = 20
PINNED = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.M)
NAME = re.compile(r"^[A-Za-z0-9._-]+")

logger = logging.getLogger("flows.canary")  # Prefect loads this file under another name


@flow(name="canary", flow_run_name="canary", persist_result=False, validate_parameters=False)
def canary(
    root: str = ".", beyond_bounds: bool = False, extras: Sequence[str] = EXTRAS, check: Sequence[str] = CHECK
) -> State[Any]:
    """Tries the newest dependencies in a scratch environment.

    Args:
        root: The workspace.
        beyond_bounds: Whether upper bounds in pyproject.toml are left out, to see which could be lifted.
        extras: Which of pyproject.toml's to install.
        check: What must work there: arguments of Python, said in a scratch copy of the workspace.
    """
    return told(lambda: _canary(find_workspace(Path(root)), beyond_bounds, extras, check))


def _canary(layout: Layout, beyond_bounds: bool, extras: Sequence[str], check: Sequence[str]) -> State[Any]:
    scratch = layout.operations_dir / "canary"
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        copy = Layout(scratch / "workspace")
        with exclusive(layout, "canary", wait_s=PATIENCE_S):
            snapshot = take_snapshot(layout)
        scratch_copy(layout, copy, snapshot)
        python = scratch / "venv" / "bin" / "python"
        failure = install(copy, python, beyond_bounds, extras) or try_out(copy, python, check)
        moved = changes(_pins(layout), _installed(copy, python) if python.is_file() else {})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    create_markdown_artifact(_report(moved, failure), key="canary", description="What the newest versions do")
    gist = f"{len(moved)} packages are newer than in requirements.lock"
    if failure is None:
        return Completed(name="Newest works", message=f"{gist}, and all works with them.")
    return Completed(name="Newest breaks", message=f"{gist}. {failure}")


@task(name="install", task_run_name="install", cache_policy=NO_CACHE, persist_result=False)
def install(copy: Layout, python: Path, beyond_bounds: bool, extras: Sequence[str]) -> str | None:
    """Makes the environment; what went wrong, None where nothing did."""
    overrides = copy.root.parent / "overrides.txt"
    overrides.write_text("".join(f"{name}\n" for name in bounded(copy.root / "pyproject.toml")), encoding="utf-8")
    options = ["--override", str(overrides)] if beyond_bounds else []
    commands = (
        ["venv", "--quiet", "--python", sys.executable, str(python.parents[1])],
        ["pip", "install", "--quiet", "--python", str(python), *options, "--editable", f".[{','.join(extras)}]"],
    )
    for command in commands:
        if said := _fails(copy, [_uv(), *command], INSTALL_TIMEOUT_S):
            return f"They cannot be installed: {said}"
    return None


@task(name="try", task_run_name="try", cache_policy=NO_CACHE, persist_result=False)
def try_out(copy: Layout, python: Path, check: Sequence[str]) -> str | None:
    """Runs the check in the environment; what went wrong, None where nothing did."""
    copy.prefect_home.mkdir(parents=True, exist_ok=True)  # Prefect makes no folders above its own
    said = _fails(copy, [str(python), *check], CHECK_TIMEOUT_S)
    return said and f"`python {' '.join(check)}` fails with them: {said}"


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """Name, old and new version of each package that is in both and moved."""
    return sorted(
        (name, before[name], after[name]) for name in before.keys() & after.keys() if before[name] != after[name]
    )


def bounded(pyproject: Path) -> Iterator[str]:
    """The dependencies that have an upper bound, extras' included, without it."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in sorted({each for group in groups for each in group}):
        if "<" in requirement and (found := NAME.match(requirement)):
            yield found[0]


def _report(moved: Sequence[tuple[str, str, str]], failure: str | None) -> str:
    rows = [f"| {name} | {old} | {new} |" for name, old, new in moved]
    verdict = "All works with the newest versions." if failure is None else f"```\n{failure}\n```"
    return "\n".join([verdict, "", "| package | locked | newest |", "|---|---|---|", *rows])


def _pins(layout: Layout) -> dict[str, str]:
    return dict(PINNED.findall((layout.root / "requirements.lock").read_text(encoding="utf-8")))


def _installed(copy: Layout, python: Path) -> dict[str, str]:
    run = _run(copy, [_uv(), "pip", "list", "--format", "json", "--python", str(python)], INSTALL_TIMEOUT_S)
    return {each["name"]: each["version"] for each in json.loads(run.stdout)}


def _fails(copy: Layout, command: Sequence[str], timeout_s: float) -> str | None:
    """The last lines of a command that failed."""
    try:
        run = _run(copy, command, timeout_s)
    except subprocess.TimeoutExpired:
        return f"stopped after {timeout_s:.0f} s"
    if run.returncode == 0:
        return None
    lines = [line for line in (run.stdout + run.stderr).splitlines() if line.strip()]
    return "\n".join(lines[-NUM_LINES:]) or f"exit code {run.returncode}"


def _run(copy: Layout, command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """In the scratch copy, and with a Prefect server of its own."""
    apart = {  # and nothing of where this workspace, its registry or its key lie
        name: value
        for name, value in environment().items()
        if name == MARK or not name.startswith(("PREFECT_", "TANUKI_"))
    }
    apart["PREFECT_HOME"] = str(copy.prefect_home)
    apart["PATH"] = os.pathsep.join((str(Path(command[0]).parent), apart["PATH"]))
    return subprocess.run(
        list(command), cwd=copy.root, env=apart, capture_output=True, text=True, timeout=timeout_s, check=False
    )


def _uv() -> str:
    beside = Path(sys.executable).parent / "uv"
    found = str(beside) if beside.is_file() else shutil.which("uv")
    if found is None:
        raise WorkspaceError("uv is not installed, and the canary installs with it. Run `make setup`.")
    return found
