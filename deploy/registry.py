"""The registry: immutable versions of bundles, a log of what happened to them, and which one is the champion.

    versions/ID/      a bundle's files, with lineage.json and model_card.md beside them; never changed again
    events.jsonl      the log (deploy/event_log.py): the truth about what was, is and why
    champion.json     the version in production, derived from the log; the one file that a server watches

A promotion appends to the log, then replaces the pointer by one rename. Whoever changes something holds a lock and
says which champion was expected, so of two promotions at once the second fails. A kill between any two steps leaves a
registry that reads as before or as after; the next change sweeps up what was left. The order of the log is the truth,
its times are what the clock said. Promotion and rollback by flows, reading by the command line and the server.

This is a registry in a folder; deploy/shared_registry.py is one behind a URL, of which such a folder is a copy.
"""

import dataclasses
import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from deploy.bundle import Bundle, bundle_files, read_bundle, verify_bundle
from deploy.errors import BundleError, RegistryError
from deploy.event_log import MOVES, Event, Kind, append_event, read_events
from deploy.files import sha256_file, sync_directory, write_json

LINEAGE, CARD = "lineage.json", "model_card.md"
INCOMING, OUTGOING = ".incoming-", ".outgoing-"
LOCK_TIMEOUT_S = 30.0
DELETE_POINTER = (
    "Delete it: the next change writes it again from the log. To change the champion, use `tanuki promote`."
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Version:
    """One registered bundle.

    Args:
        id: 1, 2, 3...
        directory: Holds the bundle's files.
        digest: The bundle's identity.
        registered_at: ISO 8601, UTC.
    """

    id: int
    directory: Path
    digest: str
    registered_at: str


def utc_now() -> datetime:
    """The time, UTC."""
    return datetime.now(UTC)


class Registry:
    """A registry in a folder; nothing is created before the first registration.

    Args:
        root: The folder.
        clock: Tells the time of events.
    """

    def __init__(self, root: Path, *, clock: Callable[[], datetime] = utc_now) -> None:
        self.root = root
        self.place = str(root)  # for messages
        self._clock = clock
        self._versions_dir = root / "versions"
        self._log = root / "events.jsonl"
        self._pointer = root / "champion.json"

    # Reading: no lock, nothing written.

    def events(self) -> list[Event]:
        """All that happened, oldest first.

        Raises:
            RegistryError: If the log was edited or damaged.
        """
        return read_events(self._log)

    def versions(self) -> list[Version]:
        """All versions, oldest first.

        Raises:
            RegistryError: If one of them lost its lineage.
        """
        return [self.version(id_) for id_ in self._ids()]

    def version(self, id_: int) -> Version:
        """One version.

        Raises:
            RegistryError: If there is none of that number, or its lineage is damaged.
        """
        directory = self._versions_dir / str(id_)
        if not directory.is_dir():
            known = ", ".join(map(str, self._ids())) or "none"
            raise RegistryError(f"{self.place} has no version {id_}; it has {known}. See `tanuki versions`.")
        lineage = self._read_lineage(id_)
        return Version(id_, directory, lineage["digest"], lineage["registered_at"])

    def champion(self) -> Version | None:
        """The version in production, or None.

        Raises:
            RegistryError: If pointer and log contradict each other, or the version is gone.
        """
        current = self.champion_id()
        if current is None:
            return None
        directory = self._versions_dir / str(current)
        if not directory.is_dir():
            raise RegistryError(
                f"version {current} is the champion, but {directory} is gone. Restore it from a backup, go back with "
                "`tanuki rollback --reason WHY`, or choose one with `tanuki promote ID --reason WHY`; `tanuki "
                "versions` lists what is left."
            )
        return self.version(current)

    def champion_id(self) -> int | None:
        """The number of the version in production, or None, even where that version is gone.

        Raises:
            RegistryError: If pointer and log contradict each other.
        """
        current = _champion(self.events())
        self._check_pointer()
        return current

    def require_champion(self) -> Version:
        """The version in production.

        Raises:
            RegistryError: If there is none yet, or the registry is damaged.
        """
        champion = self.champion()
        if champion is None:
            raise RegistryError("there is no champion yet. Run `tanuki retrain`; see `tanuki versions`.")
        return champion

    def registered_lineage(self, id_: int) -> dict[str, Any]:
        """What was said of a version when it was registered, without checking its files (``lineage`` does)."""
        lineage: dict[str, Any] = self._read_lineage(id_)["lineage"]
        return lineage

    def bundle(self, id_: int) -> Bundle:
        """The bundle of a version, checked file by file.

        Raises:
            RegistryError: If it is not the bundle that was registered.
        """
        version = self.version(id_)
        self._fetch(version)
        try:
            bundle = read_bundle(version.directory)
        except BundleError as error:
            raise RegistryError(f"version {id_} is damaged: {error} {self._remedy(id_)}") from error
        self._check_digest(version, bundle)
        return bundle

    def lineage(self, id_: int) -> dict[str, Any]:
        """Where a version comes from and what happened to it.

        Returns:
            version, digest, registered_at, lineage (as registered), bundle (the lineage in the bundle itself), card
            (the path of its model card, or None) and events.

        Raises:
            RegistryError: If there is none of that number, or its lineage was edited.
        """
        events = [event for event in self.events() if event.version == id_]
        stored = self._read_lineage(id_)
        self._fetch(self.version(id_))
        for name, digest in next((event.files for event in events if event.files), {}).items():
            path = self._versions_dir / str(id_) / name
            if not path.is_file() or sha256_file(path) != digest:
                raise RegistryError(f"{path} is not the file that was registered. Restore it from a backup.")
        card = self._versions_dir / str(id_) / CARD
        return {
            **stored,
            "bundle": dict(self.bundle(id_).lineage),
            "card": str(card) if card.is_file() else None,
            "events": [dataclasses.asdict(event) for event in events],
        }

    def live_at(self, when: datetime) -> Event | None:
        """What had made the champion of a time champion, or None where there was none yet.

        Where the clock went back, the later line of the log holds.
        """
        moves = [event for event in self.events() if event.kind in MOVES]
        return next((event for event in reversed(moves) if datetime.fromisoformat(event.time) <= when), None)

    def clock_went_back(self) -> list[tuple[Event, Event]]:
        """Neighbours in the log of which the second has the earlier time."""
        events = self.events()
        return [
            (one, other)
            for one, other in pairwise(events)
            if datetime.fromisoformat(other.time) < datetime.fromisoformat(one.time)
        ]

    def previous_champion(self) -> int | None:
        """Where a rollback would go to, or None."""
        stack = _champion_stack(self.events())
        return stack[-2] if len(stack) > 1 else None

    def gate_uses(self, test_digest: str, *, besides: tuple[int, int | None] | None = None) -> int:
        """How many decisions name this test set (their ``test_digest``), those that were only looked at included.

        A look that the verdict itself followed is one use with it: it asked the same of the same images.

        Args:
            test_digest: Of images and labels.
            besides: A version and the champion it is compared with now: a look at just that is no use before.
        """
        uses = [event for event in self.events() if (event.decision or {}).get("test_digest") == test_digest]
        pairs = [(event.version, (event.decision or {}).get("compared_with")) for event in uses]
        judged = [pair for event, pair in zip(uses, pairs, strict=True) if event.kind != "looked_at"]
        return len(judged) + len(set(pairs) - {*judged, besides})

    def stamp(self) -> tuple[int, ...] | None:
        """What changes when the pointer is replaced, cheap to ask for; None where there is no pointer."""
        try:
            stat = self._pointer.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    # Changing: under the lock, after repair.

    def register(self, bundle_dir: Path, lineage: Mapping[str, Any], *, card: Path | None = None) -> Version:
        """Copies a bundle into the registry, once: a bundle that is there already keeps its version.

        Args:
            bundle_dir: The bundle; its golden pictures are run on the copy.
            lineage: Where it comes from; values that JSON can hold.
            card: Its model card.

        Raises:
            BundleError: If the bundle is not whole or answers otherwise than when it was written.
        """
        with self._changing():
            digest = read_bundle(bundle_dir).digest
            for known in self._ids():
                with suppress(RegistryError):  # a damaged version is no reason to take no new one
                    version = self.version(known)
                    if version.digest == digest:
                        logger.info("bundle %s is version %d already", digest[:12], version.id)
                        return version
            id_ = self._add(bundle_dir, lineage, card)
            self._record_registration(id_, "a new bundle")
            logger.info("bundle %s is version %d now", digest[:12], id_)
            return self.version(id_)

    def promote(
        self,
        id_: int,
        *,
        reason: str,
        expected: int | None,
        forced: bool = False,
        decision: Mapping[str, Any] | None = None,
    ) -> Version:
        """Makes a version the champion; nothing happens where it is the champion already.

        Args:
            id_: The version.
            reason: Why, in words.
            expected: The champion that the caller compared with; None for none.
            forced: A person overrules the gate.
            decision: What the gate said.

        Raises:
            RegistryError: If another one is the champion by now, or the version is damaged.
        """
        with self._changing():
            current = _champion(self.events())
            if current == id_:
                return self.version(id_)
            if current != expected:
                raise RegistryError(
                    f"the champion is version {current or 'none'} by now, not {expected or 'none'}: somebody else "
                    f"promoted or rolled back meanwhile. Compare version {id_} with it and promote again."
                )
            self._verify(id_)
            self._append("forced" if forced else "promoted", id_, reason, decision=decision)
            self._point()
            return self.version(id_)

    def refuse(
        self, id_: int, reason: str, *, undecided: bool = False, decision: Mapping[str, Any] | None = None
    ) -> None:
        """Records that a version was not promoted; the champion stays.

        Raises:
            RegistryError: If there is no such version.
        """
        with self._changing():
            self.version(id_)
            kind: Kind = "undecided" if undecided else "refused"
            self._append(kind, id_, reason, decision=decision)

    def note_look(self, id_: int, reason: str, *, decision: Mapping[str, Any]) -> None:
        """Records what the gate said where nothing was to follow from it: the test set was used all the same.

        Raises:
            RegistryError: If there is no such version.
        """
        with self._changing():
            self.version(id_)
            self._append("looked_at", id_, reason, decision=decision)

    def sign(self, id_: int, private_key: Path) -> str:
        """Signs a version that is whole, in place of an earlier signature; needs the extra `sign`.

        Returns:
            The id of the key.

        Raises:
            RegistryError: If the version is damaged.
            KeyFileError: If the file is no Ed25519 private key without a password.
        """
        with self._changing():
            return self._sign(id_, private_key)

    def rollback(self, reason: str, *, private_key: Path | None = None) -> Version:
        """Makes the champion before this one the champion again, after its golden pictures were run.

        Rolling back twice goes back twice; a version that was rolled back from is out until it is promoted again.

        Args:
            reason: Why, in words.
            private_key: Signs it before it is champion, so that a server which requires this key takes it; None for
                none.

        Raises:
            RegistryError: If there is no earlier champion, or it is damaged.
            KeyFileError: If the file is no Ed25519 private key without a password.
        """
        with self._changing():
            stack = _champion_stack(self.events())
            if len(stack) < 2:
                only = f"version {stack[0]} is the first champion" if stack else "there is no champion"
                raise RegistryError(
                    f"nothing to roll back to: {only}. Promote a version: `tanuki promote ID --reason`."
                )
            target = stack[-2]
            self._verify(target)
            if private_key is not None:
                self._sign(target, private_key)
            self._append("rolled_back", target, reason)
            self._point()
            return self.version(target)

    def sweepable(self, *, keep_last: int) -> list[int]:
        """The versions that `sweep` would remove: never live, and not among the last.

        Args:
            keep_last: How many of the youngest versions stay whatever was said of them.
        """
        live = {event.version for event in self.events() if event.kind in MOVES}
        ids = self._ids()
        return [id_ for id_ in ids[: max(0, len(ids) - keep_last)] if id_ not in live]

    def sweep(self, *, keep_last: int) -> list[int]:
        """Removes the versions that were never live, but for the last ones; their history stays in the log.

        Args:
            keep_last: How many of the youngest versions stay whatever was said of them.

        Returns:
            Which were removed.
        """
        with self._changing():
            removed = self.sweepable(keep_last=keep_last)
            for id_ in removed:
                self._append("removed", id_, f"never live and not among the last {keep_last}")
                self._discard(id_)
            return removed

    def repair(self) -> None:
        """Sweeps up what a kill left: temporary folders, a version without its event, a pointer behind the log."""
        with self._changing():
            pass

    # The steps of a change.

    @contextmanager
    def _changing(self) -> Iterator[None]:
        try:
            self._versions_dir.mkdir(parents=True, exist_ok=True)
            with locked(self.root / ".lock"):
                self._clean_up()
                yield
        except OSError as error:
            raise RegistryError(
                f"the registry {self.place} cannot be changed: {error}. Whoever reads it finds it whole. Make room, or "
                "give this account the right to write there, and run the command again."
            ) from error

    def _clean_up(self) -> None:
        """Finishes what a kill cut short."""
        self._check_pointer()
        for pattern in (f"{INCOMING}*", f"{OUTGOING}*"):
            for leftover in self._versions_dir.glob(pattern):
                shutil.rmtree(leftover)
        last = {event.version: event.kind for event in self.events()}
        for id_ in self._ids():
            if id_ not in last:
                self._record_registration(id_, "a new bundle; its registration was interrupted")
            elif last[id_] == "removed":
                self._discard(id_)
        self._point()

    def _discard(self, id_: int) -> None:
        """Takes a version out of sight by one rename, then off the disk."""
        outgoing = self._versions_dir / f"{OUTGOING}{id_}"
        (self._versions_dir / str(id_)).rename(outgoing)
        sync_directory(self._versions_dir)
        shutil.rmtree(outgoing)

    def _sign(self, id_: int, private_key: Path) -> str:
        from deploy.signing import sign_bundle  # an extra that only who names a key needs

        signed_by = sign_bundle(self.bundle(id_), private_key)
        self._share_signature(id_)
        return signed_by

    def _fetch(self, version: Version) -> None:
        """Sees to it that a version's files are here; in a folder they always are."""

    def _share_signature(self, id_: int) -> None:
        """Lets others see a version's new signature; in a folder they do."""

    def _add(self, bundle_dir: Path, lineage: Mapping[str, Any], card: Path | None) -> int:
        """Puts a bundle among the versions, under a number of its own."""
        id_ = self._next_id()
        with self._incoming(bundle_dir, card) as (folder, bundle):
            write_json(folder / LINEAGE, self._stored_lineage(id_, bundle, lineage))
            self._put_in_place(folder, id_)
        return id_

    def _next_id(self) -> int:
        """A number is never given twice."""
        return 1 + max([*self._ids(), *(event.version for event in self.events())], default=0)

    @contextmanager
    def _incoming(self, bundle_dir: Path, card: Path | None) -> Iterator[tuple[Path, Bundle]]:
        """Copies a bundle beside the versions and runs it there; what is not put in place by the end is gone."""
        folder = Path(tempfile.mkdtemp(dir=self._versions_dir, prefix=INCOMING))
        try:
            folder.chmod(0o755)
            for name in bundle_files(read_bundle(bundle_dir)):
                _copy(bundle_dir / name, folder / name)
            if card is not None:
                _copy(card, folder / CARD)
            yield folder, verify_bundle(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _stored_lineage(self, id_: int, bundle: Bundle, lineage: Mapping[str, Any]) -> dict[str, Any]:
        """What lineage.json says of a version."""
        return {
            "version": id_,
            "digest": bundle.digest,
            "registered_at": self._clock().isoformat(),
            "lineage": dict(lineage),
        }

    def _put_in_place(self, folder: Path, id_: int) -> None:
        (folder / LINEAGE).chmod(0o444)
        sync_directory(folder)
        folder.rename(self._versions_dir / str(id_))
        sync_directory(self._versions_dir)

    def _record_registration(self, id_: int, reason: str) -> None:
        directory = self.version(id_).directory
        files = {name: sha256_file(directory / name) for name in (LINEAGE, CARD) if (directory / name).is_file()}
        self._append("registered", id_, reason, files=files)

    def _append(
        self,
        kind: Kind,
        id_: int,
        reason: str,
        *,
        decision: Mapping[str, Any] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        events, now = self.events(), self._clock()
        if events and now < datetime.fromisoformat(events[-1].time):
            logger.warning("the clock went back: it is %s, and the last event was at %s", now, events[-1].time)
        event = Event(
            sequence=len(events) + 1,
            time=now.isoformat(),
            kind=kind,
            version=id_,
            champion=id_ if kind in MOVES else _champion(events),
            reason=reason,
            decision=decision,
            files=files,
        )
        self._write(event)
        logger.info("version %d %s: %s", id_, kind.replace("_", " "), reason)

    def _write(self, event: Event) -> None:
        append_event(self._log, event)

    def _point(self) -> None:
        """Brings the pointer up to the log."""
        events = self.events()
        current = _champion(events)
        if current is None:
            return
        try:
            digest = self.version(current).digest
        except RegistryError:
            return  # gone or damaged: whoever reads is told so, and no way out of it may be barred
        sequence = next(event.sequence for event in reversed(events) if event.kind in MOVES)
        value = {"version": current, "digest": digest, "sequence": sequence}
        if self._read_pointer() != value:
            write_json(self._pointer, value)
            sync_directory(self.root)

    def _read_pointer(self) -> dict[str, Any] | None:
        try:
            data = self._pointer.read_bytes()
        except FileNotFoundError:
            return None
        return parse_pointer(data, name=str(self._pointer))

    def _check_pointer(self) -> None:
        pointer = self._read_pointer()
        if pointer is not None:
            check_pointer(pointer, self.events(), name=str(self._pointer), log=str(self._log))

    def _verify(self, id_: int) -> None:
        """Runs a version's golden pictures."""
        version = self.version(id_)
        self._fetch(version)
        try:
            bundle = verify_bundle(version.directory)
        except BundleError as error:
            raise RegistryError(f"version {id_} cannot go into production: {error} {self._remedy(id_)}") from error
        self._check_digest(version, bundle)

    def _check_digest(self, version: Version, bundle: Bundle) -> None:
        if bundle.digest != version.digest:
            raise RegistryError(
                f"{version.directory} holds the bundle {bundle.digest[:12]}, but {version.digest[:12]} was registered. "
                + self._remedy(version.id)
            )

    def _remedy(self, id_: int) -> str:
        return f"Restore {self._versions_dir / str(id_)} from a backup, or promote another version."

    def _ids(self) -> list[int]:
        if not self._versions_dir.is_dir():
            return []
        names = [path.name for path in self._versions_dir.iterdir() if path.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def _read_lineage(self, id_: int) -> dict[str, Any]:
        path = self._versions_dir / str(id_) / LINEAGE
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            known = ", ".join(map(str, self._ids())) or "none"
            raise RegistryError(f"{path} is missing; the registry has versions {known}. {self._remedy(id_)}") from error
        except ValueError as error:
            raise RegistryError(f"{path} is no JSON: {error}. {self._remedy(id_)}") from error
        wanted = ("digest", "registered_at", "lineage")
        if not isinstance(value, dict) or value.get("version") != id_ or any(key not in value for key in wanted):
            raise RegistryError(f"{path} is not the lineage of version {id_}. {self._remedy(id_)}")
        return value


def parse_pointer(data: bytes, *, name: str) -> dict[str, Any]:
    """What a champion pointer says.

    Raises:
        RegistryError: If it was edited or damaged.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise RegistryError(f"{name} is no JSON: {error}. {DELETE_POINTER}") from error
    if not isinstance(value, dict) or not all(isinstance(value.get(key), int) for key in ("version", "sequence")):
        raise RegistryError(f"{name} names no version and sequence. {DELETE_POINTER}")
    return value


def check_pointer(pointer: Mapping[str, Any], events: list[Event], *, name: str, log: str) -> None:
    """A pointer may be behind the log (a kill) and is then brought up; it may not say what the log never said.

    Raises:
        RegistryError: If it does.
    """
    if pointer["sequence"] > len(events):
        raise RegistryError(
            f"{name} rests on event {pointer['sequence']}, but {log} ends at {len(events)}: the log "
            "lost its end. Restore it from a backup; or, to go on with what it still holds, delete the pointer."
        )
    event = events[pointer["sequence"] - 1] if pointer["sequence"] > 0 else None
    if event is None or event.kind not in MOVES or event.champion != pointer["version"]:
        raise RegistryError(
            f"{name} says that version {pointer['version']} is the champion; event {pointer['sequence']} "
            f"of {log} does not. One of them was edited. {DELETE_POINTER}"
        )


def _champion(events: list[Event]) -> int | None:
    """The champion after these events."""
    return events[-1].champion if events else None


def _champion_stack(events: list[Event]) -> list[int]:
    """The champions a rollback can reach, the present one last: promotions push, rollbacks pop."""
    stack: list[int] = []
    for event in events:
        if event.kind == "rolled_back":
            del stack[-1:]
        elif event.kind in MOVES:
            stack.append(event.version)
    return stack


def _copy(source: Path, target: Path) -> None:
    """Copies a file for good: synced and read-only."""
    target.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("rb+") as file:
        os.fsync(file.fileno())
    target.chmod(0o444)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the registry's lock; the system frees it when the process ends, however it ends.

    Raises:
        RegistryError: If another process holds it for too long.
    """
    with path.open("a") as file:
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise RegistryError(
                        f"another process has been changing {path.parent} for {LOCK_TIMEOUT_S:.0f} s. "
                        "Wait for it to end and try again."
                    ) from error
                time.sleep(0.05)
        yield


def open_registry(where: str | Path, *, copy: Path | None = None) -> Registry:
    """The registry in a folder, or behind a URL.

    Args:
        where: A folder's path, or a URL of fsspec such as ``s3://bucket/prefix``.
        copy: Where the copy of a registry behind a URL lies; None for the user's cache.

    Raises:
        RegistryError: If the URL's protocol needs a package that is not installed.
    """
    protocol, separator, path = str(where).partition("://")
    if not separator:
        return Registry(Path(where))
    if protocol in ("file", "local"):
        return Registry(Path(path))
    from deploy.shared_registry import SharedRegistry  # needs fsspec, which a registry in a folder does not

    return SharedRegistry(str(where), copy)
