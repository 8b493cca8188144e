"""Plain supervised training of a small torchvision architecture, interruptible between any two epochs.

AdamW, one warm-up and one cosine, an exponential moving average of the weights, nothing else: the transfer
comes from the source task, not from the optimizer. All randomness of an epoch follows from the seed and the
epoch's number, and a checkpoint holds everything else, so a run that was killed and resumed ends in the same
bytes as one that was not. Called by ``tasks.pretrain``.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
import torchvision
from torch import nn

from deploy.files import sha256_bytes
from tasks.models.depthwise import use_fast_depthwise
from tasks.training.checkpoint import Checkpoint, CheckpointFile, prefixed, without_prefix

logger = logging.getLogger(__name__)

HEAD_NAMES = ("classifier", "fc", "heads", "head")
"""Where torchvision's architectures keep their classifier."""
PIXEL_MEAN = 0.5
PIXEL_STD = 0.5
"""Normalisation of every channel, of pixels in 0..1."""
SECONDS_BETWEEN_LINES = 20.0

Batch = tuple[torch.Tensor, torch.Tensor]


class Source(Protocol):
    """A labelled source task. Pictures are (B, 3, S, S) float32 in 0..1, labels (B,) int64."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""

    @property
    def identity(self) -> str:
        """What decides the pictures, besides the classes."""

    def training_batches(self, epoch: int, batch_size: int) -> Iterator[Batch]:
        """The batches of one epoch, a function of the epoch's number; only full batches."""

    def validation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Pictures that are never trained on, always the same ones."""

    def num_training_batches(self, batch_size: int) -> int:
        """Batches an epoch."""


@dataclass(frozen=True)
class TrainingRecipe:
    """What decides the weights, besides the source task.

    Attributes:
        architecture: A torchvision classification architecture.
        epochs: Passes over the source (for generated sources: its ``images_per_epoch``).
        batch_size: Pictures an optimizer step.
        learning_rate: AdamW's, at the top of the cycle.
        weight_decay: AdamW's, of weights with two axes or more.
        label_smoothing: In 0..1.
        warmup_fraction: Share of the steps on the way up.
        ema_decay: Of the moving average, per step; what comes out is the average.
        seed: Of the initial weights; the source has its own.
    """

    architecture: str
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    label_smoothing: float
    warmup_fraction: float
    ema_decay: float
    seed: int


@dataclass(frozen=True)
class Pretrained:
    """What training comes to.

    Attributes:
        trunk: The averaged weights without the classifier, fp32, contiguous, on the CPU.
        source_accuracy: Top-1 share on the source's validation pictures.
        wall_s: Seconds spent, over all the runs that a resumed training took.
    """

    trunk: dict[str, torch.Tensor]
    source_accuracy: float
    wall_s: float


def build_model(architecture: str, num_classes: int) -> nn.Module:
    """A torchvision architecture with random weights and one linear layer straight on the pooled features.

    The hidden layer that some classifiers have (MobileNetV3's 576 to 1024) would learn what the trunk should, and would
    then be thrown away with the classifier.
    """
    model: nn.Module = torchvision.models.get_model(architecture, weights=None)
    name = next(name for name in HEAD_NAMES if hasattr(model, name))
    head = getattr(model, name)
    before = [] if isinstance(head, nn.Linear) else list(head.children())
    layers: list[nn.Module] = []
    for layer in [head] if isinstance(head, nn.Linear) else before:
        if isinstance(layer, nn.Linear):
            layers.append(nn.Linear(layer.in_features, num_classes))
            break
        layers.append(layer)
    setattr(model, name, nn.Sequential(*layers))
    return model


def trunk_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The entries of a model's state that are not its classifier's."""
    return {key: value for key, value in state.items() if key.split(".")[0] not in HEAD_NAMES}


def train(
    source: Source,
    recipe: TrainingRecipe,
    *,
    checkpoint_path: Path,
    on_epoch: Callable[[int], None] = lambda _: None,
) -> Pretrained:
    """Train from random weights, or go on from the checkpoint if it belongs to this very recipe and source.

    Args:
        source: The source task.
        recipe: What decides the weights.
        checkpoint_path: Replaced after each epoch; the caller deletes it when the result is safe.
        on_epoch: Called with the number of finished epochs after each checkpoint.
    """
    torch.manual_seed(recipe.seed)
    model = use_fast_depthwise(build_model(recipe.architecture, len(source.class_names)))
    model = model.to(memory_format=torch.channels_last)
    average = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer = _optimizer(model, recipe)
    file = CheckpointFile(checkpoint_path, _run_digest(source, recipe))
    saved = file.load()
    done, seconds = (0, 0.0) if saved is None else _restore(saved, model, average, optimizer)
    for epoch in range(done, recipe.epochs):
        started = time.perf_counter()
        loss = _train_epoch(model, average, optimizer, source, recipe, epoch)
        seconds += time.perf_counter() - started
        file.save(_checkpoint(model, average, optimizer, epoch + 1, seconds))
        logger.info("epoch %d/%d  loss %.3f  %.0f s so far", epoch + 1, recipe.epochs, loss, seconds)
        on_epoch(epoch + 1)
    model.load_state_dict(average)
    accuracy = source_accuracy(model, source, recipe.batch_size)
    trunk = {key: value.contiguous().clone() for key, value in trunk_state(average).items()}
    return Pretrained(trunk=trunk, source_accuracy=accuracy, wall_s=seconds)


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, S, S) in 0..1 as the network takes them, channels last."""
    return ((pictures - PIXEL_MEAN) / PIXEL_STD).contiguous(memory_format=torch.channels_last)


def ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches in the same order, the next one made on another core while this one is used."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        coming = worker.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = worker.submit(next, batches, None)
            yield batch


def learning_rate_at(step: int, num_steps: int, recipe: TrainingRecipe) -> float:
    """Linear warm-up, then half a cosine to zero.

    References:
        Loshchilov and Hutter 2017, arXiv:1608.03983 (without restarts).
    """
    warmup = max(1, round(recipe.warmup_fraction * num_steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


@torch.inference_mode()
def source_accuracy(model: nn.Module, source: Source, batch_size: int) -> float:
    """Top-1 share on the validation pictures; NaN if there are none."""
    model.eval()
    right = total = 0
    for pictures, labels in source.validation_batches(batch_size):
        right += int((model(normalise(pictures)).argmax(1) == labels).sum())
        total += len(labels)
    return right / total if total else math.nan


def _train_epoch(
    model: nn.Module,
    average: dict[str, torch.Tensor],
    optimizer: torch.optim.Optimizer,
    source: Source,
    recipe: TrainingRecipe,
    epoch: int,
) -> float:
    """One pass; the mean loss."""
    model.train()
    torch.manual_seed(recipe.seed * 1_000_003 + epoch + 1)  # dropout and stochastic depth, the same after a resume
    per_epoch = source.num_training_batches(recipe.batch_size)
    losses, last_line = 0.0, time.monotonic()
    for index, (pictures, labels) in enumerate(ahead(source.training_batches(epoch, recipe.batch_size))):
        step = epoch * per_epoch + index
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe.epochs * per_epoch, recipe)
        logits = model(normalise(pictures))  # (B, C)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _update_average(average, model, min(recipe.ema_decay, (1 + step) / (10 + step)))
        losses += float(loss.detach())
        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            logger.info("epoch %d  batch %d/%d  loss %.3f", epoch + 1, index + 1, per_epoch, losses / (index + 1))
    return losses / max(1, per_epoch)


@torch.no_grad()
def _update_average(average: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    state = model.state_dict()
    floating = [key for key, value in state.items() if value.is_floating_point()]
    torch._foreach_lerp_([average[key] for key in floating], [state[key] for key in floating], 1 - decay)
    for key in state.keys() - set(floating):
        average[key].copy_(state[key])


def _optimizer(model: nn.Module, recipe: TrainingRecipe) -> torch.optim.AdamW:
    decayed = [weight for weight in model.parameters() if weight.ndim >= 2]
    spared = [weight for weight in model.parameters() if weight.ndim < 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, foreach=True)


def _run_digest(source: Source, recipe: TrainingRecipe) -> str:
    """What must not have changed between a checkpoint and the run that resumes it."""
    identity = {"recipe": asdict(recipe), "classes": source.class_names, "source": source.identity}
    return sha256_bytes(json.dumps(identity, sort_keys=True).encode())


def _checkpoint(
    model: nn.Module, average: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer, epochs: int, wall_s: float
) -> Checkpoint:
    """Everything that the next epoch depends on."""
    tensors = prefixed("model", model.state_dict()) | prefixed("average", average)
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= prefixed(f"optimizer/{index}", slots)
    return Checkpoint({"epochs": epochs, "wall_s": wall_s}, tensors)


def _restore(
    checkpoint: Checkpoint, model: nn.Module, average: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, float]:
    """Epochs done and seconds spent so far."""
    model.load_state_dict(without_prefix("model", checkpoint.tensors))
    for key, value in without_prefix("average", checkpoint.tensors).items():
        average[key].copy_(value)
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in without_prefix("optimizer", checkpoint.tensors).items():
        index, slot = key.split("/")
        slots.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})
    logger.info("going on after epoch %d", checkpoint.position["epochs"])
    return int(checkpoint.position["epochs"]), float(checkpoint.position["wall_s"])
