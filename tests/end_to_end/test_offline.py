"""Nobody is called unless asked, and no secret turns up: of the retrain that all workers of a run share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flows.sources import open_source
from tasks.errors import DataError, ParamsError
from tasks.params import load_params
from tests.conftest import CANARY, REPOSITORY, Workspace

HOST = "192.0.2.1"  # of nobody (RFC 5737)


def test_a_retrain_asks_nobody_but_this_machine(lived_in: Workspace, first_retrain: dict) -> None:
    """Prefect, DVC, Great Expectations and torch included; tests/offline/sitecustomize.py was in every process."""
    assert first_retrain["champion"]["id"] == 1
    asked = lived_in.network_log.read_text() if lived_in.network_log.exists() else ""
    assert asked == ""


def test_the_guard_sees_and_refuses_who_does_ask(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace", tmp_path / "prefect")
    workspace.root.mkdir()
    ask = f"import urllib.request; urllib.request.urlopen('http://{HOST}/', timeout=5)"
    child = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {ask!r}]).returncode)"
    run = workspace.run(sys.executable, "-c", child, check=False)
    assert run.returncode == 1
    assert "no network in tests" in run.stderr
    assert HOST in workspace.network_log.read_text()
    workspace.run(sys.executable, "-c", "import socket; socket.create_server(('127.0.0.1', 0))")


def test_no_secret_of_the_environment_turns_up_anywhere(lived_in: Workspace, first_retrain: dict) -> None:
    folders = (lived_in.root, lived_in.prefect_home)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 100
    leaks = [path for path in files if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert leaks == []


def test_onnxruntime_collects_nothing(tmp_path: Path) -> None:
    """It would leave an identifier in the home folder, and send it."""
    program = (
        "from tests.deploy.tiny_bundle import *\nfrom pathlib import Path\nfrom deploy.predictor import Predictor\n"
        "with Predictor(write_colour_bundle(Path('bundle'))) as it: it.predict([colour_image('blau')])\n"
    )
    home = tmp_path / "home"
    home.mkdir()
    hidden = ("CI", "ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "GITHUB_ACTIONS", "PYTEST_CURRENT_TEST")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    environment |= {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    assert list(home.rglob("*onnxruntime*")) == []


def test_an_address_with_a_password_is_refused_and_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="password") as told:
        open_source("ssh://me:hunter2@host/photos")
    assert "hunter2" not in str(told.value)
    params = (REPOSITORY / "params.yaml").read_text()
    line = next(line for line in params.splitlines() if line.startswith("  source: embedded:"))
    (tmp_path / "params.yaml").write_text(params.replace(line, "  source: https://me:hunter2@host/weights"))
    with pytest.raises(ParamsError, match="password") as told_too:
        load_params(tmp_path / "params.yaml")
    assert "hunter2" not in str(told_too.value)
