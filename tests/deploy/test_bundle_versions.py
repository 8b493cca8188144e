"""A bundle that was ever written is read for ever."""

import json
from pathlib import Path

import pytest

from deploy.bundle import FORMAT_VERSION, READERS, verify_bundle
from deploy.predictor import Predictor
from deploy.registry import Registry
from tests.deploy.old_bundles import WRITERS
from tests.deploy.tiny_bundle import LABELS, colour_image, write_colour_bundle


def test_every_past_format_version_has_a_reader_and_a_writer_of_its_day() -> None:
    assert set(READERS) == {*WRITERS, FORMAT_VERSION} == set(range(1, FORMAT_VERSION + 1))


@pytest.mark.parametrize("version", WRITERS)
def test_a_bundle_of_a_past_version_is_whole_answers_and_can_be_champion(tmp_path: Path, version: int) -> None:
    WRITERS[version](tmp_path / "bundle")
    bundle = verify_bundle(tmp_path / "bundle")
    assert (bundle.format_version, bundle.labels, bundle.precision) == (version, LABELS, "fp32")
    with Predictor(bundle) as predictor:
        answers = predictor.predict([colour_image(label) for label in LABELS])
    assert answers.probabilities.argmax(axis=1).tolist() == [0, 1, 2]
    registry = Registry(tmp_path / "registry")
    old = registry.register(tmp_path / "bundle", {})
    registry.promote(old.id, reason="old", expected=None)
    new = registry.register(write_colour_bundle(tmp_path / "new").directory, {})
    registry.promote(new.id, reason="new", expected=old.id)
    registry.rollback("the old one was better")
    assert registry.bundle(registry.require_champion().id).digest == bundle.digest


def test_todays_bundles_are_of_the_newest_version(tmp_path: Path) -> None:
    bundle = write_colour_bundle(tmp_path / "bundle")
    assert bundle.format_version == FORMAT_VERSION
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["format_version"] == FORMAT_VERSION
