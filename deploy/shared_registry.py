"""A registry behind a URL, in an object store that many machines see; in a folder here lies a copy of what was read.

    versions/ID/lineage.json          the number ID is taken by whoever creates this object
    versions/ID/...                   the bundle's files and its card; each created once and never changed
    events/00000001.json              one immutable object an event: the log
    champion.json                     derived from the log, for whoever reads without tanuki

There is no lock. An event is created under the number after the last one that was seen, and the store lets nobody else
create it again: of two promotions at once the second is refused. What one machine left half registered, the same
command finishes on any. The copy is a registry in a folder (deploy/registry.py), brought up to the log before it is
read; files of a version come when they are asked for, each checked by its digest, and the copy can be deleted at any
time. Where the store does not answer, reading goes on with what was last seen, and nothing can be changed.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from deploy.bundle import INDEX, SIGNATURE, bundle_digests, bundle_files
from deploy.errors import BundleError, RegistryError
from deploy.event_log import MOVES, Event, append_lines, event_line, parse_event, whole_lines
from deploy.files import sha256_bytes, sha256_file, write_bytes
from deploy.object_store import ObjectStore
from deploy.registry import (
    CARD,
    INCOMING,
    LINEAGE,
    Registry,
    Version,
    check_pointer,
    locked,
    parse_pointer,
    utc_now,
)

POINTER = "champion.json"
AHEAD = 16  # events asked for at once, where there are new ones
FETCHING = ".fetching-"
ABANDONED = timedelta(days=1)

logger = logging.getLogger(__name__)


class SharedRegistry(Registry):
    """A registry behind a URL.

    Args:
        url: Such as ``s3://bucket/prefix``.
        copy: The folder of the copy; None for one in the user's cache.
        clock: Tells the time of events.

    Raises:
        RegistryError: If the URL's protocol is unknown here.
    """

    def __init__(self, url: str, copy: Path | None = None, *, clock: Callable[[], datetime] = utc_now) -> None:
        super().__init__(copy or copy_of(url), clock=clock)
        self.place = url.rstrip("/")
        self._store = ObjectStore(url)
        self._was_read = False
        self._is_away = False

    def events(self) -> list[Event]:
        if not self._was_read:
            self._catch_up_if_possible()
        return super().events()

    def version(self, id_: int) -> Version:
        if not self._was_read:
            self._catch_up_if_possible()
        return super().version(id_)

    def stamp(self) -> tuple[int, ...] | None:
        """What changes when there is another champion; asks the store.

        Raises:
            RegistryError: If it does not answer and was never read, or is not the one of the copy.
        """
        self._catch_up_if_possible()
        return super().stamp()

    def sweep(self, *, keep_last: int) -> list[int]:
        removed = super().sweep(keep_last=keep_last)
        with self._changing():
            self._sweep_up()
        return removed

    # Reading: the copy is brought up to the store.

    def _catch_up_if_possible(self) -> None:
        try:
            self._catch_up()
            if self._is_away:
                logger.info("%s answers again", self.place)
            self._is_away = False
        except OSError as error:
            if not whole_lines(self._log):
                raise RegistryError(
                    f"{self.place} cannot be read: {error}. Look at the address, the network and the keys "
                    "(for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)."
                ) from error
            if not self._is_away:
                logger.warning("%s: going on with what was last seen there", error)
            self._is_away = True

    def _catch_up(self) -> None:
        """Reads the events that the copy lacks, with what their versions' lineage says.

        Raises:
            OSError: If the store does not answer.
            RegistryError: If its log is another one than the copy's, or was edited.
        """
        self._versions_dir.mkdir(parents=True, exist_ok=True)
        with locked(self.root / ".catching-up"), self._reading():
            known = whole_lines(self._log).splitlines(keepends=True)
            last, following = self._store.read_all([_event(len(known)), _event(len(known) + 1)])
            if known and last != known[-1]:
                raise RegistryError(
                    f"{self.place} is not the registry that {self.root} is a copy of: event {len(known)} is another "
                    f"one there. If that is right, delete {self.root}; if not, somebody edited the log."
                )
            number, ahead = len(known) + 1, [following]
            while ahead[0] is not None:
                new = [line for line in ahead if line is not None]
                self._take_in(
                    [parse_event(each, number + at, where=self._named(number + at)) for at, each in enumerate(new)]
                )
                number += len(new)
                ahead = self._store.read_all([_event(number + at) for at in range(AHEAD)]) if all(ahead) else [None]
            super()._point()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Whoever looks into the copy meanwhile looks into the copy; where there is none yet, asks again afterwards."""
        self._was_read = True
        try:
            yield
        except (OSError, RegistryError):
            self._was_read = bool(whole_lines(self._log))
            raise

    def _take_in(self, events: list[Event]) -> None:
        """Adds events to the copy's log; the lineage of what they register comes first."""
        registered = [event.version for event in events if event.kind == "registered"]
        found = self._store.read_all([_object(id_, LINEAGE) for id_ in registered])
        for id_, lineage in zip(registered, found, strict=True):
            if lineage is not None:  # gone: whoever asks for the version is told so
                write_bytes(self._versions_dir / str(id_) / LINEAGE, lineage)
        append_lines(self._log, "".join(map(event_line, events)))
        for event in events:
            if event.kind == "removed":
                shutil.rmtree(self._versions_dir / str(event.version), ignore_errors=True)

    def _ids(self) -> list[int]:
        """Versions that the log registers; a number that is only taken is none yet."""
        kinds = {event.version: event.kind for event in self.events()}
        return sorted(
            id_ for id_, kind in kinds.items() if kind != "removed" and (self._versions_dir / str(id_)).is_dir()
        )

    def _fetch(self, version: Version) -> None:
        """Brings the files of a version that are not here, or not as they were registered."""
        with locked(self.root / f"{FETCHING}{version.id}"):
            index = version.directory / INDEX
            if not index.is_file():
                self._bring(version, [INDEX])
            try:
                digests = bundle_digests(version.directory)
            except BundleError:
                self._bring(version, [INDEX])  # the copy rotted, or what is there did: reading it tells
                digests = self._digests(version)
            registered = next((event.files for event in self.events() if event.version == version.id), None)
            wanted = {**digests, **(registered or {})}
            self._bring(version, [name for name, digest in wanted.items() if _differs(version, name, digest)])
            signature = self._ask(version, [SIGNATURE])[0]
            if signature is not None:
                write_bytes(version.directory / SIGNATURE, signature)
            elif not self._is_away:
                (version.directory / SIGNATURE).unlink(missing_ok=True)

    def _digests(self, version: Version) -> Mapping[str, str]:
        try:
            return bundle_digests(version.directory)
        except BundleError as error:
            raise RegistryError(f"version {version.id} is damaged: {error} {self._remedy(version.id)}") from error

    def _bring(self, version: Version, names: list[str]) -> None:
        """Downloads files of a version into the copy; what is missing there stays missing here.

        Raises:
            RegistryError: If the store does not answer.
        """
        found = self._ask(version, names)
        if names and self._is_away:
            raise RegistryError(
                f"{self.place} does not answer, and {version.directory} lacks {len(names)} files of version "
                f"{version.id}, {names[0]} among them. Try again when it does."
            )
        for name, data in zip(names, found, strict=True):
            if data is None:
                continue
            with tempfile.TemporaryDirectory(dir=self.root, prefix=INCOMING) as folder:  # a bundle holds no stray files
                path = Path(folder) / "file"
                write_bytes(path, data)
                target = version.directory / name
                target.parent.mkdir(exist_ok=True)
                path.replace(target)

    def _ask(self, version: Version, names: list[str]) -> list[bytes | None]:
        """Objects of a version; where the store is away, the copy must do."""
        if self._is_away:
            return [None] * len(names)
        try:
            return self._store.read_all([_object(version.id, name) for name in names])
        except OSError as error:
            self._is_away = True
            logger.warning("%s: going on with what is here of version %d", error, version.id)
            return [None] * len(names)

    # Changing: an event is created where there is none, or not at all.

    def _clean_up(self) -> None:
        """Brings the copy up to the store, and the store's pointer up to the log."""
        self._store.require_exclusive_creation()
        self._catch_up()
        self._is_away = False
        for leftover in (*self._versions_dir.glob(f"{INCOMING}*"), *self.root.glob(f"{INCOMING}*")):
            shutil.rmtree(leftover, ignore_errors=True)
        data, name = self._store.read(POINTER), f"{self.place}/{POINTER}"
        if data is not None:
            check_pointer(parse_pointer(data, name=name), self.events(), name=name, log=f"{self.place}/events")
        self._point()

    def _write(self, event: Event) -> None:
        """Creates an event; where somebody else did that first, after theirs, unless it rests on what they changed."""
        while not self._store.create(_event(event.sequence), event_line(event).encode()):
            self._catch_up()
            events = super().events()
            new = events[event.sequence - 1 :]
            if event.kind == "registered" and any(other.version == event.version for other in new):
                return  # the same bundle, from another machine
            rests_on_champion = event.kind in MOVES or event.kind == "removed"
            if rests_on_champion and any(other.kind in MOVES or other.version == event.version for other in new):
                champion = events[-1].champion
                raise RegistryError(
                    f"somebody else changed {self.place} meanwhile: the champion is version {champion or 'none'} by "
                    f"now. Look (`tanuki versions`), then run the command again if it still holds."
                )
            champion = event.champion if event.kind in MOVES else events[-1].champion
            event = replace(event, sequence=len(events) + 1, champion=champion)
        self._catch_up()

    def _add(self, bundle_dir: Path, lineage: Mapping[str, Any], card: Path | None) -> int:
        """Takes a number, or the one that this bundle took before a kill, and creates the files under it."""
        with self._incoming(bundle_dir, card) as (folder, bundle):
            id_ = self._next_id()
            while True:
                stored = json.dumps(self._stored_lineage(id_, bundle, lineage), indent=2, sort_keys=True).encode()
                if self._store.create(_object(id_, LINEAGE), stored):
                    break
                taken = self._store.read(_object(id_, LINEAGE)) or b"{}"
                if json.loads(taken).get("digest") == bundle.digest:
                    stored = taken
                    break
                id_ += 1
            write_bytes(folder / LINEAGE, stored)
            self._create_files(folder, id_, [*bundle_files(bundle), *([CARD] if card is not None else [])])
            shutil.rmtree(self._versions_dir / str(id_), ignore_errors=True)  # of an attempt that was cut short
            self._put_in_place(folder, id_)
        return id_

    def _create_files(self, folder: Path, id_: int, names: list[str]) -> None:
        created = self._store.create_all([(_object(id_, name), (folder / name).read_bytes()) for name in names])
        for name, is_ours in zip(names, created, strict=True):
            if is_ours:
                continue
            theirs = self._store.read(_object(id_, name)) or b""
            if name == CARD:  # told again, with other words
                (folder / CARD).unlink()
                write_bytes(folder / CARD, theirs)
            elif name != SIGNATURE:
                raise RegistryError(
                    f"{self.place}/{_object(id_, name)} is there already, and is not that file of this bundle "
                    f"({sha256_bytes(theirs)[:12]}). Somebody put it there by hand: delete it, and run this again."
                )

    def _share_signature(self, id_: int) -> None:
        self._store.write(_object(id_, SIGNATURE), (self._versions_dir / str(id_) / SIGNATURE).read_bytes())

    def _discard(self, id_: int) -> None:
        self._store.remove_folder(f"versions/{id_}")

    def _sweep_up(self) -> None:
        """Removes what a kill left of removed versions, and numbers that were taken long ago and never registered."""
        kinds = {event.version: event.kind for event in self.events()}
        there = [int(name) for name in self._store.folders("versions") if name.isdecimal()]
        for id_ in (each for each in there if kinds.get(each, "removed") == "removed"):
            lineage = None if id_ in kinds else self._store.read(_object(id_, LINEAGE))
            if lineage is None or self._clock() - _taken_at(lineage) > ABANDONED:
                self._discard(id_)

    def _point(self) -> None:
        super()._point()
        pointer = self._read_pointer()
        if pointer is not None:
            self._store.advance(
                POINTER,
                self._pointer.read_bytes(),
                is_newer=lambda there: _sequence(there) < pointer["sequence"],
            )

    def _named(self, number: int) -> str:
        return f"{self.place}/{_event(number)}"

    def _remedy(self, id_: int) -> str:
        return f"Restore {self.place}/versions/{id_} from a backup, or promote another version."


def copy_of(url: str) -> Path:
    """Where the copy of a registry lies unless told otherwise: in the user's cache ($XDG_CACHE_HOME, ~/.cache)."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return caches / "tanuki" / "registries" / sha256_bytes(url.rstrip("/").encode())[:16]


def _event(number: int) -> str:
    return f"events/{number:08d}.json"


def _object(id_: int, name: str) -> str:
    return f"versions/{id_}/{name}"


def _taken_at(lineage: bytes) -> datetime:
    return datetime.fromisoformat(json.loads(lineage)["registered_at"])


def _sequence(pointer: bytes) -> int:
    """On which event a pointer rests; before all of them where it was damaged."""
    try:
        return int(json.loads(pointer)["sequence"])
    except (ValueError, KeyError, TypeError):
        return 0


def _differs(version: Version, name: str, digest: str) -> bool:
    """Whether a file of the copy is not the one of that digest.

    Raises:
        RegistryError: If it would lie outside the version's folder.
    """
    path = version.directory / name
    if not path.resolve().is_relative_to(version.directory.resolve()):
        raise RegistryError(f"version {version.id} names the file {name!r}, which points outside its folder.")
    return not path.is_file() or sha256_file(path) != digest
