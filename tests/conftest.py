"""What all tests share."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings

from tests.awkward import make_awkward

# How long an example takes says how busy the machine is.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before anything imports onnxruntime

# Several workers share the cores: torch's threads must wait for each other asleep, not spinning.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

IMAGES_PER_CLASS = 40
CANARY = "-".join(("canary", "7f3c1a"))  # in secrets of the environment: must turn up nowhere, nor here
CANARIES = {"HF_TOKEN": f"hf_{CANARY}", "TANUKI_NOTIFY": f"https://hooks.example.invalid/{CANARY}"}
REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.hookimpl(trylast=True)  # after those that are not asked for have gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One file makes the first retrain, the others that need it come last: no worker waits while it is made."""
    files = list(dict.fromkeys(item.path for item in items if "first_retrain" in getattr(item, "fixturenames", ())))
    makes_it = next((file for file in files if file.name == "test_retrain.py"), files[0] if files else None)
    items.sort(key=lambda item: item.path in files and item.path != makes_it)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def material() -> Path:
    """Real weights, photo sets and broken images: $TANUKI_MATERIAL, or ../shared/material."""
    folder = Path(os.environ.get("TANUKI_MATERIAL", REPOSITORY.parent / "shared" / "material"))
    if not folder.is_dir():
        pytest.skip(f"no test material at {folder}: set TANUKI_MATERIAL")
    return folder.resolve()


@dataclass(frozen=True)
class Workspace:
    """A fresh clone of this repository, as it is in the working tree, that tests may do anything to."""

    root: Path
    prefect_home: Path

    @property
    def network_log(self) -> Path:
        """Written to by whoever asks for anything but loopback (tests/offline/sitecustomize.py)."""
        return self.root.parent / f"{self.root.name}-network.log"

    def run(self, *command: str | Path, check: bool = True, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
        run = subprocess.run(
            [str(word) for word in command],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check:
            assert run.returncode == 0, f"{command} ended with {run.returncode}\n{run.stdout}\n{run.stderr}"
        return run

    def start(self, *command: str) -> subprocess.Popen[str]:
        """The same without waiting, in a process group of its own, as a terminal would start it."""
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def tanuki(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "flows.cli", *arguments, check=check)

    def dvc(self, *arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", "dvc", *arguments, check=check)

    @property
    def environment(self) -> dict[str, str]:
        scripts = str(Path(sys.executable).parent)
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
            "PATH": scripts + os.pathsep + os.environ["PATH"],
            "PREFECT_HOME": str(self.prefect_home),
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "1",
            "COLUMNS": "200",
            "PYTHONPATH": str(REPOSITORY / "tests" / "offline"),
            "TANUKI_TEST_NETWORK_LOG": str(self.network_log),
            **CANARIES,
            "GIT_AUTHOR_NAME": "Test",
            "GIT_AUTHOR_EMAIL": "test@example.org",
            "GIT_COMMITTER_NAME": "Test",
            "GIT_COMMITTER_EMAIL": "test@example.org",
        }

    def set_param(self, key: str, value: object) -> None:
        """Changes one number of params.yaml, as a person would in an editor."""
        from ruamel.yaml import YAML

        yaml = YAML()
        path = self.root / "params.yaml"
        params = yaml.load(path)
        *sections, name = key.split(".")
        target = params
        for section in sections:
            target = target[section]
        target[name] = value
        yaml.dump(params, path)


def wait_for(word: str, process: subprocess.Popen[str]) -> None:
    """Reads what a process says, up to the line with that word."""
    assert process.stdout is not None
    told = []
    for line in process.stdout:
        told.append(line)
        if word in line:
            return
    raise AssertionError(f"{process.args} ended with {process.wait()} and never said {word!r}:\n{''.join(told)}")


def clone(folder: Path, prefect_home: Path) -> Workspace:
    """Lays the working tree's files out in a git repository of their own, with a first commit.

    Without what a retrain in this tree has left there: whoever typed `make retrain` first gets the same tests.
    """
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in set(filter(None, listed.split("\0"))) - {"dvc.lock", "data/raw.dvc"}:
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, folder / name)
    workspace = Workspace(folder, prefect_home)
    workspace.run("git", "init", "--quiet", "--initial-branch", "main")
    workspace.run("git", "add", "--all")
    workspace.run("git", "commit", "--quiet", "--message", "Start")
    return workspace


@pytest.fixture(scope="session")
def prefect_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture
def workspace(tmp_path: Path, prefect_home: Path) -> Workspace:
    return clone(tmp_path / "workspace", prefect_home)


def write_digits(folder: Path, start: int, stop: int, *, names: Mapping[str, str] | None = None) -> int:
    """The sample's digits from ``start`` to ``stop`` of each class, a folder a class; returns how many."""
    from flows.sample import sample_images

    seen: Counter[str] = Counter()
    written = 0
    for name, data in sample_images().items():
        label = Path(name).parts[0]
        if start <= seen[label] < stop:
            path = folder / (names or {}).get(label, label) / Path(name).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            written += 1
        seen[label] += 1
    return written


def make_quick(workspace: Workspace) -> None:
    """Fewer rounds than the defaults: these tests ask whether it works, not how well."""
    workspace.set_param("finetune.epochs", 1)
    workspace.set_param("finetune.min_val_images", 20)
    workspace.set_param("finetune.views", 1)
    workspace.set_param("train_head.num_c", 5)


def prepared(root: Path, prefect_home: Path, digits: Path, *, awkward: bool = False) -> Workspace:
    workspace = clone(root, prefect_home)
    make_quick(workspace)
    workspace.tanuki("add", digits)
    if awkward:
        make_awkward(workspace.root / "data" / "raw")
    workspace.run("git", "add", "--all")
    workspace.run("git", "commit", "--quiet", "--message", "Digits")
    return workspace


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 handwritten digits, a folder a class."""
    folder = tmp_path_factory.mktemp("digits")
    write_digits(folder, 0, IMAGES_PER_CLASS)
    return folder


@pytest.fixture(scope="session")
def lived_in(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Workspace:
    """Digits, odd labels and broken files: one workspace for all workers of a run; test_retrain.py lives in it."""
    root = shared_folder(tmp_path_factory) / "lived_in" / "work space"
    prefect_home = root.parent / "prefect"
    with alone(root.parent):
        if not (root / "data" / "raw.dvc").is_file():
            return prepared(root, prefect_home, digits, awkward=True)
    return Workspace(root, prefect_home)


@pytest.fixture(scope="session")
def first_retrain(lived_in: Workspace) -> dict:
    """The summary of the first retrain in ``lived_in``; its bundle is version 1 of the registry, for good.

    Done by somebody whom git does not know.
    """
    told = lived_in.root.parent / "first_retrain.json"
    with alone(told.parent):
        if not told.is_file():
            run = retrain_unknown(lived_in, "--json")
            assert run.returncode == 0, run.stdout + run.stderr
            shutil.copytree(lived_in.root, told.with_suffix(""), symlinks=True)  # the tests that live in it go on
            told.write_text(run.stdout)
    return json.loads(told.read_text())


@pytest.fixture(scope="session")
def retrained(lived_in: Workspace, first_retrain: dict) -> Path:
    """A copy of ``lived_in`` as its first retrain left it."""
    return lived_in.root.parent / "first_retrain"


def retrain_unknown(workspace: Workspace, *options: str) -> subprocess.CompletedProcess[str]:
    """A retrain by somebody whom git does not know."""
    identity = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
    environment = {name: value for name, value in workspace.environment.items() if name not in identity}
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", "retrain", *options],
        cwd=workspace.root,
        env={**environment, "HOME": str(workspace.root.parent), "GIT_CONFIG_NOSYSTEM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def locked_outputs(lock: Path) -> dict[str, str]:
    """DVC's hash of every output of every stage, from a dvc.lock."""
    from ruamel.yaml import YAML

    stages = YAML(typ="safe").load(lock)["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run see."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps the other workers of this run out."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
