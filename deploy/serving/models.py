"""Which versions answer, following the registry's champion: loaded beside the old one, proven, only then swapped in.

One thread of low priority looks at the champion pointer. A new champion's digests are checked, its golden pictures
asked and its sessions warmed before one assignment makes it the champion here; what is under way ends on the version
that it began with. A version that fails is refused and told of, and the old one goes on. The last few stay loaded: a
rollback is one assignment.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from deploy.bundle import Bundle
from deploy.errors import RegistryError, TanukiError
from deploy.golden import check_golden, golden_pictures
from deploy.images import decode_image
from deploy.predictor import Predictor
from deploy.registry import CARD, Registry, Version
from deploy.serving.errors import NOT_FOUND, UNAVAILABLE, RequestError, echo
from deploy.serving.live_model import LiveModel
from deploy.serving.memory import give_memory_back

RETRY_S = 15.0  # a refused champion is looked at again: the disk may have been away
NICENESS = 10
WARM_UP_RUNS = 2
GIVE_BACK_S = 10.0

Outcome = Literal["swapped", "refused"]

logger = logging.getLogger(__name__)


class Models:
    """The versions that answer; may be asked and refreshed from any thread.

    Args:
        registry: Where the champion is named.
        name: The model's name in the protocol.
        keep: How many earlier versions stay loaded beside the champion.
        on_reload: Told of each swap and each refusal.
        public_key: Whose signature a bundle must bear; None where none is required.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        name: str,
        keep: int,
        on_reload: Callable[[Outcome], None],
        public_key: Path | None = None,
    ) -> None:
        self.name = name
        self.champion: LiveModel | None = None
        self.challenger: LiveModel | None = None  # compared with the champion, or given a share
        self.problem: str | None = None  # why the registry's champion is not the one that answers
        self._registry = registry
        self._keep = keep
        self._on_reload = on_reload
        self._public_key = public_key
        self._loaded: dict[int, LiveModel] = {}  # replaced, never changed; the least recently promoted first
        self._retired: list[LiveModel] = []
        self._seen: tuple[int, ...] | None = ()
        self._retry_at = 0.0
        self._refreshing = threading.Lock()

    @property
    def loaded(self) -> list[LiveModel]:
        """All versions that answer, in the order of their numbers."""
        return [model for _, model in sorted(self._answering.items())]

    @property
    def _answering(self) -> dict[int, LiveModel]:
        return self._loaded if self.challenger is None else {self.challenger.version: self.challenger} | self._loaded

    def add_challenger(self, version: int) -> None:
        """Loads a version that the champion is compared with, for as long as this server runs.

        Raises:
            TanukiError: If it cannot answer.
        """
        self.challenger = self._of(self._registry.version(version))

    def resolve(self, name: str, version: str | None = None) -> LiveModel:
        """The version that a request asks for; the champion where it names none.

        Raises:
            RequestError: If it is not here, in the words of the protocol's reference server.
        """
        if name != self.name:
            raise RequestError(NOT_FOUND, f"Request for unknown model: '{echo(name)}' is not found")
        if not version:
            return self.require_champion()
        is_number = version.isascii() and version.isdecimal() and len(version) < 19
        found = self._answering.get(int(version)) if is_number else None
        if found is None:
            raise RequestError(NOT_FOUND, f"Request for unknown model: '{name}' version {echo(version)} is not found")
        return found

    def require_champion(self) -> LiveModel:
        """The champion.

        Raises:
            RequestError: If there is none yet.
        """
        if self.champion is None:
            raise RequestError(UNAVAILABLE, f"Request for unknown model: '{self.name}' has no available versions")
        return self.champion

    def refresh(self, *, force: bool = False) -> None:
        """Follows the champion pointer, if it changed or what it named was refused a while ago.

        Args:
            force: Look whatever the pointer says.
        """
        with self._refreshing:
            seen = self._stamp()
            is_due = self.problem is not None and time.monotonic() >= self._retry_at
            if force or is_due or seen != self._seen:
                self._seen = seen
                self._follow()
            self._let_go()

    def _stamp(self) -> tuple[int, ...] | None:
        """What changes when the pointer is replaced."""
        try:
            return self._registry.stamp()
        except RegistryError:  # one behind a URL that was never reached: looking closer tells why
            return None

    def _follow(self) -> None:
        """Makes the registry's champion the champion here, or says why not."""
        try:
            wanted = self._registry.champion()
            if wanted is None:
                if self.champion is not None:
                    raise RegistryError(f"{self._registry.place} names no champion any more.")
                return
            if self.champion is None or self.champion.bundle.digest != wanted.digest:
                self._swap_in(self._of(wanted))
                self._on_reload("swapped")
            self.problem = None
        except Exception as error:  # whatever is wrong with a new version, the old one goes on
            is_known = isinstance(error, TanukiError | OSError)
            still = f"version {self.champion.version} goes on answering" if self.champion else "nothing answers"
            if self.problem is None or not is_known:
                logger.error("the champion cannot be taken over, %s: %s", still, error, exc_info=not is_known)
            self.problem = str(error)
            self._retry_at = time.monotonic() + RETRY_S
            self._on_reload("refused")

    def _of(self, version: Version) -> LiveModel:
        """The version, loaded now unless it still is."""
        kept = self._answering.get(version.id)
        if kept is not None and kept.bundle.digest == version.digest:
            return kept
        start = time.monotonic()
        model = load(self._registry, version, public_key=self._public_key)
        logger.info("version %d loaded and proven in %.2f s", version.id, time.monotonic() - start)
        return model

    def _swap_in(self, model: LiveModel) -> None:
        loaded = {id_: each for id_, each in self._loaded.items() if id_ != model.version} | {model.version: model}
        for id_ in list(loaded)[: -(self._keep + 1)]:
            self._retired.append(loaded.pop(id_))
        before, self._loaded, self.champion = self.champion, loaded, model
        logger.info(
            "version %d answers now, after %s", model.version, f"version {before.version}" if before else "none"
        )

    def _let_go(self) -> None:
        """Frees retired versions that nobody waits for any more, and gives their memory back to the system."""
        resting = [model for model in self._retired if model.in_flight == 0]
        if resting:
            self._retired = [model for model in self._retired if model not in resting]
            del resting
            give_memory_back()


def load(registry: Registry, version: Version, *, public_key: Path | None = None) -> LiveModel:
    """Loads a version, proves it and warms it up.

    Raises:
        TanukiError: If it is not the bundle that was registered, lacks the signature that is required, changes
            meanwhile, or answers its golden pictures otherwise than it did.
    """
    bundle = registry.bundle(version.id)
    if public_key is not None:
        from deploy.signing import require_signature  # an extra that only who asks for it needs

        require_signature(bundle, public_key)
    check_golden(bundle)
    predictor = Predictor(bundle, threads=1)  # now that the check's own sessions are gone
    # Once more, or what was exchanged before the sessions were open is believed.
    if registry.bundle(version.id).digest != bundle.digest:
        raise RegistryError(f"Version {version.id} was exchanged while it was loaded.")
    _warm_up(predictor, bundle)
    give_memory_back()
    return LiveModel(version.id, bundle, predictor, registry.registered_lineage(version.id), _card(version.directory))


def _warm_up(predictor: Predictor, bundle: Bundle) -> None:
    """The first runs of a session are slow; they should not be a client's."""
    for _ in range(WARM_UP_RUNS):
        for picture in golden_pictures(bundle):
            predictor.answers(predictor.pixels(decode_image(picture)))


def _card(directory: Path) -> str | None:
    path = directory / CARD
    return path.read_text(encoding="utf-8") if path.is_file() else None


class Watcher(threading.Thread):
    """The thread that follows the registry, behind everything that answers.

    Args:
        models: What it refreshes.
        every_s: How long it sleeps between two looks.
    """

    def __init__(self, models: Models, *, every_s: float) -> None:
        super().__init__(name="watcher", daemon=True)
        self._models = models
        self._every_s = every_s
        self._over = threading.Event()

    def run(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        due = 0.0
        while not self._over.wait(self._every_s):
            try:
                self._models.refresh()
            except Exception:
                logger.exception("the registry could not be followed; trying again")
            if time.monotonic() >= due:
                due = time.monotonic() + GIVE_BACK_S
                give_memory_back()  # half a millisecond, for a tenth of the process

    def stop(self) -> None:
        """Ends the thread."""
        self._over.set()
        self.join()
