"""One connection: uvicorn's, with bodies handed on whole, answers written at once, and time limits that cost little.

What ASGI's messages are too slow at, or cannot say, a request finds in its scope (Exchange).
"""

import asyncio
from collections.abc import Callable, Sequence, Sized
from typing import Any

import orjson
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 65_536
PIECE_BYTES = 1_048_576
HEAD_S = 15  # for a client to send its request line and headers
BODY_HEADERS = (b"content-length", b"transfer-encoding")
EXCHANGE = "tanuki.exchange"


class Deadline:
    """A time limit that is set and lifted for each request and hardly ever reached.

    A timer is not made anew each time: it stays, and looks again when it fires.

    Args:
        loop: The event loop, on which it is used.
    """

    __slots__ = ("_act", "_due", "_fires_at", "_loop", "_timer")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = self._due = 0.0
        self._act: Callable[[], Any] | None = None

    def set(self, seconds: float, act: Callable[[], Any]) -> None:
        """Acts after so long, instead of whatever was set before."""
        self._due, self._act = self._loop.time() + seconds, act
        if self._timer is None or self._fires_at > self._due:
            self._arm()

    def lift(self) -> None:
        """Acts no more."""
        self._act = None

    def end(self) -> None:
        """Leaves no timer behind."""
        self._act = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._fires_at = self._due
        self._timer = self._loop.call_at(self._due, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self._act is None:
            return
        if self._loop.time() < self._due:
            self._arm()
        else:
            act, self._act = self._act, None
            act()


class Flow(FlowControl):
    """Uvicorn's, but nothing more is read while requests wait for the answers before theirs: each read holds thousands.

    Args:
        transport: Which is read from.
        pipeline: What waits.
    """

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            super().resume_reading()


class Connection(HttpToolsProtocol):
    """A connection that gives a body to its request at once, and limits a request's head in size and in time.

    Args:
        given: What uvicorn gives it.
        leave_s: For the client to read the rest of its answers, once the connection is to end.
        more: What uvicorn gives it.
    """

    on_leave: Callable[[], Any] | None = None  # of the request that is being answered
    _head_bytes = 0  # trailers included
    _awaits_head = False
    _holds_body = False  # what was read last, or the end of a request

    def __init__(self, *given: Any, leave_s: float, **more: Any) -> None:
        super().__init__(*given, **more)
        self._leave_s = leave_s

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        self._pieces: list[bytes] = []
        self._piece_bytes = 0
        self._patience = Deadline(self.loop)  # for a head, and for the next request
        self.body_deadline = Deadline(self.loop)
        # Uvicorn would refuse requests of all connections while there are too many, in words not the protocol's.
        limit, self.limit_concurrency = self.limit_concurrency, None
        self.is_one_too_many = limit is not None and len(self.connections) > limit
        self._await_head()

    def data_received(self, data: bytes) -> None:
        awaited_head, self._holds_body = self._awaits_head, False
        super().data_received(data)
        if not self._holds_body and (self._awaits_head or not awaited_head):
            self._head_bytes += len(data)
        if self._head_bytes <= MAX_HEAD_BYTES or self.transport.is_closing():
            return
        if self._awaits_head:
            self._have_head()
            self.send_400_response(f"More than {MAX_HEAD_BYTES} bytes of headers.")
        else:
            self._leave()

    def eof_received(self) -> None:
        """A client that sends no more may still read no more."""
        self._leave()

    def send_400_response(self, msg: str) -> None:
        """In the protocol's form, where uvicorn's is plain text."""
        body = orjson.dumps({"error": msg})
        headers = [*self.server_state.default_headers, (b"content-type", b"application/json")]
        headers += [(b"content-length", b"%d" % len(body)), (b"connection", b"close")]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        self.transport.write(b"".join([STATUS_LINE[400], head, b"\r\n", body]))
        self._leave()

    def timeout_keep_alive_handler(self) -> None:
        """As uvicorn's."""
        self._leave()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        """As uvicorn's; but what comes after the body says nothing of the request."""
        if self._awaits_head:
            super().on_header(name, value)
        elif self._holds_body:
            self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        self._have_head()
        if self.parser.should_upgrade() and any(name in BODY_HEADERS for name, _ in self.headers):
            # The parser would skip the body, and what is in it would be the next request.
            self.send_400_response("A request with a body must have no Upgrade header (Java: Version.HTTP_1_1).")
            return
        super().on_headers_complete()
        self.scope[EXCHANGE] = Exchange(self, self.cycle)  # type: ignore[literal-required]

    def on_body(self, body: bytes) -> None:
        """Wakes the request once its body is there, or a large piece of it, and not for every read from the socket."""
        self._holds_body, self._head_bytes = True, 0
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        self._pieces.append(body)
        self._piece_bytes += len(body)
        if self._piece_bytes > PIECE_BYTES:
            self._pass_on()
            self.flow.pause_reading()
            self.cycle.message_event.set()

    def on_message_complete(self) -> None:
        self._holds_body = True
        if self.transport.is_closing():
            return
        self._pass_on()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """As uvicorn's, with another timer for the next request."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self._leave()
            return
        next_one = self.pipeline.pop() if self.pipeline else None
        self.flow.resume_reading()
        if next_one is not None:
            self._start_asgi_task(*next_one)
            if self._awaits_head and not self.pipeline:
                self._await_rest()
        elif not self._awaits_head:
            self._patience.set(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        self._awaits_head = False
        self._patience.end()
        self.body_deadline.end()
        self.pipeline.clear()
        super().connection_lost(exc)
        if self.on_leave is not None:
            self.on_leave()

    def _leave(self) -> None:
        """Closes the connection once the client has read what it was answered, or its time for that is over."""
        self.transport.close()
        self._patience.set(self._leave_s, self.transport.abort)

    def _pass_on(self) -> None:
        """Gives the request what came of its body: copied once, and not at all where it came in one read."""
        came = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        # Its copy as bytes, which the request gets, is then the very same object.
        self.cycle.body = self.cycle.body + came if self.cycle.body else came  # type: ignore[assignment]
        self._pieces, self._piece_bytes = [], 0

    def _await_head(self) -> None:
        self._awaits_head, self._head_bytes = True, 0
        if not self.pipeline:  # else it is not read before these are answered
            self._await_rest()

    def _await_rest(self) -> None:
        self._patience.set(HEAD_S, self.timeout_keep_alive_handler)

    def _have_head(self) -> None:
        self._awaits_head = False
        self._patience.lift()


class Exchange:
    """A request and its answer on a connection; one at a time is answered there.

    Args:
        connection: Where it came.
        cycle: Uvicorn's record of it.
    """

    __slots__ = ("_connection", "_cycle")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle

    @property
    def has_left(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return self._cycle.disconnected or self._connection.transport.is_closing()

    @property
    def is_one_too_many(self) -> bool:
        """Whether its connection was one more than may be open."""
        return self._connection.is_one_too_many

    def give_up(self) -> None:
        """Leaves it without an answer, which nobody waits for."""
        self._cycle.disconnected = True  # uvicorn knows it of the last request on a connection only

    def abort(self) -> None:
        """Ends the connection at once, whatever is still to be sent."""
        self.give_up()
        self._connection.transport.abort()

    def on_leave(self, act: Callable[[], Any] | None) -> None:
        """Acts when the client goes away; None for not any more."""
        self._connection.on_leave = act

    @property
    def deadline(self) -> Deadline:
        """A limit for the rest of its body."""
        return self._connection.body_deadline

    def reply(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes, *, is_last: bool) -> bool:
        """Writes an answer in one piece; what names and values hold is the caller's care.

        Args:
            status: HTTP's code.
            headers: The body's length among them.
            body: Left out where the request was HEAD.
            is_last: The connection is closed afterwards.

        Returns:
            False where the client does not read what it was sent before: nothing was written.
        """
        cycle = self._cycle
        if self.has_left:
            self.give_up()
            return True
        if cycle.flow.write_paused:
            return False
        cycle.keep_alive = cycle.keep_alive and not is_last
        pieces = [STATUS_LINE[status]]
        for name, value in (*cycle.default_headers, *headers):
            pieces += (name, b": ", value, b"\r\n")
        pieces.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        if cycle.scope["method"] != "HEAD":
            pieces.append(body)
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.transport.write(b"".join(pieces))
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()
        return True
