"""Stage evaluate: what ships is what is measured.

The exported bundle answers the test images through deploy's own predictor. Beside it stand the class prototypes and the
linear probe, from stored features, so that a person sees what each step brought. No torch. Wall times are kept out of
everything but latency.json, so that two runs write the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from dataclasses import asdict, astuple, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from deploy.bundle import Bundle, read_bundle
from deploy.files import Readable, atomic_path, sha256_bytes, sha256_file, write_json, write_text
from deploy.images import decode_image
from deploy.latency import measure_latency
from deploy.predictor import Predictor
from tasks.data.features import load_features
from tasks.data.image_store import open_images
from tasks.data.manifest import read_manifest
from tasks.errors import DataError, ImageError
from tasks.evaluation.metrics import (
    Accuracy,
    ClassScore,
    ReliabilityBin,
    accuracy_of,
    balanced_accuracy,
    class_scores,
    expected_calibration_error,
    macro_f1,
    negative_log_likelihood,
    reliability,
)
from tasks.evaluation.model_card import CardFacts, model_card
from tasks.evaluation.plots import Mistake, draw_confusion, draw_mistakes, draw_reliability
from tasks.models.backbone_card import read_card
from tasks.models.head import read_head
from tasks.progress import progress
from tasks.training.prototypes import class_prototypes

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from tasks.layout import Layout
    from tasks.models.backbone_card import BackboneCard
    from tasks.params import EvaluateParams

LATENCY_PICTURES = 8
MISTAKES_SHOWN = 18

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateReport:
    """How good the bundle is on the test images, and what the simpler models reach there. Shares in 0..1.

    Attributes:
        num_test: Test images.
        num_classes: Classes of the bundle.
        confidence: Of the two-sided intervals (Wilson).
        accuracy: Of the bundle, with accuracy_low and accuracy_high.
        balanced_accuracy: Mean recall of the classes.
        macro_f1: Mean F1 of the classes.
        nll: Negative log-likelihood, nats an image.
        ece: Expected calibration error.
        class_prototypes: The nearest class mean in the frozen features.
        linear_probe: The head on the frozen features.
        finetuned: The fine-tuned network, which is then the bundle; None where no stage was kept.
        finetuned_reason: Why there is none.
        bundle_digest: Which bundle was measured.
        test_digest: Which test images and labels it was measured on.
    """

    num_test: int
    num_classes: int
    confidence: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    balanced_accuracy: float
    macro_f1: float
    nll: float
    ece: float
    class_prototypes: Accuracy
    linear_probe: Accuracy
    finetuned: Accuracy | None
    finetuned_reason: str | None
    bundle_digest: str
    test_digest: str


@dataclass(frozen=True, eq=False)
class Measured:
    """The bundle's answers for the test images.

    Attributes:
        labels: Classes, in the order of the probabilities.
        probabilities: (N, C) float32.
        truth: Column of the true class, (N,).
        predicted: Column of the most probable class, (N,).
        classes: Scores of each class.
        bins: Answers by their confidence.
    """

    labels: tuple[str, ...]
    probabilities: NDArray[np.float32]
    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]
    classes: list[ClassScore]
    bins: list[ReliabilityBin]


def run(layout: Layout, *, evaluate: EvaluateParams) -> EvaluateReport:
    """Measures data/bundle on the accepted test images; writes data/reports/evaluation/.

    Raises:
        BundleError: If the bundle is not whole.
        DataError: If there are no test images, they cannot be read, or the bundle does not know their classes.
        StoreError: If the probe or the stored features are missing.
    """
    bundle = read_bundle(layout.bundle_dir)
    images = read_manifest(layout.accepted)
    test = images[images["split"] == "test"].reset_index(drop=True)
    truth = _columns(test["label"], bundle.labels)
    store = open_images(layout.raw)
    paths = [store.file(path) for path in test["path"]]
    with Predictor(bundle) as predictor:
        measured = _measure(bundle.labels, _answers(predictor, paths), truth, evaluate.calibration_bins)
        _write_latency(layout.evaluation_dir / "latency.json", predictor, paths, evaluate.latency_runs)
    report = _report(layout, images, test, bundle, measured, evaluate.confidence)
    _write_predictions(layout.predictions, test, measured)
    _write_tables(layout.evaluation_dir, measured)
    _draw(layout.evaluation_dir, paths, measured, report.ece)
    write_text(layout.model_card, _card(layout, images, bundle, measured, report))
    logger.info("accuracy %.1f %% on %d test images", 100 * report.accuracy, report.num_test)
    return report


def digest_of_test_set(test: pd.DataFrame) -> str:
    """Identity of a test set: which images under which labels, whatever their paths and order."""
    lines = sorted(f"{sha256} {label}" for sha256, label in zip(test["sha256"], test["label"], strict=True))
    return sha256_bytes("\n".join(lines).encode())


def _columns(texts: Iterable[str], labels: tuple[str, ...]) -> NDArray[np.int64]:
    """Columns of the labels of images, (N,)."""
    texts = list(texts)
    if not texts:
        raise DataError("there are no test images. Add some, or raise index_images.test_fraction in params.yaml.")
    column = {label: index for index, label in enumerate(labels)}
    if unknown := sorted(set(texts) - set(labels)):
        raise DataError(
            f"the bundle does not know {len(unknown)} classes of the test images: {', '.join(map(repr, unknown))}. "
            "It is older than the data: train again (dvc repro)."
        )
    return np.array([column[text] for text in texts], dtype=np.int64)


def _answers(predictor: Predictor, paths: Sequence[Readable]) -> NDArray[np.float32]:
    """Probabilities of the test images, (N, C)."""
    try:
        return predictor.score_files(progress(paths, total=len(paths), what="evaluate")).probabilities
    except ImageError as error:
        raise DataError(
            f"{error}. These files could be read when they were indexed: restore them (dvc checkout), or run the "
            "pipeline again from index_images (dvc repro)."
        ) from error


def _measure(
    labels: tuple[str, ...], probabilities: NDArray[np.float32], truth: NDArray[np.int64], num_bins: int
) -> Measured:
    predicted = probabilities.argmax(axis=1)
    return Measured(
        labels=labels,
        probabilities=probabilities,
        truth=truth,
        predicted=predicted,
        classes=class_scores(predicted, truth, len(labels)),
        bins=reliability(probabilities, truth, num_bins),
    )


def _report(
    layout: Layout,
    images: pd.DataFrame,
    test: pd.DataFrame,
    bundle: Bundle,
    measured: Measured,
    confidence: float,
) -> EvaluateReport:
    accuracy = accuracy_of(measured.predicted == measured.truth, confidence)
    prototypes, probe = _baselines(layout, images, test, confidence)
    kept, reason = _finetuned(layout)
    return EvaluateReport(
        num_test=len(test),
        num_classes=len(bundle.labels),
        confidence=confidence,
        **asdict(accuracy),
        balanced_accuracy=balanced_accuracy(measured.classes),
        macro_f1=macro_f1(measured.classes),
        nll=negative_log_likelihood(measured.probabilities, measured.truth),
        ece=expected_calibration_error(measured.bins),
        class_prototypes=prototypes,
        linear_probe=probe,
        finetuned=accuracy if kept else None,
        finetuned_reason=None if kept else reason,
        bundle_digest=bundle.digest,
        test_digest=digest_of_test_set(test),
    )


def _baselines(
    layout: Layout, images: pd.DataFrame, test: pd.DataFrame, confidence: float
) -> tuple[Accuracy, Accuracy]:
    """Class prototypes and linear probe on the stored features of the test images."""
    card = read_card(layout.backbone_card)
    train = images[images["split"] == "train"]
    train_features = load_features(layout.features_dir, card, list(train["sha256"]))
    features = load_features(layout.features_dir, card, list(test["sha256"]))
    heads = class_prototypes(train_features, list(train["label"])), read_head(layout.head_dir)
    prototypes, probe = (
        accuracy_of(head.logits(features).argmax(axis=1) == _columns(test["label"], head.labels), confidence)
        for head in heads
    )
    return prototypes, probe


def _finetuned(layout: Layout) -> tuple[list[str], str]:
    """The fine-tuning stages that were kept, and why none was."""
    path = layout.finetuned_dir / "finetuned.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        return list(facts["kept"]), facts.get("reason") or "no stage was kept"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}). Run the stage finetune (dvc repro finetune).") from error


def _write_latency(path: Path, predictor: Predictor, paths: Sequence[Readable], runs: int) -> None:
    """Times the bundle on a few of the test images. The one file that is not the same twice."""
    few = [paths[index] for index in np.linspace(0, len(paths) - 1, LATENCY_PICTURES).astype(int)]
    (latency,) = measure_latency([predictor], [each.read_bytes() for each in few], runs=runs)
    write_json(path, asdict(latency))
    logger.info("one picture takes %.1f ms (p95 %.1f ms)", latency.p50_s * 1e3, latency.p95_s * 1e3)


def _write_predictions(path: Path, test: pd.DataFrame, measured: Measured) -> None:
    """What was answered, image by image: what the gate reads."""
    names = np.asarray(measured.labels, dtype=np.str_)
    width = len(measured.labels)
    schema = pa.schema(
        [
            ("path", pa.string()),
            ("sha256", pa.string()),
            ("label", pa.string()),
            ("predicted", pa.string()),
            ("probabilities", pa.list_(pa.float32(), width)),
        ],
        metadata={"tanuki.labels": json.dumps(measured.labels)},
    )
    probabilities = pa.FixedSizeListArray.from_arrays(pa.array(measured.probabilities.ravel()), width)
    columns = [
        pa.array(test["path"]),
        pa.array(test["sha256"]),
        pa.array(names[measured.truth]),
        pa.array(names[measured.predicted]),
        probabilities,
    ]
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), temporary, compression="zstd")


def _write_tables(directory: Path, measured: Measured) -> None:
    names = np.asarray(measured.labels, dtype=np.str_)
    pairs = zip(names[measured.truth], names[measured.predicted], strict=True)
    _write_csv(directory / "confusion.csv", ("actual", "predicted"), pairs)
    _write_csv(directory / "reliability.csv", ("confidence", "accuracy", "count"), map(astuple, measured.bins))
    rows = ((label, *astuple(score)) for label, score in zip(names, measured.classes, strict=True))
    _write_csv(directory / "per_class.csv", ("label", "num_test", "precision", "recall", "f1"), rows)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _draw(directory: Path, paths: Sequence[Readable], measured: Measured, calibration_error: float) -> None:
    counts = np.zeros((len(measured.labels),) * 2, dtype=np.int64)
    np.add.at(counts, (measured.truth, measured.predicted), 1)
    draw_confusion(directory / "confusion.png", counts, measured.labels)
    draw_reliability(directory / "reliability.png", measured.bins, calibration_error)
    draw_mistakes(directory / "worst_mistakes.png", _worst_mistakes(paths, measured))


def _worst_mistakes(paths: Sequence[Readable], measured: Measured) -> list[Mistake]:
    """The mistakes of which the model was most sure."""
    wrong = np.flatnonzero(measured.predicted != measured.truth)
    sureness = measured.probabilities[wrong, measured.predicted[wrong]]
    worst = wrong[np.argsort(-sureness, kind="stable")][:MISTAKES_SHOWN]
    return [
        Mistake(
            image=decode_image(paths[index].read_bytes()),
            truth=measured.labels[measured.truth[index]],
            predicted=measured.labels[measured.predicted[index]],
            probability=float(measured.probabilities[index].max()),
        )
        for index in worst
    ]


def _card(layout: Layout, images: pd.DataFrame, bundle: Bundle, measured: Measured, report: EvaluateReport) -> str:
    card: BackboneCard = read_card(layout.backbone_card)
    kept, reason = _finetuned(layout)
    shipped = Accuracy(report.accuracy, report.accuracy_low, report.accuracy_high)
    facts = CardFacts(
        labels=bundle.labels,
        bundle_digest=bundle.digest,
        data_sha256=sha256_file(layout.accepted),
        num_images={split: int((images["split"] == split).sum()) for split in ("train", "val", "test")},
        architecture=card.architecture,
        weights_source=card.source,
        weights_licence=card.licence,
        kept_stages=kept,
        preprocessing=bundle.preprocessing["words"],
        confidence=report.confidence,
        measured={
            "class prototypes": report.class_prototypes,
            "linear probe": report.linear_probe,
            "fine-tuned": report.finetuned or f"not kept: {reason}",
            "what ships": shipped,
        },
        balanced_accuracy=report.balanced_accuracy,
        macro_f1=report.macro_f1,
        nll=report.nll,
        ece=report.ece,
        classes=measured.classes,
    )
    return model_card(facts)
