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
from deploy.latency import measure_latency, measure_throughput
from deploy.machine import available_cores
from deploy.predictor import Predictor
from tasks.data.features import load_features
from tasks.data.image_store import open_images
from tasks.data.manifest import read_manifest
from tasks.errors import DataError, ImageError
from tasks.evaluation.metrics import (
    Accuracy,
    ClassScore,
    MacroIntervals,
    ReliabilityBin,
    accuracy_of,
    balanced_accuracy,
    class_scores,
    expected_calibration_error,
    macro_f1,
    macro_intervals,
    negative_log_likelihood,
    reliability,
)
from tasks.evaluation.model_card import PURPOSE, Attacked, CardFacts, identity, limits, model_card
from tasks.evaluation.page import inline_png, render_page
from tasks.evaluation.plots import (
    Mistake,
    draw_confusion,
    draw_mistakes,
    draw_reliability,
    drawable_names,
    thumbnail,
)
from tasks.evaluation.robustness import Robustness, robust_answers, robustness_of, robustness_subset
from tasks.evaluation.slices import Slice, slices_by_number, slices_by_source
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
THROUGHPUT_PICTURES, THROUGHPUT_ROUNDS = 32, 3
MISTAKES_SHOWN = 18
CONFUSIONS_SHOWN = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EvaluateReport:
    """How good the bundle is on the test images, and what the simpler models reach there. Shares in 0..1.

    Attributes:
        num_test: Test images.
        num_classes: Classes of the bundle.
        confidence: Of the two-sided intervals.
        accuracy: Of the bundle, with accuracy_low and accuracy_high (Wilson).
        balanced_accuracy: Mean recall of the classes, with its interval (bootstrap).
        macro_f1: Mean F1 of the classes, with its interval (bootstrap).
        nll: Negative log-likelihood, nats an image.
        ece: Expected calibration error.
        size_bytes: Of the whole graph.
        robustness: On corrupted pictures; None where params.yaml asks for none.
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
    balanced_accuracy_low: float
    balanced_accuracy_high: float
    macro_f1: float
    macro_f1_low: float
    macro_f1_high: float
    nll: float
    ece: float
    size_bytes: int
    robustness: Robustness | None
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
        intervals: Of the means over the classes.
        slices: Parts of the test images.
        robustness: On corrupted pictures.
    """

    labels: tuple[str, ...]
    probabilities: NDArray[np.float32]
    truth: NDArray[np.int64]
    predicted: NDArray[np.int64]
    classes: list[ClassScore]
    bins: list[ReliabilityBin]
    intervals: MacroIntervals
    slices: list[Slice]
    robustness: Robustness | None

    @property
    def wrong(self) -> NDArray[np.int64]:
        """Rows of the mistakes, those of which the model was most sure first."""
        rows = np.flatnonzero(self.predicted != self.truth)
        return rows[np.argsort(-self.probabilities[rows, self.predicted[rows]], kind="stable")]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How often each class (rows) was taken for each class (columns), (C, C)."""
        counts = np.zeros((len(self.labels),) * 2, dtype=np.int64)
        np.add.at(counts, (self.truth, self.predicted), 1)
        return counts


def run(layout: Layout, *, seed: int, evaluate: EvaluateParams) -> EvaluateReport:
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
        probabilities = _answers(predictor, paths)
        robustness = _robustness(layout, predictor, test, paths, seed=seed, evaluate=evaluate)
        _write_latency(layout.evaluation_dir / "latency.json", predictor, paths, evaluate.latency_runs)
    measured = _measure(bundle.labels, probabilities, truth, test, robustness, seed, evaluate)
    report = _report(layout, images, test, bundle, measured, evaluate.confidence)
    _write_predictions(layout.predictions, test, measured)
    _write_tables(layout.evaluation_dir, measured)
    _draw(layout.evaluation_dir, paths, measured)
    facts = _facts(layout, images, bundle, measured, report)
    write_text(layout.model_card, model_card(facts))
    write_text(layout.evaluation_page, _page(layout, test, paths, measured, report, facts))
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


def _robustness(
    layout: Layout,
    predictor: Predictor,
    test: pd.DataFrame,
    paths: Sequence[Readable],
    *,
    seed: int,
    evaluate: EvaluateParams,
) -> Robustness | None:
    """Asks for a subset of the test images in every corruption; keeps the answers, which the gate compares."""
    rows = robustness_subset(test["sha256"], size=evaluate.robustness_images, seed=seed)
    shown = progress((paths[row].read_bytes() for row in rows), total=len(rows), what="evaluate, corrupted")
    answers = robust_answers(predictor, shown) if len(rows) else {}
    labels, names = test["label"].to_numpy(dtype=np.str_), np.asarray(predictor.labels, dtype=np.str_)
    told = [
        (test["path"].iloc[row], corruption, labels[row], names[column])
        for corruption, columns in answers.items()
        for row, column in zip(rows, columns, strict=True)
    ]
    _write_csv(layout.robustness, ("path", "corruption", "label", "predicted"), told)
    right = {name: names[columns] == labels[rows] for name, columns in answers.items()}
    settings: dict[str, Any] = {"confidence": evaluate.confidence, "draws": evaluate.draws, "seed": seed}
    return robustness_of(right, **settings) if right else None


def _measure(
    labels: tuple[str, ...],
    probabilities: NDArray[np.float32],
    truth: NDArray[np.int64],
    test: pd.DataFrame,
    robustness: Robustness | None,
    seed: int,
    params: EvaluateParams,
) -> Measured:
    predicted = probabilities.argmax(axis=1)
    right = predicted == truth
    sizes = {name: test[name].to_numpy(dtype=np.float64) for name in ("width", "height", "brightness")}
    numbers = {
        "brightness": sizes["brightness"],
        "size": np.sqrt(sizes["width"] * sizes["height"]),
        "aspect": sizes["width"] / sizes["height"],
    }
    confidence, min_images = params.confidence, params.min_slice_images
    return Measured(
        labels=labels,
        probabilities=probabilities,
        truth=truth,
        predicted=predicted,
        classes=class_scores(predicted, truth, len(labels)),
        bins=reliability(probabilities, truth, params.calibration_bins),
        intervals=macro_intervals(predicted, truth, len(labels), confidence=confidence, draws=params.draws, seed=seed),
        slices=[
            *slices_by_number(numbers, right, confidence=confidence, min_images=min_images),
            *slices_by_source(
                list(test["path"]), list(test["label"]), right, confidence=confidence, min_images=min_images
            ),
        ],
        robustness=robustness,
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
        **asdict(measured.intervals),
        nll=negative_log_likelihood(measured.probabilities, measured.truth),
        ece=expected_calibration_error(measured.bins),
        size_bytes=bundle.size_bytes,
        robustness=measured.robustness,
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
    heads = class_prototypes(train_features, list(train["label"]), calibrated=False), read_head(layout.head_dir)
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


def _attacked(layout: Layout) -> Attacked | None:
    """Accuracy under attack as finetune measured it, where its adversarial stage was kept."""
    told = json.loads((layout.finetuned_dir / "finetuned.json").read_text(encoding="utf-8"))
    kept = [stage for stage in told.get("stages", ()) if stage["kept"] and stage.get("robustness_after")]
    if not kept:
        return None
    accuracy = {name: Accuracy(**share) for name, share in kept[-1]["robustness_after"].items()}
    return Attacked(kept[-1]["num_attacked"], kept[-1]["epsilon"], accuracy)


def _write_latency(path: Path, predictor: Predictor, paths: Sequence[Readable], runs: int) -> None:
    """Times the bundle on a few of the test images. The one file that is not the same twice."""
    few, more = (
        [paths[row].read_bytes() for row in np.linspace(0, len(paths) - 1, number).astype(int)]
        for number in (LATENCY_PICTURES, THROUGHPUT_PICTURES)
    )
    (latency,) = measure_latency([predictor], few, runs=runs)
    images_per_s = measure_throughput(predictor, more, rounds=THROUGHPUT_ROUNDS)
    write_json(path, {**asdict(latency), "images_per_s": images_per_s, "cores": available_cores()})
    logger.info(
        "one picture takes %.1f ms (p95 %.1f ms); %.0f pictures a second",
        latency.p50_s * 1e3,
        latency.p95_s * 1e3,
        images_per_s,
    )


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
    rows = ((number, names[number - 1], *astuple(score)) for number, score in enumerate(measured.classes, start=1))
    _write_csv(directory / "per_class.csv", ("number", "label", "num_test", "precision", "recall", "f1"), rows)
    parts = ((each.kind, each.name, each.num_images, *astuple(each.accuracy)) for each in measured.slices)
    header = ("kind", "name", "num_images", "accuracy", "accuracy_low", "accuracy_high")
    _write_csv(directory / "slices.csv", header, parts)


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _draw(directory: Path, paths: Sequence[Readable], measured: Measured) -> None:
    names = drawable_names(measured.labels)
    draw_confusion(directory / "confusion.png", measured.counts, names)
    draw_reliability(directory / "reliability.png", measured.bins, expected_calibration_error(measured.bins))
    mistakes = [
        Mistake(
            image=decode_image(paths[row].read_bytes()),
            truth=names[measured.truth[row]],
            predicted=names[measured.predicted[row]],
            probability=float(measured.probabilities[row].max()),
        )
        for row in measured.wrong[:MISTAKES_SHOWN]
    ]
    draw_mistakes(directory / "worst_mistakes.png", mistakes)


def _facts(
    layout: Layout, images: pd.DataFrame, bundle: Bundle, measured: Measured, report: EvaluateReport
) -> CardFacts:
    card: BackboneCard = read_card(layout.backbone_card)
    kept, reason = _finetuned(layout)
    shipped = Accuracy(report.accuracy, report.accuracy_low, report.accuracy_high)
    return CardFacts(
        labels=bundle.labels,
        bundle_digest=bundle.digest,
        data_sha256=sha256_file(layout.accepted),
        num_images={split: int((images["split"] == split).sum()) for split in ("train", "val", "test")},
        architecture=card.architecture,
        backbone_notes=card.notes,
        weights_source=card.source,
        weights_licence=card.licence,
        kept_stages=kept,
        preprocessing=bundle.preprocessing["words"],
        precision=bundle.precision,
        confidence=report.confidence,
        measured={
            "class prototypes": report.class_prototypes,
            "linear probe": report.linear_probe,
            "fine-tuned": report.finetuned or f"not kept: {reason}",
            "what ships": shipped,
        },
        balanced_accuracy=report.balanced_accuracy,
        macro_f1=report.macro_f1,
        intervals=measured.intervals,
        nll=report.nll,
        ece=report.ece,
        classes=measured.classes,
        slices=measured.slices,
        robustness=measured.robustness,
        attacked=_attacked(layout),
    )


def _page(
    layout: Layout,
    test: pd.DataFrame,
    paths: Sequence[Readable],
    measured: Measured,
    report: EvaluateReport,
    facts: CardFacts,
) -> str:
    """All of it in one HTML file."""
    pictures = {name: (layout.evaluation_dir / f"{name}.png").read_bytes() for name in ("confusion", "reliability")}
    mistakes = [
        {
            "thumbnail": inline_png(thumbnail(decode_image(paths[row].read_bytes()))),
            "truth": measured.labels[measured.truth[row]],
            "predicted": measured.labels[measured.predicted[row]],
            "probability": float(measured.probabilities[row].max()),
            "path": test["path"].iloc[row],
        }
        for row in measured.wrong[:MISTAKES_SHOWN]
    ]
    classes = zip(range(1, len(measured.labels) + 1), measured.labels, measured.classes, strict=True)
    return render_page(
        "evaluation.html",
        report=report,
        pictures={name: inline_png(data) for name, data in pictures.items()},
        mistakes=mistakes,
        num_wrong=len(measured.wrong),
        confusions=_confusions(measured),
        classes=sorted(classes, key=lambda each: each[2].f1),
        slices=measured.slices,
        facts=identity(facts),
        purpose=PURPOSE,
        limits=limits(facts),
    )


def _confusions(measured: Measured) -> list[tuple[str, str, int]]:
    """The commonest mistakes: true class, what it was taken for, how often."""
    counts = measured.counts
    np.fill_diagonal(counts, 0)
    most = np.argsort(-counts, axis=None, kind="stable")[:CONFUSIONS_SHOWN]
    pairs = zip(*np.unravel_index(most, counts.shape), strict=True)
    return [
        (measured.labels[row], measured.labels[column], int(counts[row, column]))
        for row, column in pairs
        if counts[row, column]
    ]
