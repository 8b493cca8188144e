"""A warm Python: one process that has libraries imported already and runs modules in forks of itself.

A small retrain is mostly Python starting and importing: DVC once a stage, and a Python a stage. While a warm process
serves, whoever finds its address in the environment hands `python -m MODULE ARGUMENTS` over to it: a fork runs the
module with the same arguments, folder, environment and open files, and its exit code comes back. Only libraries of
others are imported beforehand, so a fork runs our code as it lies on the disk, and makes the bytes that a new process
makes.
Without a warm process, or where it has gone, all runs as ever.

    python -m tasks.warm --serve SOCKET LIBRARY...     the warm process (flows/warm.py starts it); Linux only
    python -m tasks.warm MODULE ARGUMENT...            in place of `python -m MODULE ARGUMENT...`

All are in one process group and get a terminal's Ctrl-C as they always did. A fork dies with the process that asked for
it; the warm process ends when its standard input does and the last fork has ended.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

ADDRESS = "TANUKI_WARM"
"""The environment variable that names the warm process's socket."""

SIZE = struct.Struct("!I")
PID = struct.Struct("!q")
CODE = struct.Struct("!B")
FILES = (0, 1, 2)
ENDS = (signal.SIGTERM, signal.SIGHUP)
YOUNG = 50_000
"""Objects between two looks for garbage in a fork: DVC's YAML makes many and drops few, and took a third longer."""
KILLED = 128 + signal.SIGKILL


@dataclass(frozen=True)
class Request:
    """What `python -m MODULE ARGUMENTS` is to be."""

    module: str
    arguments: list[str]
    folder: str
    environment: dict[str, str]


def hand_over(module: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None) -> int | None:
    """Has a module run in the warm process and waits for its end.

    Args:
        module: As after ``python -m``.
        arguments: As after the module.
        environment: What it sees; this process's own, less the warm process's address, where that is None.

    Returns:
        Its exit code; None where no warm process has taken it, so that it is for the caller to run.
    """
    address = os.environ.get(ADDRESS)
    if not address:
        return None
    seen = environment or {name: value for name, value in os.environ.items() if name != ADDRESS}
    request = json.dumps([module, list(arguments), str(Path.cwd()), dict(seen)]).encode()
    ends = [number for number in ENDS if signal.getsignal(number) is not signal.SIG_IGN]
    forks: list[int] = []

    def end(number: int, _frame: object) -> None:
        if not forks:
            raise SystemExit(128 + number)  # if there is a fork, it ends when the connection does
        os.kill(forks[0], number)

    before = {number: signal.signal(number, end) for number in ends}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing has begun that could be told of
    with contextlib.suppress(ConnectionError, FileNotFoundError), socket.socket(socket.AF_UNIX) as host:
        host.connect(address)
        socket.send_fds(host, [SIZE.pack(len(request))], FILES)
        host.sendall(request)
        answer = _receive(host, PID.size)
        if len(answer) == PID.size:
            forks.extend(PID.unpack(answer))
            return _wait(host, forks[0])
    for number, handler in before.items():
        signal.signal(number, handler)
    return None


def _wait(host: socket.socket, pid: int) -> int:
    """The exit code of a fork."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the fork gets it too, and says what it comes to
    with contextlib.suppress(ConnectionError):
        code = _receive(host, CODE.size)
        if code:
            return int(CODE.unpack(code)[0])
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # nobody would know how it ends
    return KILLED


def _receive(sender: socket.socket, size: int) -> bytes:
    """So many bytes, or fewer where the sender has gone."""
    data = b""
    while len(data) < size and (part := sender.recv(size - len(data))):
        data += part
    return data


class Host:
    """The warm process: imports libraries one after another, and takes requests in between and afterwards."""

    def __init__(self, door: socket.socket, libraries: Iterable[str]) -> None:
        import selectors

        self.door = door
        self.waiting = deque(libraries)
        self.forks: dict[int, socket.socket] = {}
        self.is_open = True
        self.woken, self.waker = os.pipe()
        self.selector = selectors.DefaultSelector()
        for file, do in ((door, self._take), (sys.stdin, self._close), (self.woken, self._reap)):
            self.selector.register(file, selectors.EVENT_READ, do)
        self.readable = selectors.EVENT_READ

    def serve(self) -> Request | None:
        """In a fork, what it is to run; in the warm process None, at its end."""
        gc.disable()  # imports leave no garbage; looking for it takes a fifth of their time
        os.set_blocking(self.waker, False)
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while self.is_open or self.forks:
            is_idle = not (self.is_open and self.waiting)
            for key, _ in self.selector.select(None if is_idle else 0):
                if (request := key.data(key.fileobj)) is not None:
                    return request  # type: ignore[no-any-return]
            if self.is_open and self.waiting:
                with contextlib.suppress(ImportError):  # whoever needs it will say so
                    importlib.import_module(self.waiting.popleft())
        return None

    def _take(self, _door: Any) -> Request | None:
        """Forks for a request, which it gives in the fork."""
        asker, _ = self.door.accept()
        head, files, _, _ = socket.recv_fds(asker, SIZE.size, len(FILES))
        data = _receive(asker, *SIZE.unpack(head)) if len(head) == SIZE.size else b""
        if not data or len(files) != len(FILES):
            asker.close()
            return None
        request = Request(*json.loads(data))
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            self._become(files)
            return request
        for file in files:
            os.close(file)
        self.forks[pid] = asker
        with contextlib.suppress(ConnectionError):
            asker.sendall(PID.pack(pid))
        self.selector.register(asker, self.readable, lambda _asker: self._kill(pid))
        return None

    def _become(self, files: Sequence[int]) -> None:
        """Lets go of what is the warm process's, in a fork, and takes the files of who asked."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.selector.close()
        for held in (self.door, *self.forks.values()):
            held.close()
        os.close(self.woken)
        os.close(self.waker)
        for file, standard in zip(files, FILES, strict=True):
            os.dup2(file, standard)
            os.close(file)
        gc.enable()
        gc.set_threshold(YOUNG)

    def _kill(self, pid: int) -> None:
        """Who asked for it has gone."""
        if pid in self.forks:  # else it was told of a moment ago
            self.selector.unregister(self.forks[pid])
            os.kill(pid, signal.SIGKILL)

    def _reap(self, _pipe: Any) -> None:
        """Tells the exit codes of forks that have ended."""
        os.read(self.woken, 4096)
        for pid, asker in list(self.forks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                with contextlib.suppress(OSError):
                    asker.sendall(CODE.pack(code if code >= 0 else 128 - code))
                with contextlib.suppress(KeyError):
                    self.selector.unregister(asker)
                asker.close()
                del self.forks[pid]

    def _close(self, _stdin: Any) -> None:
        """Takes no more: who started this has ended."""
        self.is_open = False
        self.selector.unregister(sys.stdin)
        self.selector.unregister(self.door)
        self.door.close()


def main() -> int:
    """Serves, or runs a module in the warm process, or runs it here."""
    if sys.argv[1] != "--serve":
        module, *arguments = sys.argv[1:]
        code = hand_over(module, arguments, os.environ)
        if code is not None:
            return code
        _run(Request(module, arguments, str(Path.cwd()), dict(os.environ)))
        return 0
    told = Host(socket.socket(fileno=int(sys.argv[2])), sys.argv[3:]).serve()
    if told is not None:
        _run_and_exit(told)
    return 0


def _run_and_exit(request: Request) -> NoReturn:
    """Ends a fork as multiprocessing ends its own: threads, exit functions, streams; the rest is not taken apart.

    What is frozen would outlive the interpreter, of which nanobind's modules complain at length; to thaw it first
    costs a fork more than a second.
    """
    code = 0
    try:
        _run(request)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001 - told as Python tells it
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code & 0xFF)


def _run(request: Request) -> None:
    """What ``python -m`` does, and in its words."""
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.path[0] = request.folder
    sys.argv = [request.module, *request.arguments]
    runpy.run_module(request.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    sys.exit(main())
