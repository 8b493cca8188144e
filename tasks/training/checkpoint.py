"""Where a killed fine-tuning goes on: one safetensors file with the plan position as JSON in its header.

A checkpoint carries a digest of everything the run depends on and is used by no other run. Nothing is pickled.
Called by ``tasks.finetune`` through ``tasks.training.staged``.
"""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from deploy.files import write_bytes
from tasks.training import processes

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
HEADER_KEY = "tanuki"


@dataclass(frozen=True)
class Checkpoint:
    """How far a run was.

    Attributes:
        position: JSON values: which stage, which epoch, what earlier stages came to.
        tensors: Named weights and optimiser state.
    """

    position: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class CheckpointFile:
    """The checkpoint of one run.

    Attributes:
        path: The file.
        run_digest: sha256 over the inputs, parameters and versions of the run.
        began: When the run began, or would have begun had nothing interrupted it; of `time.perf_counter`.
    """

    path: Path
    run_digest: str
    began: float = field(default_factory=time.perf_counter)

    def after_interruption(self) -> "CheckpointFile":
        """The same; where there is a checkpoint of this run, begun earlier by the seconds that led to it."""
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {})[HEADER_KEY])
        except (OSError, SafetensorError, ValueError, KeyError):
            return self
        is_mine = header.get("run_digest") == self.run_digest
        return replace(self, began=self.began - header.get("seconds", 0.0)) if is_mine else self

    def save(self, checkpoint: Checkpoint) -> None:
        """Replaces the checkpoint; a reader sees the old one or the new one. Of several processes the first writes."""
        if not processes.is_first():
            return
        header = {"format_version": FORMAT_VERSION, "run_digest": self.run_digest, "position": checkpoint.position}
        header["seconds"] = time.perf_counter() - self.began
        tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
        write_bytes(self.path, save(tensors, {HEADER_KEY: json.dumps(header, sort_keys=True)}))

    def load(self) -> Checkpoint | None:
        """The checkpoint, or None where there is none of this run that can be read."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {})[HEADER_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except (SafetensorError, ValueError, KeyError) as error:
            logger.warning("the checkpoint %s cannot be read (%s): starting afresh", self.path, error)
            return None
        if header.get("format_version") != FORMAT_VERSION or header.get("run_digest") != self.run_digest:
            logger.info("the checkpoint %s is of another run: starting afresh", self.path)
            return None
        return Checkpoint(header["position"], tensors)

    def remove(self) -> None:
        """Removes the checkpoint, and its folder if nothing else is in it."""
        self.path.unlink(missing_ok=True)
        if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
            self.path.parent.rmdir()


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors renamed ``prefix/name``."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named ``prefix/name``, as ``name``."""
    start = f"{prefix}/"
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
