"""Which split an image belongs to. Splits never move: only the image's near-duplicate group and the seed decide.

Adding, renaming, relabelling or removing other images leaves every image where it was, so a champion was never trained
on today's test images.
"""

import hashlib
from collections.abc import Collection
from typing import Final, Literal

Split = Literal["train", "val", "test"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val", "test")


def hash_fraction(group: str, seed: int) -> float:
    """A number in [0, 1) that depends on the group and the seed alone, uniform over groups."""
    digest = hashlib.sha256(f"split:{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:7]) / 2**56


def hashed_split(group: str, *, seed: int, val_fraction: float, test_fraction: float) -> Split:
    """The split of a group, where the folders do not say.

    Test grows from 0 upwards and val from 1 downwards: a change of one fraction never moves an image between
    the other two.

    Args:
        group: Near-duplicate group.
        seed: Of the whole run.
        val_fraction: Expected share of groups in val.
        test_fraction: Expected share of groups in test.
    """
    fraction = hash_fraction(group, seed)
    if fraction < test_fraction:
        return "test"
    return "val" if fraction >= 1 - val_fraction else "train"


def assigned_split(
    group: str,
    official: Split | None,
    official_splits: Collection[Split],
    *,
    seed: int,
    val_fraction: float,
    test_fraction: float,
) -> Split:
    """The split of an image: its official one, and hashed where there is none.

    Where the official folders lack val or test, that share is hashed out of official train.

    Args:
        group: Near-duplicate group.
        official: The split that the image's folder names, if any.
        official_splits: All splits that the set's folders name.
        seed: Of the whole run.
        val_fraction: Expected share of groups in val.
        test_fraction: Expected share of groups in test.
    """
    if official in ("val", "test"):
        return official
    hashed = hashed_split(group, seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    if official is None or hashed not in official_splits:
        return hashed
    return official
