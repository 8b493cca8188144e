"""A module that is handed over to the warm process does what `python -m` does, and ends with who asked for it."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tasks import warm
from tests.tasks.finetune_workspaces import with_cuda

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks only on Linux")

TELL = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get("WORD"), sys.stdin.read(), "fractions" in sys.modules]))
print("aside", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
LAST = """
import os, time
print(os.getpid(), flush=True)
time.sleep(120)
"""


@dataclass
class Host:
    """A warm process that has imported fractions, in a process group with all that ask it."""

    folder: Path
    process: subprocess.Popen[bytes]
    environment: dict[str, str] = field(default_factory=dict)

    def ask(self, module: str, *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tasks.warm", module, *arguments],
            cwd=cwd or self.folder,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def hang_up() -> Iterator[None]:
    """SIGHUP and Ctrl-C end processes that start now, also where the tests run under nohup or in the background."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGHUP, before[0])
    signal.signal(signal.SIGINT, before[1])


@pytest.fixture
def host(repository: Path, tmp_path: Path, hang_up: None) -> Iterator[Host]:
    (tmp_path / "tell.py").write_text(TELL)
    (tmp_path / "last.py").write_text(LAST)
    with hosting(repository, tmp_path, "no_such_library", "fractions") as host:
        yield host


@contextmanager
def hosting(repository: Path, folder: Path, *libraries: str) -> Iterator[Host]:
    environment = {**os.environ, "PYTHONPATH": str(repository), "WORD": "grüße", warm.ADDRESS: str(folder / "door")}
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(environment[warm.ADDRESS])
        door.listen()
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks.warm", "--serve", str(door.fileno()), *libraries],
            cwd=folder,
            env=environment | {"WORD": "of the host"},
            stdin=subprocess.PIPE,
            pass_fds=[door.fileno()],
        )
    yield Host(folder, process, environment)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(timeout=60)


def test_it_runs_as_python_m_does_but_warm(host: Host, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "tell.py").write_text(TELL)
    for _ in range(2):
        host.ask("tell", "0").communicate("")  # a library is imported after each
    for code, folder in ((0, tmp_path), (7, elsewhere)):
        asked = host.ask("tell", str(code), "a b", cwd=folder)
        told, aside = asked.communicate("in")
        assert asked.returncode == code
        assert told == f'[["{code}", "a b"], "{folder}", "gr\\u00fc\\u00dfe", "in", true]\n'
        assert aside == "aside\n"
    assert "No module named nothing" in host.ask("nothing").communicate()[1]


@pytest.mark.parametrize("end", ["sys.exit('no luck')", "raise ValueError('no luck')", "raise SystemExit", "pass"])
def test_it_ends_as_python_ends(host: Host, tmp_path: Path, end: str) -> None:
    code = f"import atexit, sys\natexit.register(print, 'at the end')\nprint('first', end=' ')\n{end}\n"
    (tmp_path / "ends.py").write_text(code)
    warm_end = host.ask("ends")
    told, aside = warm_end.communicate(timeout=60)
    cold = subprocess.run([sys.executable, "-m", "ends"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (warm_end.returncode, told) == (cold.returncode, cold.stdout)
    assert ("no luck" in aside) == ("no luck" in cold.stderr)
    assert aside.count("Traceback") == cold.stderr.count("Traceback")


def test_code_is_read_when_it_runs_not_before(host: Host, tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text("print(1)")
    assert host.ask("ours").communicate()[0] == "1\n"
    (tmp_path / "ours.py").write_text("print('changed')")
    assert host.ask("ours").communicate()[0] == "changed\n"


def test_without_a_warm_process_it_runs_here(host: Host) -> None:
    host.environment[warm.ADDRESS] += "-of-none"
    told, _ = host.ask("tell", "3").communicate("")
    assert told.endswith("false]\n")
    del host.environment[warm.ADDRESS]
    asked = host.ask("tell", "3")
    assert asked.communicate("")[0] == told
    assert asked.returncode == 3


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_what_ends_who_asked_ends_the_fork(host: Host, how: signal.Signals) -> None:
    asker = host.ask("last")
    pid = int(asker.stdout.readline())  # type: ignore[union-attr]
    asker.send_signal(how)
    asker.communicate(timeout=60)
    assert asker.returncode == (-how if how == signal.SIGKILL else 128 + how)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)
    assert not psutil.pid_exists(pid)


def test_the_end_of_the_warm_process_is_the_end_of_its_forks(host: Host) -> None:
    asker = host.ask("last")
    pid = int(asker.stdout.readline())  # type: ignore[union-attr]
    host.process.kill()
    asker.communicate(timeout=60)
    assert asker.returncode == warm.KILLED
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    asked = host.ask("tell", "5")  # nobody is there now: it runs all the same
    asked.communicate("")
    assert asked.returncode == 5


def test_it_outlives_who_started_it_until_its_forks_have_ended(host: Host) -> None:
    asker = host.ask("last")
    asker.stdout.readline()  # type: ignore[union-attr]
    host.process.stdin.close()  # type: ignore[union-attr]
    late = host.ask("tell", "6")
    late.communicate("")
    assert late.returncode == 6
    time.sleep(0.1)
    assert host.process.poll() is None
    asker.terminate()
    asker.communicate(timeout=60)
    assert host.process.wait(timeout=60) == 0


@with_cuda
def test_forks_use_the_gpu(repository: Path, tmp_path: Path, hang_up: None) -> None:
    """Which none can whose parent has: CUDA does not live through a fork."""
    (tmp_path / "adds.py").write_text("import torch\nprint(torch.ones(3, device='cuda').sum().item())")
    with hosting(repository, tmp_path, "torch") as host:
        for _ in range(2):
            assert host.ask("adds").communicate(timeout=120) == ("3.0\n", "")
