"""Progress of long work: a bar on a terminal, a line every few seconds in a log."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

LOG_INTERVAL_S = 5.0

logger = logging.getLogger(__name__)


def progress(items: Iterable[Item], *, total: int, what: str, unit: str = "img", done: int = 0) -> Iterator[Item]:
    """Yields the items and shows how far the work is.

    Args:
        items: What is worked through.
        total: How many there are.
        what: The name of the work, such as the stage.
        unit: What is counted.
        done: How many of them were worked through before.
    """
    if sys.stderr.isatty():
        yield from tqdm(
            items, total=total, initial=done, desc=what, unit=unit, file=sys.stderr, delay=0.5, leave=not done
        )
    else:
        yield from _logged(items, total, what, unit, done)


def _logged(items: Iterable[Item], total: int, what: str, unit: str, done: int) -> Iterator[Item]:
    """A line every LOG_INTERVAL_S: how many are done, how many a second, and how long the rest will take."""
    start = told = time.monotonic()
    for count, item in enumerate(items):
        now = time.monotonic()
        if now - told >= LOG_INTERVAL_S:
            told = now
            if count:
                rate = count / (now - start)
                told_of = (what, done + count, total, unit, rate, (total - done - count) / rate)
                logger.info("%s: %d of %d %s, %.3g a second, %.0f s to go", *told_of)
            else:  # the first one was long in coming, which says nothing of the rest
                logger.info("%s: %d of %d %s", what, done, total, unit)
        yield item
