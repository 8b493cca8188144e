"""The weights that one stage of fine-tuning moves, with their optimiser, schedule and average: one epoch at a time.

Everything that a stage may not move stays frozen, BatchNorm's statistics included, and `frozen_digest` proves it.
There is no random draw in here. Called by ``tasks.training.staged`` and
``tasks.training.adversarial``.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks.errors import TrainingError
from tasks.models.architectures import Boundary, Network
from tasks.models.head import Head
from tasks.training import processes
from tasks.training.checkpoint import prefixed, without_prefix
from tasks.training.ema import Ema
from tasks.training.memory import halved_until_it_fits, is_out_of_memory
from tasks.training.schedule import Recipe, StageLength, warmup_cosine

SGD_MOMENTUM = 0.9
MIN_SCALE = 1e-6
ANY_SIZE = 2**31  # of a part, where memory holds the batch


class DivergedError(Exception):
    """The loss is no number any more."""


class StandardisedHead(nn.Module):
    """A linear head that sees embeddings shifted to mean zero and divided by one scalar deviation.

    The function is the head's own; the coordinates make one learning rate fit backbones of any feature scale.

    Args:
        head: Where to start from.
        embeddings: (N, D) float32, to take mean and deviation from.
    """

    def __init__(self, head: Head, embeddings: Tensor) -> None:
        super().__init__()
        self.labels = head.labels
        self.shift = embeddings.mean(dim=0)  # (D,); it and the weights lie where these do
        self.scale = float((embeddings - self.shift).square().mean().sqrt().clamp_min(MIN_SCALE))
        weight, bias = (torch.from_numpy(each.copy()).to(embeddings.device) for each in (head.weight, head.bias))
        self.weight = nn.Parameter(weight * self.scale)
        self.bias = nn.Parameter(bias + weight @ self.shift)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Logits (B, C) of embeddings (B, D)."""
        return nn.functional.linear((embeddings - self.shift) / self.scale, self.weight, self.bias)

    def folded(self) -> Head:
        """The same function on plain embeddings."""
        with torch.no_grad():
            weight = self.weight / self.scale
            bias = self.bias - weight @ self.shift
        return Head(self.labels, *(each.cpu().numpy().astype(np.float32) for each in (weight, bias)))


@dataclass(frozen=True)
class Pace:
    """How fast and how long a stage moves its weights.

    Attributes:
        recipe: The optimiser.
        learning_rates: Of each unfrozen layer group, then of the head; per step.
        weight_decay: Before the recipe's scale.
        length: Steps and epochs.
        warmup_fraction: Share of the steps spent rising to the full rate.
        clip_norm: Largest norm of the gradient of a step.
        ema_decay: Of the average of the weights.
        schedule: Share of the full rate at a step.
    """

    recipe: Recipe
    learning_rates: Sequence[float]
    weight_decay: float
    length: StageLength
    warmup_fraction: float
    clip_norm: float
    ema_decay: float
    schedule: Callable[..., float] = warmup_cosine


class Moving(nn.Module):
    """The layer groups from ``group`` on, and the head."""

    def __init__(self, network: Network, group: int, head: StandardisedHead) -> None:
        super().__init__()
        self.network, self.group, self.head = network, group, head

    def forward(self, maps: Tensor, pooled: Tensor) -> Tensor:
        """Logits (B, C) of the two parts of a `Boundary`."""
        logits: Tensor = self.head(self.network.forward_from(Boundary(maps, pooled), self.group))
        return logits


class StageTuner:
    """Moves the layer groups from ``group`` on, and the head.

    Args:
        network: The network; groups below ``group`` get ``requires_grad=False``.
        group: The first group that moves.
        head: The head, which moves too.
        pace: Rates and length.
    """

    def __init__(self, network: Network, group: int, head: StandardisedHead, pace: Pace) -> None:
        self.network, self.group, self.head, self.pace = network, group, head, pace
        self.tensors = trainable_tensors(network, group, head)
        self.model = processes.spread(Moving(network, group, head))
        self.optimiser = _optimiser(network, group, head, pace)
        self.ema = Ema(self.tensors, pace.ema_decay)
        self.step = 0
        self.part_size: int | None = None  # pictures at once, where memory does not hold a batch
        self.seconds = 0.0  # that its epochs took

    def run_epoch(
        self, boundaries: Iterable[Boundary], labels: Iterable[Tensor], weights: Iterable[float] | None = None
    ) -> float:
        """One step a batch.

        Args:
            boundaries: Activations of each batch, or of this process's share of it.
            labels: Class indices (B,) int64 of the same.
            weights: What these pictures' mean loss counts in each batch's; 1 where there is one process.

        Returns:
            Mean loss, nats a picture.

        Raises:
            DivergedError: If the loss is not finite.
        """
        began, total, count = time.perf_counter(), 0.0, 0
        for boundary, targets, weight in zip(boundaries, labels, weights or itertools.repeat(1.0)):  # noqa: B905
            loss_of = partial(self._loss, boundary, targets.to(boundary.pooled.device))
            total += self.descend(loss_of, len(targets), weight) * len(targets)
            count += len(targets)
        self.seconds += time.perf_counter() - began
        return total / count

    def _loss(self, boundary: Boundary, targets: Tensor, part: slice) -> Tensor:
        """Mean cross-entropy of a part of a batch."""
        return nn.functional.cross_entropy(self.model(boundary.maps[part], boundary.pooled[part]), targets[part])

    def descend(self, loss_of: Callable[[slice], Tensor], batch_size: int, weight: float = 1.0) -> float:
        """One step down the mean loss of a batch; returns its value.

        Where memory runs out the batch is halved, for the rest of the stage, and the parts' gradients add up to the
        same step: BatchNorm is frozen, so a picture's loss does not hang on its neighbours. Several processes agree
        before the first step on parts that fit all of them; later they could not without leaving each other waiting.

        Args:
            loss_of: Mean loss of some pictures of the batch; where there are several processes, through ``model``.
            batch_size: Pictures in the batch, or in this process's share of it.
            weight: What their mean loss counts in the whole batch's.

        Raises:
            DivergedError: If the loss or its gradient is not finite.
            TrainingError: If memory runs out where several processes have agreed.
        """
        factor = self.pace.schedule(self.step, steps=self.pace.length.steps, warmup_fraction=self.pace.warmup_fraction)
        for group, rate in zip(self.optimiser.param_groups, self.pace.learning_rates, strict=True):
            group["lr"] = rate * factor
        value = processes.total(weight * self._accumulate(loss_of, batch_size, weight))
        if not np.isfinite(value):
            raise DivergedError(f"the loss is {value} at step {self.step + 1}")
        norm = float(nn.utils.clip_grad_norm_(self.tensors.values(), self.pace.clip_norm))
        if not np.isfinite(norm):  # the step would spoil all weights, and the next batch would be blamed
            raise DivergedError(f"the gradient's norm is {norm} at step {self.step + 1}")
        self.optimiser.step()
        self.ema.update(self.tensors)
        self.step += 1
        return value

    def _accumulate(self, loss_of: Callable[[slice], Tensor], batch_size: int, weight: float) -> float:
        """Gradients of the weighted mean loss of a batch, in parts that fit into memory; the loss, not weighted."""
        if processes.count() == 1:
            return self._halve_until_it_fits(loss_of, batch_size, weight)
        if self.part_size is None:
            with processes.alone(self.model):
                self._halve_until_it_fits(loss_of, batch_size, weight)
            self.part_size = processes.smallest(self.part_size or ANY_SIZE)
        try:
            return self._in_parts(
                loss_of, batch_size, weight * processes.count()
            )  # of whose gradients the mean is taken
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"Out of memory with {min(self.part_size, batch_size)} pictures at once in one of {processes.count()} "
                "processes. Lower finetune.batch_size or finetune.num_processes, or free memory; run again and it goes "
                "on from its last epoch."
            ) from error

    def _halve_until_it_fits(self, loss_of: Callable[[slice], Tensor], batch_size: int, weight: float) -> float:
        """The same, in this process alone."""

        def attempt(size: int) -> float:
            if size < batch_size:
                self.part_size = size
            return self._in_parts(loss_of, batch_size, weight)

        return halved_until_it_fits(attempt, min(self.part_size or batch_size, batch_size))

    def _in_parts(self, loss_of: Callable[[slice], Tensor], batch_size: int, weight: float) -> float:
        """One attempt; several processes exchange gradients with the last part."""
        self.optimiser.zero_grad(set_to_none=True)
        *first, last = parts(batch_size, min(self.part_size or batch_size, batch_size))
        with processes.alone(self.model):
            value = sum(self._backward(loss_of, part, batch_size, weight) for part in first)
        return value + self._backward(loss_of, last, batch_size, weight)

    def _backward(self, loss_of: Callable[[slice], Tensor], part: slice, batch_size: int, weight: float) -> float:
        """Adds a part's share of the gradient; its share of the loss."""
        loss = loss_of(part)
        if part.stop - part.start < batch_size:
            loss = loss * ((part.stop - part.start) / batch_size)
        (loss if weight == 1 else weight * loss).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        """Everything that `restore` needs but ``step``."""
        optimiser = {
            f"{index}/{key}": value
            for index, values in self.optimiser.state_dict()["state"].items()
            for key, value in values.items()
            if isinstance(value, Tensor)
        }
        return {
            **prefixed("now", self.tensors),
            **prefixed("ema", self.ema.average),
            **prefixed("optimiser", optimiser),
        }

    def restore(self, state: Mapping[str, Tensor], step: int) -> None:
        """Goes on from `state` at ``step``, as if nothing had happened."""
        self.step = step
        put(self.tensors, without_prefix("now", state))
        self.ema.restore(without_prefix("ema", state), step)
        parameters = [parameter for group in self.optimiser.param_groups for parameter in group["params"]]
        moments: dict[int, dict[str, Any]] = {}
        for name, value in without_prefix("optimiser", state).items():
            index, _, key = name.partition("/")
            # In the parameter's own memory format: kernels round differently for other strides.
            same = value if value.ndim == 0 else torch.empty_like(parameters[int(index)]).copy_(value)
            moments.setdefault(int(index), {})[key] = same
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": moments})


def parts(batch_size: int, size: int) -> list[slice]:
    """A batch in parts of at most ``size``."""
    return [slice(start, min(start + size, batch_size)) for start in range(0, batch_size, size)]


def trainable_tensors(network: Network, group: int, head: StandardisedHead) -> dict[str, nn.Parameter]:
    """The parameters from ``group`` on under torchvision's names, and the head's; all others are frozen on the way."""
    moving = {id(each) for index in range(group, network.num_groups) for each in network.group_parameters(index)}
    tensors = {}
    for name, parameter in network.trunk.named_parameters():
        parameter.requires_grad_(id(parameter) in moving)
        if id(parameter) in moving:
            tensors[f"trunk.{name}"] = parameter
    return {**tensors, "head.weight": head.weight, "head.bias": head.bias}


@torch.no_grad()
def put(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies values into tensors of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that later steps do not move."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def interpolated(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Weights at a share ``alpha`` of the way from ``start`` to ``end`` (WiSE-FT; exact, as BatchNorm is frozen)."""
    end = {name: end[name].to(start[name].device) for name in start}  # from a checkpoint they come on the CPU
    return {name: torch.lerp(start[name], end[name], alpha) if alpha < 1 else end[name] for name in start}


def frozen_digest(network: Network, group: int) -> str:
    """sha256 over everything that may not move: parameters below ``group``, and every buffer of the network."""
    moving = {id(each) for index in range(group, network.num_groups) for each in network.group_parameters(index)}
    digest = hashlib.sha256()
    parameters = ((name, each) for name, each in network.trunk.named_parameters() if id(each) not in moving)
    for name, tensor in (*parameters, *network.trunk.named_buffers()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _optimiser(network: Network, group: int, head: StandardisedHead, pace: Pace) -> torch.optim.Optimizer:
    """One parameter group a layer group, then the head's; rates are set at each step."""
    layer_groups = [network.group_parameters(index) for index in range(group, network.num_groups)]
    groups = [{"params": list(each)} for each in (*layer_groups, head.parameters())]
    decay = pace.weight_decay * pace.recipe.weight_decay_scale
    if pace.recipe.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=SGD_MOMENTUM, nesterov=True, weight_decay=decay, fused=True)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=decay, fused=True)
