"""How long a stage of fine-tuning runs, and how fast each layer group moves: numbers and rules, no tensors.

Recipes follow METHOD.md's defaults: optimiser and learning rate by family of architecture, epochs by number of
training images, linear warm-up and cosine to zero, rates that fall towards the stem. Called by ``tasks.finetune``.
"""

import math
from dataclasses import dataclass
from typing import Literal

from tasks.errors import ParamsError
from tasks.models.layer_groups import Groups

REFERENCE_BATCH_SIZE = 64
"""Batch size that the recipes' learning rates are given for; they scale linearly."""
STATED_BATCH_SIZE = 32
"""Batch size that params.yaml's rates of the stages adversarial and scratch are given for; they scale linearly, too."""
MIN_STEPS = 200
"""Steps of the top stage when epochs are chosen by size; later stages take half."""
USELESS_STEPS = 20
"""A stage that its cost limit cuts below this many steps is left out: it would be mostly warm-up."""
EPOCHS_BY_SIZE = ((500, 20), (5_000, 10), (20_000, 6))
"""(training images below, epochs of the top stage)."""
EPOCHS_ABOVE = 3
TOP, REST = "top", "rest"
ADVERSARIAL = "adversarial"
"""Name of the stage that comes last where it is asked for; the others are made by `stage_shape`."""
SCRATCH = "scratch"
"""Name of the stage that starts from random weights, alone: the baseline."""
AttackName = Literal["fgsm_rs", "pgd"]
SLOW_START, FAST_DECAY = 1e-2, 1e-3
"""Shares of the full rate at the first and at the last step of adversarial fine-tuning."""


@dataclass(frozen=True)
class Recipe:
    """How a family of architectures is fine-tuned.

    Attributes:
        optimiser: AdamW, or SGD with Nesterov momentum 0.9.
        learning_rate: Of the head in the top stage, at batch size 64.
        weight_decay_scale: What params.yaml's ``weight_decay``, meant for AdamW, is multiplied by.
        hardening_rate: Of AdamW in the adversarial stage, at the top, at batch size 32.
    """

    optimiser: Literal["adamw", "sgd"]
    learning_rate: float
    weight_decay_scale: float
    hardening_rate: float = 3e-4


ADAMW_CNN = Recipe("adamw", 3e-4, 1.0)
ADAMW_DEFAULT = Recipe("adamw", 1e-4, 1.0)
ADAMW_TRANSFORMER = Recipe("adamw", 5e-5, 1.0)
ADAMW_SQUEEZENET = Recipe("adamw", 1e-4, 1.0, hardening_rate=1e-3)
SGD_RESIDUAL = Recipe("sgd", 2e-3, 0.01)

RECIPES = (
    ("mobilenet", ADAMW_CNN),
    ("efficientnet", ADAMW_CNN),
    ("convnext", ADAMW_DEFAULT),
    ("squeezenet", ADAMW_SQUEEZENET),
    ("vit", ADAMW_TRANSFORMER),
    ("swin", ADAMW_TRANSFORMER),
    ("resnet", SGD_RESIDUAL),
    ("resnext", SGD_RESIDUAL),
    ("wide_resnet", SGD_RESIDUAL),
    ("regnet", SGD_RESIDUAL),
    ("densenet", SGD_RESIDUAL),
)
"""(prefix of the architecture's name, recipe); the first that fits, else ADAMW_DEFAULT."""


@dataclass(frozen=True)
class TuningSettings:
    """The numbers of fine-tuning; see params.yaml, section ``finetune``.

    Attributes:
        seed: Of every random draw.
        recipe: The family's optimiser.
        learning_rate: Of the head in the top stage, at this batch size.
        layer_decay: Ratio of rates between neighbouring layer groups.
        weight_decay: Before the recipe's scale.
        warmup_fraction: Share of a stage's steps.
        clip_norm: Largest norm of a gradient.
        ema_decay: Of the average of the weights.
        batch_size: Pictures a step.
        epochs: Of the top stage.
        max_steps: Of one stage.
        max_tflop: Floating-point work of one stage's steps, in 10^12.
        boundary_cache_bytes: Limit of the temporary files of one stage.
    """

    seed: int
    recipe: Recipe
    learning_rate: float
    layer_decay: float
    weight_decay: float
    warmup_fraction: float
    clip_norm: float
    ema_decay: float
    batch_size: int
    epochs: int | Literal["auto"]
    max_steps: int
    max_tflop: float
    boundary_cache_bytes: int


@dataclass(frozen=True)
class AdversarialSettings:
    """The numbers of the stage; see params.yaml, section ``finetune.adversarial``.

    Attributes:
        attack: That is trained against.
        epsilon: Largest change of a value in [0, 1].
        epochs: At most.
        max_tflop: Floating-point work of the steps, in 10^12, that of the attacks included.
        learning_rate: AdamW's, of all layer groups, at batch size 32.
        pgd_steps: Of the attack ``pgd`` in training.
        clean_weight: Share of the loss on undisturbed pictures.
        max_clean_loss: Validation accuracy that robustness may cost.
        max_fall: Of the accuracy under PGD from one epoch to the next, before ``fgsm_rs`` gives way to ``pgd``.
        val_images: At most so many validation pictures are attacked.
    """

    attack: AttackName
    epsilon: float
    epochs: int
    max_tflop: float
    learning_rate: float
    pgd_steps: int
    clean_weight: float
    max_clean_loss: float
    max_fall: float
    val_images: int


@dataclass(frozen=True)
class ScratchSettings:
    """The numbers of the baseline from random weights; see params.yaml, section ``finetune.scratch``.

    Attributes:
        seconds: Of its steps.
        learning_rate: AdamW's, at batch size 32.
        weight_decay: AdamW's.
        label_smoothing: Share of the target that is spread over all classes.
    """

    seconds: float
    learning_rate: float
    weight_decay: float
    label_smoothing: float


def recipe_for(architecture: str) -> Recipe:
    """The recipe of an architecture's family."""
    for prefix, recipe in RECIPES:
        if architecture.startswith(prefix):
            return recipe
    return ADAMW_DEFAULT


@dataclass(frozen=True)
class StageShape:
    """What a named stage unfreezes and how strongly it trains.

    Attributes:
        name: ``top``, ``rest``, or a module of the backbone.
        rate_factor: Its learning rate over the recipe's.
        length_factor: Its epochs and minimum steps over the top stage's.
    """

    name: str
    rate_factor: float
    length_factor: float

    def first_group(self, groups: Groups) -> int:
        """The first layer group that moves: the last in ``top``, that after the stem in ``rest``, else a module's.

        Raises:
            ParamsError: If no layer group above the stem has the module; lists them.
        """
        top = len(groups) - 1
        if self.name in (TOP, REST):
            return top if self.name == TOP else min(1, top)
        for index in range(1, len(groups)):
            if self.name in groups[index]:
                return index
        listed = "; ".join(", ".join(step for step in steps if step and step[0] != "@") for steps in groups[1:])
        raise ParamsError(
            f"finetune.stages: no layer group of this backbone has the module {self.name!r}. Its groups above the "
            f"stem, which stays frozen: {listed or 'they have no modules to name'}. `{TOP}` is the last, `{REST}` all."
        )


def stage_shape(name: str) -> StageShape:
    """The shape of a stage; one that is named by a module trains as ``rest`` does."""
    return StageShape(name, 1.0, 1.0) if name == TOP else StageShape(name, rate_factor=0.2, length_factor=0.5)


@dataclass(frozen=True)
class StageLength:
    """How long a stage runs.

    Attributes:
        epochs: Epochs begun.
        steps: Optimiser steps; the last epoch may be cut short.
        steps_per_epoch: Batches in a whole epoch.
        limited_by: What cut it short, or None.
    """

    epochs: int
    steps: int
    steps_per_epoch: int
    limited_by: Literal["max_steps", "max_tflop"] | None


def stage_length(
    *,
    num_images: int,
    batch_size: int,
    epochs: int | Literal["auto"],
    length_factor: float,
    max_steps: int,
    affordable_steps: int,
) -> StageLength:
    """Epochs and steps of a stage.

    Args:
        num_images: Training images, at least 1.
        batch_size: Images a step.
        epochs: Of the top stage; auto: by number of images, with at least ``MIN_STEPS`` steps.
        length_factor: Share of the top stage's length that this stage takes.
        max_steps: Limit that a person set.
        affordable_steps: Limit that the cost of a step sets.
    """
    steps_per_epoch = math.ceil(num_images / batch_size)
    by_size = next((count for below, count in EPOCHS_BY_SIZE if num_images < below), EPOCHS_ABOVE)
    top_epochs = max(by_size, math.ceil(MIN_STEPS / steps_per_epoch)) if epochs == "auto" else epochs
    wanted = max(1, math.ceil(top_epochs * length_factor)) * steps_per_epoch
    steps = min(wanted, max_steps, affordable_steps)
    limited_by: Literal["max_steps", "max_tflop"] | None = None
    if steps < wanted:
        limited_by = "max_steps" if steps == max_steps else "max_tflop"
    return StageLength(math.ceil(steps / steps_per_epoch), steps, steps_per_epoch, limited_by)


def layer_group_learning_rates(num_groups: int, base_lr: float, layer_decay: float) -> list[float]:
    """Learning rate of each layer group, from the stem (index 0) to the head (last).

    Group ``i`` gets ``base_lr * layer_decay ** (num_groups - 1 - i)``: layers near the input
    hold more general features and should move less.

    Args:
        num_groups: Number of layer groups, the head among them, at least 1.
        base_lr: Learning rate of the head, per optimiser step.
        layer_decay: Ratio between neighbouring groups, in (0, 1].

    Returns:
        ``num_groups`` rates, non-decreasing.

    Raises:
        ParamsError: If ``layer_decay`` is outside (0, 1].

    References:
        Howard and Ruder 2018, arXiv:1801.06146 (discriminative fine-tuning).
    """
    if not 0 < layer_decay <= 1:
        raise ParamsError(f"finetune.layer_decay is {layer_decay}: it must be above 0 and at most 1.")
    return [base_lr * layer_decay ** (num_groups - 1 - index) for index in range(num_groups)]


def warmup_cosine(step: int, *, steps: int, warmup_fraction: float) -> float:
    """Share of the full learning rate at a step: a linear rise, then half a cosine down to nearly zero.

    Args:
        step: From 0 to ``steps - 1``.
        steps: Steps of the whole stage.
        warmup_fraction: Share of the steps spent rising.

    Returns:
        A factor in (0, 1].

    References:
        Loshchilov and Hutter 2017, arXiv:1608.03983 (cosine annealing, without restarts).
    """
    warmup = min(round(steps * warmup_fraction), steps - 1)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def slow_growth(step: int, *, steps: int, warmup_fraction: float) -> float:
    """Share of the full epsilon at a step of adversarial fine-tuning: a linear rise, then 1.

    A network that has never been attacked has nothing right within the full epsilon, and no step shows it a way there.

    Args:
        step: From 0 to ``steps - 1``.
        steps: Steps of the whole stage.
        warmup_fraction: Share of the steps spent rising.
    """
    return min(1.0, (step + 1) / (round(steps * warmup_fraction) + 1))


def slow_start_fast_decay(step: int, *, steps: int, warmup_fraction: float) -> float:
    """Share of the full learning rate at a step of adversarial fine-tuning.

    Linear from 1/100 to 1, so that what the network knows is not thrown away, then exponential down to 1/1000 at the
    last step, before it learns the training pictures' own disturbances by heart. The numbers are ours.

    Args:
        step: From 0 to ``steps - 1``.
        steps: Steps of the whole stage.
        warmup_fraction: Share of the steps spent rising.

    References:
        Jeddi, Shafiee and Wong 2020, arXiv:2012.13628 (the shape).
    """
    warmup = min(round(steps * warmup_fraction), steps - 1)
    if step < warmup:
        return SLOW_START + (1 - SLOW_START) * step / warmup
    return float(FAST_DECAY ** ((step - warmup) / max(steps - 1 - warmup, 1)))
