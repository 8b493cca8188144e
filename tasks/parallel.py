"""Work on all cores, in order, without holding more than a few items at once."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

ITEMS_PER_THREAD = 4

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(call: Callable[[Item], Result], items: Iterable[Item], *, workers: int) -> Iterator[Result]:
    """Results in the order of the items, from threads; a few items a thread are under way, not all as in Executor.map.

    Args:
        call: Must leave the interpreter's lock for its work, as decoding, hashing and onnxruntime do.
        items: Taken as they are needed.
        workers: Threads.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(call, item))
                if len(waiting) >= ITEMS_PER_THREAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
