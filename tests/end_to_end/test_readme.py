"""The README's commands, typed in order by somebody with a folder of photos; then the backbone that `pretrain` made."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Workspace, clone, make_quick, write_digits
from tests.end_to_end.test_remotes import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SETS_UP = re.compile(r"git clone|make |\. \.venv")  # what the fixture stands for
PHOTOS = {"3": "three", "8": "eight"}


def commands_of(readme: Path, kind: str = "sh") -> list[str]:
    """Every line of the README's blocks of a kind, comments cut off."""
    blocks = re.findall(rf"```{kind}\n(.*?)```", readme.read_text(encoding="utf-8"), re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Workspace:
    """A clone after `make retrain`, with ~/photos beside it and some.jpg in it."""
    home = tmp_path_factory.mktemp("home")
    workspace = clone(home / "tanuki", prefect_home)
    make_quick(workspace)
    for key, value in {"source": "glyphs", "max_characters": 40, "num_invented": 0, "size_px": 32}.items():
        workspace.set_param(f"pretrain.{key}", value)
    for key, value in {"epochs": 1, "images_per_epoch": 512, "batch_size": 64}.items():
        workspace.set_param(f"pretrain.{key}", value)
    write_digits(home / "digits", 0, 70)
    for digit, label in PHOTOS.items():
        for place, file in enumerate(sorted((home / "digits" / digit).iterdir())):
            goal = home / ("photos" if place < 60 else "inbox") / label / f"{place:04d}.png"
            goal.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, goal)
    shutil.copy(next((home / "digits" / "3").iterdir()), workspace.root / "some.jpg")
    (workspace.root / ".git" / "info" / "exclude").write_text("some.jpg\n")
    workspace.tanuki("retrain", "--sample")
    return workspace


def test_every_command_of_the_readme_runs_in_its_order(newcomer: Workspace, repository: Path) -> None:
    tanuki = f'tanuki() {{ python -m flows.cli "$@"; }}; HOME={newcomer.root.parent}'
    commands = [line for line in commands_of(repository / "README.md") if not SETS_UP.match(line)]
    assert len(commands) > 10
    for command in commands:
        newcomer.run("bash", "-c", f"{tanuki}\n{command}")
    history = json.loads(newcomer.tanuki("versions", "--json").stdout)
    assert [row["champion"] for row in history][:2] == [True, False]  # promoted 2, then rolled back to 1


def test_what_pretrain_made_is_a_backbone(newcomer: Workspace) -> None:
    card = json.loads((newcomer.root / "data" / "pretrained" / "weights.json").read_text())
    newcomer.set_param("backbone.source", "file:data/pretrained/weights.safetensors")
    newcomer.tanuki("retrain")
    backbone = json.loads((newcomer.root / "data" / "backbone" / "backbone.json").read_text())
    assert backbone["architecture"] == card["architecture"]
    assert backbone["size_px"] == 32


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_server_answers_as_the_readme_says(newcomer: Workspace, repository: Path) -> None:
    """Its blocks of the kind shell begin with a server, which goes on while the rest is typed."""
    serve, *asked = commands_of(repository / "README.md", "shell")
    for name in ("one.jpg", "two.jpg"):
        shutil.copy(newcomer.root / "some.jpg", newcomer.root / name)
    port = free_port()
    command = [sys.executable, "-m", "flows.cli", *serve.split()[1:], "--port", str(port)]
    with subprocess.Popen(command, cwd=newcomer.root, env=newcomer.environment) as server:
        try:
            url = f"127.0.0.1:{port}"
            newcomer.run("curl", "--retry", "60", "--retry-connrefused", "--retry-delay", "1", f"{url}/v2/health/ready")
            told = [
                newcomer.run("bash", "-c", f"{line} --fail".replace("localhost:8000", url)).stdout for line in asked
            ]
        finally:
            server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert '"label"' in told[0]
    assert "tanuki_" in told[-1]
