"""Changes of a shared registry by name, and a process that makes one until the S3 kills it (tests/object_stores.py)."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import s3fs  # noqa: F401  so that a process which is forked need not

from deploy.shared_registry import SharedRegistry
from tests.object_stores import kill_after

CHANGES: Mapping[str, Callable[[SharedRegistry, Path], object]] = {
    "register": lambda registry, bundle: registry.register(bundle, {"git": "c"}, card=bundle.parent / "card.md"),
    "promote": lambda registry, _: registry.promote(2, reason="better", expected=1),
    "rollback": lambda registry, _: registry.rollback("bad") if registry.champion_id() == 2 else registry.repair(),
    "sweep": lambda registry, _: registry.sweep(keep_last=0),
}


def change_until_killed(
    change: str, url: str, copy: Path, bundle: Path, environment: Mapping[str, str], writes: int
) -> None:
    os.environ.update(environment)
    kill_after(writes, process=os.getpid())
    CHANGES[change](SharedRegistry(url, copy), bundle)
