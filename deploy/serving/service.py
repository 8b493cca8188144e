"""What every way in shares: the models, the batcher, the limits, and whether the server is on its way out."""

import asyncio
import hmac
import itertools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.errors import TanukiError
from deploy.machine import available_cores
from deploy.registry import open_registry
from deploy.serving.batcher import Answer, Batcher, BatchTimes, Outcome, Picture
from deploy.serving.capture import Capture
from deploy.serving.comparison import Challenge, reports_of
from deploy.serving.errors import BAD_REQUEST, TOO_MANY, RequestError, ServingError
from deploy.serving.inference_protocol import model_statistics, summed_statistics
from deploy.serving.live_model import LiveModel
from deploy.serving.metrics import Family, Metrics, metrics_text
from deploy.serving.models import Models, Watcher
from deploy.serving.peers import Handlers, Kind, Peers
from deploy.serving.settings import Settings

if TYPE_CHECKING:
    from deploy.serving.worker import Worker

logger = logging.getLogger(__name__)


class Service:
    """One server's parts. Make it, ``load``, and ``start`` it on the event loop; ``stop`` it at the end.

    Args:
        settings: How it is run.
        worker: Which of several processes this is; None where it is alone.

    Raises:
        ServingError: If the token file holds none.
        OSError: If it cannot be read.
    """

    def __init__(self, settings: Settings, *, worker: "Worker | None" = None) -> None:
        self.settings = settings
        self.draining = False
        self.metrics = Metrics(
            waiting=lambda: self.batcher.waiting,
            champion=self._champion_version,
            worker=worker.number if worker else None,
        )
        self.models = Models(
            open_registry(settings.registry, copy=settings.registry_copy),
            name=settings.name,
            keep=settings.keep,
            on_reload=self.metrics.reload,
            public_key=settings.public_key,
        )
        self.parser = ThreadPoolExecutor(1, thread_name_prefix="parser")  # large JSON and compressed bodies
        self.batcher: Batcher
        self.capture: Capture | None = None
        self._worker = worker
        self._peers: Peers | None = None
        self._challenge: Challenge | None = None
        self._telling: asyncio.Task[Any] | None = None
        self._own: Handlers = {
            "metrics": self._own_metrics,
            "statistics": self._own_statistics,
            "look": self._own_look,
            "comparisons": self._own_comparisons,
            "end_second": self._own_end_second,
            "second_ended": self._own_second_ended,
        }
        self._held_bytes = 0
        self._watcher = Watcher(self.models, every_s=settings.watch_s)
        self._tokens = _tokens(settings)

    def load(self) -> None:
        """Loads the champion; without one the server starts, waits for the first and is not ready.

        Raises:
            ServingError: If there is no registry, or its champion cannot answer.
        """
        if "://" not in self.settings.registry and not Path(self.settings.registry).is_dir():
            raise ServingError(
                f"{self.settings.registry} is no registry: there is no such folder. "
                "Name it with --registry, or make one with `tanuki retrain`."
            )
        self.models.refresh()
        if self.models.problem is not None:
            raise ServingError(f"the champion cannot answer: {self.models.problem}")
        if self.settings.second is not None:
            self._add_challenger(self.settings.second.version)
        self.capture = self._start_capture()
        if self.models.champion is None:
            logger.warning("%s has no champion yet: waiting for the first promotion", self.settings.registry)

    def _add_challenger(self, version: int) -> None:
        try:
            self.models.add_challenger(version)
        except TanukiError as error:
            raise ServingError(f"version {version} cannot be compared with the champion: {error}") from error

    async def start(self) -> None:
        """Starts the threads; on the event loop that they answer to."""
        self.batcher = Batcher(
            threads=self.settings.threads or available_cores(),
            max_waiting=self.settings.max_waiting,
            max_pixels=self.settings.max_pixels,
            on_batch=self._count_batch,
            on_given_up=self._given_up,
            max_wait_s=self.settings.max_wait_s,
        )
        if self.settings.second is not None:
            self._challenge = Challenge(
                self.settings.second,
                self.models,
                self.batcher,
                on_compared=self.metrics.compared,
                max_failures=self.settings.second_failures,
                on_stopped=self._second_stopped,
            )
        self._watcher.start()

    async def join_peers(self) -> None:
        """Where this is one of several processes: tells that it answers now, and can be asked for what it knows."""
        if self._worker is not None:
            self._peers = Peers(self._worker.end, self._own)
            await self._peers.start()
            if self._challenge is not None and any(await self._of_all("second_ended")):  # before this one could be told
                self._challenge.end()

    @property
    def has_peers(self) -> bool:
        """Whether this is one of several processes."""
        return self._worker is not None

    def _start_capture(self) -> Capture | None:
        settings = self.settings
        if settings.capture_dir is None:
            return None
        return Capture(
            settings.capture_dir,
            fraction=settings.capture_fraction,
            max_bytes=int(settings.capture_mb * 1e6),
            max_age=timedelta(days=settings.capture_days),
            pictures=settings.capture_pictures,
            on_rows=self.metrics.captured,
        )

    async def stop(self) -> None:
        """Ends the threads, once what waits is answered."""
        if self._peers is not None:
            await self._peers.stop()
        if self._challenge is not None:
            await self._challenge.stop()
        await asyncio.to_thread(self._watcher.stop)
        await asyncio.to_thread(self.batcher.close)
        if self.capture is not None:
            await asyncio.to_thread(self.capture.close)
        self.parser.shutdown()

    @property
    def is_ready(self) -> bool:
        """Whether new requests are welcome."""
        return self.models.champion is not None and not self.draining

    def admits(self, authorization: bytes | None) -> bool:
        """Whether a request may be served, by its header ``authorization``."""
        if not self._tokens:
            return True
        kind, _, token = (authorization or b"").partition(b" ")
        digest = sha256(token.strip()).digest()
        return kind.lower() == b"bearer" and any(hmac.compare_digest(digest, known) for known in self._tokens)

    def hold(self, num_bytes: int) -> None:
        """Counts bytes of a request's body, until they are `released`.

        Raises:
            RequestError: If all bodies together are too large; these are counted all the same.
        """
        self._held_bytes += num_bytes
        limit = self.settings.max_bodies_bytes
        if self._held_bytes > limit:
            raise RequestError(TOO_MANY, f"all requests' bodies together are larger than {limit}", retry_after_s=1)

    def release(self, num_bytes: int) -> None:
        """A request is over whose body had so many bytes."""
        self._held_bytes -= num_bytes

    async def look(self, name: str) -> None:
        """Looks at the registry now, as the protocol's load call asks.

        Raises:
            RequestError: If the model has another name, or its champion was refused.
        """
        if name != self.models.name:
            raise RequestError(BAD_REQUEST, f"failed to load '{name[:100]}', failed to poll from model repository")
        problems = [problem for problem in await self._of_all("look") if problem is not None]
        if problems:
            raise RequestError(BAD_REQUEST, f"failed to load '{name}': {problems[0]}")

    async def metrics_text(self) -> bytes:
        """What Prometheus reads, of all processes."""
        of_runs = Path(self.settings.registry) / "metrics"  # none where the registry is behind a URL
        return metrics_text(await self._of_all("metrics"), of_runs=of_runs)

    async def statistics(self, version: str | None = None) -> list[dict[str, Any]]:
        """What each version did, in all processes, in Triton's terms; of one version where it is named."""
        found = summed_statistics(itertools.chain.from_iterable(await self._of_all("statistics")))
        return [each for each in found if not version or each["version"] == str(version)]

    async def _of_all(self, kind: Kind) -> list[Any]:
        """An answer of each process of this server."""
        return [await self._own[kind]()] if self._peers is None else await self._peers.ask(kind)

    async def _own_metrics(self) -> list[Family]:
        return self.metrics.families()

    async def _own_statistics(self) -> list[dict[str, Any]]:
        return [model_statistics(each, self.models.name) for each in self.models.loaded]

    async def _own_look(self) -> str | None:
        await asyncio.to_thread(self.models.refresh, force=True)
        return self.models.problem

    async def _own_comparisons(self) -> list[dict[str, Any]]:
        return self._challenge.found() if self._challenge else []

    async def _own_end_second(self) -> None:
        if self._challenge is not None:
            self._challenge.end()

    async def _own_second_ended(self) -> bool:
        return self._challenge is not None and self._challenge.is_stopped

    def _second_stopped(self, version: int) -> None:
        self.metrics.stopped(version)
        self._telling = asyncio.get_running_loop().create_task(self._of_all("end_second"))

    async def comparisons(self) -> list[dict[str, Any]]:
        """What the second version said of the champion's pictures, in all processes."""
        return reports_of(await self._of_all("comparisons"))

    def choose(self, name: str, version: str | None = None) -> LiveModel:
        """Who answers a request: the version that it names, else the champion, or the second version for its share.

        Raises:
            RequestError: If it is not here.
        """
        model = self.models.resolve(name, version)
        return model if version or self._challenge is None else self._challenge.choose(model)

    async def answer(
        self, model: LiveModel, pictures: Sequence[Picture], *, request_id: str, timeout_s: float | None = None
    ) -> list[Outcome]:
        """Answers pictures within the client's time or the server's, whichever is less, and keeps the statistics.

        Raises:
            RequestError: If too many wait, or the time is over.
        """
        start = time.monotonic()
        limit_s = min(timeout_s or self.settings.timeout_s, self.settings.timeout_s)
        try:
            outcomes = await self.batcher.answer(model, pictures, timeout_s=limit_s)
        except RequestError:
            model.statistics.request(time.monotonic() - start, answered=False)
            raise
        answered = any(isinstance(outcome, Answer) for outcome in outcomes)
        model.statistics.request(time.monotonic() - start, answered=answered)
        if self._challenge is not None:
            self._challenge.offer(model, pictures, outcomes)
        if self.capture is not None:
            self.capture.offer(model, pictures, outcomes, request_id)
        return outcomes

    def _count_batch(self, times: BatchTimes) -> None:
        done = times.model.statistics
        done.pictures += times.num_pictures
        done.batches += 1
        done.queue_ns += int(sum(times.queue_s) * 1e9)
        done.decode_ns += int(times.decode_s * 1e9)
        done.run_ns += int(times.run_s * 1e9)
        self.metrics.batch(times)

    def _given_up(self, model: LiveModel) -> None:
        if self._challenge is not None:
            self._challenge.given_up(model)

    def _champion_version(self) -> int:
        return self.models.champion.version if self.models.champion else 0


def _tokens(settings: Settings) -> list[bytes]:
    """Digests of the tokens, so that a comparison tells nothing of their length."""
    if settings.token_file is None:
        return []
    lines = settings.token_file.read_bytes().split(b"\n")
    tokens = [sha256(line.strip()).digest() for line in lines if line.strip()]
    if not tokens:
        raise ServingError(f"{settings.token_file} holds no token: write one a line, or leave --token-file out.")
    return tokens
