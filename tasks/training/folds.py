"""Folds that keep near-duplicates together and spread every class, as a function of the groups and the seed alone."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NEVER_HELD_OUT = -1


def assign_folds(targets: Sequence[int], groups: Sequence[str], *, num_folds: int, seed: int) -> NDArray[np.intp]:
    """The fold in which each row is held out, (N,) in [0, num_folds), or `NEVER_HELD_OUT`.

    Groups are dealt to the folds class by class, in the order of a hash. A class with a single group is never held out:
    without it no fit could know the class.

    Args:
        targets: Class of each row.
        groups: Near-duplicate group of each row; all rows of a group land in one fold, with its most frequent class.
        num_folds: At least 2.
        seed: Of the order.
    """
    classes: dict[str, Counter[int]] = defaultdict(Counter)
    for group, target in zip(groups, targets, strict=True):
        classes[group][target] += 1
    by_class: dict[int, list[str]] = defaultdict(list)
    for group, counts in classes.items():
        by_class[min(counts, key=lambda target: (-counts[target], target))].append(group)
    fold_of: dict[str, int] = {}
    dealt = 0
    for target in sorted(by_class):
        mine = sorted(by_class[target], key=lambda group: hashlib.sha256(f"{seed} {group}".encode()).digest())
        for group in mine:
            fold_of[group] = dealt % num_folds if len(mine) > 1 else NEVER_HELD_OUT
            dealt += len(mine) > 1
    return np.array([fold_of[group] for group in groups], dtype=np.intp)
