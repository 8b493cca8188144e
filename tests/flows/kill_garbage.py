"""Kills the collection of garbage at each of its steps (``python -m tests.flows.kill_garbage FOLDER``)."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from tasks.data.feature_store import Key, Space, drop_orphans, open_store, writing
from tests.deploy.kill_everywhere import kill_at_each_step

SPACE = Space(trunk_sha256="t", preprocessing_sha256="p", engine="e", feature_dim=3)
VALUES = np.arange(18, dtype=np.float16).reshape(6, 3)
KEYS = [Key(f"{number:064x}", "centre") for number in range(6)]
NEEDED = (0, 4)


def prepare(root: Path) -> Path:
    """Two shards that hold one needed row each, and a space that nothing needs."""
    shutil.rmtree(root, ignore_errors=True)
    with writing(root, SPACE) as store:
        store.append(KEYS[:3], VALUES[:3])
        store.append(KEYS[3:], VALUES[3:])
    with writing(root, replace(SPACE, engine="other")) as other:
        other.append(KEYS[:2], VALUES[:2])
    return root


def collect(root: Path) -> None:
    needed = {KEYS[number].image_sha256 for number in NEEDED}
    drop_orphans(root, lambda space: needed if space == SPACE else set(), dry_run=False)


def check(root: Path) -> None:
    """What is needed is there at any time, and the next call ends what was begun."""
    needed = [KEYS[number] for number in NEEDED]
    np.testing.assert_array_equal(open_store(root, SPACE).gather(needed), VALUES[list(NEEDED)].astype(np.float32))
    collect(root)
    assert sorted(open_store(root, SPACE).rows) == needed
    assert [path.name for path in root.iterdir()] == [SPACE.name]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    print(kill_at_each_step(lambda: prepare(folder), collect, check, stride=1))
