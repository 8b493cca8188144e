"""A second version beside the champion: both answer the same pictures, one of them in moments that nobody else needs.

Shadowed, the champion answers and the second version is asked afterwards. As a canary, the second version answers a
share of the requests that name no version, and the champion is asked afterwards. What is asked afterwards never reaches
a client, waits behind every request (deploy/serving/batcher.py) and is dropped where there is no time for it.

A second version is stopped, and told of, where its network fails on more pictures than the champion's, or is at work on
more requests that are given up: their time was over, or their clients left. It gets no more requests then.
"""

import asyncio
import logging
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deploy.serving.batcher import Answer, Batcher, Outcome, Picture
from deploy.serving.errors import RequestError
from deploy.serving.live_model import LiveModel
from deploy.serving.models import Models
from deploy.serving.settings import Second

PENDING_BYTES = 64_000_000  # of pictures that are still to be compared
MAX_PAIRS = 1000  # of labels that are told apart; the rest is counted as different, without its names
TOLD_PAIRS = 10
RECENT = 200  # pictures of either version whose failures are looked at
CHANCE = 4  # standard deviations of the champion's share that are no difference: it is looked at all the time
LEAST_FAILURES = 5  # before it may be stopped: one accident is no rate

Fate = Literal["same", "other", "failed", "dropped"]

logger = logging.getLogger(__name__)


@dataclass
class Comparison:
    """What two versions said of the same pictures; sums, so that several processes can be added up.

    Args:
        fates: How many pictures got the same label, got another, failed on one of the two, were left out.
        distance: Sum of the pictures' total variation distances (half of what the probabilities differ by), each 0..1.
        champion_confidence: Sum of the champion's highest probabilities.
        challenger_confidence: Sum of the other version's.
        pairs: How often which labels stood against each other, the champion's first.
        stopped: Why the other version gets no more pictures; None where it does.
    """

    fates: Counter[str] = field(default_factory=Counter)
    distance: float = 0.0
    champion_confidence: float = 0.0
    challenger_confidence: float = 0.0
    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    stopped: str | None = None

    def add(
        self, champion: LiveModel, challenger: LiveModel, one: Outcome, other: Outcome
    ) -> tuple[Fate, float] | None:
        """Counts a picture by the champion's outcome and the other's.

        Returns:
            What became of it and the distance, or None where it is no picture to either.
        """
        if not isinstance(one, Answer) or not isinstance(other, Answer):
            if not isinstance(one, Answer) and not isinstance(other, Answer):
                return None
            self.fates["failed"] += 1
            return "failed", 1.0
        labels = (champion.labels[one.probabilities.argmax()], challenger.labels[other.probabilities.argmax()])
        distance = distance_of(one.probabilities, other.probabilities, champion.labels, challenger.labels)
        fate: Fate = "same" if labels[0] == labels[1] else "other"
        self.fates[fate] += 1
        self.distance += distance
        self.champion_confidence += float(one.probabilities.max())
        self.challenger_confidence += float(other.probabilities.max())
        if fate == "other" and (labels in self.pairs or len(self.pairs) < MAX_PAIRS):
            self.pairs[labels] += 1
        return fate, distance

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(
            self.fates + other.fates,
            self.distance + other.distance,
            self.champion_confidence + other.champion_confidence,
            self.challenger_confidence + other.challenger_confidence,
            self.pairs + other.pairs,
            self.stopped or other.stopped,
        )

    def report(self) -> dict[str, Any]:
        """For people and programs: shares and means."""
        num = self.fates["same"] + self.fates["other"]
        return {
            "pictures": num,
            "same_label": self.fates["same"] / num if num else None,
            "mean_distance": self.distance / num if num else None,
            "champion_confidence": self.champion_confidence / num if num else None,
            "challenger_confidence": self.challenger_confidence / num if num else None,
            "failed": self.fates["failed"],
            "dropped": self.fates["dropped"],
            "stopped": self.stopped,
            "other_labels": [
                {"champion": pair[0], "challenger": pair[1], "pictures": count}
                for pair, count in self.pairs.most_common(TOLD_PAIRS)
            ],
        }


def distance_of(
    one: NDArray[np.float32], other: NDArray[np.float32], labels: Sequence[str], other_labels: Sequence[str]
) -> float:
    """Total variation distance of two answers, 0..1; a label that one of them lacks has probability 0 there."""
    if labels == other_labels:
        return float(np.abs(one - other).sum() / 2)
    left = dict(zip(labels, one.tolist(), strict=True))
    right = dict(zip(other_labels, other.tolist(), strict=True))
    return float(sum(abs(left.get(label, 0.0) - right.get(label, 0.0)) for label in {*left, *right}) / 2)


class Challenge:
    """Gives the second version its share, and compares. Make it and use it on the event loop.

    Args:
        second: Which version, and what it gets.
        models: Hold it as ``challenger``.
        batcher: Asks.
        on_compared: Told of each picture: both versions, what became of it and the distance.
        max_failures: Share of its latest pictures, in 0..1, on which the second version may fail beyond the champion's
            own share and what chance makes of that.
        on_stopped: Told of the second version when it fails on more.
    """

    def __init__(
        self,
        second: Second,
        models: Models,
        batcher: Batcher,
        *,
        on_compared: Callable[[int, int, Fate, float], None],
        max_failures: float,
        on_stopped: Callable[[int], None],
    ) -> None:
        self._second = second
        self._models = models
        self._batcher = batcher
        self._on_compared = on_compared
        self._max_failures = max_failures
        self._on_stopped = on_stopped
        self._champion_failed: deque[bool] = deque(maxlen=RECENT)  # a picture
        self._challenger_failed: deque[bool] = deque(maxlen=RECENT)
        self.is_stopped = False  # the second version
        self._found: dict[tuple[int, int], Comparison] = {}
        self._pending_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def choose(self, champion: LiveModel) -> LiveModel:
        """Who answers a request that names no version."""
        challenger = self._models.challenger
        is_open = self._second.answers and not self.is_stopped
        is_its = is_open and challenger is not None and random.random() < self._second.share
        return challenger if is_its and challenger is not None else champion

    def offer(self, answered: LiveModel, pictures: Sequence[Picture], outcomes: Sequence[Outcome]) -> None:
        """Compares what was answered, if it is to be compared; returns at once."""
        if (both := self._both()) is None:
            return
        champion, challenger = both
        self._judge(answered, _failures(outcomes))
        if self._second.answers:
            is_wanted = answered is challenger
        else:
            is_wanted = answered is champion and random.random() < self._second.share
        if not is_wanted:
            return
        size = sum(len(each) if isinstance(each, bytes) else each.nbytes for each in pictures)
        if self._pending_bytes + size > PENDING_BYTES:
            self._drop(champion, challenger, len(pictures))
            return
        self._pending_bytes += size
        task = asyncio.get_running_loop().create_task(self._compare(champion, challenger, pictures, outcomes))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._forget(task, size))

    async def _compare(
        self, champion: LiveModel, challenger: LiveModel, pictures: Sequence[Picture], outcomes: Sequence[Outcome]
    ) -> None:
        asked = champion if self._second.answers else challenger
        try:
            others = await self._batcher.answer(asked, pictures, timeout_s=None, is_aside=True)
        except RequestError:  # no time for it
            self._drop(champion, challenger, len(pictures))
            return
        self._judge(asked, _failures(others))
        ones, others = (others, list(outcomes)) if self._second.answers else (list(outcomes), others)
        comparison = self._of(champion, challenger)
        for one, other in zip(ones, others, strict=True):
            if found := comparison.add(champion, challenger, one, other):
                self._on_compared(champion.version, challenger.version, *found)

    def end(self) -> None:
        """Gives the second version no more: another process of this server has stopped it."""
        self.is_stopped = True

    def given_up(self, asked: LiveModel) -> None:
        """Takes note of a request that one of the two was at work on when its time was over or its client left."""
        self._judge(asked, [True])

    def _judge(self, asked: LiveModel, failures: Iterable[bool]) -> None:
        """Stops the second version if it failed too often of late."""
        if (both := self._both()) is None:
            return
        champion, challenger = both
        if asked is champion:
            self._champion_failed.extend(failures)
        elif asked is challenger:
            self._challenger_failed.extend(failures)
        failed, num = sum(self._challenger_failed), len(self._challenger_failed)
        if failed < LEAST_FAILURES:
            return
        num_champion = max(1, len(self._champion_failed))
        share = sum(self._champion_failed) / num_champion
        chance = CHANCE * math.sqrt(share * (1 - share) * (1 / num + 1 / num_champion))
        may_fail = self._max_failures + share + chance
        if failed <= may_fail * num:
            return
        self.is_stopped = True
        why = f"it failed on {failed} of its last {num} pictures, {may_fail:.0%} may"
        self._of(champion, challenger).stopped = why
        logger.error("version %d is stopped, the champion answers alone: %s", challenger.version, why)
        self._on_stopped(challenger.version)

    def _both(self) -> tuple[LiveModel, LiveModel] | None:
        """Champion and second version, as long as they are two and the second is not stopped."""
        champion, challenger = self._models.champion, self._models.challenger
        if champion is None or challenger is None or champion is challenger or self.is_stopped:
            return None
        return champion, challenger

    def _of(self, champion: LiveModel, challenger: LiveModel) -> Comparison:
        return self._found.setdefault((champion.version, challenger.version), Comparison())

    def _drop(self, champion: LiveModel, challenger: LiveModel, num: int) -> None:
        self._of(champion, challenger).fates["dropped"] += num
        for _ in range(num):
            self._on_compared(champion.version, challenger.version, "dropped", 1.0)

    def _forget(self, task: "asyncio.Task[None]", size: int) -> None:
        self._tasks.discard(task)
        self._pending_bytes -= size
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a comparison failed", exc_info=error)

    def found(self) -> list[dict[str, Any]]:
        """All comparisons so far, as JSON holds them."""
        return [
            {
                "champion": champion,
                "challenger": challenger,
                **vars(each),
                "pairs": [[*pair, count] for pair, count in each.pairs.items()],
            }
            for (champion, challenger), each in self._found.items()
        ]

    async def stop(self) -> None:
        """Gives up what is still to be compared."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _failures(outcomes: Iterable[Outcome]) -> Iterator[bool]:
    """Whether the network failed on each; a picture that is none is no failure."""
    return (isinstance(each, RequestError) for each in outcomes)


def reports_of(processes: Iterable[Iterable[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The comparisons that several processes found, added up; the latest versions first."""
    summed: dict[tuple[int, int], Comparison] = {}
    for each in (each for found in processes for each in found):
        key = (each.pop("champion"), each.pop("challenger"))
        pairs = Counter({(one, other): count for one, other, count in each.pop("pairs")})
        made = Comparison(Counter(each.pop("fates")), pairs=pairs, **each)
        summed[key] = summed[key] + made if key in summed else made
    return [
        {"champion": str(key[0]), "challenger": str(key[1]), **comparison.report()}
        for key, comparison in sorted(summed.items(), reverse=True)
    ]
