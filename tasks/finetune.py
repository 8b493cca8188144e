"""Stage finetune: staged fine-tuning from the linear probe; a stage is kept only if validation says so.

Reads the backbone, the probe and the accepted images; writes data/models/finetuned/: finetuned.json always, and the
tuned network with its head only if a stage was kept. The method is in ``tasks.training.staged``, the rule in
``tasks.training.selection``; ``adversarial``, the last stage where it is asked for, is in
``tasks.training.adversarial``; ``scratch``, a baseline that stands alone, is in ``tasks.training.scratch``. Loss and
accuracy of each epoch go to finetune_epochs.csv as they come, seconds to finetune_times.json. An interrupted run goes
on from data/models/checkpoints/ and gives the same bytes as one that was not; its seconds are those that led to the
checkpoint and those after it. torch is imported where a stage is tried, and nowhere else: where none is, the seconds of
its import would be most of a retrain.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import logging
import shutil
import sys
import time
from dataclasses import asdict, astuple, dataclass
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from deploy.files import sha256_bytes, sha256_file, write_bytes, write_json, write_text
from deploy.machine import available_cores
from deploy.runtime import open_session
from tasks.data.image_store import open_images
from tasks.data.manifest import read_manifest
from tasks.data.views import CENTRE, view_names
from tasks.errors import BackboneError
from tasks.export.preprocessing import preprocessing_graph
from tasks.models.backbone_card import BackboneCard, read_card
from tasks.models.head import CARD_NAME, WEIGHTS_NAME, Head, read_head, read_notes, write_head
from tasks.training.augmented import LabelledPixels, PixelSource
from tasks.training.logit_adjustment import class_shift
from tasks.training.schedule import (
    ADVERSARIAL,
    REFERENCE_BATCH_SIZE,
    SCRATCH,
    AdversarialSettings,
    ScratchSettings,
    TuningSettings,
    recipe_for,
)
from tasks.training.selection import accuracy, best_temperature, negative_log_likelihood

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnxruntime as ort
    import pandas as pd
    from numpy.typing import NDArray

    from tasks.layout import Layout
    from tasks.models.architectures import Network
    from tasks.params import AugmentParams, FinetuneParams
    from tasks.training.checkpoint import CheckpointFile
    from tasks.training.device import Compute, DeviceName
    from tasks.training.staged import EpochRecord, FineTuned, StageRecord, StageTimes

NETWORK_NAME = "network.safetensors"
FACTS_NAME = "finetuned.json"
CHECKPOINT_NAME = "finetune.safetensors"
BYTES_PER_GB = 1_000_000_000
CPU_TFLOP, GPU_TFLOP = 50.0, 5_000.0  # of a stage: minutes on two cores, and on a GPU of today
ADVERSARIAL_TIMES = 4.0  # so much more for the adversarial stage: attacks are passes, too
SCRATCH_VIEWS = 16  # nothing is kept of them, and random weights need more variety
EPOCH_COLUMNS = ("number", "stage", "epoch", "step", "train_loss", "val_nll", "val_accuracy")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinetuneReport:
    """What fine-tuning came to; finetuned.json holds the same.

    Attributes:
        kept: Names of the stages that were kept.
        reason: Why there is no fine-tuned network, or None if there is one.
        num_train: Training images.
        num_val: Validation images of known classes.
        optimiser: Of the architecture's family.
        views: In which each training image was shown.
        stages: One record a stage that was considered.
        temperature: Folded into the final head, or None.
        logit_adjustment: Its strength in the probe. Training starts from the probe without it and is judged without it,
            by likelihood under the classes' own shares; the final head has it again.
        val_nll_before: Of the probe, nats an image, as it is.
        val_nll_after: Of the final model, as it is (the temperature was fitted on these same images).
        val_accuracy_before: Of the probe.
        val_accuracy_after: Of the final model.
        compute: Device and precision of training, and why; None where no stage was tried.
    """

    kept: tuple[str, ...]
    reason: str | None
    num_train: int
    num_val: int
    optimiser: str
    views: tuple[str, ...]
    stages: tuple[StageRecord, ...] = ()
    temperature: float | None = None
    logit_adjustment: float = 0.0
    val_nll_before: float | None = None
    val_nll_after: float | None = None
    val_accuracy_before: float | None = None
    val_accuracy_after: float | None = None
    compute: Compute | None = None


def run(layout: Layout, *, seed: int, augment: AugmentParams, finetune: FinetuneParams) -> FinetuneReport:
    """Fine-tunes from data/models/head into data/models/finetuned.

    Raises:
        DataError: If an image has gone or changed since it was indexed.
        BackboneError: If the backbone is missing or damaged.
        StoreError: If the probe is missing or damaged.
        ParamsError: If the device that is asked for is not there.
    """
    began = time.perf_counter()
    card, head = read_card(layout.backbone_card), read_head(layout.head_dir)
    known = _known_images(layout, head)
    train, val = known[known["split"] == "train"], known[known["split"] == "val"]
    report = FinetuneReport(
        kept=(),
        reason=_reason_to_leave_out(finetune, len(val)),
        num_train=len(train),
        num_val=len(val),
        optimiser=recipe_for(card.architecture).optimiser,
        views=view_names(SCRATCH_VIEWS if SCRATCH in finetune.stages else finetune.views, augment.hflip),
        logit_adjustment=read_notes(layout.head_dir).get("logit_adjustment", 0.0),  # earlier versions have none
    )
    _write_epochs(layout, ())
    times: tuple[StageTimes, ...] = ()
    if report.reason:
        logger.info("no fine-tuning: %s", report.reason)
        _write(layout, report, None, head)
    else:
        from tasks.training.checkpoint import CheckpointFile
        from tasks.training.device import choose_compute, this_machine
        from tasks.training.processes import joined, started

        compute = choose_compute(finetune.device, finetune.precision, this_machine(), num_processes=started())
        logger.info("training on %s in %s: %s", compute.device, compute.precision, compute.reason)
        report = dataclasses.replace(report, compute=compute)
        digest = _run_digest(layout, known, seed, augment, finetune, compute)
        checkpoints = CheckpointFile(layout.checkpoints_dir / CHECKPOINT_NAME, digest, began).after_interruption()
        began = checkpoints.began
        work: dict[str, Any] = {"seed": seed, "augment": augment, "finetune": finetune, "compute": compute}
        with joined(compute.device):
            report, times = _tuned(layout, report, card, head, known, checkpoints=checkpoints, **work)
    told = {
        "seconds": time.perf_counter() - began,
        "cores": available_cores(),
        "stages": [asdict(each) for each in times],
    }
    write_json(layout.times("finetune"), told)
    return report


def is_due(layout: Layout, finetune: FinetuneParams) -> bool:
    """Whether `run` would try a stage."""
    known = _known_images(layout, read_head(layout.head_dir))
    return _reason_to_leave_out(finetune, int((known["split"] == "val").sum())) is None


def _known_images(layout: Layout, head: Head) -> pd.DataFrame:
    """The accepted images of the head's classes."""
    images = read_manifest(layout.accepted)
    return images[images["label"].isin(head.labels)]


def _tuned(
    layout: Layout,
    report: FinetuneReport,
    card: BackboneCard,
    head: Head,
    known: pd.DataFrame,
    *,
    seed: int,
    augment: AugmentParams,
    finetune: FinetuneParams,
    compute: Compute,
    checkpoints: CheckpointFile,
) -> tuple[FinetuneReport, tuple[StageTimes, ...]]:
    """Tries the stages and writes what came of them."""
    from tasks.training import processes
    from tasks.training.adversarial import PixelClassifier, harden, measured_again
    from tasks.training.device import place
    from tasks.training.scratch import from_scratch
    from tasks.training.staged import deterministic_torch, fine_tune

    train, val = known[known["split"] == "train"], known[known["split"] == "val"]
    counts = [int((train["label"] == label).sum()) for label in head.labels]
    shift = class_shift(counts, report.logit_adjustment)
    head = dataclasses.replace(head, bias=head.bias - shift)
    threads = max(1, available_cores() // processes.count())
    with deterministic_torch(threads, strict=compute.device == "cpu"):
        network = load_network(layout, card)
        place(network, compute, norms_are_frozen=SCRATCH not in finetune.stages)
        sessions = open_preprocessing(layout, card)
        train_pixels = labelled_pixels(layout, train, head, sessions, report.views, augment)
        val_pixels = labelled_pixels(layout, val, head, sessions, (CENTRE,), augment)
        settings = tuning_settings(card, seed, finetune, compute.device)
        work: dict[str, Any] = {"train": train_pixels, "val": val_pixels, "settings": settings}
        told = partial(_write_epochs, layout) if processes.is_first() else lambda _: None
        work |= {"checkpoints": checkpoints, "on_epoch": told}
        plain = [stage for stage in finetune.stages if stage not in (ADVERSARIAL, SCRATCH)]
        if SCRATCH in finetune.stages:
            scratch = ScratchSettings(**finetune.scratch.model_dump())
            tuned = from_scratch(network, head, architecture=card.architecture, scratch=scratch, **work)
        else:
            tuned = fine_tune(network, head, stages=plain, **work)
        if ADVERSARIAL in finetune.stages:
            work |= {"mean": card.mean, "std": card.std}
            adversarial = adversarial_settings(card, finetune, compute.device)
            tuned = harden(network, tuned, adversarial=adversarial, **work)
        report, head = _concluded(report, tuned, val_pixels.labels)
        head = dataclasses.replace(head, bias=head.bias + shift)
        if ADVERSARIAL in report.kept and shift.any():
            *others, record = report.stages
            model = PixelClassifier.of(network, head, card.mean, card.std)
            given: dict[str, Any] = {"settings": settings, "adversarial": adversarial, "position": len(others)}
            record = measured_again(record, model, val_pixels, **given)
            report = dataclasses.replace(report, stages=(*others, record))
    processes.wait_for_all()
    if processes.is_first():
        _write(layout, report, network if report.kept else None, head)
        _write_epochs(layout, tuned.curve)
        checkpoints.remove()
    processes.wait_for_all()
    return report, tuned.times


def _write_epochs(layout: Layout, curve: Sequence[EpochRecord]) -> None:
    """The learning curves so far."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(EPOCH_COLUMNS)
    writer.writerows((number, *astuple(each)) for number, each in enumerate(curve, start=1))
    write_text(layout.epochs, text.getvalue())


def _reason_to_leave_out(finetune: FinetuneParams, num_val: int) -> str | None:
    """Why no stage is tried, or None."""
    if not finetune.enabled:
        return "finetune.enabled is false"
    if not finetune.stages:
        return "finetune.stages is empty"
    if num_val < finetune.min_val_images:
        return f"{num_val} validation images cannot judge a stage: finetune.min_val_images is {finetune.min_val_images}"
    return None


def _run_digest(
    layout: Layout, images: pd.DataFrame, seed: int, augment: AugmentParams, finetune: FinetuneParams, compute: Compute
) -> str:
    """sha256 over everything the outcome depends on."""
    facts = {
        "seed": seed,
        "augment": augment.model_dump(),
        "finetune": finetune.model_dump(),
        "backbone": sha256_file(layout.backbone_card),
        "weights": sha256_file(layout.backbone_weights),
        "head": [sha256_file(layout.head_dir / name) for name in (CARD_NAME, WEIGHTS_NAME)],
        "images": images[["path", "sha256", "label", "split"]].astype(str).to_numpy().tolist(),
        "versions": [version("torch"), np.__version__],
        "threads": available_cores(),
        "compute": [compute.device, compute.precision],
    }
    return sha256_bytes(json.dumps(facts, sort_keys=True).encode())


def load_network(layout: Layout, card: BackboneCard) -> Network:
    """The backbone with its pretrained weights.

    Raises:
        BackboneError: If the weights are not those of the card, or do not fit.
    """
    from safetensors.torch import load_file

    from tasks.models.architectures import build_network

    if sha256_file(layout.backbone_weights) != card.weights_sha256:
        raise BackboneError(
            f"{layout.backbone_weights} is not what {layout.backbone_card.name} describes. "
            "Run `dvc repro fetch_backbone`, or `dvc checkout`."
        )
    network = build_network(card.architecture, depths=card.depths)
    network.load_trunk(load_file(layout.backbone_weights))
    return network


def open_preprocessing(layout: Layout, card: BackboneCard) -> tuple[ort.InferenceSession, ort.InferenceSession]:
    """The backbone's own preprocessing, and the same without its central crop (for random squares)."""
    opset = max(entry.version for entry in onnx.load(layout.preprocess_onnx).opset_import)
    crop = preprocessing_graph(size_px=card.size_px, crop_fraction=1.0, mean=card.mean, std=card.std, opset=opset)
    return open_session(layout.preprocess_onnx), open_session(crop.SerializeToString())


def labelled_pixels(
    layout: Layout,
    rows: pd.DataFrame,
    head: Head,
    sessions: tuple[ort.InferenceSession, ort.InferenceSession],
    views: tuple[str, ...],
    augment: AugmentParams,
) -> LabelledPixels:
    """The pictures of some rows of the manifest, with class indices in the head's order."""
    index_of = {label: index for index, label in enumerate(head.labels)}
    store = open_images(layout.raw)
    pixels = PixelSource(
        files=[store.file(path) for path in rows["path"]],
        shas=rows["sha256"].tolist(),
        views=views,
        whole=sessions[0],
        crop=sessions[1],
        min_area_fraction=augment.min_area_fraction,
        hflip=augment.hflip,
        max_pixels=sys.maxsize,  # index_images has judged the size of these bytes
        workers=available_cores(),
    )
    return LabelledPixels(pixels, np.array([index_of[label] for label in rows["label"]], np.int64))


def tuning_settings(card: BackboneCard, seed: int, finetune: FinetuneParams, device: DeviceName) -> TuningSettings:
    """The parameters, with what is ``auto`` taken from the family's recipe."""
    recipe = recipe_for(card.architecture)
    rate = finetune.learning_rate
    return TuningSettings(
        seed=seed,
        recipe=recipe,
        learning_rate=recipe.learning_rate * finetune.batch_size / REFERENCE_BATCH_SIZE if rate == "auto" else rate,
        layer_decay=finetune.layer_decay,
        weight_decay=finetune.weight_decay,
        warmup_fraction=finetune.warmup_fraction,
        clip_norm=finetune.clip_norm,
        ema_decay=finetune.ema_decay,
        batch_size=finetune.batch_size,
        epochs=finetune.epochs,
        max_steps=finetune.max_steps,
        max_tflop=_affordable_tflop(device) if finetune.max_tflop == "auto" else finetune.max_tflop,
        boundary_cache_bytes=int(finetune.boundary_cache_gb * BYTES_PER_GB),
    )


def _affordable_tflop(device: DeviceName) -> float:
    """Of a stage."""
    return CPU_TFLOP if device == "cpu" else GPU_TFLOP


def adversarial_settings(card: BackboneCard, finetune: FinetuneParams, device: DeviceName) -> AdversarialSettings:
    """The parameters, with what is ``auto`` filled in, and epsilon as a share of the range of a value."""
    values = finetune.adversarial.model_dump()
    values["epsilon"] /= 255
    if values["learning_rate"] == "auto":
        values["learning_rate"] = recipe_for(card.architecture).hardening_rate
    if values["max_tflop"] == "auto":
        values["max_tflop"] = ADVERSARIAL_TIMES * _affordable_tflop(device)
    return AdversarialSettings(**values)


def _concluded(report: FinetuneReport, tuned: FineTuned, labels: NDArray[np.int64]) -> tuple[FinetuneReport, Head]:
    """The report of stages that ran, and the final head with its temperature folded in."""
    from tasks.training.staged import rounded

    kept = tuple(record.name for record in tuned.records if record.kept)
    before = float(negative_log_likelihood(tuned.val_logits_before, labels).mean())
    facts: dict[str, Any] = {
        "kept": kept,
        "stages": tuned.records,
        "val_nll_before": rounded(before),
        "val_accuracy_before": rounded(accuracy(tuned.val_logits_before, labels)),
    }
    if not kept:
        return dataclasses.replace(report, reason="no stage was kept", **facts), tuned.head
    temperature = best_temperature(tuned.val_logits_after, labels)
    head = Head(
        tuned.head.labels,
        (tuned.head.weight / temperature).astype(np.float32),
        (tuned.head.bias / temperature).astype(np.float32),
    )
    facts |= {
        "temperature": rounded(temperature),
        "val_nll_after": rounded(float(negative_log_likelihood(tuned.val_logits_after / temperature, labels).mean())),
        "val_accuracy_after": rounded(accuracy(tuned.val_logits_after, labels)),
    }
    return dataclasses.replace(report, **facts), head


def _write(layout: Layout, report: FinetuneReport, network: Network | None, head: Head) -> None:
    """Replaces data/models/finetuned; finetuned.json comes last, so that where it is, the rest is."""
    shutil.rmtree(layout.finetuned_dir, ignore_errors=True)
    facts = dataclasses.asdict(report)
    if network:
        from safetensors.torch import save

        state = {name: tensor.cpu().contiguous() for name, tensor in network.trunk_state().items()}
        write_bytes(layout.finetuned_dir / NETWORK_NAME, save(state))
        notes = {name: getattr(report, name) for name in ("kept", "temperature", "logit_adjustment")}
        write_head(layout.finetuned_dir, head, {**notes, "kept": list(report.kept)})
    write_json(layout.finetuned_dir / FACTS_NAME, facts)
