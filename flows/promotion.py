"""What becomes of a bundle: registered, put before the gate, promoted or refused; later forced or rolled back.

The challenger's answers are those that `evaluate` measured on this very bundle; the champion answers the same test
images now, through the same predictor. Numbers in, decision out: tasks/gate.py. What happened: deploy/registry.py.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from deploy.bundle import Bundle, read_bundle
from deploy.errors import BundleError
from deploy.latency import measure_latency
from deploy.predictor import Predictor
from deploy.registry import Registry, Version
from flows import workspace
from flows.graph import read_stages
from tasks.data.image_store import open_images
from tasks.gate import Decision, Scores, decide
from tasks.layout import Layout
from tasks.params import load_params

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verdict:
    """What the gate said of a version and what became of it.

    Args:
        version: The version that was judged.
        compared_with: The champion then, or None.
        champion: The champion now, or None.
        outcome: "first", "promote", "refuse", "undecided", or "champion" where it was in production already.
        reasons: Whole sentences; the first one is the gist.
        warnings: What a person should know that decided nothing.
        numbers: What the reasons rest on.
    """

    version: int
    compared_with: int | None
    champion: int | None
    outcome: str
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class TestImages:
    """Today's test images and what the challenger answered for them.

    Args:
        paths: Relative to data/raw.
        truth: Their labels.
        probabilities: The challenger's, of shape (N, C).
        digest: Of images and labels: the identity of the test set.
    """

    paths: tuple[str, ...]
    truth: tuple[str, ...]
    probabilities: np.ndarray
    digest: str


def judge(layout: Layout, *, promote: bool) -> Verdict:
    """Registers the workspace's bundle, compares it with the champion and, if it passes, makes it champion.

    Judging the same bundle by the same test images against the same champion again changes nothing.

    Args:
        layout: The workspace, with every stage up to date.
        promote: False leaves the champion and the history as they are and only tells the decision.
    """
    registry = Registry(layout.registry_dir)
    version = registry.register(layout.bundle_dir, lineage(layout), card=layout.model_card)
    champion = registry.champion()
    if champion is not None and champion.id == version.id:
        reason = f"Version {version.id} is champion already."
        return Verdict(version.id, version.id, version.id, "champion", (reason,), (), {})
    test = read_test_images(layout)
    decision = _decide(layout, registry, version, champion, test)
    compared_with = None if champion is None else champion.id
    if promote and not _was_judged(registry, version, champion, test.digest):
        _record(registry, version, compared_with, decision, test.digest)
    now = registry.champion()
    return Verdict(
        version=version.id,
        compared_with=compared_with,
        champion=None if now is None else now.id,
        outcome=decision.outcome,
        reasons=decision.reasons if promote else (*decision.reasons, "Nothing was promoted, as asked."),
        warnings=decision.warnings,
        numbers=decision.numbers,
    )


def is_judged(layout: Layout, *, promote: bool) -> bool:
    """Whether the workspace's bundle is champion, or was judged by today's test images against today's champion."""
    registry = Registry(layout.registry_dir)
    try:
        digest = read_bundle(layout.bundle_dir).digest
        version = next((each for each in registry.versions() if each.digest == digest), None)
        champion = registry.champion()
        if version is None or champion is None:
            return False
        if version.id == champion.id or not promote:
            return True
        return _was_judged(registry, version, champion, read_test_images(layout).digest)
    except (BundleError, FileNotFoundError):
        return False


def force(layout: Layout, version: int, *, reason: str) -> str:
    """Makes a version champion whatever the gate said of it."""
    registry = Registry(layout.registry_dir)
    before = registry.champion()
    if before is not None and before.id == version:
        return f"Version {version} is champion already."
    registry.promote(version, reason=reason, expected=None if before is None else before.id, forced=True)
    return f"Version {version} is champion now" + ("." if before is None else f", in place of version {before.id}.")


def roll_back(layout: Layout, *, reason: str) -> str:
    """Makes the previous champion the champion again."""
    registry = Registry(layout.registry_dir)
    before = registry.champion()
    now = registry.rollback(reason)
    return f"Version {now.id} is champion again" + ("." if before is None else f", in place of version {before.id}.")


def lineage(layout: Layout) -> dict[str, Any]:
    """Where the workspace's bundle comes from: git commit, DVC hashes, params, each stage's report."""
    return {
        **workspace.lineage(layout),
        "params": json.loads(load_params(layout.params).model_dump_json()),
        "metrics": read_reports(layout),
    }


def read_reports(layout: Layout) -> dict[str, Any]:
    """The metrics file of each stage that has one, by the stage's name."""
    files = {stage.name: layout.report(stage.name) for stage in read_stages(layout.pipeline)}
    return {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.is_file()}


def read_test_images(layout: Layout) -> TestImages:
    """What `evaluate` measured, image by image."""
    table = pq.read_table(layout.predictions)
    columns = {name: table.column(name).to_pylist() for name in ("path", "label", "probabilities")}
    return TestImages(
        paths=tuple(columns["path"]),
        truth=tuple(columns["label"]),
        probabilities=np.asarray(columns["probabilities"], dtype=np.float32),
        digest=json.loads(layout.report("evaluate").read_text(encoding="utf-8"))["test_digest"],
    )


def _decide(
    layout: Layout, registry: Registry, version: Version, champion: Version | None, test: TestImages
) -> Decision:
    params = load_params(layout.params)
    challenger_bundle = registry.bundle(version.id)
    champion_bundle = None if champion is None else registry.bundle(champion.id)
    challenger, before = _scores(layout, challenger_bundle, champion_bundle, test)
    return decide(
        challenger,
        before,
        truth=test.truth,
        seed=params.seed,
        num_uses=registry.gate_uses(test.digest),
        **{name: getattr(params.gate, name) for name in type(params.gate).model_fields},
    )


def _scores(
    layout: Layout, challenger: Bundle, champion: Bundle | None, test: TestImages
) -> tuple[Scores, Scores | None]:
    """Both models' answers on the test images, and their latencies measured in turns."""
    images = open_images(layout.raw)
    pictures = [images.file(path).read_bytes() for path in test.paths[:8]]
    with Predictor(challenger) as now:
        if champion is None:
            (latency,) = measure_latency([now], pictures, runs=20)
            return Scores(challenger.labels, test.probabilities, latency.p50_s, challenger.size_bytes), None
        with Predictor(champion) as before:
            logger.info("the champion answers today's %d test images", len(test.paths))
            answers = before.score_files([images.file(path) for path in test.paths])
            latencies = measure_latency([now, before], pictures, runs=20)
    return (
        Scores(challenger.labels, test.probabilities, latencies[0].p50_s, challenger.size_bytes),
        Scores(champion.labels, answers.probabilities, latencies[1].p50_s, champion.size_bytes),
    )


def _was_judged(registry: Registry, version: Version, champion: Version | None, test_digest: str) -> bool:
    compared_with = None if champion is None else champion.id
    decisions = [event.decision for event in registry.events() if event.version == version.id and event.decision]
    return any(each["test_digest"] == test_digest and each["compared_with"] == compared_with for each in decisions)


def _record(
    registry: Registry, version: Version, compared_with: int | None, decision: Decision, test_digest: str
) -> None:
    told = {**asdict(decision), "test_digest": test_digest, "compared_with": compared_with}
    if decision.promotes:
        registry.promote(version.id, reason=decision.reasons[0], expected=compared_with, decision=told)
    else:
        undecided = decision.outcome == "undecided"
        registry.refuse(version.id, decision.reasons[0], undecided=undecided, decision=told)
