"""What `tanuki doctor` looks at, each finding with what to do. It changes nothing."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.version import Version

from deploy.errors import TanukiError
from deploy.machine import available_cores
from flows.registries import registry_of
from flows.workspace import WorkspaceError, default_remote, environment, find_workspace, missing_in_remote
from tasks.layout import Layout
from tasks.params import load_params

MIN_FREE_GB = 5.0
GB = 1e9

KNOWN_CLASHES = (
    # package, first version that breaks, what breaks
    ("fastapi", "0.151", "prefect 3.8's server refuses with it what its own client sends (nulls)"),
    ("sqlalchemy", "2.1", "the scheduler of prefect 3.8's server fails with it"),
    ("prefect", "3.9", "it wants a certifi that is not released"),
)
SIMD = {"avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI (int8)", "avx512_bf16": "bf16", "amx_bf16": "AMX"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        subject: What.
        level: "problem" stops work, "warning" may.
        text: What was found, and what to do where it is not well.
    """

    subject: str
    level: Literal["ok", "warning", "problem"]
    text: str


def examine(start: Path) -> list[Finding]:
    """Looks at the machine, the environment and the workspace at or above a folder."""
    found = [_python(), *_packages(), *_git(start), _processor()]
    try:
        layout = find_workspace(start)
    except TanukiError as error:
        return [*found, Finding("workspace", "problem", str(error))]
    return [*found, _disk(layout), _params(layout), _dvc(layout), _registry(layout), _prefect()]


def _registry(layout: Layout) -> Finding:
    """Whether it can be read, and what it holds."""
    try:
        registry = registry_of(layout)
        champion, number = registry.champion(), len(registry.versions())
    except TanukiError as error:
        return Finding("registry", "problem", str(error))
    now = f"version {champion.id} is champion" if champion else "no champion yet"
    return Finding("registry", "ok", f"{registry.place}: {number} versions, {now}")


def _python() -> Finding:
    version = platform.python_version()
    if (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Finding("Python", "ok", f"{version} at {sys.executable}")
    return Finding("Python", "problem", f"{version}: tanuki needs 3.11 to 3.13. Run `make setup PYTHON=python3.12`.")


def _packages() -> Iterator[Finding]:
    """Against what pyproject.toml asks for, and what is known to break."""
    for package, bad, why in KNOWN_CLASHES:
        version = _installed(package)
        if version is not None and Version(version) >= Version(bad):
            yield Finding("packages", "problem", f"{package} {version}: {why}. Run `make setup`.")
    torch, vision = _installed("torch"), _installed("torchvision")
    if torch is not None and vision is not None and "+cpu" in torch and "+cpu" not in vision:
        yield Finding(
            "packages",
            "problem",
            f"torch {torch} with torchvision {vision}: of two builds. Remove .venv and run `make setup`.",
        )
    names = ("torch", "torchvision", "onnx", "onnxruntime", "great-expectations", "dvc", "prefect")
    missing = [name for name in names if _installed(name) is None]
    if missing:
        yield Finding("packages", "problem", f"not installed: {', '.join(missing)}. Run `make setup`.")
    present = ", ".join(f"{name} {_installed(name)}" for name in names if name not in missing)
    yield Finding("packages", "ok", present)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(start: Path) -> Iterator[Finding]:
    if shutil.which("git") is None:
        yield Finding("git", "problem", "not installed. Install it with your system's package manager.")
        return
    yield Finding("git", "ok", _says("git", "--version"))
    name, mail = (_says("git", "-C", str(start), "config", key) for key in ("user.name", "user.email"))
    if name and mail:
        yield Finding("git identity", "ok", f"{name} <{mail}>")
    else:
        yield Finding(
            "git identity",
            "warning",
            "none, so you cannot commit data versions. "
            "Run `git config --global user.name 'You' && git config --global user.email you@example.org`.",
        )


def _says(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    return run.stdout.strip() if run.returncode == 0 else ""


def _processor() -> Finding:
    cores = available_cores()
    flags = _cpu_flags()
    features = ", ".join(name for flag, name in SIMD.items() if flag in flags) or "no SIMD extension recognised"
    return Finding("processor", "ok", f"{cores} core(s) for this process, {features}")


def _cpu_flags() -> set[str]:
    try:
        return set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M).group(1).split())  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return set()


def _disk(layout: Layout) -> Finding:
    free_gb = shutil.disk_usage(layout.root).free / GB
    if free_gb < MIN_FREE_GB:
        return Finding(
            "disk", "warning", f"{free_gb:.1f} GB free at {layout.root}; DVC keeps a copy of data and models."
        )
    return Finding("disk", "ok", f"{free_gb:.0f} GB free")


def _params(layout: Layout) -> Finding:
    try:
        params = load_params(layout.params)
    except TanukiError as error:
        return Finding("params.yaml", "problem", str(error))
    return Finding("params.yaml", "ok", f"backbone {params.backbone.source}")


def _dvc(layout: Layout) -> Finding:
    """The default remote: there, and willing to say what it has of data/raw."""
    try:
        remote = default_remote(layout)
    except WorkspaceError as error:
        return Finding("DVC remote", "problem", f"{error} Mend it, or restore .dvc/config from git.")
    if remote is None:
        return Finding(
            "DVC remote",
            "warning",
            "no default, so data versions live on this disk only. Run `dvc remote add -d NAME URL` and `dvc push`.",
        )
    if not layout.raw_pointer.is_file():
        return Finding("DVC remote", "ok", f"{remote}; not asked, for there is no data yet")
    try:
        missing = missing_in_remote(layout, str(layout.raw.relative_to(layout.root)))
    except WorkspaceError as error:
        return Finding(
            "DVC remote",
            "warning",
            f"{remote} does not answer: {error} Look at `dvc remote list`, at your rights and at the network; ssh:// "
            "and s3:// need the packages dvc-ssh and dvc-s3.",
        )
    if missing:
        return Finding("DVC remote", "warning", f"{remote} lacks {len(missing):,} files of data/raw. Run `dvc push`.")
    return Finding("DVC remote", "ok", f"{remote} answers and has all of data/raw")


def _prefect() -> Finding:
    url = os.environ.get("PREFECT_API_URL")
    where = (
        f"server at {url}"
        if url
        else "no server set: each run starts a temporary one (`prefect server start` keeps one)"
    )
    return Finding("Prefect", "ok", where)
