"""Stage train_head: the linear probe on stored features. No image is read, no backbone is run, no torch is imported."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from tasks.data.features import load_features
from tasks.data.manifest import class_names, read_manifest
from tasks.data.views import training_views
from tasks.errors import ParamsError
from tasks.models.backbone_card import read_card
from tasks.models.head import write_head
from tasks.training.linear_probe import PathPoint, fit_probe
from tasks.training.temperature import row_nll

if TYPE_CHECKING:
    import pandas as pd

    from tasks.layout import Layout
    from tasks.models.backbone_card import BackboneCard
    from tasks.models.head import Head
    from tasks.params import AugmentParams, FeaturesParams, TrainHeadParams

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainHeadReport:
    """The chosen probe; out-of-fold and val numbers are None where there was nothing to judge on."""

    num_train: int
    num_classes: int
    views: tuple[str, ...]
    feature_dim: int
    log10_c: float
    temperature: float
    num_parts: int
    num_held_out: int
    out_of_fold_accuracy: float | None
    out_of_fold_nll: float | None
    num_val: int
    val_accuracy: float | None
    val_nll: float | None
    num_iterations: int
    converged: bool
    path: tuple[PathPoint, ...]


def run(
    layout: Layout, *, seed: int, augment: AugmentParams, features: FeaturesParams, train_head: TrainHeadParams
) -> TrainHeadReport:
    """Fits the probe to the accepted train images and writes data/models/head.

    Raises:
        StoreError: If features are missing: run cache_features first.
        TrainingError: If there are fewer than two classes.
        ParamsError: If the path of C is empty.
    """
    if train_head.min_log10_c >= train_head.max_log10_c:
        raise ParamsError(
            f"params.yaml: train_head.min_log10_c ({train_head.min_log10_c:g}) must be below "
            f"train_head.max_log10_c ({train_head.max_log10_c:g})."
        )
    card = read_card(layout.backbone_card)
    images = read_manifest(layout.accepted)
    train = images[images["split"] == "train"]
    shas, labels, groups = (train[name].astype(str).tolist() for name in ("sha256", "label", "group"))
    views = training_views(
        features.views, num_train=len(train), min_area_fraction=augment.min_area_fraction, hflip=augment.hflip
    )
    stored = load_features(layout.features_dir, card, shas, views).reshape(len(views), len(shas), -1)
    probe = fit_probe(stored, labels, groups, classes=class_names(images), seed=seed, **train_head.model_dump())
    num_val, val_accuracy, val_nll = _judge(layout, card, probe.head, images[images["split"] == "val"])
    report = TrainHeadReport(
        num_train=len(train),
        num_classes=len(probe.head.labels),
        views=views,
        feature_dim=card.feature_dim,
        log10_c=probe.log10_c,
        temperature=probe.temperature,
        num_parts=probe.num_parts,
        num_held_out=probe.num_held_out,
        out_of_fold_accuracy=probe.accuracy,
        out_of_fold_nll=probe.nll,
        num_val=num_val,
        val_accuracy=val_accuracy,
        val_nll=val_nll,
        num_iterations=probe.num_iterations,
        converged=probe.converged,
        path=probe.path,
    )
    write_head(layout.head_dir, probe.head, {"kind": "linear probe", "seed": seed, **asdict(report)})
    _log(report)
    return report


def _judge(layout: Layout, card: BackboneCard, head: Head, val: pd.DataFrame) -> tuple[int, float | None, float | None]:
    """Number, accuracy and NLL (nats) of the val images whose class the head has."""
    known = val[val["label"].isin(head.labels)]
    if known.empty:
        return 0, None, None
    targets = np.array([head.labels.index(label) for label in known["label"]], dtype=np.intp)
    logits = head.logits(load_features(layout.features_dir, card, known["sha256"].astype(str).tolist()))
    return len(known), float((logits.argmax(axis=1) == targets).mean()), float(row_nll(logits, targets).mean())


def _log(report: TrainHeadReport) -> None:
    logger.info(
        "C = 10^%.2f of %d tried, temperature %.2f; out-of-fold accuracy %s on %d, val accuracy %s on %d",
        report.log10_c,
        len(report.path),
        report.temperature,
        _percent(report.out_of_fold_accuracy),
        report.num_held_out,
        _percent(report.val_accuracy),
        report.num_val,
    )
    if not report.converged:
        logger.warning("the last fit stopped after %d iterations before it converged", report.num_iterations)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"
