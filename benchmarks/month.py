"""What benchmarks/soak.py has a month bring: on which night what goes wrong, images good and bad, what clients ask."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.images import decode_image
from flows.sample import sample_images

EVENTS = {  # how many nights of thirty
    "none": 4,  # no new image
    "bad": 5,  # images that must not be trained on
    "drifted": 1,  # clients send negatives
    "relabelled": 1,  # a class gets another name
    "lying": 1,  # the DVC remote loses what it has just taken
    "full": 1,  # no room on the workspace's disk while it retrains
    "killed": 1,  # the retrain is killed with kill -9, sometime
}
ALONE = {"none"}  # nights on which nothing else happens
OLD_NAME, NEW_NAME = "7", "seven"
NUM_FIRST, NUM_A_DAY, NUM_ASKED = 1000, (15, 35), 60

AT_THE_DOOR, IN_QUARANTINE = "at the door", "in quarantine"


@dataclass(frozen=True)
class Bad:
    """An image that must not be trained on.

    Args:
        path: In the inbox, and in data/raw where it gets so far.
        data: The file.
        where: Who must notice it.
        reason: What the reason must say.
    """

    path: str
    data: bytes
    where: str
    reason: str


def planned(nights: int, events: Sequence[str], generator: np.random.Generator) -> list[frozenset[str]]:
    """What happens on each night, the first of which is an ordinary one.

    Of thirty nights each event has as many as EVENTS says, of fewer proportionally fewer but one; each has a night of
    its own as long as there are enough.
    """
    dealt = [name for name in events for _ in range(max(1, EVENTS[name] * nights // 30))]
    free = [int(each) for each in generator.permutation(np.arange(1, nights))]
    found: list[set[str]] = [set() for _ in range(nights)]
    for name in sorted(dealt, key=lambda each: each not in ALONE):  # those first that want a night for themselves
        fits = [night for night in free if not found[night] or not (ALONE & ({name} | found[night]))]
        if fits:
            night = min(fits, key=lambda each: len(found[each]))  # min() takes the first, and the order is random
            found[night].add(name)
    return [frozenset(each) for each in found]


class Pictures:
    """The sample's digits in an order that a seed says: the first set, then each day's.

    Args:
        generator: Of that order, and of what clients ask.
    """

    def __init__(self, generator: np.random.Generator) -> None:
        everything = list(sample_images().items())
        self._generator = generator
        self._order = [everything[each] for each in generator.permutation(len(everything))]
        self._next = NUM_FIRST

    @property
    def num_given(self) -> int:
        """Images that were given out."""
        return self._next

    def first(self, folder: Path) -> None:
        """Writes the set that the month begins with, a folder a class."""
        write(folder, dict(self._order[:NUM_FIRST]))

    def day(self, names: Mapping[str, str]) -> dict[str, bytes]:
        """A day's new images by their path; ``names`` are the classes' new names."""
        number = int(self._generator.integers(*NUM_A_DAY))
        taken = self._order[self._next : self._next + number]
        self._next += len(taken)
        return {renamed(path, names): data for path, data in taken}

    def asked(self, *, drifted: bool) -> list[bytes]:
        """What clients send on a day."""
        rows = self._generator.choice(len(self._order), NUM_ASKED, replace=False)
        return [_negative(self._order[row][1]) if drifted else self._order[row][1] for row in rows]

    def bad(self, night: int, kind: int) -> list[Bad]:
        """One or two bad images.

        Args:
            night: Makes their names.
            kind: Any number; counts through the kinds.
        """
        broken = Bad(f"4/broken-{night}.png", self._order[0][1][:60], AT_THE_DOOR, "truncated|cannot|not|broken")
        path, known = next(each for each in self._order[:NUM_FIRST] if not each[0].startswith(("3/", f"{OLD_NAME}/")))
        wrong = Bad(f"3/known-{night}.png", known, AT_THE_DOOR, f"under another label: {path.split('/')[0]}")
        tiny = Bad(f"5/tiny-{night}.png", self._noise(2, 2), IN_QUARANTINE, "too small: 2x2")
        strip = Bad(f"6/strip-{night}.png", self._noise(8, 200), IN_QUARANTINE, "too long and narrow: 200x8")
        twin = self._noise(8, 8)
        twins = [
            Bad(f"{label}/twin-{night}.png", twin, IN_QUARANTINE, "the same bytes under another label")
            for label in ("1", "2")
        ]
        return ([broken, tiny], [wrong, strip], twins)[kind % 3]

    def _noise(self, height: int, width: int) -> bytes:
        return _encoded(self._generator.integers(0, 256, (height, width), dtype=np.uint8))


def renamed(path: str, names: Mapping[str, str]) -> str:
    """A path under the new name of its class."""
    label, name = path.split("/")
    return f"{names.get(label, label)}/{name}"


def write(folder: Path, images: Mapping[str, bytes]) -> None:
    """Writes images below a folder."""
    for path, data in images.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def _negative(data: bytes) -> bytes:
    return _encoded(255 - decode_image(data))


def _encoded(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
