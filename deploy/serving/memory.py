"""How a server that runs for months stays as small as it was: what the C library keeps is given back."""

import contextlib
import ctypes
import sys

MALLOC_ARENA_MAX = -8  # of <malloc.h>
ARENAS = 2


def give_memory_back() -> None:
    """Gives freed memory back to the system: the C library keeps it, and a server grew with every promotion."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def share_arenas() -> None:
    """Lets all threads allocate from few arenas: each keeps a hoard of its own. Before there are threads."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(MALLOC_ARENA_MAX, ARENAS)
