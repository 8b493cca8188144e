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


def progress(items: Iterable[Item], *, total: int, what: str, unit: str = "img") -> Iterator[Item]:
    """Yields the items and shows how far the work is.

    Args:
        items: What is worked through.
        total: How many there are.
        what: The name of the work, such as the stage.
        unit: What is counted.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, desc=what, unit=unit, file=sys.stderr, delay=0.5)
    else:
        yield from _logged(items, total, what, unit)


def _logged(items: Iterable[Item], total: int, what: str, unit: str) -> Iterator[Item]:
    """A line every LOG_INTERVAL_S: how many are done, and how many a second."""
    start = told = time.monotonic()
    for count, item in enumerate(items):
        now = time.monotonic()
        if now - told >= LOG_INTERVAL_S:
            told = now
            logger.info("%s: %d of %d %s, %.0f a second", what, count, total, unit, count / (now - start))
        yield item
