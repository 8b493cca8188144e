"""How many pictures go through a network at once: as many as are fast, and no more than memory holds.

Called by the modules beside this one.
"""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
CPU_PART_PX = 8 * 224 * 224
"""More pictures at once are slower: their maps leave the caches, and those above 32 MB come from the kernel anew each
time, page by page. At 224 px eight take .65 (mobilenet_v2), .52 (squeezenet1_1) and .88 (resnet18) of the time of 32
forward in float32, .76, .54 and .91 in bfloat16; forward and back to the pixels .52, .77 and .95, and .74, .87 and 1.04
(two cores)."""

logger = logging.getLogger(__name__)

T = TypeVar("T")

_held: dict[tuple[int, ...], int] = {}  # pictures of a shape that memory held at once, where it did not hold more


def in_parts(run: Callable[..., T], maps: Tensor, *more: Tensor) -> list[T]:
    """What ``run`` makes of some pictures, or of maps (B, ...), part after part; no weight gets a gradient there.

    On a CPU so many at once as `CPU_PART_PX` says; anywhere else all, and all of what is no (B, C, H, W). Where memory
    does not hold that, all parts are run again with half as many, and later ones of the same shape with no more.

    Args:
        run: Takes a part of each.
        maps: Whose size says how many go at once.
        more: Of the same length B.
    """
    shape, size = tuple(maps.shape[1:]), len(maps)
    if maps.device.type == "cpu" and maps.ndim == 4:
        size = max(1, CPU_PART_PX // (maps.shape[2] * maps.shape[3]))
    size = min(size, len(maps), _held.get(shape, size))

    def attempt(at_once: int) -> list[T]:
        if at_once < size:
            _held[shape] = at_once
        return [run(*part) for part in zip(*(torch.split(each, at_once) for each in (maps, *more)), strict=True)]

    return halved_until_it_fits(attempt, size)


def halved_until_it_fits(attempt: Callable[[int], T], size: int) -> T:
    """What an attempt with ``size`` pictures at once returns, or with half of them and so on where memory ends.

    Raises:
        Exception: Of the attempt, if it was another one or came with a single picture.
    """
    while True:
        try:
            return attempt(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or size == 1:
                raise
        half = (size + 1) // 2
        logger.warning("out of memory with %d pictures at once: going on with %d, same steps", size, half)
        size = half


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device or the machine had no memory left; torch's CPU says so in a plain RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in text for words in OUT_OF_MEMORY)
