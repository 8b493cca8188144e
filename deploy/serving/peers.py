"""What the workers of one server ask each other, so that any of them can answer for all.

A connection goes to one worker, but metrics, statistics, "look at the registry now" and "the second version is stopped"
are about the whole server. A worker puts such a question to the process that started them all
(deploy/serving/workers.py), on a socket that only they have; that one passes it to every worker, the asking one too,
and brings all answers back. Lines of JSON:

    {"ask": kind, "id": n}         worker, to all        {"asked": kind, "token": t}      to each worker
    {"told": value, "token": t}    a worker's answer     {"answers": [...], "id": n}      to the worker that asked
    {"ready": true}                a worker that listens
"""

import asyncio
import itertools
import json
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

Kind = Literal["metrics", "statistics", "look", "comparisons", "end_second", "second_ended"]
Handlers = Mapping[Kind, Callable[[], Awaitable[Any]]]

LINE_BYTES = 1 << 26  # of all workers' metrics together
PATIENCE_S = 5.0  # for the slowest worker; a new champion that is loaded because of the question takes longer
PATIENCE_LOOK_S = 60.0

logger = logging.getLogger(__name__)


class Peers:
    """All workers of a server, one's own included, as one of them sees them. Make it and use it on the event loop.

    Args:
        end: This worker's end of the socket to the process that started it.
        handlers: What answers each kind of question here.
    """

    def __init__(self, end: socket.socket, handlers: Handlers) -> None:
        self._end = end
        self._handlers = handlers
        self._waiting: dict[int, asyncio.Future[list[Any]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()

    async def start(self) -> None:
        """Begins to answer what others ask, and tells that this worker listens."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._end, limit=LINE_BYTES)
        self._keep(self._listen())
        self._say({"ready": True})

    async def ask(self, kind: Kind) -> list[Any]:
        """The answers of all workers that gave one in time."""
        number = next(self._numbers)  # never again: an answer may come after its asker has left
        self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            self._say({"ask": kind, "id": number})
            return await self._waiting[number]
        finally:
            del self._waiting[number]

    async def stop(self) -> None:
        """Ends the connection."""
        for task in self._tasks:
            task.cancel()
        self._writer.close()

    def _say(self, message: dict[str, Any]) -> None:
        self._writer.write(json.dumps(message).encode() + b"\n")

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _listen(self) -> None:
        while line := await self._reader.readline():
            message = json.loads(line)
            if "asked" in message:
                self._keep(self._answer(message["asked"], message["token"]))
            elif waiting := self._waiting.get(message["id"]):
                waiting.set_result(message["answers"])
        logger.error("the process that started this worker is gone: stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    async def _answer(self, kind: Kind, token: int) -> None:
        self._say({"told": await self._handlers[kind](), "token": token})
