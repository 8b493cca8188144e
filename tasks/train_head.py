"""Stage train_head: the linear probe on stored features. No image is read, no backbone is run, no torch is imported.

With ``train_head.method: as_is`` there is no fit: the backbone's own classifier answers where it knows all the classes
by name and is one linear layer, else the class prototypes do. That is what a pretrained model does without training.

Uneven classes that will be judged alike get their scores adjusted (``tasks.training.logit_adjustment``), here and, by
what head.json says, in ``finetune``.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploy.files import write_json
from deploy.machine import available_cores
from tasks.data.features import load_features
from tasks.data.manifest import class_names, read_manifest
from tasks.data.views import training_views
from tasks.errors import ParamsError
from tasks.evaluation.paired import mcnemar_midp
from tasks.models.backbone_card import read_card
from tasks.models.head import write_head
from tasks.models.own_head import own_head, same_names
from tasks.training.linear_probe import PathPoint, check_examples, fit_probe
from tasks.training.logit_adjustment import adjustment_strength
from tasks.training.prototypes import class_prototypes
from tasks.training.temperature import row_nll

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    from tasks.layout import Layout
    from tasks.models.backbone_card import BackboneCard
    from tasks.models.head import Head
    from tasks.params import AugmentParams, FeaturesParams, GateParams, TrainHeadParams

CONFIDENCE = 0.99  # that a probe knows more than which class is the largest; C is chosen on the same images
CLEAR_SHARE = 0.75  # of the images on which the two differ: who wins so many should be seen to be better
SOLVER = "L-BFGS, multinomial, every image weighs the same"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainHeadReport:
    """The chosen head; out-of-fold and val numbers are None where there was nothing to judge on.

    ``method`` is ``probe``, ``own_classes`` (the backbone's own classifier) or ``prototypes``; all but the first have
    no fit to tell of. ``num_same_names`` of the classes bear the name of one of the backbone's own. ``is_at_chance``:
    see `is_at_chance`; ``chance_accuracy`` is that of always naming the largest class, on the same images.
    Out-of-fold numbers are of the fit; ``out_of_fold_adjusted_balanced_accuracy`` and those on val are of the head,
    with its logit adjustment (0: none).
    """

    method: str
    num_same_names: int
    num_train: int
    num_train_by_class: dict[str, int]
    num_classes: int
    views: tuple[str, ...]
    feature_dim: int
    solver: str | None
    log10_c: float | None
    temperature: float | None
    class_ratio: float
    logit_adjustment: float
    num_parts: int
    num_held_out: int
    out_of_fold_accuracy: float | None
    chance_accuracy: float
    is_at_chance: bool
    out_of_fold_nll: float | None
    out_of_fold_balanced_accuracy: float | None
    out_of_fold_adjusted_balanced_accuracy: float | None
    num_val: int
    val_accuracy: float | None
    val_nll: float | None
    num_iterations: int
    converged: bool
    path: tuple[PathPoint, ...]


def run(
    layout: Layout,
    *,
    seed: int,
    augment: AugmentParams,
    features: FeaturesParams,
    train_head: TrainHeadParams,
    gate: GateParams,
) -> TrainHeadReport:
    """Fits the probe to the accepted train images and writes data/models/head.

    Raises:
        StoreError: If features are missing: run cache_features first.
        TrainingError: If there are fewer than two classes.
        BackboneError: If ``backbone.labels`` are not those of its classifier.
        ParamsError: If the path of C is empty.
    """
    if train_head.min_log10_c >= train_head.max_log10_c:
        raise ParamsError(
            f"params.yaml: train_head.min_log10_c ({train_head.min_log10_c:g}) must be below "
            f"train_head.max_log10_c ({train_head.max_log10_c:g})."
        )
    began = time.perf_counter()
    card = read_card(layout.backbone_card)
    images = read_manifest(layout.accepted)
    train = images[images["split"] == "train"]
    shas, labels, groups = (train[name].astype(str).tolist() for name in ("sha256", "label", "group"))
    views = training_views(
        features.views, num_train=len(train), min_area_fraction=augment.min_area_fraction, hflip=augment.hflip
    )
    stored = load_features(layout.features_dir, card, shas, views).reshape(len(views), len(shas), -1)
    same = same_names(class_names(images), card.labels or ())
    probe, method, adjustment = None, "probe", 0.0
    if train_head.method == "as_is":
        head, method = _as_is(layout, card, stored[0], labels, same)
    else:
        adjustment = adjustment_strength(
            train_head.logit_adjustment,
            train_labels=labels,
            test_labels=images.loc[images["split"] == "test", "label"].astype(str).tolist(),
            balanced=gate.balanced,
        )
        settings = train_head.model_dump(exclude={"method", "logit_adjustment"})
        settings |= {"seed": seed, "adjustment": adjustment}
        probe = fit_probe(stored, labels, groups, classes=class_names(images), **settings)
        head = probe.head
    num_by_class = {label: labels.count(label) for label in head.labels}
    chance = max(num_by_class.values()) / len(labels)
    if probe and probe.accuracy is not None:
        chance = probe.accuracy - (probe.num_won - probe.num_lost) / probe.num_held_out
    num_val, val_accuracy, val_nll = _judge(layout, card, head, images[images["split"] == "val"])
    report = TrainHeadReport(
        method=method,
        num_same_names=len(same),
        num_train=len(train),
        num_train_by_class=num_by_class,
        num_classes=len(head.labels),
        views=views,
        feature_dim=card.feature_dim,
        solver=SOLVER if probe else None,
        log10_c=probe.log10_c if probe else None,
        temperature=probe.temperature if probe else None,
        class_ratio=max(num_by_class.values()) / max(1, min(num_by_class.values())),
        logit_adjustment=adjustment,
        num_parts=probe.num_parts if probe else 0,
        num_held_out=probe.num_held_out if probe else 0,
        out_of_fold_accuracy=probe.accuracy if probe else None,
        chance_accuracy=chance,
        is_at_chance=bool(probe and probe.num_held_out and is_at_chance(probe.num_won, probe.num_lost)),
        out_of_fold_nll=probe.nll if probe else None,
        out_of_fold_balanced_accuracy=probe.balanced_accuracy if probe else None,
        out_of_fold_adjusted_balanced_accuracy=probe.adjusted_balanced_accuracy if probe else None,
        num_val=num_val,
        val_accuracy=val_accuracy,
        val_nll=val_nll,
        num_iterations=probe.num_iterations if probe else 0,
        converged=probe.converged if probe else True,
        path=probe.path if probe else (),
    )
    kind = {"probe": "linear probe", "own_classes": "the backbone's own classes", "prototypes": "class prototypes"}
    write_head(layout.head_dir, head, {"kind": kind[method], "seed": seed, **asdict(report)})
    _log(report)
    write_json(layout.times("train_head"), {"seconds": time.perf_counter() - began, "cores": available_cores()})
    return report


def _as_is(
    layout: Layout, card: BackboneCard, features: NDArray[np.float32], labels: list[str], same: dict[str, int]
) -> tuple[Head, str]:
    """A head without a gradient step: the backbone's own classes where all overlap, else class prototypes."""
    check_examples(features[None], labels)
    if card.labels and set(same) >= set(labels):
        columns = {label: same[label] for label in set(labels)}
        head = own_head(
            layout.backbone_weights,
            card.architecture,
            columns=columns,
            num_classes=len(card.labels),
            feature_dim=card.feature_dim,
        )
        if head is not None:
            return head, "own_classes"
    return class_prototypes(features, labels), "prototypes"


def _judge(layout: Layout, card: BackboneCard, head: Head, val: pd.DataFrame) -> tuple[int, float | None, float | None]:
    """Number, accuracy and NLL (nats) of the val images whose class the head has."""
    known = val[val["label"].isin(head.labels)]
    if known.empty:
        return 0, None, None
    targets = np.array([head.labels.index(label) for label in known["label"]], dtype=np.intp)
    logits = head.logits(load_features(layout.features_dir, card, known["sha256"].astype(str).tolist()))
    return len(known), float((logits.argmax(axis=1) == targets).mean()), float(row_nll(logits, targets).mean())


def is_at_chance(won: int, lost: int) -> bool:
    """Whether a probe knows no more than which class is the largest, as far as held-out images can tell.

    It is told so where it is right no more often than always naming that class; or where it is, but not beyond noise,
    and the images on which the two differ are enough to show a clear winner. Two are not: who has all of 302 images of
    one class and 2 of another right is not at chance.

    Args:
        won: Images that the probe alone has right.
        lost: Images that always naming the largest class alone has right.
    """
    clear = math.ceil(CLEAR_SHARE * (won + lost))
    limit = 1 - CONFIDENCE
    return won <= lost or mcnemar_midp(clear, won + lost - clear) < limit <= mcnemar_midp(won, lost)


def _log(report: TrainHeadReport) -> None:
    if report.log10_c is None or report.temperature is None:
        told = (report.method, report.num_same_names, report.num_classes, _percent(report.val_accuracy), report.num_val)
        logger.info("no fit: %s; %d of %d classes are the backbone's own, val accuracy %s on %d", *told)
        return
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
    if report.logit_adjustment:
        logger.info(
            "the largest class has %.1f times the images of the smallest: scores adjusted with strength %.2g, "
            "out-of-fold balanced accuracy %s (%s without)",
            report.class_ratio,
            report.logit_adjustment,
            _percent(report.out_of_fold_adjusted_balanced_accuracy),
            _percent(report.out_of_fold_balanced_accuracy),
        )
    if report.is_at_chance:
        logger.warning(
            "the probe is at chance: held-out accuracy %s on %d images, and always naming the largest class gives %s. "
            "Are the labels right (`tanuki suspects`), and does the backbone suit the pictures (backbone.source)?",
            _percent(report.out_of_fold_accuracy),
            report.num_held_out,
            _percent(report.chance_accuracy),
        )
    if not report.converged:
        logger.warning("the last fit stopped after %d iterations before it converged", report.num_iterations)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"
