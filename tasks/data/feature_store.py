"""The feature store: rows of float16 under content keys, in append-only shards.

A *space* is everything that decides a feature besides the picture and its view: trunk, preprocessing, engine and
precision. Each space is a folder of shards. A shard is two files, written once and never changed:

    SPACE/space.json       what the space is
    SPACE/000001.npy       (n, D) float16, read through mmap
    SPACE/000001.json      the key of each row and a digest over both; its rename commits the shard

Several processes may add to one space at once, each under numbers of its own (`adding`); all else needs it alone.
So a kill at any moment leaves whole shards and at most a stray file, which the next writer sweeps; a shard that does
not have its digest is named, and the next writer drops it. Deleting the folder loses time and nothing else.
Written by tasks.cache_features, read through tasks.data.features, rid of what nothing needs by flows.garbage.
"""

import fcntl
import io
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.files import sha256_bytes, write_json, write_text
from tasks.errors import StoreError

LOCK_WAIT_S = 60.0
LOCK_POLL_S = 0.2
SPACE_NAME = re.compile(r"[0-9a-f]{16}")
SPACE_CARD = "space.json"

logger = logging.getLogger(__name__)


class Key(NamedTuple):
    """Names one row of a space."""

    image_sha256: str
    view: str


@dataclass(frozen=True)
class Space:
    """What decides a feature besides the picture and its view.

    Args:
        trunk_sha256: Weights, architecture and depths of the frozen backbone.
        preprocessing_sha256: Size, crop, mean and std.
        engine: What computed it and in which precision.
        feature_dim: D.
    """

    trunk_sha256: str
    preprocessing_sha256: str
    engine: str
    feature_dim: int

    @property
    def name(self) -> str:
        """The folder of the space."""
        return sha256_bytes(json.dumps(asdict(self), sort_keys=True).encode())[:16]


@dataclass(frozen=True)
class Part:
    """The ``index``-th of ``count`` equal shares of all images, by content: for as many processes or machines."""

    index: int
    count: int

    def __contains__(self, image_sha256: str) -> bool:
        return int(image_sha256[:8], 16) % self.count == self.index - 1

    def next_number(self, last: int) -> int:
        """The first number above ``last`` that is this part's; with one part, all are."""
        return last + 1 + (self.index - last - 1 - 1) % self.count


@dataclass(frozen=True)
class Shard:
    """A committed shard: its features file, and the keys of its rows in order."""

    path: Path
    keys: tuple[Key, ...]


@dataclass(frozen=True)
class Orphans:
    """Rows of a space that nothing needs.

    Args:
        space: Where they are.
        rows: How many.
        of_rows: All rows of the space.
        freed_bytes: What they take, their keys included.
    """

    space: Space
    rows: int
    of_rows: int
    freed_bytes: int


@dataclass(eq=False)
class FeatureStore:
    """The rows of one space, for reading; a `writing` store can also append and drop.

    Args:
        directory: The folder of the space.
        space: What it holds.
        part: Whose numbers of shards are used.
    """

    directory: Path
    space: Space
    part: Part = Part(1, 1)
    shards: list[Shard] = field(default_factory=list)
    rows: dict[Key, tuple[int, int]] = field(default_factory=dict)

    def __contains__(self, key: Key) -> bool:
        return key in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, keys: Sequence[Key]) -> NDArray[np.float32]:
        """The features of these keys, (N, D) float32.

        Raises:
            StoreError: If some are not stored.
        """
        if missing := [key for key in keys if key not in self.rows]:
            raise StoreError(
                f"{self.directory}: {len(missing)} of {len(keys)} features are not stored, such as view "
                f"{missing[0].view} of image {missing[0].image_sha256[:12]}. Run `python -m tasks cache_features`."
            )
        features = np.empty((len(keys), self.space.feature_dim), np.float32)
        places = np.array([self.rows[key] for key in keys], dtype=np.int64).reshape(-1, 2)
        for index in np.unique(places[:, 0]):
            chosen = places[:, 0] == index
            features[chosen] = np.load(self.shards[index].path, mmap_mode="r", allow_pickle=False)[places[chosen, 1]]
        return features

    def append(self, keys: Sequence[Key], features: NDArray[np.floating[Any]]) -> None:
        """Commits one shard: after this returns, the rows survive a kill.

        Args:
            keys: One a row, none of them stored yet.
            features: (n, D), finite as float16 (see `not_storable`).

        Raises:
            StoreError: If a row is not finite or too large for float16.
        """
        if bad := not_storable(features):
            named = ", ".join(f"view {keys[row].view} of image {keys[row].image_sha256[:12]}" for row in bad[:20])
            raise StoreError(f"{self.directory}: {len(bad)} features are not finite in float16: {named}.")
        data = io.BytesIO()  # of a full disk numpy itself would tell neither that nor where
        np.save(data, np.ascontiguousarray(features, dtype=np.float16), allow_pickle=False)
        shard = Shard(self._write_under_a_free_number(data.getvalue()), tuple(keys))
        index = {"sha256": _digest(data.getvalue(), shard.keys), "rows": [list(key) for key in keys]}
        write_text(_index_path(shard.path), json.dumps(index, separators=(",", ":")) + "\n")
        self._register(shard)

    def _write_under_a_free_number(self, data: bytes) -> Path:
        """The path of a new features file; never another's, should two processes add the same part at once."""
        number = max((int(shard.path.stem) for shard in self.shards), default=0)
        while True:
            number = self.part.next_number(number)
            path = self.directory / f"{number:06d}.npy"
            with suppress(FileExistsError):
                _write_new(path, data)
                return path

    def keep_only(self, images: Set[str]) -> None:
        """Forgets the rows of all other images; where a shard holds both, what stays is written anew first.

        A kill leaves some rows stored twice, which does no harm and is put right by the next call.
        """
        for number, shard in enumerate(list(self.shards)):
            kept = self._kept(number, images)
            if len(kept) == len(shard.keys):
                continue
            if kept:
                self.append(kept, self.gather(kept))
            _remove(shard.path)
        # Numbers of shards in ``rows`` are places in ``shards``: read anew rather than renumbered.
        left, _ = _read(self.directory, self.space)
        self.shards, self.rows = left.shards, left.rows

    def orphans(self, images: Set[str]) -> "Orphans":
        """What `keep_only` would take out."""
        rows = freed = 0
        for number, shard in enumerate(self.shards):
            if gone := len(shard.keys) - len(self._kept(number, images)):
                size = sum(path.stat().st_size for path in (shard.path, _index_path(shard.path)))
                rows += gone
                freed += size * gone // len(shard.keys)
        return Orphans(self.space, rows, sum(len(shard.keys) for shard in self.shards), freed)

    def _kept(self, number: int, images: Set[str]) -> list[Key]:
        """The rows of a shard that belong to these images and are not stored again in a later shard."""
        keys = self.shards[number].keys
        return [key for row, key in enumerate(keys) if key.image_sha256 in images and self.rows[key] == (number, row)]

    def drop_all(self) -> None:
        """Forgets every row of the space."""
        for shard in self.shards:
            _remove(shard.path)
        self.shards.clear()
        self.rows.clear()

    def _register(self, shard: Shard) -> None:
        self.rows.update({key: (len(self.shards), row) for row, key in enumerate(shard.keys)})
        self.shards.append(shard)


def not_storable(features: NDArray[np.floating[Any]]) -> list[int]:
    """Rows of (n, D) that hold NaN, infinity, or what float16 cannot (above 65,504)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return [int(row) for row in np.flatnonzero(~np.isfinite(features.astype(np.float16)).all(axis=1))]


def open_store(root: Path, space: Space) -> FeatureStore:
    """Opens a space for reading; one that does not exist yet is empty.

    Raises:
        StoreError: If shards are damaged; all are named.
    """
    store, damaged = _read(root / space.name, space)
    if damaged:
        raise StoreError(
            f"{store.directory}: {len(damaged)} shard(s) are damaged: {_names(damaged)}. "
            "Run `python -m tasks cache_features`: it drops them and computes their features again."
        )
    return store


@contextmanager
def writing(root: Path, space: Space, *, wait_s: float = LOCK_WAIT_S) -> Iterator[FeatureStore]:
    """Opens a space for writing, held by one process at a time; damaged shards and strays are dropped first.

    Args:
        root: The folder of all spaces.
        space: Which.
        wait_s: How long to wait for another writer, in seconds.

    Raises:
        StoreError: If another process keeps writing it.
    """
    directory = root / space.name
    with _locked(directory, fcntl.LOCK_EX, wait_s):
        store, damaged = _read(directory, space)
        if damaged:
            logger.warning(
                "%s: dropped %d damaged shard(s): %s; their features are computed again",
                directory,
                len(damaged),
                _names(damaged),
            )
        for path in damaged:
            _remove(path)
        _sweep(store)
        write_json(directory / SPACE_CARD, asdict(space))
        yield store


@contextmanager
def adding(root: Path, space: Space, part: Part, *, wait_s: float = LOCK_WAIT_S) -> Iterator[FeatureStore]:
    """Opens a space for adding a part of the images, beside others that add theirs; nothing is dropped or swept.

    Args:
        root: The folder of all spaces.
        space: Which.
        part: Whose numbers are used; should two processes add the same one at once, rows may be stored twice.
        wait_s: How long to wait for a process that has the space alone, in seconds.

    Raises:
        StoreError: If another process keeps the space for itself.
    """
    directory = root / space.name
    with _locked(directory, fcntl.LOCK_SH, wait_s):
        store, _ = _read(directory, space)
        store.part = part
        write_json(directory / SPACE_CARD, asdict(space))
        yield store


def drop_orphans(root: Path, needed: Callable[[Space], Set[str]], *, dry_run: bool) -> list[Orphans]:
    """Takes out the rows that nothing needs, space by space; a space without any is left as it is.

    Args:
        root: The folder of all spaces.
        needed: The images (sha256) whose rows in a space are needed.
        dry_run: Only tell.

    Raises:
        StoreError: If another process keeps writing a space, or a space does not tell what it is.
    """
    found = []
    for directory in sorted(path for path in root.glob("*") if SPACE_NAME.fullmatch(path.name)):
        if not _holds_something(directory):
            if not dry_run:
                _remove_empty(directory)
            continue
        space = _read_space(directory)
        images = needed(space)
        if dry_run:
            found.append(_read(directory, space)[0].orphans(images))
            continue
        with writing(root, space) as store:
            found.append(store.orphans(images))
            store.keep_only(images)
            if not store.rows:
                (directory / SPACE_CARD).unlink()
                directory.rmdir()
    return [orphans for orphans in found if orphans.rows]


def _holds_something(directory: Path) -> bool:
    """Whether there is more in a space's folder than what a kill at its first step or before its last leaves."""
    return any(not path.name.startswith(".") for path in directory.iterdir())


def _remove_empty(directory: Path) -> None:
    """Removes the folder of a space that holds nothing, unless another process begins to fill it."""
    with _locked(directory, fcntl.LOCK_EX, LOCK_WAIT_S):
        if not _holds_something(directory):
            shutil.rmtree(directory)


def _read_space(directory: Path) -> Space:
    """What a folder of shards is by its card."""
    try:
        space = Space(**json.loads((directory / SPACE_CARD).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(
            f"{directory / SPACE_CARD} cannot be read ({error}), so nobody can tell whose features these are. "
            "Run `python -m tasks cache_features`, which mends that of the current backbone; if it stays so, delete "
            f"{directory}: only time is lost."
        ) from error
    if space.name != directory.name:
        raise StoreError(f"{directory / SPACE_CARD} is that of another space. Delete {directory}: only time is lost.")
    return space


def _read(directory: Path, space: Space) -> tuple[FeatureStore, list[Path]]:
    """The store of all whole shards, and the feature files of the damaged ones."""
    store, damaged = FeatureStore(directory, space), []
    for index_path in sorted(directory.glob("[0-9]*.json")):
        shard = _read_shard(index_path, space.feature_dim)
        if shard is None:
            damaged.append(index_path.with_suffix(".npy"))
        else:
            store._register(shard)
    return store, damaged


def _read_shard(index_path: Path, feature_dim: int) -> Shard | None:
    """A shard whose digest, shape and type hold, else None."""
    try:
        index = json.loads(index_path.read_bytes())
        shard = Shard(index_path.with_suffix(".npy"), tuple(Key(*row) for row in index["rows"]))
        if _digest(shard.path.read_bytes(), shard.keys) != index["sha256"]:
            return None
        features = np.load(shard.path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError):
        return None
    return shard if features.shape == (len(shard.keys), feature_dim) and features.dtype == np.float16 else None


def _digest(data: bytes, keys: Iterable[Key]) -> str:
    """Over the features file and the keys: neither can change alone."""
    return sha256_bytes(data + "\n".join(f"{key.image_sha256} {key.view}" for key in keys).encode())


def _sweep(store: FeatureStore) -> None:
    """Removes what a killed writer left: temporary files, and features without their index."""
    committed = {path for shard in store.shards for path in (shard.path, _index_path(shard.path))}
    for path in store.directory.iterdir():
        if path.is_file() and path not in committed and path.name != SPACE_CARD:
            logger.info("%s: left by an interrupted run, removed", path)
            path.unlink()


def _remove(features_path: Path) -> None:
    """Takes a shard out, its index first, so that a kill between the two leaves a stray and no broken shard."""
    _index_path(features_path).unlink(missing_ok=True)
    features_path.unlink(missing_ok=True)


def _write_new(path: Path, data: bytes) -> None:
    """Writes a file that is not there yet; a kill leaves a part of it, and no index, so that it does not count.

    Raises:
        FileExistsError: If it is there.
    """
    with path.open("xb") as file:
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def _index_path(features_path: Path) -> Path:
    return features_path.with_suffix(".json")


def _names(paths: Iterable[Path]) -> str:
    return ", ".join(path.name for path in paths)


@contextmanager
def _locked(directory: Path, mode: int, wait_s: float) -> Iterator[None]:
    """Holds the folder itself: no lock file that DVC would track, and the kernel frees it when the process dies."""
    deadline, told = time.monotonic() + wait_s, False
    while (handle := _try_lock(directory, mode)) is None:
        if time.monotonic() >= deadline:
            raise StoreError(
                f"{directory} is being written by another process, for more than {wait_s:g} s. "
                "Wait for it to finish (or end it) and run again; nothing was changed."
            )
        if not told:
            logger.info("%s: another process writes it; waiting up to %g s", directory, wait_s)
            told = True
        time.sleep(LOCK_POLL_S)
    try:
        yield
    finally:
        os.close(handle)


def _try_lock(directory: Path, mode: int) -> int | None:
    """The folder, made where there is none, open and locked; None where another process has it, or has removed it."""
    directory.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):  # `tanuki gc` removes a folder that is empty, and its lock with it
        handle = os.open(directory, os.O_RDONLY)
        try:
            fcntl.flock(handle, mode | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), directory.stat()):
                return handle
        except BlockingIOError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    return None
