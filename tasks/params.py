"""params.yaml as frozen records: one section a stage, or a thing that several stages share.

No defaults here: params.yaml is the only place of numbers. Unknown keys are errors and all mistakes are told at once.
Read by tasks.__main__ for a stage, and by flows for the sections that concern them.
"""

import urllib.parse
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tasks.errors import ParamsError

Auto = Literal["auto"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
STAGES = ("top", "rest", "adversarial", "scratch")
PerChannel = Annotated[tuple[float, float, float], Field(strict=False)]  # YAML has lists, no tuples


class Section(BaseModel):
    """A section of params.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class DataParams(Section):
    """How the images of data/raw lie on the disk; what is trained does not depend on it."""

    layout: Literal["folders", "shards"]
    shard_mb: Annotated[float, Field(gt=0)]


def holds_password(address: str) -> bool:
    """Whether an address has a password in it, which would then stand in lineage, logs and git."""
    return "://" in address and urllib.parse.urlsplit(address).password is not None


class BackboneParams(Section):
    """Which pretrained weights, and how pictures are put before them."""

    source: str
    architecture: str | None
    sha256: str | None
    licence: str | None
    labels: str | None
    size_px: Annotated[int, Field(ge=16, le=1024)] | None
    crop_fraction: Annotated[float, Field(gt=0, le=1)] | None
    mean: PerChannel | None
    std: PerChannel | None

    @field_validator("source")
    @classmethod
    def _source_tells_no_secret(cls, source: str) -> str:
        if holds_password(source):
            # Not a message of pydantic's own: that would say what was found.
            raise ParamsError(
                "params.yaml: backbone.source has a password in it, and that file goes into git, lineage and reports. "
                "Fetch the file by a means of your own, and name it as file:PATH."
            )
        return source


class AugmentParams(Section):
    """What may be done to a picture without changing its label."""

    hflip: StrictBool
    min_area_fraction: Annotated[float, Field(gt=0, le=1)]


class IndexImagesParams(Section):
    """The manifest and its splits."""

    val_fraction: Annotated[float, Field(ge=0, lt=0.5)]
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)]
    max_megapixels: Annotated[float, Field(gt=0)]


class ValidateDataParams(Section):
    """When a set is good enough to train on."""

    min_images_per_class: Annotated[int, Field(ge=2)]
    min_train_images_per_class: Annotated[int, Field(ge=2)]
    max_class_ratio: Annotated[float, Field(ge=1)]
    max_quarantined_fraction: Fraction
    min_side_px: Positive
    max_aspect_ratio: Annotated[float, Field(ge=1)]
    min_kind_fraction: Fraction
    max_robust_z: Annotated[float, Field(gt=0)]
    max_shift: Annotated[float, Field(gt=0)]


class FeaturesParams(Section):
    """What is taken from the frozen backbone, and of which views."""

    depths: Annotated[int, Field(ge=1, le=8)]
    views: Annotated[int, Field(ge=1, le=8)] | Auto
    engine: Literal["auto", "onnxruntime", "openvino", "torch"]
    batch_size: Positive | Auto
    recheck: Annotated[int, Field(ge=0)]


class TrainHeadParams(Section):
    """The linear probe's regularisation path and its cross-validation."""

    method: Literal["probe", "as_is"]
    min_log10_c: float
    max_log10_c: float
    num_c: Annotated[int, Field(ge=2)]
    folds: Annotated[int, Field(ge=2, le=20)]
    max_iterations: Positive
    holdout_above: Positive
    logit_adjustment: Annotated[float, Field(ge=0, le=2)] | Auto


class AdversarialParams(Section):
    """Fine-tuning against attacks, the optional last stage."""

    attack: Literal["fgsm_rs", "pgd"]
    epsilon: Annotated[float, Field(gt=0, le=255)]
    epochs: Positive
    max_tflop: Annotated[float, Field(gt=0)] | Auto
    learning_rate: Annotated[float, Field(gt=0)] | Auto
    pgd_steps: Positive
    clean_weight: Fraction
    max_clean_loss: Fraction
    max_fall: Fraction
    val_images: Positive


class ScratchParams(Section):
    """The baseline from random weights."""

    seconds: Annotated[float, Field(gt=0)]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]


class FinetuneParams(Section):
    """Staged fine-tuning from the probe."""

    enabled: StrictBool
    min_val_images: Positive
    epochs: Positive | Auto
    max_steps: Positive
    max_tflop: Annotated[float, Field(gt=0)] | Auto
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0)] | Auto
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    warmup_fraction: Fraction
    clip_norm: Annotated[float, Field(gt=0)]
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    views: Positive
    boundary_cache_gb: Annotated[float, Field(ge=0)]
    num_processes: Positive
    device: Literal["cpu", "cuda", "mps"] | Auto
    precision: Literal["float32", "bfloat16"] | Auto
    stages: Annotated[tuple[str, ...], Field(strict=False)]
    adversarial: AdversarialParams
    scratch: ScratchParams

    @model_validator(mode="after")
    def _only_plain_stages_share_their_batches(self) -> "FinetuneParams":
        if self.num_processes > 1 and {"adversarial", "scratch"} & set(self.stages):
            raise ValueError("num_processes above 1 is not for the stages adversarial and scratch; leave them out")
        return self

    @field_validator("stages")
    @classmethod
    def _stages_have_names_of_stages_or_modules(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        for name in stages:
            if name not in STAGES and not any(character.isdigit() for character in name):  # modules are numbered
                raise ValueError(
                    f"there is no stage {name!r}; there are {', '.join(STAGES)}, or a module of the backbone, such as "
                    "layer3 or features.7, from whose layer group on all layers move"
                )
        return stages

    @field_validator("stages")
    @classmethod
    def _adversarial_comes_last(cls, stages: tuple[str, ...]) -> tuple[str, ...]:
        if "adversarial" in stages[:-1]:
            raise ValueError("adversarial comes once, as the last stage")
        if "scratch" in stages and len(stages) > 1:
            raise ValueError("scratch is a baseline from random weights and stands alone")
        return stages


class ExportOnnxParams(Section):
    """The graph and how close it must come to what was trained."""

    opset: Annotated[int, Field(ge=18, le=23)]
    max_probability_difference: Annotated[float, Field(gt=0)]
    min_top1_agreement: Fraction
    parity_images: Positive
    golden_images: Positive
    int8: Literal["off"] | Auto
    int8_calibration_images: Positive
    int8_max_accuracy_loss: Annotated[float, Field(gt=0, lt=1)]
    int8_confidence: Annotated[float, Field(gt=0.5, lt=1)]
    int8_min_speedup: Annotated[float, Field(ge=1)]


class EvaluateParams(Section):
    """How the bundle is measured."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    draws: Annotated[int, Field(ge=100)]
    calibration_bins: Positive
    min_slice_images: Positive
    robustness_images: Annotated[int, Field(ge=0)]
    latency_runs: Positive


class GateParams(Section):
    """When a challenger may replace the champion."""

    confidence: Annotated[float, Field(gt=0.5, lt=1)]
    margin: Annotated[float, Field(ge=0, lt=1)] | Auto
    draws: Annotated[int, Field(ge=100)]
    balanced: StrictBool | Auto
    max_class_loss: Fraction
    min_class_images: Positive
    max_nll_increase: Annotated[float, Field(ge=0)]
    max_overconfidence: Fraction
    max_robustness_loss: Fraction
    min_accuracy: Fraction
    min_class_accuracy: Fraction
    max_latency_ratio: Annotated[float, Field(gt=0)]
    max_size_ratio: Annotated[float, Field(gt=0)]
    warn_uses: Positive


class PretrainParams(Section):
    """Training a backbone on a larger, related source task."""

    source: str
    output: str
    architecture: str
    size_px: Annotated[int, Field(ge=32, le=512)]
    epochs: Positive
    images_per_epoch: Positive
    batch_size: Annotated[int, Field(ge=2)]
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    warmup_fraction: Fraction
    ema_decay: Annotated[float, Field(ge=0, lt=1)]
    max_characters: Annotated[int, Field(ge=0)]
    max_similarity: Annotated[float, Field(gt=0, le=1)]
    num_invented: Annotated[int, Field(ge=0)]
    hands_per_invented: Positive
    val_fraction: Annotated[float, Field(ge=0, lt=0.5)]
    hflip: StrictBool
    min_area_fraction: Annotated[float, Field(gt=0, le=1)]


class AttackParams(Section):
    """Attacking what ships."""

    images: Positive


class DriftParams(Section):
    """Comparing what production sees with the test images."""

    window_days: Annotated[float, Field(gt=0)]
    min_images: Annotated[int, Field(ge=10)]
    max_images: Annotated[int, Field(ge=10)]
    reference_images: Annotated[int, Field(ge=10)]
    level: Annotated[float, Field(gt=0, le=0.5)]
    permutations: Annotated[int, Field(ge=100)]
    neighbours: Positive
    novel_images: Annotated[int, Field(ge=0)]


class Params(Section):
    """The whole of params.yaml."""

    seed: Annotated[int, Field(ge=0)]
    data: DataParams
    backbone: BackboneParams
    augment: AugmentParams
    index_images: IndexImagesParams
    validate_data: ValidateDataParams
    features: FeaturesParams
    train_head: TrainHeadParams
    finetune: FinetuneParams
    export_onnx: ExportOnnxParams
    evaluate: EvaluateParams
    gate: GateParams
    pretrain: PretrainParams
    drift: DriftParams
    attack: AttackParams


def load_params(path: Path) -> Params:
    """Reads params.yaml.

    Raises:
        ParamsError: If it is missing, is no YAML, or holds mistakes; all of them are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ParamsError(
            f"{path} is missing. Run the command from a tanuki workspace, or restore the file."
        ) from error
    try:
        values = YAML(typ="safe", pure=True).load(text)
    except YAMLError as error:
        raise ParamsError(f"{path} is no YAML: {error}") from error
    try:
        return Params.model_validate({} if values is None else values)
    except ValidationError as error:
        mistakes = "\n".join(f"  {_mistake(each)}" for each in error.errors())
        raise ParamsError(f"{path} has {error.error_count()} mistake(s):\n{mistakes}") from error


def _mistake(error: ErrorDetails) -> str:
    """One line: which key, what is wrong, what was found."""
    key = ".".join(str(part) for part in error["loc"] if part != "literal['auto']")
    if error["type"] == "extra_forbidden":
        return f"{key}: no such key. Is it misspelt?"
    if error["type"] == "missing":
        return f"{key}: missing."
    return f"{key}: {error['msg']}; found {error['input']!r}."
