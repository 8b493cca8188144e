"""Signals: told once however they flap; what the images and params.yaml give as their levels."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.signals import Signal, new_backbone, new_data, watch
from tasks.layout import Layout
from tests.conftest import Workspace, write_digits


def told(layout: Layout, levels: list[float]) -> list[float]:
    """The levels at which a signal was told."""
    heard: list[float] = []
    for level in levels:
        watch(layout, Signal("drift", level, "drift"), tell=lambda signal: heard.append(signal.level))
    return heard


def test_a_level_that_flaps_around_the_mark_is_told_once(tmp_path: Path) -> None:
    assert told(Layout(tmp_path), [0.2, 1.1, 0.9, 1.0, 0.6, 1.2, 3.0]) == [1.1]


def test_it_is_told_again_after_it_has_been_low(tmp_path: Path) -> None:
    assert told(Layout(tmp_path), [1.0, 0.4, 0.9, 1.5, 0.0, 1.0]) == [1.0, 1.5, 1.0]


@given(levels=st.lists(st.floats(0.5, 2), max_size=8))
def test_without_a_low_level_nothing_is_told_twice(
    tmp_path_factory: pytest.TempPathFactory, levels: list[float]
) -> None:
    assert len(told(Layout(tmp_path_factory.mktemp("signals")), levels)) <= 1


def test_a_server_that_cannot_be_told_is_told_the_next_time(tmp_path: Path) -> None:
    def fails(_: Signal) -> None:
        raise OSError("no server")

    layout = Layout(tmp_path)
    with pytest.raises(OSError, match="no server"):
        watch(layout, Signal("drift", 1, "drift"), tell=fails)
    assert told(layout, [1.0]) == [1.0]


def test_images_that_no_retrain_has_seen_are_counted(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert new_data(layout, min_images=5, min_share=0.5).level == 0
    number = write_digits(layout.raw, 0, 1)
    signal = new_data(layout, min_images=5, min_share=100)
    assert (signal.level, signal.text[:13]) == (number / 5, "10 new images")
    assert new_data(layout, min_images=1000, min_share=0.5).level == number / 0.5


def test_another_backbone_in_params_is_told_of(lived_in: Workspace, first_retrain: dict) -> None:
    layout = Layout(lived_in.root)
    assert new_backbone(layout).level == 0
    assert new_data(layout, min_images=1, min_share=0.01).level == 0
    before = layout.params.read_text()
    lived_in.set_param("backbone.size_px", 32)
    signal = new_backbone(layout)
    layout.params.write_text(before)
    assert signal.level == 1
