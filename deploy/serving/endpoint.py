"""One HTTP request, from its headers to its answer: who may ask, what it may send, what it is told and what is counted.

Plain ASGI: request and response objects would cost more than the protocol around a picture does.
"""

import asyncio
import logging
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qs

import orjson
from starlette.types import Receive, Scope, Send

from deploy.serving.connection import EXCHANGE, Exchange
from deploy.serving.errors import BAD_REQUEST, NOT_FOUND, TOO_LARGE, TOO_SLOW, UNAUTHORIZED, UNAVAILABLE, RequestError
from deploy.serving.request_ids import request_id
from deploy.serving.service import Service

JSON = b"application/json"
UNPACK_WINDOWS = {b"gzip": 16 + zlib.MAX_WBITS, b"deflate": zlib.MAX_WBITS}

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(slots=True)
class Reply:
    """An answer.

    Args:
        body: Its bytes.
        status: HTTP's code.
        content_type: What they are.
        headers: Further ones.
    """

    body: bytes = b""
    status: int = 200
    content_type: bytes = JSON
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


def json_reply(value: Any, status: int = 200) -> Reply:
    """An answer of JSON."""
    return Reply(orjson.dumps(value), status)


@dataclass(slots=True)
class Call:
    """A request on its way.

    Args:
        scope: ASGI's.
        receive: ASGI's.
        service: What answers.
        headers: Names in small letters; of a repeated one the last.
        id: The client's name for it (X-Request-Id), or one made here.
        ended_by: Why its wait was ended: a time limit, or the client left.
        held_bytes: Of its body, packed and unpacked.
    """

    scope: Scope
    receive: Receive
    service: Service
    headers: dict[bytes, bytes]
    id: str
    ended_by: Exception | None = None
    held_bytes: int = 0

    @property
    def exchange(self) -> Exchange:
        """Its connection's side of it."""
        exchange: Exchange = self.scope[EXCHANGE]
        return exchange

    def path(self, name: str) -> str | None:
        """A part of the path."""
        value: str | None = self.scope["path_params"].get(name)
        return value

    def query(self, name: str) -> str | None:
        """A value of the query; the last where it is given several times."""
        values = parse_qs(self.scope["query_string"].decode("latin-1"), keep_blank_values=True).get(name)
        return values[-1] if values else None

    async def body(self) -> bytes:
        """The body, unpacked where it is compressed.

        Raises:
            RequestError: If it is too large, alone or with those of all others, comes too slowly, or is not what its
                headers say.
        """
        limit = self.service.settings.max_body_bytes
        length = self.headers.get(b"content-length", b"0")
        if length.isdigit() and int(length.lstrip(b"0") or b"0") > limit:  # as many noughts as a header holds
            raise _too_large(limit)
        deadline = self.exchange.deadline
        deadline.set(self.service.settings.body_timeout_s, self._ender(self._too_slow))
        try:
            body = await self._unless_ended(self._received(limit))
        finally:
            deadline.lift()
        encoding = self.headers.get(b"content-encoding", b"identity").strip().lower()
        if encoding in (b"", b"identity"):
            return body
        unpacked = await self.aside(_unpacked, body, encoding, limit)
        self._hold(unpacked)
        return unpacked

    async def aside(self, function: Callable[..., Result], *arguments: Any) -> Result:
        """Runs slow Python off the event loop, one at a time."""
        return await asyncio.get_running_loop().run_in_executor(self.service.parser, function, *arguments)

    async def unless_left(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Waits for work, and cancels it if the client goes away meanwhile.

        Raises:
            ClientGoneError: If it went.
        """
        if self.exchange.has_left:
            work.close()
            raise ClientGoneError
        self.exchange.on_leave(self._ender(ClientGoneError))
        try:
            return await self._unless_ended(work)
        finally:
            self.exchange.on_leave(None)

    def _ender(self, why: Callable[[], Exception]) -> Callable[[], None]:
        """What ends this task's wait, and lets it tell that from its own end."""
        task = asyncio.current_task()
        assert task is not None

        def end() -> None:
            self.ended_by = why()
            task.cancel()

        return end

    async def _unless_ended(self, work: Coroutine[Any, Any, Result]) -> Result:
        try:
            return await work
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self.ended_by is None or task is None:
                raise
            task.uncancel()
            raise self.ended_by from None

    def _too_slow(self) -> RequestError:
        seconds = f"{self.service.settings.body_timeout_s:g}"
        return RequestError(TOO_SLOW, f"the request's body did not come within {seconds} s")

    def _hold(self, piece: bytes) -> None:
        self.held_bytes += len(piece)
        self.service.hold(len(piece))

    async def _received(self, limit: int) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            pieces.append(message.get("body", b""))
            self._hold(pieces[-1])
            size += len(pieces[-1])
            if size > limit:
                raise _too_large(limit)
            if not message.get("more_body", False):
                return b"".join(pieces) if len(pieces) > 1 else pieces[0]


Handler = Callable[[Call], Awaitable[Reply]]


class Endpoint:
    """An ASGI application for one path.

    Args:
        service: What answers.
        route: The name it is counted under.
        get: What GET and HEAD do.
        post: What POST does.
        is_open: Whether it is served without a token, and on one connection too many.
    """

    def __init__(
        self,
        service: Service,
        route: str,
        *,
        get: Handler | None = None,
        post: Handler | None = None,
        is_open: bool = False,
    ) -> None:
        self._service = service
        self._route = route
        self._handlers = {
            method: handler
            for method, handler in {"GET": get, "HEAD": get, "POST": post}.items()
            if handler is not None
        }
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        call = Call(scope, receive, self._service, headers, request_id(headers.get(b"x-request-id", b"")))
        try:
            await self._answer(call, send)
        finally:
            self._service.release(call.held_bytes)

    async def _answer(self, call: Call, send: Send) -> None:
        start = time.perf_counter()
        problem: str | None = None
        try:
            reply = await self._reply(call)
        except ClientGoneError:
            call.exchange.give_up()
            self._service.metrics.request(self._route, 499, time.perf_counter() - start)
            return
        except RequestError as error:
            reply, problem = error_reply(error), error.message
        except asyncio.CancelledError:  # the server's last grace is over
            problem = "the server is shutting down"
            reply = error_reply(RequestError(UNAVAILABLE, problem))
        except Exception:
            logger.exception("request %s failed", call.id)
            reply, problem = error_reply(RequestError(500, f"the server failed on request {call.id}")), "see above"
        await self._send(call, reply, send)
        seconds = time.perf_counter() - start
        self._service.metrics.request(self._route, reply.status, seconds)
        if problem is not None or self._service.settings.log_requests:
            facts = {"request_id": call.id, "status": reply.status, "ms": round(seconds * 1e3, 2)}
            logger.info("%s %s %s", call.scope["method"], call.scope["path"], problem or "answered", extra=facts)

    async def _reply(self, call: Call) -> Reply:
        if call.exchange.is_one_too_many and not self._is_open:  # busy is not dead: nobody should start it anew
            limit = self._service.settings.max_connections
            raise RequestError(UNAVAILABLE, f"more than {limit} connections are open", retry_after_s=1)
        if not self._is_open and not self._service.admits(call.headers.get(b"authorization")):
            raise RequestError(UNAUTHORIZED, "this server wants a bearer token")
        handler = self._handlers.get(call.scope["method"])
        if handler is None:
            if not self._handlers:
                raise RequestError(NOT_FOUND, "Not Found")
            reply = error_reply(RequestError(405, "Method Not Allowed"))
            reply.headers.append((b"allow", ", ".join(self._handlers).encode()))
            return reply
        return await handler(call)

    async def _send(self, call: Call, reply: Reply, send: Send) -> None:
        headers = [
            (b"content-type", reply.content_type),
            (b"content-length", b"%d" % len(reply.body)),
            (b"x-request-id", call.id.encode()),
            *reply.headers,
        ]
        is_last = self._service.draining or call.exchange.is_one_too_many
        is_last = is_last or reply.status in (TOO_SLOW, TOO_LARGE)  # a body's rest is not waited for
        if call.exchange.reply(reply.status, headers, reply.body, is_last=is_last):
            return
        if is_last:
            headers.append((b"connection", b"close"))
        try:
            async with asyncio.timeout(self._service.settings.body_timeout_s):
                await send({"type": "http.response.start", "status": reply.status, "headers": headers})
                await send({"type": "http.response.body", "body": reply.body})
        except (TimeoutError, asyncio.CancelledError):
            call.exchange.abort()


def error_reply(error: RequestError) -> Reply:
    """What a client reads of a mistake, as the protocol words it."""
    reply = json_reply({"error": error.message}, error.status)
    if error.retry_after_s is not None:
        reply.headers.append((b"retry-after", b"%d" % max(1, error.retry_after_s)))
    if error.status == UNAUTHORIZED:
        reply.headers.append((b"www-authenticate", b"Bearer"))
    return reply


def _too_large(limit: int) -> RequestError:
    return RequestError(TOO_LARGE, f"the request's body is larger than {limit} bytes")


def _unpacked(body: bytes, encoding: bytes, limit: int) -> bytes:
    """A compressed body, never more than the limit of it."""
    if encoding not in UNPACK_WINDOWS:
        raise RequestError(415, "Content-Encoding may be gzip, deflate or identity")
    unpacker = zlib.decompressobj(UNPACK_WINDOWS[encoding])
    try:
        unpacked = unpacker.decompress(body, limit + 1)
    except zlib.error as error:
        raise RequestError(BAD_REQUEST, f"the body is not what its Content-Encoding says: {error}") from error
    if len(unpacked) > limit:
        raise _too_large(limit)
    if not unpacker.eof or unpacker.unused_data:
        raise RequestError(BAD_REQUEST, "the body is not what its Content-Encoding says: it ends too early or too late")
    return unpacked
