"""The soak's own month, in short: its plan, and two nights of it, on the second of which much goes wrong."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.month import EVENTS, Pictures, planned


@pytest.mark.parametrize("seed", range(5))
def test_a_month_has_each_event_as_often_as_it_should_and_begins_quietly(seed: int) -> None:
    plan = planned(30, list(EVENTS), np.random.default_rng(seed))
    assert Counter(name for night in plan for name in night) == EVENTS
    assert max(map(len, plan)) == 1  # each on a night of its own
    assert plan[0] == frozenset()
    assert plan == planned(30, list(EVENTS), np.random.default_rng(seed))


def test_a_few_nights_have_every_event_and_none_beside_a_day_without_images() -> None:
    plan = planned(5, list(EVENTS), np.random.default_rng(0))
    assert {name for night in plan for name in night} == set(EVENTS)
    assert all(len(night) == 1 for night in plan if "none" in night)


def test_pictures_are_given_once_and_under_the_new_name_of_their_class() -> None:
    pictures = Pictures(np.random.default_rng(0))
    days = [pictures.day({"7": "seven"}) for _ in range(3)]
    given = [path.split("/")[1] for day in days for path in day]
    assert len(given) == len(set(given)) == pictures.num_given - 1000
    assert {path.split("/")[0] for day in days for path in day} <= {*"012345689", "seven"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount the disk that a soak lives on")
def test_two_nights_with_bad_images_a_lying_remote_and_a_kill_leave_all_in_order(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "--nights", "2", "--events", "bad", "lying", "killed"]
    soak = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert soak.returncode == 0, soak.stdout + soak.stderr
    assert "| 2 | bad, killed, lying |" in soak.stdout
    assert "Failed; Ingested" in soak.stdout  # the lie was noticed, and what the message says helped
