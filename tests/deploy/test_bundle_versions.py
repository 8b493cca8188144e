"""A bundle that was ever written is read for ever: those in old_bundles/ are what the code of their day wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from deploy.bundle import FORMAT_VERSION, READERS, verify_bundle
from deploy.predictor import Predictor
from deploy.registry import Registry
from tests.deploy.tiny_bundle import LABELS, colour_image, write_colour_bundle

OLD = sorted(path for path in (Path(__file__).parent / "old_bundles").iterdir() if path.is_dir())


def test_every_format_version_there_ever_was_has_a_reader_and_a_bundle_of_its_day() -> None:
    assert set(READERS) == {int(path.name.split("-")[0]) for path in OLD} == set(range(1, FORMAT_VERSION + 1))


@pytest.mark.parametrize("old", OLD, ids=lambda path: path.name)
def test_a_bundle_of_the_past_is_whole_answers_and_can_be_champion(tmp_path: Path, old: Path) -> None:
    version, _, precision = old.name.partition("-")
    bundle = verify_bundle(old)
    assert (bundle.format_version, bundle.labels) == (int(version), LABELS)
    assert bundle.precision == (precision or "fp32")
    golden = json.loads((old / "golden" / "golden.json").read_text())
    with Predictor(bundle) as predictor:
        answers = predictor.predict([colour_image(label) for label in LABELS])
        again = predictor.score_files([old / "golden" / each["file"] for each in golden])
    assert answers.probabilities.argmax(axis=1).tolist() == [0, 1, 2]
    np.testing.assert_allclose(again.probabilities, [each["probabilities"] for each in golden], atol=1e-4)
    registry = Registry(tmp_path / "registry")
    first = registry.register(shutil.copytree(old, tmp_path / "bundle"), {})
    registry.promote(first.id, reason="old", expected=None)
    new = registry.register(write_colour_bundle(tmp_path / "new", sharpness=9.0).directory, {})
    registry.promote(new.id, reason="new", expected=first.id)
    registry.rollback("the old one was better")
    assert registry.bundle(registry.require_champion().id).digest == bundle.digest


def test_todays_bundles_are_of_the_newest_version(tmp_path: Path) -> None:
    bundle = write_colour_bundle(tmp_path / "bundle")
    assert bundle.format_version == FORMAT_VERSION
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["format_version"] == FORMAT_VERSION
