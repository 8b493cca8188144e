"""Staged fine-tuning from a linear probe (LP-FT): the top layer group first, then all but the stem.

Every stage starts from what was kept before it, trains with BatchNorm frozen and rates that fall towards the stem,
follows an average of the weights, and is kept only if validation says so (``tasks.training.selection``). A stage that
is not kept changes nothing. Stages are data: ``tasks.training.schedule.stage_shape``. Called by ``tasks.finetune``.

All random draws are functions of (seed, stage, epoch), so a run that was killed goes on from its checkpoint as if it
had not been: there is no generator whose state would have to be saved.

References:
    Kumar et al. 2022, arXiv:2202.10054 (LP-FT). Howard and Ruder 2018, arXiv:1801.06146 (discriminative rates).
    Wortsman et al. 2022, arXiv:2109.01903 (WiSE-FT).
"""

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from tasks.models.architectures import Boundary, Network
from tasks.models.head import Head
from tasks.models.layer_groups import Groups
from tasks.progress import progress
from tasks.training import processes
from tasks.training.augmented import Item, LabelledPixels, PixelSource
from tasks.training.boundary import BoundarySource, RecomputedBoundary, open_boundary
from tasks.training.checkpoint import Checkpoint, CheckpointFile, prefixed, without_prefix
from tasks.training.device import memory_format, wait_for
from tasks.training.memory import halved_until_it_fits, in_parts
from tasks.training.schedule import (
    USELESS_STEPS,
    StageLength,
    StageShape,
    TuningSettings,
    layer_group_learning_rates,
    stage_length,
    stage_shape,
)
from tasks.training.selection import ALPHAS, MIN_IMAGES_TO_PICK_EPOCHS, Judgement, compare, judge
from tasks.training.tuner import (
    DivergedError,
    Pace,
    StageTuner,
    StandardisedHead,
    copied,
    frozen_digest,
    interpolated,
    put,
    trainable_tensors,
)

logger = logging.getLogger(__name__)

VIEW_OFFSETS = 2**31
"""Where the draws of the views' order live among the draws of a stage, beyond any epoch."""
REPORT_DIGITS = 6
MAX_NAMED = 32
"""Pictures of a batch that a message names."""

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class StageRecord:
    """What came of a stage. No times, so that the same run makes the same record.

    Attributes:
        name: ``top`` or ``rest``.
        groups: Layer groups that moved, besides the head.
        num_parameters: Numbers that moved, the head's among them.
        epochs: Epochs begun; 0 if the stage was not tried.
        steps: Optimiser steps.
        limited_by: The limit that cut it short, if any.
        learning_rates: Full rates of those groups, then of the head.
        boundary: Whether the frozen part's output was kept or computed in each epoch.
        val_nll_before: Nats a validation picture at the start, at its best temperature.
        val_nll_after: The same of the best candidate.
        val_nll_standard_error: Of the paired difference.
        val_accuracy_before: At the start.
        val_accuracy_after: Of the best candidate.
        alpha: Where the best candidate lies between start (0) and end (1).
        kept: Whether the following stages, and the model, start from it.
        reason: Why.
    """

    name: str
    groups: tuple[int, ...]
    num_parameters: int
    epochs: int
    steps: int
    limited_by: str | None
    learning_rates: tuple[float, ...]
    boundary: str | None
    val_nll_before: float | None
    val_nll_after: float | None
    val_nll_standard_error: float | None
    val_accuracy_before: float | None
    val_accuracy_after: float | None
    alpha: float | None
    kept: bool
    reason: str


@dataclass(frozen=True)
class EpochRecord:
    """An epoch, for the learning curves.

    Attributes:
        stage: Its name.
        epoch: From 1.
        step: Steps of the stage done by its end.
        train_loss: Mean over its pictures, nats.
        val_nll: Of the averaged weights, nats a validation picture at their best temperature; None: not measured.
        val_accuracy: Of the same.
    """

    stage: str
    epoch: int
    step: int
    train_loss: float
    val_nll: float | None
    val_accuracy: float | None


OnEpoch = Callable[[Sequence[EpochRecord]], None]


@dataclass(frozen=True, eq=False)
class StageTimes:
    """Where a stage's seconds went; never part of a report. A resumed stage tells of its last run.

    Attributes:
        stage: Its name.
        boundary: Whether the frozen part's output was kept or computed in each epoch.
        predicted_s: Seconds of either way, from the first pictures and steps: to keep what is frozen, and of all steps.
        training_s: What these took; None where nothing was predicted.
        seconds: What the stage took, validation included.
    """

    stage: str
    boundary: str | None
    predicted_s: Mapping[str, float]
    training_s: float | None
    seconds: float


@dataclass(frozen=True, eq=False)
class FineTuned:
    """The outcome. The network that was handed in holds the kept weights.

    Attributes:
        head: The kept head; its temperature is still to be folded in.
        records: One a stage.
        val_logits_before: (N, C) of the validation pictures from the probe.
        val_logits_after: (N, C) of the same from the kept weights.
        curve: All epochs of all stages.
        times: One a stage that ran.
    """

    head: Head
    records: tuple[StageRecord, ...]
    val_logits_before: NDArray[np.float32]
    val_logits_after: NDArray[np.float32]
    curve: tuple[EpochRecord, ...] = ()
    times: tuple[StageTimes, ...] = ()


def fine_tune(
    network: Network,
    head: Head,
    *,
    train: LabelledPixels,
    val: LabelledPixels,
    stages: Sequence[str],
    settings: TuningSettings,
    checkpoints: CheckpointFile,
    on_epoch: OnEpoch = lambda _: None,
) -> FineTuned:
    """Runs the stages one after another, from where an interrupted run of the same inputs was.

    Args:
        network: With the backbone's weights, on the device to train on; on return with those that were kept.
        head: The linear probe.
        train: Training pictures in their views.
        val: Validation pictures in one view; at least two.
        stages: Their names, see `stage_shape`.
        settings: The numbers.
        checkpoints: Where to go on from; temporary files lie beside it. The caller removes it when it has written
            the outcome.
        on_epoch: Told of all epochs so far, after each.

    Raises:
        ParamsError: If a stage names a module that no layer group above the stem has.
    """
    shapes = [stage_shape(name) for name in stages]
    for shape in shapes:
        shape.first_group(network.groups)  # may raise: not after the stages before it have taken minutes
    network.to(memory_format=memory_format(network.device))
    before = after = logits_of(network, head, val.pixels, settings.batch_size)
    records: list[StageRecord] = []
    curve: list[EpochRecord] = []
    times: list[StageTimes] = []
    resumed = checkpoints.load()
    processes.wait_for_all()  # before the first writes another
    if resumed:
        curve = [EpochRecord(**values) for values in resumed.position["curve"]]
        records = [_record(values) for values in resumed.position["records"]]
        network.load_trunk(without_prefix("kept/trunk", resumed.tensors))
        head = Head(head.labels, *(resumed.tensors[f"kept/head/{name}"].numpy() for name in ("weight", "bias")))
        logger.info("going on at stage %d, epoch %d", len(records) + 1, resumed.position["epoch"] + 1)
    for index in range(len(records), len(shapes)):
        shape = shapes[index]
        reason = _reason_to_leave_out(shape, records, network.groups)
        if reason:
            logger.info("stage %s: %s", shape.name, reason)
            records.append(_untried(shape, network.groups, reason))
            continue
        stage = _Stage(
            shape, index, network, head, train, val, settings, checkpoints, tuple(records), curve, times, on_epoch
        )
        record, head = stage.run(resumed if resumed and resumed.position["epoch"] else None)
        records.append(record)
        resumed = Checkpoint(position_of(records, curve), kept_tensors(network, head))
        checkpoints.save(resumed)
    if any(record.kept for record in records):
        after = logits_of(network, head, val.pixels, settings.batch_size)
    return FineTuned(head, tuple(records), before, after, tuple(curve), tuple(times))


@dataclass(frozen=True, eq=False)
class _Stage:
    """One stage and what it works on."""

    shape: StageShape
    index: int
    network: Network
    head: Head
    train: LabelledPixels
    val: LabelledPixels
    settings: TuningSettings
    checkpoints: CheckpointFile
    records: tuple[StageRecord, ...]
    curve: list[EpochRecord]  # grows by an epoch at a time
    times: list[StageTimes]  # grows by a stage
    on_epoch: OnEpoch

    @property
    def group(self) -> int:
        """The first layer group that moves."""
        return self.shape.first_group(self.network.groups)

    def run(self, resumed: Checkpoint | None) -> tuple[StageRecord, Head]:
        """Trains, judges, and leaves the network with the kept weights.

        Args:
            resumed: A checkpoint from within this stage.
        """
        began = time.perf_counter()
        frozen = frozen_digest(self.network, self.group)
        with self.network.exactly():
            val_source, val_bytes = self._open(self.val.pixels, 0, "val", passes=math.inf)
        embeddings = embeddings_of(self.network, self.group, val_source, self.settings.batch_size)
        head = StandardisedHead(self.head, embeddings)
        with torch.no_grad():
            before = judge(head(embeddings).cpu().numpy(), self.val.labels)
        passes, opened = self._passes(head, val_source), time.perf_counter()
        train_source, _ = self._open(self.train.pixels, val_bytes, "train", passes=passes)
        open_s = time.perf_counter() - opened
        pace = self._pace(head, train_source)
        if pace.length.steps < USELESS_STEPS and pace.length.limited_by == "max_tflop":
            reason = f"not tried: finetune.max_tflop affords {pace.length.steps} steps; {USELESS_STEPS} is the least"
            return _untried(self.shape, self.network.groups, reason), self.head
        record = replace(
            _untried(self.shape, self.network.groups, ""),
            epochs=pace.length.epochs,
            steps=pace.length.steps,
            num_parameters=sum(each.numel() for each in trainable_tensors(self.network, self.group, head).values()),
            limited_by=pace.length.limited_by,
            learning_rates=tuple(rounded(rate) for rate in pace.learning_rates),
            boundary=train_source.kind,
            val_nll_before=rounded(before.mean_nll),
            val_accuracy_before=rounded(before.accuracy),
        )
        start = copied(trainable_tensors(self.network, self.group, head))
        predicted = self._predicted(head, pace.length.steps)
        tuner = StageTuner(self.network, self.group, head, pace)
        end, trouble = self._train(tuner, train_source, val_source, resumed)
        if end:
            record = replace(record, **self._select(head, start, end, before, val_source))
        early = f"; stopped early: {trouble}" if trouble else ""
        record = replace(record, reason=f"{record.reason}{early}" if end else f"dropped: {trouble}")
        if trouble:
            record = replace(record, epochs=begun(self.curve, self.shape.name), steps=tuner.step)
        if not record.kept:
            put(trainable_tensors(self.network, self.group, head), start)
        if frozen_digest(self.network, self.group) != frozen:
            raise RuntimeError(f"stage {self.shape.name} moved what it had frozen")
        seconds = time.perf_counter() - began
        training_s = open_s + tuner.seconds
        self.times.append(StageTimes(self.shape.name, train_source.kind, predicted, training_s, seconds))
        told = (self.shape.name, seconds, training_s, predicted[train_source.kind], train_source.kind)
        logger.info("stage %s took %.1f s, training %.1f s of it where %.1f s were expected, what is frozen %s", *told)
        logger.info("stage %s: %s", self.shape.name, record.reason)
        return record, head.folded() if record.kept else self.head

    def _open(self, pixels: PixelSource, used_bytes: int, what: str, *, passes: float) -> tuple[BoundarySource, int]:
        return open_boundary(
            self.network,
            self.group,
            pixels,
            passes=passes,
            max_bytes=self.settings.boundary_cache_bytes - used_bytes,
            directory=self.checkpoints.path.parent,
            batch_size=self.settings.batch_size,
            what=f"{self.shape.name}: {what} boundary",
        )

    def _passes(self, head: StandardisedHead, val_source: BoundarySource) -> float:
        """How often training would see each picture, were what is frozen kept.

        A step's cost is then that of a validation picture, of which it is kept where anything is.
        """
        length = self._length(head, val_source)
        return length.steps / length.steps_per_epoch

    def _predicted(self, head: StandardisedHead, steps: int) -> dict[str, float]:
        """Seconds of the stage's training either way, from the share of a batch, or what memory holds of it."""
        share = len(processes.share_of(range(min(self.settings.batch_size, len(self.train.labels)))))
        return halved_until_it_fits(partial(self._timed, head, steps, share), share)

    def _timed(self, head: StandardisedHead, steps: int, share: int, size: int) -> dict[str, float]:
        """The same from the second of two batches of ``size`` pictures."""
        forget_gradients(self.network, head)  # of an attempt that memory did not hold
        source = RecomputedBoundary(self.network, self.group, self.train.pixels)
        views = source.num_views
        batches = [[(index, turn % views) for index in range(size)] for turn in range(2)]
        frozen_s = step_s = 0.0
        for batch in batches:
            began = time.perf_counter()
            boundary = next(source.batches([batch]))
            wait_for(self.network.device)
            frozen_s, began = time.perf_counter() - began, time.perf_counter()
            loss_of_class_0(head(self.network.forward_from(boundary, self.group))).backward()  # type: ignore[no-untyped-call]
            wait_for(self.network.device)
            step_s = time.perf_counter() - began
        forget_gradients(self.network, head)
        kept = source.num_images * views / size
        steps_of_size = steps * share / size
        return {"cached": kept * frozen_s + steps_of_size * step_s, "recomputed": steps_of_size * (frozen_s + step_s)}

    def _length(self, head: StandardisedHead, source: BoundarySource) -> StageLength:
        """As many steps as the settings allow where one costs what it does with pictures from ``source``."""
        settings = self.settings
        flop = flop_per_image(self.network, self.group, head, source) * settings.batch_size
        return stage_length(
            num_images=len(self.train.labels),
            batch_size=settings.batch_size,
            epochs=settings.epochs,
            length_factor=self.shape.length_factor,
            max_steps=settings.max_steps,
            affordable_steps=int(settings.max_tflop * 1e12 / max(flop, 1)),
        )

    def _pace(self, head: StandardisedHead, source: BoundarySource) -> Pace:
        """Rates of the groups that move, and as many steps as the settings and their cost allow."""
        settings = self.settings
        rates = layer_group_learning_rates(
            self.network.num_groups + 1, settings.learning_rate * self.shape.rate_factor, settings.layer_decay
        )
        return Pace(
            recipe=settings.recipe,
            learning_rates=rates[self.group :],
            weight_decay=settings.weight_decay,
            length=self._length(head, source),
            warmup_fraction=settings.warmup_fraction,
            clip_norm=settings.clip_norm,
            ema_decay=settings.ema_decay,
        )

    def _train(
        self, tuner: StageTuner, source: BoundarySource, val_source: BoundarySource, resumed: Checkpoint | None
    ) -> tuple[dict[str, Tensor], str | None]:
        """All epochs: the average of the weights at the end, or at the best epoch if enough pictures can tell.

        Where the loss stops being a number, training stops, and the average at the end of the epoch before counts as
        the end; there is none (an empty one) where that was the first epoch.

        Returns:
            The weights, and what went wrong, or None.
        """
        length = tuner.pace.length
        picks = len(self.val.labels) >= MIN_IMAGES_TO_PICK_EPOCHS
        best_nll, best, good, first = math.inf, dict[str, Tensor](), dict[str, Tensor](), 0
        kept = kept_tensors(self.network, self.head)  # before anything moves: what a stage that is dropped goes back to
        if resumed:
            first = resumed.position["epoch"]
            best_nll = resumed.position["best_nll"] if picks else math.inf
            best = without_prefix("best", resumed.tensors)
            tuner.restore(resumed.tensors, resumed.position["step"])
            good = copied(tuner.ema.average)
        for epoch in range(first, length.epochs):
            began = time.perf_counter()
            try:
                loss = self._run_epoch(tuner, epoch, source)
                judged = self._judge(tuner.head, tuner.tensors, tuner.ema.average, val_source)
            except DivergedError as error:
                logger.warning("stage %s, epoch %d: %s", self.shape.name, epoch + 1, error)
                return best or good, str(error)
            good = copied(tuner.ema.average)
            if picks and judged.mean_nll < best_nll:
                best_nll, best = judged.mean_nll, good
            seconds = time.perf_counter() - began
            logger.info(
                "stage %s, epoch %d/%d, step %d/%d: train loss %.4f, val nll %.4f, val accuracy %.4f, %.1f s",
                *(self.shape.name, epoch + 1, length.epochs, tuner.step, length.steps),
                *(loss, judged.mean_nll, judged.accuracy, seconds),
            )
            told = map(rounded, (loss, judged.mean_nll, judged.accuracy))
            self.curve.append(EpochRecord(self.shape.name, epoch + 1, tuner.step, *told))
            self.on_epoch(self.curve)
            position = position_of(self.records, self.curve, epoch + 1, tuner.step, best_nll if picks else None)
            self.checkpoints.save(Checkpoint(position, {**kept, **tuner.state(), **prefixed("best", best)}))
        return best or good, None

    def _run_epoch(self, tuner: StageTuner, epoch: int, source: BoundarySource) -> float:
        """One step a batch; the mean loss.

        Raises:
            DivergedError: If it is no number; names the pictures of the batch.
        """
        first = tuner.step
        batches = epoch_batches(
            (self.settings.seed, self.index),
            epoch,
            num_images=source.num_images,
            num_views=source.num_views,
            batch_size=self.settings.batch_size,
        )[: tuner.pace.length.steps - first]
        mine = [processes.share_of(batch) for batch in batches]
        targets = (torch.from_numpy(self.train.labels[[index for index, _ in batch]]) for batch in mine)
        weights = map(processes.weight_of, batches)
        try:
            return tuner.run_epoch(stage_progress(source.batches(mine), tuner, self.shape.name), targets, weights)
        except DivergedError as error:
            raise DivergedError(f"{error} ({pictures_of(self.train.pixels, batches[tuner.step - first])})") from error

    def _select(
        self,
        head: StandardisedHead,
        start: dict[str, Tensor],
        end: dict[str, Tensor],
        before: Judgement,
        val_source: BoundarySource,
    ) -> dict[str, Any]:
        """Tries what lies between start and end, and leaves the best of it in the network."""
        tensors = trainable_tensors(self.network, self.group, head)
        candidates = {
            alpha: self._judge(head, tensors, interpolated(start, end, alpha), val_source) for alpha in ALPHAS
        }
        alpha = min(candidates, key=lambda each: candidates[each].mean_nll)
        after = candidates[alpha]
        verdict = compare(before, after)
        put(tensors, interpolated(start, end, alpha))
        word, relation = ("kept", "more") if verdict.better else ("dropped", "no more")
        return {
            "alpha": alpha,
            "kept": verdict.better,
            "val_nll_after": rounded(after.mean_nll),
            "val_nll_standard_error": rounded(verdict.standard_error),
            "val_accuracy_after": rounded(after.accuracy),
            "reason": f"{word}: validation likelihood rose by {verdict.gain:.4f} nats a picture, "
            f"{relation} than its standard error {verdict.standard_error:.4f}",
        }

    def _judge(
        self, head: StandardisedHead, tensors: Any, values: dict[str, Tensor], source: BoundarySource
    ) -> Judgement:
        """Validation with other values in the moving weights; these come back afterwards."""
        own = copied(tensors)
        put(tensors, values)
        with torch.no_grad():
            logits = head(embeddings_of(self.network, self.group, source, self.settings.batch_size)).cpu().numpy()
        put(tensors, own)
        if not np.isfinite(logits).all():
            raise DivergedError("the averaged weights give no numbers")
        return judge(logits, self.val.labels)


def begun(curve: Sequence[EpochRecord], stage: str) -> int:
    """Epochs of a stage that were begun, where the last of them did not come to its end."""
    return sum(each.stage == stage for each in curve) + 1


def epoch_batches(
    draws: Sequence[int], epoch: int, *, num_images: int, num_views: int, batch_size: int
) -> list[list[Item]]:
    """The pictures of an epoch in random order, each in the view that is its turn.

    Args:
        draws: What all draws of the stage are a function of: the seed, and which stage it is.
        epoch: From 0.
        num_images: Pictures.
        num_views: Of each.
        batch_size: Of all batches but the last.
    """
    offsets = np.random.default_rng([*draws, VIEW_OFFSETS]).integers(num_views, size=num_images)
    order = np.random.default_rng([*draws, epoch]).permutation(num_images)
    items = [(int(index), int((offsets[index] + epoch) % num_views)) for index in order]
    return batched(items, batch_size)


def stage_progress(batches: Iterator[Batch], tuner: StageTuner, what: str) -> Iterator[Batch]:
    """The batches, with a bar or lines that say how far the stage is, how fast, and how long it still takes."""
    return progress(batches, total=tuner.pace.length.steps, what=what, unit="step", done=tuner.step)


def pictures_of(pixels: PixelSource, batch: Sequence[Item]) -> str:
    """The pictures of a batch, for a person who looks for a bad one."""
    paths = [PurePath(str(pixels.files[index])) for index, _ in batch]
    names = [
        f"{path.parent.name}/{path.name} as {pixels.views[view]}" for path, (_, view) in zip(paths, batch, strict=True)
    ]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"the batch was {', '.join(names[:MAX_NAMED])}{more}"


@contextmanager
def deterministic_torch(threads: int, *, strict: bool = True) -> Iterator[None]:
    """Deterministic kernels on a number of threads; what was set before comes back.

    Numbers below the normal range of float32 count as zero: they made a step up to forty times slower (gradients and
    moments are full of them, activations of a poorly scaled network as well). Filling fresh memory, which deterministic
    mode does to show bugs, took a quarter of a step. cuBLAS is deterministic only with a workspace of its own. cuDNN
    would compute float32 in TF32, with as few digits as float16 has.

    Args:
        threads: On the CPU.
        strict: Whether what has no deterministic kernel is an error; else a warning (some layers have none on GPUs).
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, before_threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    before_strict = not torch.is_deterministic_algorithms_warn_only_enabled()
    fill: Any = torch.utils.deterministic  # its switch is a property that type checkers do not see
    before_fill, before_tf32 = fill.fill_uninitialized_memory, torch.backends.cudnn.allow_tf32
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    fill.fill_uninitialized_memory = torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before_threads)
        fill.fill_uninitialized_memory, torch.backends.cudnn.allow_tf32 = before_fill, before_tf32
        torch.use_deterministic_algorithms(before, warn_only=not before_strict)


@torch.no_grad()
def embeddings_of(network: Network, group: int, source: BoundarySource, batch_size: int) -> Tensor:
    """Embeddings (N, D) of every picture in its first view, in float32."""
    batches = batched([(index, 0) for index in range(source.num_images)], batch_size)

    def of(maps: Tensor, pooled: Tensor) -> Tensor:
        return network.forward_from(Boundary(maps, pooled), group)

    with network.exactly():
        return torch.cat([part for each in source.batches(batches) for part in in_parts(of, each.maps, each.pooled)])


@torch.no_grad()
def logits_of(network: Network, head: Head, pixels: PixelSource, batch_size: int) -> NDArray[np.float32]:
    """Logits (N, C) of every picture in its first view, from pixels on."""
    return head.logits(embeddings_of(network, 0, RecomputedBoundary(network, 0, pixels), batch_size).cpu().numpy())


def batched(items: Sequence[Item], batch_size: int) -> list[list[Item]]:
    """Items in order, so many at a time."""
    return [list(items[start : start + batch_size]) for start in range(0, len(items), batch_size)]


def flop_per_image(network: Network, group: int, head: StandardisedHead, source: BoundarySource) -> float:
    """Floating-point operations of a training picture, forward and backward; with the frozen part if it runs again."""
    trainable_tensors(network, group, head)
    gradients = torch.ops.aten.convolution_backward
    with FlopCounterMode(display=False, custom_mapping={gradients: _conv_gradients_flop}) as counter:
        boundary = next(iter(source.batches([[(0, 0)]])))
        loss_of_class_0(head(network.forward_from(boundary, group))).backward()  # type: ignore[no-untyped-call]
    forget_gradients(network, head)
    return float(counter.get_total_flops())


def _conv_gradients_flop(
    out: Sequence[int], maps: Sequence[int], weight: Sequence[int], *geometry: Any, **_: Any
) -> int:
    """Operations of a convolution's gradients by its maps and its weight, each as many as of the convolution itself.

    torch's own formula knows no groups: the gradient by a depthwise weight counts once more for each of its channels.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, wanted = geometry
    return int(sum(wanted[:2])) * int(conv_flop_count([*maps], [*weight], [*out], transposed))


def loss_of_class_0(logits: Tensor) -> Tensor:
    """A loss for a backward pass that is only there to be measured."""
    return nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=logits.device))


def forget_gradients(network: Network, head: StandardisedHead) -> None:
    """After a backward pass that was only there to be measured."""
    for tensor in (*network.parameters(), *head.parameters()):
        tensor.grad = None


def _reason_to_leave_out(shape: StageShape, records: Sequence[StageRecord], groups: Groups) -> str | None:
    """Why a stage is not tried, or None."""
    last = next((record for record in reversed(records) if record.epochs), None)
    if last and not last.kept:
        return f"not tried: stage {last.name} was not kept"
    if last and shape.first_group(groups) >= min(last.groups):
        return f"not tried: stage {last.name} moved the same layers"
    return None


def _untried(shape: StageShape, groups: Groups, reason: str) -> StageRecord:
    """The record of a stage of which nothing is known but why."""
    return StageRecord(
        name=shape.name,
        groups=tuple(range(shape.first_group(groups), len(groups))),
        num_parameters=0,
        epochs=0,
        steps=0,
        limited_by=None,
        learning_rates=(),
        boundary=None,
        val_nll_before=None,
        val_nll_after=None,
        val_nll_standard_error=None,
        val_accuracy_before=None,
        val_accuracy_after=None,
        alpha=None,
        kept=False,
        reason=reason,
    )


def _record(values: dict[str, Any]) -> StageRecord:
    """A record from its JSON."""
    lists = {name: tuple(values[name]) for name in ("groups", "learning_rates")}
    return StageRecord(**{**values, **lists})


def position_of(
    records: Sequence[StageRecord],
    curve: Sequence[EpochRecord],
    epoch: int = 0,
    step: int = 0,
    best_nll: float | None = None,
) -> dict[str, Any]:
    """Where a run is: stages done, the curves so far, then epochs and steps done in the stage under way."""
    return {
        "records": [asdict(record) for record in records],
        "curve": [asdict(each) for each in curve],
        "epoch": epoch,
        "step": step,
        "best_nll": best_nll,
    }


def kept_tensors(network: Network, head: Head) -> dict[str, Tensor]:
    """Copies of what the next stage starts from."""
    weights = {"weight": torch.from_numpy(head.weight), "bias": torch.from_numpy(head.bias)}
    return copied({**prefixed("kept/trunk", network.trunk_state()), **prefixed("kept/head", weights)})


def rounded(value: float) -> float:
    """Six significant digits, for reports."""
    return float(f"{value:.{REPORT_DIGITS}g}")
