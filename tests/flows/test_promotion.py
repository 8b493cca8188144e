"""What becomes of a bundle: each outcome of the gate with its consequence, on real bundles that tell colours apart."""

import csv
import json
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from deploy.bundle import read_bundle
from deploy.errors import BundleError, KeyFileError, RegistryError
from deploy.files import sha256_bytes, write_json
from deploy.predictor import Predictor
from deploy.registry import Registry
from deploy.signing import generate_keys, require_signature
from flows import promotion, reports
from flows.cli import app
from tasks.evaluation.robustness import robust_answers
from tasks.layout import Layout
from tests.conftest import Workspace
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded, write_colour_bundle
from tests.tasks.test_evaluation import Page

GOOD, SHARPER, WRONG = 8.0, 9.0, -8.0
IMAGES_PER_CLASS = 60


@pytest.fixture
def layout(workspace: Workspace) -> Layout:
    """A workspace with test images of three colours."""
    layout = Layout(workspace.root)
    for label in LABELS:
        for index in range(IMAGES_PER_CLASS):
            path = layout.raw / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(colour_image(label, seed=index)))
    return layout


def evaluated(layout: Layout, sharpness: float, *, labels: tuple[str, ...] = LABELS, int8: float | None = None) -> None:
    """The workspace as `evaluate` leaves it for a bundle of that sharpness."""
    bundle = write_colour_bundle(layout.bundle_dir, sharpness=sharpness, labels=labels, int8=int8)
    paths = sorted(path.relative_to(layout.raw).as_posix() for path in layout.raw.rglob("*.png"))
    with Predictor(bundle) as predictor:
        probabilities = predictor.score_files([layout.raw / path for path in paths]).probabilities
    truth = [Path(path).parts[0] for path in paths]
    layout.predictions.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"path": paths, "label": truth, "probabilities": list(probabilities)}), layout.predictions)
    with Predictor(bundle) as predictor:
        spoiled = robust_answers(predictor, [(layout.raw / path).read_bytes() for path in paths[::20]])
    with layout.robustness.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "corruption", "label", "predicted"))
        for corruption, found in spoiled.items():
            writer.writerows(
                (path, corruption, Path(path).parts[0], bundle.labels[column])
                for path, column in zip(paths[::20], found, strict=True)
            )
    layout.model_card.write_text("# A model of colours")
    accuracy = float(
        np.mean([bundle.labels[row.argmax()] == label for row, label in zip(probabilities, truth, strict=True)])
    )
    write_json(layout.report("evaluate"), {"accuracy": accuracy, "test_digest": sha256_bytes("".join(paths).encode())})


def champion(layout: Layout) -> int | None:
    now = Registry(layout.registry_dir).champion()
    return None if now is None else now.id


def test_the_first_model_is_promoted(layout: Layout) -> None:
    evaluated(layout, GOOD)
    assert not promotion.is_judged(layout, promote=True)
    verdict = promotion.judge(layout, promote=True)
    assert (verdict.outcome, verdict.version, verdict.compared_with, verdict.champion) == ("first", 1, None, 1)
    assert promotion.is_judged(layout, promote=True)


def test_a_better_model_takes_over_and_a_worse_one_changes_nothing(layout: Layout) -> None:
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True)
    evaluated(layout, GOOD)
    better = promotion.judge(layout, promote=True)
    assert (better.outcome, better.champion) == ("promote", 2)
    served = {
        path: path.read_bytes()
        for path in Registry(layout.registry_dir).version(2).directory.rglob("*")
        if path.is_file()
    }
    evaluated(layout, WRONG)
    worse = promotion.judge(layout, promote=True)
    assert (worse.version, worse.outcome, worse.champion) == (1, "refuse", 2)
    assert all(path.read_bytes() == data for path, data in served.items())


def test_a_tie_changes_nothing(layout: Layout) -> None:
    evaluated(layout, GOOD)
    promotion.judge(layout, promote=True)
    evaluated(layout, SHARPER)
    tie = promotion.judge(layout, promote=True)
    assert (tie.outcome, tie.version, tie.champion) == ("refuse", 2, 1)
    assert "nothing" in " ".join(tie.reasons).lower()


def test_judging_the_same_again_changes_nothing(layout: Layout) -> None:
    evaluated(layout, GOOD)
    promotion.judge(layout, promote=True)
    evaluated(layout, WRONG)
    first = promotion.judge(layout, promote=True)
    events = len(Registry(layout.registry_dir).events())
    assert promotion.judge(layout, promote=True).outcome == first.outcome
    assert len(Registry(layout.registry_dir).events()) == events


def test_without_promotion_the_decision_has_no_consequence(layout: Layout) -> None:
    evaluated(layout, GOOD)
    verdict = promotion.judge(layout, promote=False)
    assert (verdict.outcome, verdict.champion) == ("first", None)
    assert champion(layout) is None


def test_a_look_without_promotion_counts_as_a_use_of_the_test_images_once(layout: Layout) -> None:
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True)
    evaluated(layout, GOOD)
    assert not promotion.is_judged(layout, promote=False)
    looked = promotion.judge(layout, promote=False)
    assert (looked.outcome, looked.champion, looked.numbers["num_uses"]) == ("promote", 1, 1)
    assert promotion.is_judged(layout, promote=False)
    assert not promotion.is_judged(layout, promote=True)
    promotion.judge(layout, promote=False)
    registry = Registry(layout.registry_dir)
    digest = promotion.read_test_images(layout).digest
    assert [event.kind for event in registry.events() if event.version == 2] == ["registered", "looked_at"]
    assert registry.events()[-1].reason.startswith("would be: promote; better: ")
    assert registry.gate_uses(digest) == 2
    evaluated(layout, SHARPER)
    assert promotion.judge(layout, promote=False).numbers["num_uses"] == 2
    evaluated(layout, GOOD)
    verdict = promotion.judge(layout, promote=True)
    assert (verdict.champion, verdict.numbers["num_uses"]) == (2, 2)
    assert registry.gate_uses(digest) == 3  # the verdict and the look before it asked the same


def test_what_the_gate_promotes_is_signed_before_it_is_champion_where_a_key_is_given(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = generate_keys(tmp_path / "release.key")
    monkeypatch.setenv("TANUKI_SIGNING_KEY", str(tmp_path / "release.key"))
    evaluated(layout, GOOD)
    promotion.judge(layout, promote=True, key=promotion.signing_key(None))
    registry = Registry(layout.registry_dir)
    assert require_signature(registry.bundle(1), public)
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True, key=promotion.signing_key(None))
    with pytest.raises(BundleError, match="is not signed"):
        require_signature(registry.bundle(2), public)  # refused, so nobody vouches for it
    promotion.force(layout, 2, reason="a demonstration", key=promotion.signing_key(None))
    assert require_signature(registry.bundle(2), public)
    newer = generate_keys(tmp_path / "newer.key")  # version 1 was signed, but not by the key that is required by now
    promotion.roll_back(layout, reason="it was wrong", key=tmp_path / "newer.key")
    assert require_signature(registry.bundle(1), newer)
    monkeypatch.setenv("TANUKI_SIGNING_KEY", str(public))
    with pytest.raises(KeyFileError, match="cannot be read as a private key"):
        promotion.signing_key(None)


def test_a_registry_behind_a_url_is_used_by_setting(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TANUKI_REGISTRY", f"memory://{tmp_path.name}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True)
    evaluated(layout, GOOD)
    assert promotion.judge(layout, promote=True).champion == 2
    assert promotion.roll_back(layout, reason="bad").startswith("Version 1 is champion again")
    assert [row["decision"] for row in reports.version_rows(layout)] == ["rolled_back", "promoted"]
    assert reports.version_lineage(layout, 2)["decision"]["outcome"] == "promote"
    assert not layout.registry_dir.exists()


def test_a_forced_promotion_is_audited_and_a_rollback_undoes_it(layout: Layout) -> None:
    evaluated(layout, GOOD)
    promotion.judge(layout, promote=True)
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True)
    promotion.force(layout, 2, reason="a demonstration")
    assert champion(layout) == 2
    assert promotion.is_judged(layout, promote=True)
    promotion.roll_back(layout, reason="it was wrong")
    assert champion(layout) == 1
    told = reports.version_lineage(layout, 2)
    assert [event["reason"] for event in told["events"] if event["kind"] == "forced"] == ["a demonstration"]
    assert told["decision"]["outcome"] == "refuse"


def test_the_decision_is_told_as_json_and_as_a_page(layout: Layout) -> None:
    evaluated(layout, GOOD)
    promotion.judge(layout, promote=True)
    assert "promoted: the first model" in layout.decision_page.read_text(encoding="utf-8")
    evaluated(layout, WRONG)
    verdict = promotion.judge(layout, promote=True)
    told = json.loads(layout.decision.read_text(encoding="utf-8"))
    assert (told["outcome"], told["version"], told["champion"]) == ("refuse", 2, 1)
    assert told["reasons"] == list(verdict.reasons)
    assert told["numbers"]["num_uses"] == 1
    assert told["numbers"]["champion_robust_accuracy"] > told["numbers"]["robust_accuracy"]
    assert any(reason.startswith("less robust") for reason in verdict.reasons)
    text = layout.decision_page.read_text(encoding="utf-8")
    assert Page(text).addresses == []
    assert ">refused<" in text
    assert "These test images have been used for\n1 verdict before" in text
    assert "grün" in text


def test_a_changed_test_set_and_changed_splits_are_told(layout: Layout) -> None:
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True)
    (layout.raw / LABELS[0] / "0.png").unlink()
    Workspace(layout.root, layout.root).set_param("seed", 7)
    evaluated(layout, GOOD)
    verdict = promotion.judge(layout, promote=True)
    assert verdict.outcome == "promote"
    assert [warning.split(";")[0] for warning in verdict.warnings] == [
        "the test images are not those that the champion was first measured on",
        "seed of params.yaml changed since the champion was trained, and with them the splits: it may have learnt some "
        "of today's test images, which flatters it. Add fresh test images.",
    ]


def test_a_new_class_is_judged_on_all_images_and_on_those_both_know_and_the_log_keeps_it(
    layout: Layout, tmp_path: Path
) -> None:
    shutil.move(layout.raw / LABELS[2], tmp_path / "later")
    evaluated(layout, GOOD / 2, labels=LABELS[:2])  # sharper, it would be surer of these two than one of three can be
    promotion.judge(layout, promote=True)
    shutil.move(tmp_path / "later", layout.raw / LABELS[2])
    evaluated(layout, GOOD)
    verdict = promotion.judge(layout, promote=True)
    assert (verdict.outcome, verdict.champion) == ("promote", 2)
    assert [verdict.numbers[name] for name in ("num_images", "num_shared_images", "wins", "losses")] == [
        180,
        120,
        60,
        0,
    ]
    told = (
        f"new classes: {LABELS[2]!r}; their 60 test images are misses of the champion, and the challenger is right on "
    )
    told += "60."
    assert told in verdict.warnings
    event = Registry(layout.registry_dir).events()[-1]
    assert event.decision is not None
    assert (event.kind, event.decision["numbers"]["shared_difference"]) == ("promoted", 0)
    assert told in event.decision["warnings"]
    assert "new classes: " in layout.decision_page.read_text(encoding="utf-8")


def test_what_answers_in_int8_comes_before_the_same_gate(layout: Layout) -> None:
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True)
    evaluated(layout, GOOD, int8=WRONG)
    spoiled = promotion.judge(layout, promote=True)
    assert (spoiled.outcome, spoiled.champion) == ("refuse", 1)  # good in fp32, which would not have answered
    evaluated(layout, GOOD, int8=SHARPER)
    assert promotion.judge(layout, promote=True).champion == 3
    bundle = Registry(layout.registry_dir).bundle(3)
    assert (bundle.precision, (bundle.directory / "back.onnx").is_file()) == ("int8", True)


def test_the_list_of_versions_tells_accuracy_and_what_was_said(layout: Layout) -> None:
    evaluated(layout, GOOD)
    promotion.judge(layout, promote=True)
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True)
    rows = reports.version_rows(layout)
    assert [(row["id"], row["champion"], row["accuracy"], row["decision"]) for row in rows] == [
        (1, True, 1.0, "promoted"),
        (2, False, 0.0, "refused"),
    ]


def test_who_was_champion_when_is_told(layout: Layout) -> None:
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True)
    evaluated(layout, GOOD)
    promotion.judge(layout, promote=True)
    first, second = (event for event in Registry(layout.registry_dir).events() if event.kind == "promoted")

    def versions(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["--root", str(layout.root), "versions", "--at", *arguments])

    told = json.loads(versions(first.time, "--json").stdout)
    assert (told["version"], told["since"], told["how"], told["warnings"]) == (1, first.time, "promoted", [])
    text = versions(datetime.fromisoformat(second.time).isoformat(" ")).stdout
    assert text.startswith("Version 2 was champion at ")
    assert "better: accuracy" in text
    assert "No version was champion" in versions("2001-02-03").stdout
    assert versions("yesterday").exit_code == 2


def test_a_lost_champion_stops_the_gate_and_a_forced_promotion_or_rollback_helps(layout: Layout) -> None:
    evaluated(layout, WRONG)
    promotion.judge(layout, promote=True)
    evaluated(layout, GOOD)
    promotion.judge(layout, promote=True)
    shutil.rmtree(layout.registry_dir / "versions" / "2")
    evaluated(layout, SHARPER)
    with pytest.raises(RegistryError, match=r"version 2 is the champion, but .* is gone.*tanuki rollback"):
        promotion.judge(layout, promote=True)
    assert [(row["id"], row["champion"]) for row in reports.version_rows(layout)] == [(1, False), (3, False)]
    assert promotion.force(layout, 3, reason="2 was lost") == "Version 3 is champion now, in place of version 2."
    assert promotion.judge(layout, promote=True).outcome == "champion"


def test_what_is_registered_stays_when_the_workspace_goes_on(layout: Layout) -> None:
    evaluated(layout, GOOD)
    promotion.judge(layout, promote=True)
    digest = read_bundle(layout.bundle_dir).digest
    evaluated(layout, WRONG)
    assert Registry(layout.registry_dir).bundle(1).digest == digest
    assert json.loads((layout.registry_dir / "champion.json").read_text())["version"] == 1
