"""Several processes that answer on one port: started, watched, ended, and asked what each of them knows.

Each worker is a server of its own, with its part of the threads, a listening socket of its own on the shared port
(SO_REUSEPORT: the kernel spreads connections over them) and its own watch on the registry. This one answers nothing.
It starts the first worker, and the others once that one answers, so that a mistake is told once; a worker that dies is
replaced while the others go on. On SIGTERM all drain. Should this process be killed, the workers see the socket end and
drain too.
"""

import asyncio
import itertools
import json
import logging
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deploy
from deploy.serving.listening import reserve
from deploy.serving.peers import LINE_BYTES, PATIENCE_LOOK_S, PATIENCE_S
from deploy.serving.settings import Settings

LONG_LIFE_S = 60.0  # a worker that lived so long did not die of its start
MAX_PAUSE_S = 30.0
SPARE_S = 10.0  # after a worker's own time to drain; then it is killed

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Worker:
    """A process, as the one that started it sees it."""

    number: int
    process: Process
    writer: asyncio.StreamWriter
    is_ready: asyncio.Event = field(default_factory=asyncio.Event)

    def say(self, message: dict[str, Any]) -> None:
        self.writer.write(json.dumps(message).encode() + b"\n")


class Workers:
    """The processes of one server. Make it and run it on an event loop.

    Args:
        settings: The server's.
        arguments: The command line that they came from.
        port: Of HTTP, kept for them.
        grpc_port: Of gRPC; 0 for none.
    """

    def __init__(self, settings: Settings, arguments: Sequence[str], *, port: int, grpc_port: int) -> None:
        self._settings = settings
        self._arguments = arguments
        self._ports = (str(port), str(grpc_port))
        self._alive: dict[int, _Worker] = {}
        self._tokens = itertools.count()
        self._told: dict[int, asyncio.Queue[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._over = asyncio.Event()

    async def run(self) -> int:
        """Keeps the workers going until it is told to stop.

        Returns:
            The exit code: 1 if the first worker could not start, or one had to be killed at the end.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        if not await self._first():
            return int(not self._over.is_set())
        keepers = [asyncio.create_task(self._keep(number)) for number in range(self._settings.workers)]
        await self._over.wait()
        limit_s = self._settings.notice_s + self._settings.grace_s + SPARE_S
        _, late = await asyncio.wait(keepers, timeout=limit_s)
        if late:
            logger.error("%d workers did not stop within %g s and are killed", len(late), limit_s)
            self._tell(signal.SIGKILL)
            await asyncio.wait(late)
        logger.info("all workers have stopped")
        return int(bool(late))

    async def _first(self) -> bool:
        """Starts worker 0; whether it answers."""
        first = await self._start(0)
        waits = [asyncio.ensure_future(each) for each in (first.is_ready.wait(), first.process.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        waits[0].cancel()
        return first.is_ready.is_set()

    async def _keep(self, number: int) -> None:
        """One worker's place: it is filled again whenever its process has ended."""
        pause_s, worker = 0.0, self._alive.get(number)
        while not self._over.is_set():
            born = time.monotonic()
            worker = worker or await self._start(number)
            if self._over.is_set():
                worker.process.terminate()
            code = await worker.process.wait()
            self._alive.pop(number, None)
            worker.writer.close()
            worker = None
            if self._over.is_set():
                return
            pause_s = 0.0 if time.monotonic() - born > LONG_LIFE_S else min(2 * pause_s + 0.5, MAX_PAUSE_S)
            logger.error("worker %d ended with code %d: a new one starts in %g s", number, code, pause_s)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), pause_s)

    async def _start(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "deploy.serving.worker", str(number), str(theirs.fileno()), *self._ports]
        room = str(Path(deploy.__file__).parent.parent)  # where this very code lies, whatever the working directory
        path = os.pathsep.join(filter(None, (room, os.environ.get("PYTHONPATH"))))
        process = await asyncio.create_subprocess_exec(
            *command,
            *self._arguments,
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            process_group=0,  # Ctrl-C reaches the workers through this process only, and once
        )
        theirs.close()
        reader, writer = await asyncio.open_connection(sock=ours, limit=LINE_BYTES)
        worker = self._alive[number] = _Worker(number, process, writer)
        self._do(self._listen(worker, reader))
        return worker

    def _stop(self) -> None:
        """Once: all drain. Twice: they do not wait."""
        self._over.set()
        self._tell(signal.SIGTERM)

    def _tell(self, number: signal.Signals) -> None:
        for worker in self._alive.values():
            if worker.process.returncode is None:
                worker.process.send_signal(number)

    # What one worker asks of all.

    def _do(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self, worker: _Worker, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            if "ask" in message:
                self._do(self._ask_all(worker, message["ask"], message["id"]))
            elif "token" in message:
                if waiting := self._told.get(message["token"]):
                    waiting.put_nowait(message["told"])
            else:
                worker.is_ready.set()

    async def _ask_all(self, asker: _Worker, kind: str, number: int) -> None:
        """Passes a question to every worker that answers, and the answers back; the late ones are left out."""
        asked = [worker for worker in self._alive.values() if worker.is_ready.is_set()]
        token = next(self._tokens)
        answers: list[Any] = []
        queue = self._told[token] = asyncio.Queue()
        try:
            async with asyncio.timeout(PATIENCE_LOOK_S if kind == "look" else PATIENCE_S):
                for worker in asked:
                    worker.say({"asked": kind, "token": token})
                while len(answers) < len(asked):
                    answers.append(await queue.get())
        except TimeoutError:
            logger.warning(
                "%d of %d workers did not answer in time for %s", len(asked) - len(answers), len(asked), kind
            )
        finally:
            del self._told[token]
        asker.say({"answers": answers, "id": number})


def run_workers(settings: Settings, arguments: Sequence[str]) -> int:
    """Answers with several processes until it is told to stop.

    Returns:
        The exit code.

    Raises:
        ServingError: If a port cannot be had.
    """
    kept = reserve(settings, settings.port, "--port")
    kept_for_grpc = None if settings.grpc_port is None else reserve(settings, settings.grpc_port, "--grpc-port")
    grpc_port = kept_for_grpc.getsockname()[1] if kept_for_grpc else 0

    async def run() -> int:
        return await Workers(settings, arguments, port=kept.getsockname()[1], grpc_port=grpc_port).run()

    return asyncio.run(run())
