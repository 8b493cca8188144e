"""A version that answers: its bundle, the predictor that runs it, and what it did so far."""

import time
from dataclasses import dataclass, field
from typing import Any

from deploy.bundle import Bundle
from deploy.predictor import Predictor


@dataclass
class Statistics:
    """What a version did since it was loaded; times in nanoseconds, as the protocol wants them.

    Args:
        success: Requests answered.
        failed: Requests that got an error.
        pictures: Pictures answered.
        batches: Runs of the network.
        last_ms: When it last answered, in milliseconds since 1970.
    """

    success: int = 0
    success_ns: int = 0
    failed: int = 0
    failed_ns: int = 0
    pictures: int = 0
    batches: int = 0
    queue_ns: int = 0
    decode_ns: int = 0
    run_ns: int = 0
    last_ms: int = 0

    def request(self, seconds: float, *, answered: bool) -> None:
        """Counts a request that is over."""
        if answered:
            self.success += 1
            self.success_ns += int(seconds * 1e9)
            self.last_ms = int(time.time() * 1000)
        else:
            self.failed += 1
            self.failed_ns += int(seconds * 1e9)


@dataclass(eq=False)
class LiveModel:
    """A loaded version; compared by identity.

    Args:
        version: Its number in the registry.
        bundle: Its bundle, found whole.
        predictor: What runs it.
        lineage: Where it comes from, as registered.
        card: Its model card (Markdown), or None.
        in_flight: Requests that it still has to answer; counted by the event loop.
    """

    version: int
    bundle: Bundle
    predictor: Predictor
    lineage: dict[str, Any]
    card: str | None
    in_flight: int = 0
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.bundle.labels

    @property
    def embedding_width(self) -> int:
        """Numbers in an embedding."""
        width: int = self.bundle.signature["outputs"][1]["shape"][1]
        return width
