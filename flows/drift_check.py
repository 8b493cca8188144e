"""A look for drift: what the server captured lately beside the test images. Behind the flow `drift` and `tanuki drift`.

The reference is answered here by the champion's own bundle through the server's predictor, so that a picture in both
has the same numbers in both; it is kept as long as bundle and test images stay the same. What is compared and how:
tasks/drift/compare.py.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deploy.bundle import Bundle
from deploy.capture_files import Captured, read_captured
from deploy.files import atomic_path, sha256_bytes, write_json, write_text
from deploy.predictor import Predictor
from flows.registries import registry_of
from tasks.data.image_store import open_images
from tasks.data.manifest import read_manifest
from tasks.drift.compare import Answers, Comparison, compare
from tasks.drift.page import NovelPicture, drift_page
from tasks.errors import DataError
from tasks.evaluation.robustness import robustness_subset
from tasks.layout import Layout
from tasks.params import DriftParams, load_params

Outcome = Literal["drift", "none", "too few"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DriftReport:
    """What a look for drift came to.

    Args:
        outcome: Whether there is drift; ``too few`` where there was too little to compare.
        version: The champion.
        bundle: Its digest.
        looked_at: When, ISO 8601, UTC.
        since: From when on answers were compared.
        num_captured: Answers of this bundle in that time.
        num_others: Answers of other bundles in that time.
        num_compared: Of the sample that was drawn of the former, a picture sent again counted once.
        num_reference: Test images beside them.
        level: Chance of a false alarm.
        tests: statistic, expected, p_value, adjusted_p_value of ``pictures``, ``predictions`` and ``confidence``.
        shifted: Classes predicted more or less often, beyond chance: reference_share, window_share, adjusted_p_value.
        reference_confidence: Mean probability of the predicted class.
        window_confidence: The same of what was captured.
    """

    outcome: Outcome
    version: int
    bundle: str
    looked_at: str
    since: str
    num_captured: int
    num_others: int
    num_compared: int
    num_reference: int
    level: float
    tests: Mapping[str, Mapping[str, float]]
    shifted: Mapping[str, Mapping[str, float]]
    reference_confidence: float | None
    window_confidence: float | None

    @property
    def headline(self) -> str:
        """The gist, in words."""
        if self.outcome == "too few":
            return f"{self.num_compared:,} different pictures are too few to tell"
        if self.outcome == "none":
            return "no drift"
        return "drift in " + ", ".join(
            name for name, test in self.tests.items() if test["adjusted_p_value"] <= self.level
        )

    def text(self) -> str:
        """All of it, for a terminal."""
        lines = [
            f"Version {self.version}: {self.headline}",
            f"{self.num_compared:,} answers since {self.since}, beside {self.num_reference:,} test images",
        ]
        lines += [
            f"{name:<12} {test['statistic']:9.3f}, without drift {test['expected']:.3f}; "
            f"p {test['adjusted_p_value']:.4f}"
            for name, test in self.tests.items()
        ]
        lines += [
            f"{label}: {shift['reference_share']:.1%} of the predictions then, {shift['window_share']:.1%} now"
            for label, shift in self.shifted.items()
        ]
        return "\n".join(lines)


def look_for_drift(layout: Layout, captures: Path | None = None, *, now: datetime | None = None) -> DriftReport:
    """Compares what was captured with the test images; writes drift.json and index.html.

    Args:
        layout: The workspace.
        captures: Where the server put it; data/captures where None.
        now: The end of the window; the time now where None.

    Raises:
        DataError: If there is no such folder.
        RegistryError: If there is no champion.
    """
    params = load_params(layout.params)
    folder = captures or layout.captures_dir
    if not folder.is_dir():
        raise DataError(
            f"{folder} is no folder. Start the server with `tanuki serve --capture-dir {folder}`, or name the folder "
            "that it writes to with --captures."
        )
    registry = registry_of(layout)
    version = registry.require_champion()
    bundle = registry.bundle(version.id)
    looked_at = now or datetime.now(UTC)
    since = looked_at - timedelta(days=params.drift.window_days)
    captured = read_captured(folder, bundle=bundle.digest, since=since, limit=params.drift.max_images, seed=params.seed)
    reference = read_reference(layout, bundle, params.drift, seed=params.seed)
    comparison, num_compared = None, len(captured.labels)
    if num_compared >= params.drift.min_images:
        found = _compare(bundle, captured, reference, params.drift, seed=params.seed)
        num_compared = len(found.window_rows)
        comparison = found if num_compared >= params.drift.min_images else None
    report = _report(version.id, bundle, captured, reference, comparison, num_compared, params.drift, looked_at, since)
    novel = [] if comparison is None else _novel(captured, comparison, params.drift.novel_images)
    write_json(layout.drift_dir / "drift.json", asdict(report))
    page = drift_page(
        report,
        report.headline,
        level=params.drift.level,
        comparison=comparison,
        num_reference=len(reference),
        novel=novel,
    )
    write_text(layout.drift_dir / "index.html", page)
    logger.info("version %d: %s", version.id, report.headline)
    return report


def read_reference(layout: Layout, bundle: Bundle, params: DriftParams, *, seed: int) -> Answers:
    """What a bundle answers for the test images, or for so many of them; kept, and made again where either changed."""
    images = read_manifest(layout.accepted)
    test = images[images["split"] == "test"].reset_index(drop=True)
    test = test.iloc[robustness_subset(test["sha256"], size=params.reference_images, seed=seed)]
    store = open_images(layout.raw)
    is_there = [store.file(path).is_file() for path in test["path"]]
    if not any(is_there):
        raise DataError(f"None of the test images lies in {layout.raw} any more. Run `tanuki retrain`.")
    if not all(is_there):
        moved = len(test) - sum(is_there)
        logger.warning("%d test images were relabelled or removed since the last retrain: compared without them", moved)
        test = test[is_there]
    hashes = test["sha256"].astype(str).tolist()
    key = sha256_bytes("\n".join([bundle.digest, *sorted(hashes)]).encode())
    kept = layout.drift_dir / f"reference-{key[:16]}.npz"
    if not kept.is_file():
        logger.info("the champion answers %d test images", len(test))
        with Predictor(bundle) as predictor:
            found = predictor.score_files([store.file(path) for path in test["path"]])
        for old in layout.drift_dir.glob("reference-*.npz"):
            old.unlink()
        with atomic_path(kept) as path:
            np.savez(path, probabilities=found.probabilities, embeddings=found.embeddings)
    with np.load(kept, allow_pickle=False) as arrays:
        return Answers(arrays["probabilities"], arrays["embeddings"])


def _compare(bundle: Bundle, captured: Captured, reference: Answers, params: DriftParams, *, seed: int) -> Comparison:
    return compare(
        reference,
        Answers(captured.probabilities, captured.embeddings),
        bundle.labels,
        level=params.level,
        permutations=params.permutations,
        neighbours=params.neighbours,
        seed=seed,
    )


def _report(
    version: int,
    bundle: Bundle,
    captured: Captured,
    reference: Answers,
    comparison: Comparison | None,
    num_compared: int,
    params: DriftParams,
    looked_at: datetime,
    since: datetime,
) -> DriftReport:
    outcome: Outcome = "too few" if comparison is None else "drift" if comparison.is_drift else "none"
    shifted: dict[str, Any] = {}
    if comparison is not None:
        shifted = {each.label: asdict(each) for each in comparison.classes if each.is_shifted}
    return DriftReport(
        outcome=outcome,
        version=version,
        bundle=bundle.digest,
        looked_at=looked_at.isoformat(timespec="seconds"),
        since=since.isoformat(timespec="seconds"),
        num_captured=captured.num_found,
        num_others=captured.num_others,
        num_compared=num_compared,
        num_reference=len(reference),
        level=params.level,
        tests={} if comparison is None else {name: asdict(test) for name, test in comparison.tests.items()},
        shifted=shifted,
        reference_confidence=None if comparison is None else comparison.reference_confidence,
        window_confidence=None if comparison is None else comparison.window_confidence,
    )


def _novel(captured: Captured, comparison: Comparison, number: int) -> list[NovelPicture]:
    places = comparison.most_novel[:number]
    return [
        NovelPicture(
            label=captured.labels[row],
            probability=float(captured.probabilities[row].max()),
            novelty=float(comparison.novelty[place]),
            time=captured.times[row].isoformat(timespec="seconds"),
            request_id=captured.request_ids[row],
            picture=captured.pictures[row] or captured.thumbnails[row],
        )
        for place, row in zip(places, comparison.window_rows[places], strict=True)
    ]
