"""Leases: each retrain gets a number, and only the latest that came to the gate may still change the champion.

A run that was taken for dead may wake up hours later, with a model of yesterday's data. The registry's compare-and-swap
does not notice: nobody promoted between this run's look and its promotion. So a lease is a fencing token (Kleppmann,
Designing Data-Intensive Applications, chapter 8): numbers only grow, the gate is entered one at a time, and it admits
no number below the highest that it has admitted.
"""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from deploy.errors import TanukiError
from deploy.files import write_json
from tasks.layout import Layout


class SupersededError(TanukiError):
    """A run whose turn has passed: a later one has been before the gate."""


@dataclass(frozen=True)
class Lease:
    """The right to come before the gate, as long as no later run has.

    Args:
        fence: The file that the numbers lie in; of the workspace, not of the run's clone.
        number: 1, 2, 3...
    """

    fence: Path
    number: int

    @contextmanager
    def at_the_gate(self) -> Iterator[None]:
        """Enters the gate alone.

        Raises:
            SupersededError: If a run with a later lease has been there.
        """
        with _locked(self.fence):
            numbers = _read(self.fence)
            if self.number < numbers["admitted"]:
                raise SupersededError(
                    f"This run has lease {self.number}, and the run with lease {numbers['admitted']}, which began "
                    "later, has been before the gate. Its data are newer, so this model was not judged. "
                    "Nothing is to be done."
                )
            write_json(self.fence, {**numbers, "admitted": self.number})
            yield


def take_lease(layout: Layout) -> Lease:
    """The next lease of a workspace."""
    with _locked(layout.fence):
        numbers = _read(layout.fence)
        numbers["given"] += 1
        write_json(layout.fence, numbers)
    return Lease(layout.fence, numbers["given"])


def _read(fence: Path) -> dict[str, int]:
    if not fence.is_file():
        return {"given": 0, "admitted": 0}
    numbers: dict[str, int] = json.loads(fence.read_bytes())
    return numbers


@contextmanager
def _locked(fence: Path) -> Iterator[IO[str]]:
    """Waits for its turn; the kernel lets go of it when the process ends, however it ends."""
    fence.parent.mkdir(parents=True, exist_ok=True)
    with fence.with_suffix(".lock").open("a", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
