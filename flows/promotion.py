"""What becomes of a bundle: registered, put before the gate, promoted or refused; later forced or rolled back.

The challenger's answers are those that `evaluate` measured on this very bundle; the champion answers the same test
images now, through the same predictor. Numbers in, decision out: tasks/gate.py. What happened: deploy/registry.py.
"""

import csv
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from deploy.bundle import Bundle, read_bundle
from deploy.errors import BundleError
from deploy.latency import measure_latency
from deploy.predictor import Predictor
from deploy.registry import Registry, Version
from flows import workspace
from flows.decision_page import write_decision
from flows.graph import read_stages
from flows.registries import registry_of
from tasks.data.image_store import ImageStore, open_images
from tasks.evaluation.robustness import CLEAN, robust_answers
from tasks.gate import Decision, Scores, decide
from tasks.layout import Layout
from tasks.params import Params, load_params

KEY_VARIABLE = "TANUKI_SIGNING_KEY"

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
        corrupted: The M of them that were also shown corrupted, relative to data/raw.
        survived: Share of the corruptions under which the challenger is right on each of these, (M,).
    """

    paths: tuple[str, ...]
    truth: tuple[str, ...]
    probabilities: np.ndarray
    digest: str
    corrupted: tuple[str, ...]
    survived: np.ndarray


def judge(layout: Layout, *, promote: bool, key: Path | None = None) -> Verdict:
    """Registers the workspace's bundle, compares it with the champion and, if it passes, makes it champion.

    Judging the same bundle by the same test images against the same champion again changes nothing.

    Args:
        layout: The workspace, with every stage up to date.
        promote: False leaves the champion as it is; that the test images were looked at is recorded all the same.
        key: A private key that signs the version before it becomes champion; None for none.
    """
    registry = registry_of(layout)
    version = registry.register(layout.bundle_dir, lineage(layout), card=layout.model_card)
    champion = registry.champion()
    if champion is not None and champion.id == version.id:
        reason = f"Version {version.id} is champion already."
        return Verdict(version.id, version.id, version.id, "champion", (reason,), (), {})
    test = read_test_images(layout)
    decision = _decide(layout, registry, version, champion, test)
    compared_with = None if champion is None else champion.id
    if not _was_judged(registry, version, champion, test.digest, looks_too=not promote):
        if promote and decision.promotes and key is not None:
            registry.sign(version.id, key)
        _record(registry, version, compared_with, decision, test.digest, promote=promote)
    now = registry.champion()
    verdict = Verdict(
        version=version.id,
        compared_with=compared_with,
        champion=None if now is None else now.id,
        outcome=decision.outcome,
        reasons=decision.reasons if promote else (*decision.reasons, "Nothing was promoted, as asked."),
        warnings=decision.warnings,
        numbers=decision.numbers,
    )
    write_decision(layout, verdict, decision, test_digest=test.digest)
    return verdict


def is_judged(layout: Layout, *, promote: bool) -> bool:
    """Whether the workspace's bundle is champion, or was judged by today's test images against today's champion."""
    registry = registry_of(layout)
    try:
        digest = read_bundle(layout.bundle_dir).digest
        version = next((each for each in registry.versions() if each.digest == digest), None)
        champion = registry.champion()
        if version is None or champion is None:
            return False
        if version.id == champion.id:
            return True
        return _was_judged(registry, version, champion, read_test_images(layout).digest, looks_too=not promote)
    except (BundleError, FileNotFoundError):
        return False


def signing_key(named: Path | None) -> Path | None:
    """The private key that signs champions: the one named, or $TANUKI_SIGNING_KEY; None where there is neither.

    Raises:
        KeyFileError: If it cannot sign; better told before a retrain than after it.
    """
    told = os.environ.get(KEY_VARIABLE)
    key = named or (Path(told) if told else None)
    if key is not None:
        from deploy.signing import check_private_key  # an extra that only who names a key needs

        check_private_key(key)
    return key


def force(layout: Layout, version: int, *, reason: str, key: Path | None = None) -> str:
    """Makes a version champion whatever the gate said of it, signed first where a private key is given."""
    registry = registry_of(layout)
    before = registry.champion_id()
    signed = "" if key is None else f" It is signed by the key {registry.sign(version, key)} now."
    if before == version:
        return f"Version {registry.version(version).id} is champion already.{signed}"
    registry.promote(version, reason=reason, expected=before, forced=True)
    return f"Version {version} is champion now" + ("." if before is None else f", in place of version {before}.")


def roll_back(layout: Layout, *, reason: str, key: Path | None = None) -> str:
    """Makes the previous champion the champion again, signed first where a private key is given."""
    registry = registry_of(layout)
    before = registry.champion_id()
    now = registry.rollback(reason, private_key=key)
    return f"Version {now.id} is champion again, in place of version {before}."


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
    with pq.ParquetFile(layout.predictions) as file:  # read_table imports half of pyarrow more
        table = file.read()
    columns = {name: table.column(name).to_pylist() for name in ("path", "label", "probabilities")}
    with layout.robustness.open(encoding="utf-8", newline="") as text:
        rows = [row for row in csv.DictReader(text) if row["corruption"] != CLEAN]
    right: dict[str, list[bool]] = {row["path"]: [] for row in rows}
    for row in rows:
        right[row["path"]].append(row["predicted"] == row["label"])
    return TestImages(
        paths=tuple(columns["path"]),
        truth=tuple(columns["label"]),
        probabilities=np.asarray(columns["probabilities"], dtype=np.float32),
        digest=json.loads(layout.report("evaluate").read_text(encoding="utf-8"))["test_digest"],
        corrupted=tuple(right),
        survived=np.array([np.mean(each) for each in right.values()]),
    )


def _decide(
    layout: Layout, registry: Registry, version: Version, champion: Version | None, test: TestImages
) -> Decision:
    params = load_params(layout.params)
    challenger_bundle = registry.bundle(version.id)
    champion_bundle = None if champion is None else registry.bundle(champion.id)
    challenger, before = _scores(layout, challenger_bundle, champion_bundle, test)
    decision = decide(
        challenger,
        before,
        truth=test.truth,
        seed=params.seed,
        num_uses=registry.gate_uses(test.digest, besides=(version.id, None if champion is None else champion.id)),
        **{name: getattr(params.gate, name) for name in type(params.gate).model_fields},
    )
    told = {} if champion is None else registry.registered_lineage(champion.id)
    return replace(decision, warnings=(*decision.warnings, *_changes_since(told, params, test.digest)))


def _changes_since(told: Mapping[str, Any], params: Params, test_digest: str) -> Iterator[str]:
    """What makes today's comparison another one than the champion's own evaluation, from its lineage."""
    before = told.get("metrics", {}).get("evaluate", {}).get("test_digest", test_digest)
    if before != test_digest:
        yield "the test images are not those that the champion was first measured on; both answered today's"
    now = json.loads(params.model_dump_json())
    then = told.get("params", {})
    rules = {name: (then[name], now[name]) for name in ("seed", "index_images") if name in then}
    if changed := [name for name, (one, other) in rules.items() if one != other]:
        yield (
            f"{' and '.join(changed)} of params.yaml changed since the champion was trained, and with them the splits: "
            "it may have learnt some of today's test images, which flatters it. Add fresh test images."
        )


def _scores(
    layout: Layout, challenger: Bundle, champion: Bundle | None, test: TestImages
) -> tuple[Scores, Scores | None]:
    """Both models' answers on the test images, and their latencies measured in turns."""
    images = open_images(layout.raw)
    pictures = [images.file(path).read_bytes() for path in test.paths[:8]]
    survived = before_survived = None
    with Predictor(challenger) as now:
        if champion is None:
            (latency,) = measure_latency([now], pictures, runs=20)
            return Scores(challenger.labels, test.probabilities, latency.p50_s, challenger.size_bytes), None
        with Predictor(champion) as before:
            logger.info("the champion answers today's %d test images", len(test.paths))
            answers = before.score_files([images.file(path) for path in test.paths])
            if test.corrupted:
                survived, before_survived = test.survived, _survived(before, images, test)
            latencies = measure_latency([now, before], pictures, runs=20)
    return (
        Scores(challenger.labels, test.probabilities, latencies[0].p50_s, challenger.size_bytes, survived),
        Scores(champion.labels, answers.probabilities, latencies[1].p50_s, champion.size_bytes, before_survived),
    )


def _survived(predictor: Predictor, images: ImageStore, test: TestImages) -> NDArray[np.float64]:
    """Share of the corruptions under which each corrupted test image is answered right, (M,)."""
    answers = robust_answers(predictor, (images.file(path).read_bytes() for path in test.corrupted))
    truth = dict(zip(test.paths, test.truth, strict=True))
    labels = np.array([truth[path] for path in test.corrupted])
    names = np.array(predictor.labels)
    right = [names[columns] == labels for name, columns in answers.items() if name != CLEAN]
    survived: NDArray[np.float64] = np.mean(right, axis=0)
    return survived


def _was_judged(
    registry: Registry, version: Version, champion: Version | None, test_digest: str, *, looks_too: bool
) -> bool:
    compared_with = None if champion is None else champion.id
    decisions = [
        event.decision
        for event in registry.events()
        if event.version == version.id and event.decision and (looks_too or event.kind != "looked_at")
    ]
    return any(each["test_digest"] == test_digest and each["compared_with"] == compared_with for each in decisions)


def _record(
    registry: Registry,
    version: Version,
    compared_with: int | None,
    decision: Decision,
    test_digest: str,
    *,
    promote: bool,
) -> None:
    told = {**asdict(decision), "test_digest": test_digest, "compared_with": compared_with}
    if not promote:
        registry.note_look(version.id, f"would be: {decision.outcome}; {decision.reasons[0]}", decision=told)
    elif decision.promotes:
        registry.promote(version.id, reason=decision.reasons[0], expected=compared_with, decision=told)
    else:
        undecided = decision.outcome == "undecided"
        registry.refuse(version.id, decision.reasons[0], undecided=undecided, decision=told)
