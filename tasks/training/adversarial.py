"""The adversarial stage: all layers learn to withstand small disturbances made to mislead them.

It starts from what the stages before it left and trains on each picture as it is and as an attack disturbs it, with a
learning rate that starts slowly and decays fast, and within an epsilon that grows to its full size while the rate does.
The attack works on what the network sees, in [0, 1]; the normalisation is inside the model. BatchNorm stays frozen, so
that attack and step see one and the same function.

The cheap attack, FGSM from a random start, can be overfitted to: the network withstands its single step and nothing
else (catastrophic overfitting). After each epoch FGSM and PGD are therefore run on a few training pictures; if the
accuracy under PGD is more than ``max_fall`` below that under FGSM, or below its own of the epoch before, the epoch is
thrown away and taken again from its checkpoint, from there on with PGD.

The epoch with the best accuracy under PGD-20 on validation pictures is taken, of those that ended with the whole
epsilon and whose clean accuracy is affordable, and kept by the rule of `tasks.training.selection.RobustVerdict`. As the
epoch was chosen on these same pictures, and stronger attacks exist, the numbers in the record are an upper bound.
Called by ``tasks.finetune``.

References:
    Jeddi, Shafiee and Wong 2020, arXiv:2012.13628 (adversarial fine-tuning, slow start and fast decay).
    Wong, Rice and Kolter 2020, arXiv:2001.03994 (catastrophic overfitting). Rice, Wong and Kolter 2020,
    arXiv:2002.11569 (robust accuracy falls again in late epochs).
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks.evaluation.metrics import Accuracy, accuracy_of
from tasks.models.architectures import Network
from tasks.models.head import Head
from tasks.training.attacks import all_logits, climb, fgsm, fgsm_rs, pgd
from tasks.training.augmented import Item, LabelledPixels
from tasks.training.boundary import RecomputedBoundary
from tasks.training.checkpoint import Checkpoint, CheckpointFile, prefixed, without_prefix
from tasks.training.device import on_device
from tasks.training.schedule import (
    ADAMW_DEFAULT,
    ADVERSARIAL,
    STATED_BATCH_SIZE,
    USELESS_STEPS,
    AdversarialSettings,
    AttackName,
    TuningSettings,
    slow_growth,
    slow_start_fast_decay,
    stage_length,
)
from tasks.training.selection import RobustVerdict, compare_robustness
from tasks.training.staged import (
    EpochRecord,
    FineTuned,
    OnEpoch,
    StageRecord,
    StageTimes,
    batched,
    begun,
    embeddings_of,
    epoch_batches,
    flop_per_image,
    kept_tensors,
    logits_of,
    pictures_of,
    position_of,
    rounded,
    stage_progress,
)
from tasks.training.tuner import (
    DivergedError,
    Pace,
    StageTuner,
    StandardisedHead,
    copied,
    frozen_digest,
    put,
    trainable_tensors,
)

logger = logging.getLogger(__name__)

SLOW_START_FRACTION = 0.3
VAL_STEPS, GUARD_STEPS = 20, 10
STRONGEST = f"pgd_{VAL_STEPS}"
GUARD_IMAGES = 64
CONFIDENCE = 0.95
ATTACK_DRAWS = 2**31 + 1
"""Where the draws of the attacks live among the draws of a stage, beyond any epoch."""
MEANING = "accuracy under these attacks on the network's input is an upper bound of robustness: others are stronger"

Rights = Mapping[str, NDArray[np.bool_]]
Attack = Callable[[Tensor, Tensor, np.random.Generator], Tensor]


@dataclass(frozen=True)
class AdversarialRecord(StageRecord):
    """What came of the adversarial stage.

    Attributes:
        attack: That it was trained against in the end.
        collapsed_epoch: The epoch that was taken again with PGD because of catastrophic overfitting, or None.
        epsilon: Largest change of a value in [0, 1].
        best_epoch: The one that was taken.
        num_attacked: Validation pictures that were attacked.
        robustness_before: Accuracy by attack (``clean`` is none) at the start.
        robustness_after: Of the epoch that was taken, with the head that ships.
        meaning: What these numbers are.
    """

    attack: AttackName
    collapsed_epoch: int | None
    epsilon: float
    best_epoch: int | None
    num_attacked: int
    robustness_before: Mapping[str, Accuracy] | None
    robustness_after: Mapping[str, Accuracy] | None
    meaning: str = MEANING


class PixelClassifier(nn.Module):
    """The whole model on pictures in [0, 1].

    Args:
        network: Takes normalised pictures; where it lies, the whole model does.
        head: Takes its embeddings.
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1.
    """

    def __init__(self, network: Network, head: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network, self.head = network, head
        self.mean, self.std = (torch.tensor(each, device=network.device).view(1, 3, 1, 1) for each in (mean, std))

    @classmethod
    def of(cls, network: Network, head: Head, mean: Sequence[float], std: Sequence[float]) -> "PixelClassifier":
        """With a head as it ships."""
        linear = nn.Linear(network.feature_dim, len(head.labels))
        linear.load_state_dict({"weight": torch.tensor(head.weight), "bias": torch.tensor(head.bias)})
        return cls(network, linear.to(network.device), mean, std)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of pictures (B, 3, S, S)."""
        logits: Tensor = self.head(self.network((images - self.mean) / self.std))
        return logits

    @contextmanager
    def held(self) -> Iterator[None]:
        """While it is attacked: gradients are for the pictures alone, which saves a third of the work."""
        moving = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter in moving:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in moving:
                parameter.requires_grad_(True)

    def images(self, pixels: NDArray[np.float32]) -> Tensor:
        """Pictures (B, 3, S, S) in [0, 1] of normalised ones."""
        images = torch.from_numpy(pixels).to(self.network.device) * self.std + self.mean
        return on_device(images.clamp(0, 1), self.network.device)


def pgd_attack(model: PixelClassifier, epsilon: float, num_steps: int) -> Attack:
    """PGD from one random start."""
    return lambda images, labels, rng: pgd(model, images, labels, epsilon=epsilon, num_steps=num_steps, rng=rng)


def robustness_attacks(model: PixelClassifier, epsilon: float) -> dict[str, Attack]:
    """What a model is measured with: nothing, FGSM and PGD-20."""
    return {
        "clean": lambda images, _labels, _rng: images,
        "fgsm": lambda images, labels, _rng: fgsm(model, images, labels, epsilon=epsilon),
        STRONGEST: pgd_attack(model, epsilon, VAL_STEPS),
    }


def answered_rightly(
    model: PixelClassifier,
    data: LabelledPixels,
    rows: Sequence[int],
    attacks: Mapping[str, Attack],
    *,
    seed: Sequence[int],
    batch_size: int,
) -> dict[str, NDArray[np.bool_]]:
    """Which of some pictures a model has right under each of some attacks, (N,) by the attack's name, in float32.

    Args:
        model: The model.
        data: Pictures, of which the first view is taken, and their classes.
        rows: N indices of pictures.
        attacks: By name.
        seed: Of the attacks' random draws; the same for the same result.
        batch_size: Pictures that are decoded together; attacked in parts as `in_parts` says.
    """
    right: dict[str, list[Tensor]] = {name: [] for name in attacks}
    rng = np.random.default_rng(seed)
    batches = batched([(row, 0) for row in rows], batch_size)
    for batch, pixels in zip(batches, data.pixels.batches(batches), strict=True):
        images = model.images(pixels)
        labels = _labels(data, batch).to(images.device)
        for name, attack in attacks.items():
            with model.network.exactly(), model.held():
                disturbed = attack(images, labels, rng)
            with model.network.exactly():
                right[name].append(all_logits(model, disturbed).argmax(dim=1) == labels)
    return {name: torch.cat(parts).cpu().numpy() for name, parts in right.items()}


def harden(
    network: Network,
    tuned: FineTuned,
    *,
    train: LabelledPixels,
    val: LabelledPixels,
    mean: Sequence[float],
    std: Sequence[float],
    settings: TuningSettings,
    adversarial: AdversarialSettings,
    checkpoints: CheckpointFile,
    on_epoch: OnEpoch = lambda _: None,
) -> FineTuned:
    """Runs the adversarial stage after the others, from where an interrupted run of the same inputs was.

    Args:
        network: With the weights that were kept; on return with those of this stage if it is kept.
        tuned: What the stages before came to.
        train: Training pictures in their views.
        val: Validation pictures in one view.
        mean: Of the normalisation, per channel.
        std: Of the same.
        settings: The numbers that it shares with the other stages.
        adversarial: Its own numbers.
        checkpoints: Where to go on from.
        on_epoch: Told of all epochs so far, after each.
    """
    began = time.perf_counter()
    embeddings = embeddings_of(network, 0, RecomputedBoundary(network, 0, val.pixels), settings.batch_size)
    model = PixelClassifier(network, StandardisedHead(tuned.head, embeddings), mean, std)
    resumed = checkpoints.load()
    resumed = resumed if resumed and ADVERSARIAL in resumed.position else None
    curve = [EpochRecord(**values) for values in resumed.position["curve"]] if resumed else list(tuned.curve)
    stage = _Adversarial(model, tuned, train, val, settings, adversarial, checkpoints, curve, on_epoch)
    record = stage.run(resumed)
    times = (*tuned.times, StageTimes(ADVERSARIAL, None, {}, None, time.perf_counter() - began))
    tuned = replace(tuned, records=(*tuned.records, record), curve=tuple(curve), times=times)
    if not record.kept:
        return tuned
    head = stage.head.folded()
    return replace(tuned, head=head, val_logits_after=logits_of(network, head, val.pixels, settings.batch_size))


def measured_again(
    record: StageRecord,
    model: PixelClassifier,
    val: LabelledPixels,
    *,
    settings: TuningSettings,
    adversarial: AdversarialSettings,
    position: int,
) -> StageRecord:
    """The record of the adversarial stage with the robustness of another head than it was trained with.

    Args:
        record: The stage's.
        model: What ships.
        val: Validation pictures in one view.
        settings: The numbers that the stage shared with the others.
        adversarial: Its own numbers.
        position: How many stages came before it.
    """
    assert isinstance(record, AdversarialRecord)
    right = answered_rightly(
        model,
        val,
        fixed_rows(val, adversarial.val_images),
        robustness_attacks(model, adversarial.epsilon),
        seed=(settings.seed, position, ATTACK_DRAWS),
        batch_size=settings.batch_size,
    )
    return replace(record, robustness_after=_shares(right))


@dataclass(frozen=True)
class _Progress:
    """How far the stage is, beyond epochs and steps; kept in the checkpoint.

    Attributes:
        attack: That is trained against.
        collapsed_epoch: Which was taken again, or None.
        guarded: Accuracy under the guard's PGD after the last epoch with ``fgsm_rs``; 0 before the first.
        best_epoch: So far, or None.
        best_rank: Whether its clean accuracy is affordable, and its accuracy under PGD-20.
    """

    attack: AttackName
    collapsed_epoch: int | None = None
    guarded: float = 0.0
    best_epoch: int | None = None
    best_rank: Sequence[float] = (0, -1)


@dataclass(frozen=True, eq=False)
class _Adversarial:
    """The stage and what it works on."""

    model: PixelClassifier
    tuned: FineTuned
    train: LabelledPixels
    val: LabelledPixels
    settings: TuningSettings
    adversarial: AdversarialSettings
    checkpoints: CheckpointFile
    curve: list[EpochRecord]  # grows by an epoch at a time
    on_epoch: OnEpoch

    @property
    def head(self) -> StandardisedHead:
        """The model's."""
        assert isinstance(self.model.head, StandardisedHead)
        return self.model.head

    @property
    def draws(self) -> tuple[int, int]:
        """What all random draws are a function of, besides the epoch."""
        return self.settings.seed, len(self.tuned.records)

    def run(self, resumed: Checkpoint | None) -> AdversarialRecord:
        """Trains, judges, and leaves the network with the kept weights.

        Args:
            resumed: A checkpoint from within this stage.
        """
        network = self.model.network
        pace = self._pace()
        if pace.length.steps < USELESS_STEPS and pace.length.limited_by == "max_tflop":
            afforded = f"finetune.adversarial.max_tflop affords {pace.length.steps} steps"
            reason = f"not tried: {afforded}; {USELESS_STEPS} is the least"
            logger.info("stage %s: %s", ADVERSARIAL, reason)
            return replace(self._record(pace), epochs=0, steps=0, limited_by=None, learning_rates=(), reason=reason)
        frozen, tensors = frozen_digest(network, 0), trainable_tensors(network, 0, self.head)
        start, before = copied(tensors), self._measured()
        record = replace(
            self._record(pace),
            val_accuracy_before=rounded(float(before["clean"].mean())),
            robustness_before=_shares(before),
        )
        tuner = StageTuner(network, 0, self.head, pace)
        best, progress, trouble = self._train(tuner, before, resumed)
        if best:
            put(tensors, best)
            record = replace(record, **self._judged(before, progress))
        early = f"; stopped early: {trouble}" if trouble else ""
        record = replace(record, reason=f"{record.reason}{early}" if best else f"dropped: {trouble}")
        if trouble:
            record = replace(record, epochs=begun(self.curve, ADVERSARIAL), steps=tuner.step)
        if not record.kept:
            put(tensors, start)
        if frozen_digest(network, 0) != frozen:
            raise RuntimeError(f"stage {ADVERSARIAL} moved what it had frozen")
        logger.info("stage %s: %s", ADVERSARIAL, record.reason)
        return record

    def _pace(self) -> Pace:
        """One rate for all groups: the stem, too, must unlearn what a disturbance can use."""
        settings, network = self.settings, self.model.network
        length = stage_length(
            num_images=len(self.train.labels),
            batch_size=settings.batch_size,
            epochs=self.adversarial.epochs,
            length_factor=1.0,
            max_steps=settings.max_steps,
            affordable_steps=int(
                self.adversarial.max_tflop * 1e12 / max(self._flop_per_image() * settings.batch_size, 1)
            ),
        )
        rate = self.adversarial.learning_rate * settings.batch_size / STATED_BATCH_SIZE
        return Pace(
            recipe=ADAMW_DEFAULT,
            learning_rates=[rate] * (network.num_groups + 1),
            weight_decay=settings.weight_decay,
            length=length,
            warmup_fraction=SLOW_START_FRACTION,
            clip_norm=settings.clip_norm,
            ema_decay=settings.ema_decay,
            schedule=slow_start_fast_decay,
        )

    def _flop_per_image(self) -> float:
        """Floating-point operations of a training picture: forward and backward for each step of the attack, too."""
        settings = self.adversarial
        passes = (settings.pgd_steps if settings.attack == "pgd" else 1) + 1 + bool(settings.clean_weight)
        source = RecomputedBoundary(self.model.network, 0, self.train.pixels)
        return passes * flop_per_image(self.model.network, 0, self.head, source)

    def _train(
        self, tuner: StageTuner, before: Rights, resumed: Checkpoint | None
    ) -> tuple[dict[str, Tensor], _Progress, str | None]:
        """All epochs, or those before the loss was no number any more.

        Returns:
            The averaged weights of the best one (none where that was the first), how far it came, and what went wrong.
        """
        kept = kept_tensors(tuner.network, self.tuned.head)  # what an interrupted run starts from
        progress, best, epoch = _Progress(self.adversarial.attack), dict[str, Tensor](), 0
        if resumed:
            epoch, progress = resumed.position["epoch"], _Progress(**resumed.position[ADVERSARIAL])
            best = without_prefix("best", resumed.tensors)
            tuner.restore(resumed.tensors, resumed.position["step"])
        else:
            self._save(tuner, epoch, progress, kept)  # to go back to
        while epoch < tuner.pace.length.epochs:
            began = time.perf_counter()
            try:
                loss = self._run_epoch(tuner, epoch, progress.attack)
            except DivergedError as error:
                logger.warning("stage %s, epoch %d: %s", ADVERSARIAL, epoch + 1, error)
                return best, progress, str(error)
            if progress.attack == "fgsm_rs":
                guarded = self._guarded()
                if has_collapsed(progress.guarded, **guarded, max_fall=self.adversarial.max_fall):
                    told = "stage %s, epoch %d: right are %.3f under PGD, %.3f under FGSM, %.3f before: again, with PGD"
                    logger.warning(told, ADVERSARIAL, epoch + 1, guarded["pgd"], guarded["fgsm"], progress.guarded)
                    self._go_back(tuner)
                    progress = replace(progress, attack="pgd", collapsed_epoch=epoch + 1)
                    continue
                progress = replace(progress, guarded=guarded["pgd"])
            is_whole = self._grown(tuner.pace, tuner.step - 1) == 1
            with _holding(tuner.tensors, tuner.ema.average):
                measured = self._measured(attacked=is_whole)
            if is_whole and (rank := self._rank(before, measured)) > tuple(progress.best_rank):
                progress, best = replace(progress, best_epoch=epoch + 1, best_rank=rank), copied(tuner.ema.average)
            length, seconds = tuner.pace.length, time.perf_counter() - began
            logger.info(
                "stage %s, epoch %d/%d, step %d/%d, %s: train loss %.4f, %s, %.1f s",
                *(ADVERSARIAL, epoch + 1, length.epochs, tuner.step, length.steps),
                *(progress.attack, loss, _told(measured), seconds),
            )
            epoch += 1
            accuracy = rounded(float(measured["clean"].mean()))
            self.curve.append(EpochRecord(ADVERSARIAL, epoch, tuner.step, rounded(loss), None, accuracy))
            self.on_epoch(self.curve)
            self._save(tuner, epoch, progress, {**kept, **prefixed("best", best)})
        return best, progress, None

    def _save(self, tuner: StageTuner, epoch: int, progress: _Progress, tensors: Mapping[str, Tensor]) -> None:
        position = {**position_of(self.tuned.records, self.curve, epoch, tuner.step), ADVERSARIAL: asdict(progress)}
        self.checkpoints.save(Checkpoint(position, {**tensors, **tuner.state()}))

    def _go_back(self, tuner: StageTuner) -> None:
        """To the end of the epoch before, which is in the checkpoint."""
        saved = self.checkpoints.load()
        if saved is None:
            raise RuntimeError(f"{self.checkpoints.path} has gone while it was needed")
        tuner.restore(saved.tensors, saved.position["step"])

    def _run_epoch(self, tuner: StageTuner, epoch: int, attack: AttackName) -> float:
        """One step a batch; the mean loss, nats a picture."""
        pixels, length = self.train.pixels, tuner.pace.length
        batches = epoch_batches(
            self.draws,
            epoch,
            num_images=len(self.train.labels),
            num_views=len(pixels.views),
            batch_size=self.settings.batch_size,
        )[: length.steps - tuner.step]
        total = 0.0
        first = tuner.step
        made = stage_progress(pixels.batches(batches), tuner, ADVERSARIAL)
        for batch, normalised in zip(batches, made, strict=True):
            images = self.model.images(normalised)
            labels = _labels(self.train, batch).to(images.device)
            epsilon = self.adversarial.epsilon * self._grown(tuner.pace, tuner.step)
            draws = (*self.draws, ATTACK_DRAWS, tuner.step)
            loss_of = partial(self._loss, images, labels, attack, epsilon, draws)
            try:
                total += tuner.descend(loss_of, len(batch)) * len(batch)
            except DivergedError as error:
                raise DivergedError(f"{error} ({pictures_of(pixels, batches[tuner.step - first])})") from error
        return total / sum(map(len, batches))

    def _loss(
        self, images: Tensor, labels: Tensor, attack: AttackName, epsilon: float, draws: Sequence[int], part: slice
    ) -> Tensor:
        """Cross-entropy of some pictures as they are and as the attack disturbs them, weighed."""
        images, labels = images[part], labels[part]
        draws = (*draws, part.start) if part.start else draws
        settings, rng = self.adversarial, np.random.default_rng(draws)
        with self.model.held():
            if attack == "pgd":
                steps = settings.pgd_steps
                found = climb(self.model, images, labels, epsilon=epsilon, num_steps=steps, rng=rng)
            else:
                found = fgsm_rs(self.model, images, labels, epsilon=epsilon, rng=rng)
        loss = nn.functional.cross_entropy(self.model(found), labels)
        if not settings.clean_weight:
            return loss
        clean = nn.functional.cross_entropy(self.model(images), labels)
        return settings.clean_weight * clean + (1 - settings.clean_weight) * loss

    def _grown(self, pace: Pace, step: int) -> float:
        """Share of epsilon that the attack of a step has."""
        return slow_growth(step, steps=pace.length.steps, warmup_fraction=pace.warmup_fraction)

    def _measured(self, *, attacked: bool = True) -> Rights:
        """Which validation pictures the model has right, by attack, or only as they are (``clean``)."""
        attacks = robustness_attacks(self.model, self.adversarial.epsilon)
        return self._answered(
            self.val, self.adversarial.val_images, attacks if attacked else {"clean": attacks["clean"]}
        )

    def _guarded(self) -> dict[str, float]:
        """Accuracy of the weights as they are now, not averaged, on a few training pictures under FGSM and PGD."""
        attacks = robustness_attacks(self.model, self.adversarial.epsilon)
        guard = {"fgsm": attacks["fgsm"], "pgd": pgd_attack(self.model, self.adversarial.epsilon, GUARD_STEPS)}
        right = self._answered(self.train, GUARD_IMAGES, guard)
        return {name: float(each.mean()) for name, each in right.items()}

    def _answered(self, data: LabelledPixels, num_images: int, attacks: Mapping[str, Attack]) -> Rights:
        """The same pictures and random starts each time, so that epochs can be compared."""
        rows, draws = fixed_rows(data, num_images), (*self.draws, ATTACK_DRAWS)
        return answered_rightly(self.model, data, rows, attacks, seed=draws, batch_size=self.settings.batch_size)

    def _rank(self, before: Rights, measured: Rights) -> tuple[float, float]:
        return float(self._verdict(before, measured).affordable), float(measured[STRONGEST].mean())

    def _verdict(self, before: Rights, after: Rights) -> RobustVerdict:
        return compare_robustness(
            clean_before=before["clean"],
            clean_after=after["clean"],
            robust_before=before[STRONGEST],
            robust_after=after[STRONGEST],
            max_clean_loss=self.adversarial.max_clean_loss,
        )

    def _judged(self, before: Rights, progress: _Progress) -> dict[str, Any]:
        """What the record says of the weights that were taken."""
        after = self._measured()
        verdict = self._verdict(before, after)
        return {
            "attack": progress.attack,
            "collapsed_epoch": progress.collapsed_epoch,
            "best_epoch": progress.best_epoch,
            "val_accuracy_after": rounded(float(after["clean"].mean())),
            "robustness_after": _shares(after),
            "kept": verdict.better,
            "reason": verdict.reason,
        }

    def _record(self, pace: Pace) -> AdversarialRecord:
        """The record of a stage that has yet to run."""
        return AdversarialRecord(
            name=ADVERSARIAL,
            groups=tuple(range(self.model.network.num_groups)),
            num_parameters=sum(each.numel() for each in self.model.parameters()),
            epochs=pace.length.epochs,
            steps=pace.length.steps,
            limited_by=pace.length.limited_by,
            learning_rates=tuple(rounded(rate) for rate in pace.learning_rates),
            boundary=None,
            val_nll_before=None,
            val_nll_after=None,
            val_nll_standard_error=None,
            val_accuracy_before=None,
            val_accuracy_after=None,
            alpha=None,
            kept=False,
            reason="",
            attack=self.adversarial.attack,
            collapsed_epoch=None,
            epsilon=rounded(self.adversarial.epsilon),
            best_epoch=None,
            num_attacked=len(fixed_rows(self.val, self.adversarial.val_images)),
            robustness_before=None,
            robustness_after=None,
        )


def has_collapsed(before: float, *, fgsm: float, pgd: float, max_fall: float) -> bool:
    """Whether the accuracy under PGD is further than training brings it below what it was, or below that under FGSM.

    Wong, Rice and Kolter look for a fall alone. Networks tuned on photos came to withstand FGSM without ever having
    withstood PGD: there was nothing to fall.
    """
    return max(before, fgsm) - pgd > max_fall


def fixed_rows(data: LabelledPixels, num_images: int) -> list[int]:
    """So many pictures, or all, drawn by their contents: the same ones whatever their order."""
    return sorted(range(len(data.labels)), key=lambda row: data.pixels.shas[row])[:num_images]


def _shares(rights: Rights) -> dict[str, Accuracy]:
    return {name: accuracy_of(right, CONFIDENCE) for name, right in rights.items()}


def _told(rights: Rights) -> str:
    return ", ".join(f"{name} {right.mean():.4f}" for name, right in rights.items())


def _labels(data: LabelledPixels, batch: Sequence[Item]) -> Tensor:
    """Class indices (B,) int64."""
    return torch.from_numpy(data.labels[[index for index, _ in batch]])


@contextmanager
def _holding(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values in some tensors; their own come back."""
    own = copied(tensors)
    put(tensors, values)
    try:
        yield
    finally:
        put(tensors, own)
