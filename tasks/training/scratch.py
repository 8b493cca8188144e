"""The baseline from scratch: the same architecture from random weights, for as many seconds as the others took.

All layers learn, BatchNorm with the statistics of its batch; at the end these are measured anew for the averaged
weights, because running ones are far behind after few steps. What comes out is taken as it is, better or not: it is
there to be compared with. Where it diverges, nothing is kept and the record says so. The steps are what fits into the
seconds on this machine, found by timing a few of them before anything is kept, so that the learning rate can fall to
zero at the end. It is the one stage whose outcome depends on the speed of the machine; where a run was interrupted it
goes on with the steps that were found. Called by ``tasks.finetune``.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tasks.models.architectures import Network, build_network
from tasks.models.head import Head
from tasks.training.augmented import Item, LabelledPixels
from tasks.training.boundary import RecomputedBoundary
from tasks.training.checkpoint import Checkpoint, CheckpointFile
from tasks.training.device import memory_format, on_device
from tasks.training.schedule import SCRATCH, STATED_BATCH_SIZE, Recipe, ScratchSettings, StageLength, TuningSettings
from tasks.training.selection import judge
from tasks.training.staged import (
    EpochRecord,
    FineTuned,
    OnEpoch,
    StageRecord,
    StageTimes,
    epoch_batches,
    logits_of,
    pictures_of,
    rounded,
    stage_progress,
)
from tasks.training.tuner import DivergedError, Pace, StageTuner, StandardisedHead, put

TIMED_STEPS, WARM_UP_STEPS = 4, 2
STATISTICS_BATCHES = 20
MIN_STEPS = 20

logger = logging.getLogger(__name__)


def from_scratch(
    network: Network,
    head: Head,
    *,
    architecture: str,
    train: LabelledPixels,
    val: LabelledPixels,
    settings: TuningSettings,
    scratch: ScratchSettings,
    checkpoints: CheckpointFile,
    on_epoch: OnEpoch,
) -> FineTuned:
    """Trains from random weights.

    Args:
        network: With the backbone's weights, on the device to train on; on return with the new ones, whole where it
            did not diverge.
        head: The probe, for comparison.
        architecture: Of the network.
        train: Training pictures in their views.
        val: Validation pictures in one view.
        settings: The numbers that it shares with the other stages.
        scratch: Its own numbers.
        checkpoints: Where to go on from.
        on_epoch: Told of all epochs so far.
    """
    began = time.perf_counter()
    network.to(memory_format=memory_format(network.device))
    before = logits_of(network, head, val.pixels, settings.batch_size)
    start, curve = judge(before, val.labels), list[EpochRecord]()
    stage = _Scratch(network, architecture, head, train, settings, scratch)
    record = StageRecord(
        name=SCRATCH,
        groups=tuple(range(network.num_groups)),
        num_parameters=sum(each.numel() for each in network.trunk.parameters()) + head.weight.size + head.bias.size,
        epochs=0,
        steps=0,
        limited_by="seconds",
        learning_rates=(rounded(stage.learning_rate),),
        boundary=None,
        val_nll_before=rounded(start.mean_nll),
        val_nll_after=None,
        val_nll_standard_error=None,
        val_accuracy_before=rounded(start.accuracy),
        val_accuracy_after=None,
        alpha=None,
        kept=False,
        reason="",
    )
    after = before
    try:
        tuner = stage.train_all(checkpoints, curve, on_epoch)
        head = tuner.head.folded()
        after = logits_of(network, head, val.pixels, settings.batch_size)
        end = judge(after, val.labels)
        record = replace(
            record,
            epochs=tuner.pace.length.epochs,
            steps=tuner.pace.length.steps,
            val_nll_after=rounded(end.mean_nll),
            val_accuracy_after=rounded(end.accuracy),
            kept=True,
            reason="taken as it is: the baseline from random weights, to compare with",
        )
    except DivergedError as error:
        reason = f"dropped: it diverged, {error}; a lower finetune.scratch.learning_rate may help"
        logger.warning("stage %s: %s", SCRATCH, reason)
        record = replace(record, epochs=len(curve) + 1, steps=curve[-1].step if curve else 0, reason=reason)
    times = StageTimes(SCRATCH, None, {}, None, time.perf_counter() - began)
    return FineTuned(head, (record,), before, after, tuple(curve), (times,))


@dataclass(frozen=True)
class _Scratch:
    """The stage and what it works on."""

    network: Network
    architecture: str
    head: Head
    train: LabelledPixels
    settings: TuningSettings
    scratch: ScratchSettings

    @property
    def learning_rate(self) -> float:
        """The full one, at this batch size."""
        return self.scratch.learning_rate * self.settings.batch_size / STATED_BATCH_SIZE

    def train_all(self, checkpoints: CheckpointFile, curve: list[EpochRecord], on_epoch: OnEpoch) -> StageTuner:
        """All epochs, of which the curve grows; leaves the averaged weights in the network.

        Raises:
            DivergedError: If the loss is no number any more: there is nothing to fall back to.
        """
        resumed = checkpoints.load()
        steps = resumed.position["steps"] if resumed else None
        if steps is None:
            steps = self._affordable_steps(self._tuner(MIN_STEPS))
            checkpoints.save(Checkpoint({"steps": steps, "epoch": 0, "curve": []}, {}))
        tuner = self._tuner(steps)
        curve += [EpochRecord(**values) for values in resumed.position["curve"]] if resumed else []
        first = resumed.position["epoch"] if resumed else 0
        if resumed and first:
            tuner.restore(resumed.tensors, resumed.position["step"])
        for epoch in range(first, tuner.pace.length.epochs):
            loss = self._run_epoch(tuner, epoch)
            curve.append(EpochRecord(SCRATCH, epoch + 1, tuner.step, rounded(loss), None, None))
            on_epoch(curve)
            logger.info("stage %s, epoch %d, step %d/%d: train loss %.4f", SCRATCH, epoch + 1, tuner.step, steps, loss)
            told = [asdict(each) for each in curve]
            position = {"steps": steps, "epoch": epoch + 1, "step": tuner.step, "curve": told}
            checkpoints.save(Checkpoint(position, tuner.state()))
        put(tuner.tensors, tuner.ema.average)
        self._measure_statistics()
        return tuner

    def _tuner(self, steps: int) -> StageTuner:
        """Random weights from the seed, a head of zeros, and what moves them."""
        network, head, settings = self.network, self.head, self.settings
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            fresh = build_network(self.architecture, depths=network.depths)
        network.load_trunk(fresh.trunk_state())
        _set_batch_norm(network, training=True)
        few = self._batches(0)[0]
        source = RecomputedBoundary(network, 0, self.train.pixels)
        with torch.no_grad():
            embeddings = torch.cat([network.forward_from(each, 0) for each in source.batches([few])])
        blank = Head(head.labels, np.zeros_like(head.weight), np.zeros_like(head.bias))
        per_epoch = len(self._batches(0))
        pace = Pace(
            recipe=Recipe("adamw", self.scratch.learning_rate, 1.0),
            learning_rates=[self.learning_rate] * (network.num_groups + 1),
            weight_decay=self.scratch.weight_decay,
            length=StageLength(math.ceil(steps / per_epoch), steps, per_epoch, None),
            warmup_fraction=settings.warmup_fraction,
            clip_norm=settings.clip_norm,
            ema_decay=settings.ema_decay,
        )
        return StageTuner(network, 0, StandardisedHead(blank, embeddings), pace)

    def _affordable_steps(self, tuner: StageTuner) -> int:
        """How many steps fit into the seconds, from the time that a few of them take."""
        batches = (self._batches(0) * (TIMED_STEPS + WARM_UP_STEPS))[: TIMED_STEPS + WARM_UP_STEPS]
        began = time.perf_counter()
        for index, (batch, pixels) in enumerate(zip(batches, self.train.pixels.batches(batches), strict=True)):
            if index == WARM_UP_STEPS:
                began = time.perf_counter()
            self._descend(tuner, batch, pixels)
        step_s = (time.perf_counter() - began) / TIMED_STEPS
        steps = max(MIN_STEPS, int(self.scratch.seconds / step_s))
        logger.info("stage %s: %.1f steps a second, so %d in %.0f s", SCRATCH, 1 / step_s, steps, self.scratch.seconds)
        return steps

    def _run_epoch(self, tuner: StageTuner, epoch: int) -> float:
        """One step a batch; the mean loss, nats a picture."""
        batches = self._batches(epoch)[: tuner.pace.length.steps - tuner.step]
        pixels = self.train.pixels.batches(batches)
        losses = [
            self._descend(tuner, batch, each)
            for batch, each in zip(batches, stage_progress(pixels, tuner, SCRATCH), strict=True)
        ]
        return float(np.mean(losses))

    def _descend(self, tuner: StageTuner, batch: Sequence[Item], pixels: NDArray[np.float32]) -> float:
        """A step; its loss."""
        images = on_device(torch.from_numpy(pixels), tuner.network.device)
        labels = torch.from_numpy(self.train.labels[[index for index, _ in batch]]).to(images.device)

        def loss_of(part: slice) -> torch.Tensor:
            logits = tuner.head(tuner.network(images[part]))
            return nn.functional.cross_entropy(logits, labels[part], label_smoothing=self.scratch.label_smoothing)

        try:
            return tuner.descend(loss_of, len(batch))
        except DivergedError as error:
            raise DivergedError(f"{error} ({pictures_of(self.train.pixels, batch)})") from error

    def _batches(self, epoch: int) -> list[list[Item]]:
        """An epoch's batches; one of a single picture has no statistics and is left out."""
        found = epoch_batches(
            (self.settings.seed, 0),
            epoch,
            num_images=len(self.train.labels),
            num_views=len(self.train.pixels.views),
            batch_size=self.settings.batch_size,
        )
        return [batch for batch in found if len(batch) > 1] or found

    @torch.no_grad()
    def _measure_statistics(self) -> None:
        """Sets BatchNorm's statistics to their mean over some training batches, with the weights as they are."""
        network = self.network
        layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean from now on
        source = RecomputedBoundary(network, 0, self.train.pixels)
        with network.exactly():
            embeddings = [
                network.forward_from(boundary, 0) for boundary in source.batches(self._batches(0)[:STATISTICS_BATCHES])
            ]
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        _set_batch_norm(network, training=False)
        if not all(bool(each.isfinite().all()) for each in embeddings):
            raise DivergedError("the network from random weights gives no numbers")


def _set_batch_norm(network: Network, *, training: bool) -> None:
    """Whether BatchNorm takes the statistics of its batch; the network itself never leaves eval."""
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.training = training
