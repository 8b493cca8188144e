"""Natural batches: a thread a core takes its fair share of what waits, as soon as it is free, and never waits for more.

An idle thread takes ceil(waiting / idle threads) pictures, so that a second core is not left without work, and no
artificial delay is ever added. A picture is decoded and preprocessed alone and answered in a batch. One session serves
all threads (deploy/runtime.py).

What is asked aside (deploy/serving/comparison.py) is done a picture at a time, when no request waits and, where there
are several threads, another one is idle: a request finds a thread at once, or at the end of one picture.

The event loop counts, times out and refuses; the threads only work. What passes between them is one queue under a lock
and one callback a batch.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from deploy.errors import ImageError
from deploy.images import decode_image
from deploy.serving.errors import DEADLINE, TOO_MANY, UNAVAILABLE, RequestError
from deploy.serving.live_model import LiveModel

# Larger batches are slower for small networks (cache), and make the others wait.
MAX_BATCH = 4
MAX_ASIDE = 64  # pictures that wait for a moment which nobody else needs

Picture = bytes | NDArray[np.uint8]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says of one picture.

    Args:
        probabilities: Of shape (C,), float32.
        embedding: Of shape (D,), float32.
    """

    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]


Outcome = Answer | ImageError | RequestError


@dataclass(frozen=True, slots=True)
class BatchTimes:
    """One batch, as a thread saw it.

    Args:
        model: Who answered.
        num_pictures: In it.
        queue_s: How long each of its pictures waited; none for what was asked aside, which waits on purpose.
        decode_s: Decoding and preprocessing of them all.
        run_s: The network's run.
    """

    model: LiveModel
    num_pictures: int
    queue_s: tuple[float, ...]
    decode_s: float
    run_s: float


@dataclass(slots=True, eq=False)
class _Request:
    """The pictures of one request; threads only fill in ``outcomes`` and ``began``, and look at ``dropped``."""

    model: LiveModel
    future: asyncio.Future[None]
    outcomes: list[Outcome | None]
    remaining: int
    queued_at: float
    due: float  # when it is given up
    is_aside: bool = False
    began: bool = False  # a thread has taken one of its pictures
    dropped: bool = False


@dataclass(slots=True, eq=False)
class _Job:
    """One picture of a request."""

    request: _Request
    index: int
    picture: Picture | None


@dataclass
class Batcher:
    """Answers pictures on threads of its own. Make it and call it inside a running event loop.

    Args:
        threads: How many; one a core that the process may use.
        max_waiting: Pictures that may wait or be worked on at a time; more are refused.
        max_pixels: Of an encoded picture; more is refused before it is decoded.
        on_batch: Told of each batch, on the event loop.
        on_given_up: Told who was at work on a request whose time was over, or whose client left; not of one that only
            waited, nor of what was asked aside.
        max_wait_s: A picture that finds others, and would wait longer by what the last ones took, is refused.
        max_batch: Pictures in a run of the network.
    """

    threads: int
    max_waiting: int
    max_pixels: int
    on_batch: Callable[[BatchTimes], None]
    on_given_up: Callable[[LiveModel], None] = lambda _: None
    max_wait_s: float = math.inf
    max_batch: int = MAX_BATCH
    waiting: int = 0  # pictures, those being worked on included
    waiting_aside: int = 0
    _seconds_each: float = 0.01  # smoothed time of a picture on one thread
    _jobs: deque[_Job] = field(default_factory=deque)
    _aside: deque[_Job] = field(default_factory=deque)
    _ready: threading.Condition = field(default_factory=threading.Condition)
    _open: set[_Request] = field(default_factory=set)
    _looks_at: float = math.inf  # when the first of them may be due
    _timer: asyncio.TimerHandle | None = None
    _idle: int = 0
    _closed: bool = False
    _workers: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        for number in range(self.threads):
            worker = threading.Thread(target=self._work, name=f"answers-{number}", daemon=True)
            worker.start()
            self._workers.append(worker)

    async def answer(
        self, model: LiveModel, pictures: Sequence[Picture], *, timeout_s: float | None, is_aside: bool = False
    ) -> list[Outcome]:
        """Answers the pictures of one request, in their order.

        Args:
            model: Who answers, whatever is promoted meanwhile.
            pictures: Encoded, or upright RGB uint8 (H, W, 3).
            timeout_s: After this the request is given up, and what of it still waits is dropped; None for never.
            is_aside: Nobody waits for the answer: everything else comes first.

        Returns:
            For each picture the answer, or why it has none.

        Raises:
            RequestError: If too much waits already, or the time is over.
        """
        if is_aside and self.waiting_aside + len(pictures) > MAX_ASIDE:
            raise RequestError(TOO_MANY, "no time for what nobody waits for")
        if not is_aside:
            self.check_room(len(pictures))
        future: asyncio.Future[None] = self._loop.create_future()
        now = time.monotonic()
        due = math.inf if timeout_s is None else now + timeout_s
        request = _Request(model, future, [None] * len(pictures), len(pictures), now, due, is_aside)
        jobs = [_Job(request, index, picture) for index, picture in enumerate(pictures)]
        with self._ready:
            if self._closed:
                raise RequestError(UNAVAILABLE, "the server is shutting down")
            (self._aside if is_aside else self._jobs).extend(jobs)
            self._ready.notify(len(jobs))
        self._count(request, len(pictures))
        model.in_flight += 1
        self._open.add(request)
        self._watch(request.due)
        try:
            await future
        except (RequestError, asyncio.CancelledError):
            if request.began and not is_aside:
                self.on_given_up(model)
            raise
        finally:
            self._open.discard(request)
            request.dropped = True
            model.in_flight -= 1
        return request.outcomes  # type: ignore[return-value]  # all are there when the future is done

    def check_room(self, num: int = 1) -> None:
        """Whether so many pictures may wait; to be asked before a body is read, which is then not understood in vain.

        Raises:
            RequestError: If not.
        """
        wait_s = self.waiting * self._seconds_each / self.threads
        if self.waiting + num <= self.max_waiting and wait_s <= self.max_wait_s:
            return
        raise RequestError(
            TOO_MANY,
            f"too many requests: {self.waiting} pictures wait, which takes {wait_s:.2g} s; "
            f"{self.max_waiting} may, or {self.max_wait_s:g} s",
            retry_after_s=math.ceil(wait_s),
        )

    def close(self) -> None:
        """Ends the threads once nothing waits; later requests are refused."""
        with self._ready:
            self._closed = True
            self._ready.notify_all()
        for worker in self._workers:
            worker.join()

    def _work(self) -> None:
        """A thread's life."""
        while jobs := self._take():
            started = time.monotonic()
            live = [job for job in jobs if not job.request.dropped]
            times = self._run(live, started) if live else None
            self._loop.call_soon_threadsafe(self._deliver, jobs, times, time.monotonic() - started)

    def _take(self) -> list[_Job]:
        """Waits for work and takes this thread's fair share of it, for one model; nothing when all is over."""
        with self._ready:
            self._idle += 1
            while not self._jobs and not self._closed and not self._may_take_aside():
                self._ready.wait()
            share = min(math.ceil(len(self._jobs) / self._idle), self.max_batch)
            may_take_aside = self._may_take_aside()
            self._idle -= 1
            if not self._jobs and may_take_aside and not self._closed:
                return [self._aside.popleft()]
            taken: list[_Job] = []
            while len(taken) < share and (not taken or self._jobs[0].request.model is taken[0].request.model):
                taken.append(self._jobs.popleft())
            return taken

    def _may_take_aside(self) -> bool:
        """Whether an idle thread may do what nobody waits for: where another one is idle too, or there is only one."""
        return bool(self._aside) and (self._idle > 1 or self.threads == 1)

    def _run(self, jobs: list[_Job], started: float) -> BatchTimes:
        """Fills in the outcomes of jobs of one model."""
        model = jobs[0].request.model
        queue_s = tuple(started - job.request.queued_at for job in jobs if not job.request.is_aside)
        decoded = [(job, pixels) for job in jobs if (pixels := self._pixels(job)) is not None]
        ready = time.monotonic()
        if decoded:
            try:
                pixels = np.concatenate([pixels for _, pixels in decoded]) if len(decoded) > 1 else decoded[0][1]
                for (job, _), *answer in zip(decoded, *model.predictor.answers(pixels), strict=True):
                    job.request.outcomes[job.index] = Answer(*answer)
            except Exception:
                logger.exception("version %d failed on a batch of %d", model.version, len(decoded))
                for job, _ in decoded:
                    job.request.outcomes[job.index] = RequestError(500, "the model failed on this picture")
        return BatchTimes(model, len(jobs), queue_s, ready - started, time.monotonic() - ready)

    def _pixels(self, job: _Job) -> NDArray[np.float32] | None:
        """What the network sees of a picture; None where the outcome is known: it cannot be read."""
        job.request.began = True
        picture, job.picture = job.picture, None  # its bytes are not needed any more
        try:
            image = decode_image(picture, max_pixels=self.max_pixels) if isinstance(picture, bytes) else picture
            assert image is not None
            return job.request.model.predictor.pixels(image)
        except ImageError as error:
            job.request.outcomes[job.index] = ImageError(str(error))  # whose traceback does not hold the picture
        except Exception:
            logger.exception("version %d failed before its network", job.request.model.version)
            job.request.outcomes[job.index] = RequestError(500, "the model failed on this picture")
        return None

    def _deliver(self, jobs: list[_Job], times: BatchTimes | None, seconds: float) -> None:
        """On the event loop: wakes the requests that are complete."""
        self._count(jobs[0].request, -len(jobs))
        for job in jobs:
            request = job.request
            request.remaining -= 1
            if request.remaining == 0 and not request.future.done():
                request.future.set_result(None)
        if times is not None:
            if not jobs[0].request.is_aside:
                self._seconds_each += 0.1 * (seconds / len(jobs) - self._seconds_each)
            self.on_batch(times)

    def _watch(self, due: float) -> None:
        """Looks at the open requests once this one may be due: one timer for them all, as hardly any is ever late."""
        if due >= self._looks_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._looks_at = due
        self._timer = self._loop.call_later(due - time.monotonic(), self._expire)

    def _expire(self) -> None:
        """Gives up what is late."""
        now, self._looks_at, self._timer = time.monotonic(), math.inf, None
        for request in self._open:
            if request.due <= now and not request.future.done():
                seconds = request.due - request.queued_at
                request.future.set_exception(RequestError(DEADLINE, f"no answer within {seconds:g} s"))
        self._watch(min((each.due for each in self._open if not each.future.done()), default=math.inf))

    def _count(self, request: _Request, num: int) -> None:
        """Of pictures that wait; a batch is of one kind."""
        if request.is_aside:
            self.waiting_aside += num
        else:
            self.waiting += num
