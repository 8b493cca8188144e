"""Signals: reasons to retrain beside the clock, told as Prefect events.

A signal is a level with two marks. It is told once when its level reaches the upper one, and again only after it has
been below the lower one (hysteresis, as of a thermostat): a level that flaps around one mark is told once. The
automation in deploy/prefect.yaml that listens to the event has a cool-down besides, over all signals. Where something
is lost between the two, the clock comes.
"""

import fcntl
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML

from deploy.files import write_json
from tasks.data.image_store import open_images
from tasks.data.manifest import read_manifest
from tasks.errors import DataError
from tasks.layout import Layout
from tasks.params import load_params

RETRAIN_WANTED = "tanuki.retrain.wanted"

logger = logging.getLogger(__name__)

Tell = Callable[["Signal"], None]


@dataclass(frozen=True)
class Signal:
    """A reason to retrain, as it stands.

    Args:
        name: new-data, backbone, drift...
        level: 1 is the upper mark.
        text: What is the matter, for a person.
        clear_at: The lower mark, below 1.
    """

    name: str
    level: float
    text: str
    clear_at: float = 0.5


def emit(signal: Signal) -> None:
    """Tells the Prefect server of a signal."""
    from prefect.events import emit_event

    emit_event(
        event=RETRAIN_WANTED,
        resource={"prefect.resource.id": f"tanuki.signal.{signal.name}", "prefect.resource.name": signal.text},
        payload={"signal": signal.name, "level": signal.level, "text": signal.text},
    )


def watch(layout: Layout, signal: Signal, *, tell: Tell = emit) -> bool:
    """Tells of a signal if it has reached its upper mark since it was last below its lower one.

    Returns:
        Whether it was told.
    """
    layout.signals.parent.mkdir(parents=True, exist_ok=True)
    with layout.signals.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        raised: dict[str, Any] = json.loads(layout.signals.read_bytes()) if layout.signals.is_file() else {}
        was_raised = signal.name in raised
        if signal.level >= 1 and not was_raised:
            logger.info("a reason to retrain: %s", signal.text)
            tell(signal)  # before it is noted: a kill in between tells twice, and a retrain too many does nothing
            write_json(layout.signals, {**raised, signal.name: signal.text})
            return True
        if signal.level < signal.clear_at and was_raised:
            write_json(layout.signals, {name: text for name, text in raised.items() if name != signal.name})
    return False


def new_data(layout: Layout, *, min_images: int, min_share: float) -> Signal:
    """How many images of data/raw no retrain has seen.

    Args:
        layout: The workspace.
        min_images: So many are a reason to retrain...
        min_share: ...and so is this share of those that one has seen.
    """
    images = {image.path for image in open_images(layout.raw).listing().images} if layout.raw.is_dir() else set()
    try:
        seen = set(read_manifest(layout.images)["path"])
    except DataError:
        seen = set()
    number, share = len(images - seen), len(images - seen) / max(1, len(seen))
    return Signal(
        "new-data",
        max(number / min_images, share / min_share),
        f"{number:,} new images ({share:.1%} of what was there)",
    )


def new_backbone(layout: Layout) -> Signal:
    """Whether params.yaml names another backbone than the last retrain's, as dvc.lock has it."""
    asked = load_params(layout.params).backbone
    locked = YAML(typ="safe", pure=True).load(layout.dvc_lock.read_bytes()) if layout.dvc_lock.is_file() else {}
    used = locked.get("stages", {}).get("fetch_backbone", {}).get("params", {}).get(layout.params.name, {})
    is_new = "backbone" in used and json.loads(asked.model_dump_json()) != used["backbone"]
    return Signal("backbone", float(is_new), f"another backbone in params.yaml: {asked.source}")
