"""What Prometheus reads. Everything is counted on the event loop."""

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from deploy.serving.batcher import BatchTimes

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
PICTURES = (1, 2, 3, 4, 8, 16)
MAX_RUN_BYTES = 65_536
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Name, documentation, type, and samples: name, labels and value.
Family = tuple[str, str, str, list[tuple[str, dict[str, str], float]]]


class Histogram(Collector):
    """A histogram as prometheus_client's, without its locks: it is for one thread, and observed thrice a request.

    Args:
        name: As Prometheus knows it.
        documentation: What it counts.
        labels: Their names.
        buckets: Upper bounds, rising, without infinity.
        registry: Where it is collected.
    """

    def __init__(
        self,
        name: str,
        documentation: str,
        labels: Sequence[str] = (),
        *,
        buckets: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self._name, self._documentation, self._labels = name, documentation, labels
        self._bounds = tuple(map(float, buckets))
        self._found: dict[tuple[str, ...], Observed] = {}
        if not labels:
            self.labels()
        registry.register(self)

    def labels(self, *values: object) -> "Observed":
        """What was observed of these values of the labels."""
        key = tuple(map(str, values))
        return self._found.setdefault(key, Observed(self._bounds, [0] * (len(self._bounds) + 1)))

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._documentation, labels=self._labels)
        for key, found in self._found.items():
            below = itertools.accumulate(found.counts)
            bounds = [*map(floatToGoString, self._bounds), "+Inf"]
            family.add_metric(key, list(zip(bounds, below, strict=True)), found.total)
        yield family


@dataclass(slots=True)
class Observed:
    """Values in their buckets.

    Args:
        bounds: The buckets' upper bounds.
        counts: How many fell into each, and above them all.
        total: Their sum.
    """

    bounds: tuple[float, ...]
    counts: list[int]
    total: float = 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Metrics:
    """The counters of one process.

    Args:
        waiting: Tells how many pictures wait.
        champion: Tells the version that answers; 0 for none.
        worker: The number of the process, where there are several.
    """

    def __init__(self, *, waiting: Callable[[], int], champion: Callable[[], int], worker: int | None = None) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a second line for each counter, which nobody reads
        self._registry = registry = CollectorRegistry()
        self._of = {} if worker is None else {"worker": str(worker)}
        self._looked_up: dict[tuple[str, int], tuple[Counter, Observed]] = {}
        self._versions: dict[int, Counter] = {}
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "tanuki_requests", "Requests, by what was asked and how it ended.", ["route", "code"], registry=registry
        )
        self._request_s = Histogram(
            "tanuki_request_seconds", "From the headers to the answer.", ["route"], buckets=SECONDS, registry=registry
        )
        self._queue_s = Histogram(
            "tanuki_queue_seconds", "A picture's wait for a thread.", buckets=SECONDS, registry=registry
        ).labels()
        self._decode_s = Histogram(
            "tanuki_decode_seconds", "Decoding and preprocessing of a batch.", buckets=SECONDS, registry=registry
        ).labels()
        self._run_s = Histogram(
            "tanuki_run_seconds", "The network's run on a batch.", buckets=SECONDS, registry=registry
        ).labels()
        self._batch = Histogram(
            "tanuki_batch_pictures", "Pictures in a batch.", buckets=PICTURES, registry=registry
        ).labels()
        self._pictures = Counter("tanuki_pictures", "Pictures taken up, by version.", ["version"], registry=registry)
        self._reloads = Counter("tanuki_reloads", "New champions, by outcome.", ["outcome"], registry=registry)
        self._captured = Counter("tanuki_captured", "Answers kept for drift, or dropped.", ["fate"], registry=registry)
        for fate in ("kept", "dropped"):
            self._captured.labels(fate)
        pair = ["champion", "challenger"]
        self._compared = Counter(
            "tanuki_compared", "Pictures of two versions, by outcome.", [*pair, "fate"], registry=registry
        )
        self._distance = Histogram(
            "tanuki_compared_distance", "Total variation distance of two versions' answers to a picture.", pair,
            buckets=SHARES, registry=registry,
        )  # fmt: skip
        self._stopped = Counter(
            "tanuki_second_stopped", "Second versions that failed too often to go on.", ["version"], registry=registry
        )
        for outcome in ("swapped", "refused"):
            self._reloads.labels(outcome)
        Gauge("tanuki_waiting_pictures", "Pictures that wait or are worked on.", registry=registry).set_function(
            waiting
        )
        Gauge("tanuki_model_version", "The version that answers; 0 for none.", registry=registry).set_function(champion)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts a request that is over."""
        count, histogram = self._of_request(route, status)
        count.inc()
        histogram.observe(seconds)

    def _of_request(self, route: str, status: int) -> tuple[Counter, Observed]:
        """Looked up once: a label's lookup takes a lock and makes text of its values."""
        key = (route, status)
        if key not in self._looked_up:
            self._looked_up[key] = self._requests.labels(route, status), self._request_s.labels(route)
        return self._looked_up[key]

    def batch(self, times: BatchTimes) -> None:
        """Counts a batch, here and in the version's own statistics."""
        for seconds in times.queue_s:
            self._queue_s.observe(seconds)
        self._decode_s.observe(times.decode_s)
        self._run_s.observe(times.run_s)
        self._batch.observe(times.num_pictures)
        self._of_version(times.model.version).inc(times.num_pictures)

    def _of_version(self, version: int) -> Counter:
        if version not in self._versions:
            self._versions[version] = self._pictures.labels(version)
        return self._versions[version]

    def reload(self, outcome: str) -> None:
        """Counts a champion that was taken over, or refused."""
        self._reloads.labels(outcome).inc()

    def compared(self, champion: int, challenger: int, fate: str, distance: float) -> None:
        """Counts a picture that two versions were asked about, or that there was no time for."""
        self._compared.labels(champion, challenger, fate).inc()
        if fate in ("same", "other"):
            self._distance.labels(champion, challenger).observe(distance)

    def stopped(self, version: int) -> None:
        """Counts a second version that is asked no more."""
        self._stopped.labels(version).inc()

    def captured(self, fate: str, rows: int) -> None:
        """Counts answers that were kept for drift, or dropped."""
        self._captured.labels(fate).inc(rows)

    def families(self) -> list[Family]:
        """All of it, as this process counted it."""
        return [
            (
                each.name,
                each.documentation,
                each.type,
                [(s.name, {**s.labels, **self._of}, s.value) for s in each.samples],
            )
            for each in self._registry.collect()
        ]


class _Collected:
    """Families of several processes, as a collector."""

    def __init__(self, processes: Iterable[Sequence[Family]]) -> None:
        self._processes = processes

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for name, text, kind, samples in itertools.chain.from_iterable(self._processes):
            family = families.setdefault(name, Metric(name, text, kind))
            for sample in samples:
                family.add_sample(*sample)
        yield from families.values()


def metrics_text(processes: Iterable[Sequence[Family]], *, of_runs: Path) -> bytes:
    """As Prometheus reads it, and what runs have left to be told; series of processes differ by their label ``worker``.

    Counts are not added up: a worker that was replaced begins at 0, and Prometheus sees that in a series of its own.

    Args:
        processes: What each process counted.
        of_runs: A folder of text files that tell of retrains and the like (flows/run_metrics.py); may be missing.
    """
    own = generate_latest(_Collected(processes))
    return b"".join([own, *map(_of_run, sorted(of_runs.glob("*.prom")))])


def _of_run(path: Path) -> bytes:
    try:
        return path.read_bytes() if path.stat().st_size <= MAX_RUN_BYTES else b""
    except OSError:
        return b""  # of a metric that is not told, Prometheus makes its own alarm
