"""Leases: numbers grow, one run at a time is at the gate, and a run whose turn has passed is sent away."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.lease import SupersededError, take_lease
from tasks.layout import Layout


def test_a_run_that_wakes_up_late_changes_nothing(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    asleep, later = take_lease(layout), take_lease(layout)
    with later.at_the_gate():
        pass
    with (
        pytest.raises(SupersededError, match=r"lease 1, and the run with lease 2(?s:.*)not judged"),
        asleep.at_the_gate(),
    ):
        pytest.fail("it was let in")
    with later.at_the_gate():  # the same run twice is no intruder
        pass


@given(order=st.permutations(range(5)))
def test_those_admitted_came_in_the_order_of_their_leases(
    tmp_path_factory: pytest.TempPathFactory, order: list[int]
) -> None:
    layout = Layout(tmp_path_factory.mktemp("fence"))
    leases = [take_lease(layout) for _ in order]
    admitted = []
    for index in order:
        try:
            with leases[index].at_the_gate():
                admitted.append(index)
        except SupersededError:
            pass
    assert admitted == sorted(admitted)
    assert admitted[-1] == max(order)


def test_nobody_gets_a_number_twice(tmp_path: Path) -> None:
    numbers: list[int] = []
    threads = [threading.Thread(target=lambda: numbers.append(take_lease(Layout(tmp_path)).number)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 9))


AT_THE_GATE = """
import sys
from pathlib import Path
from flows.lease import take_lease
from tasks.layout import Layout
with take_lease(Layout(Path(sys.argv[1]))).at_the_gate():
    print("in", flush=True)
    sys.stdin.read()
"""


def test_a_run_killed_at_the_gate_bars_nobody_later(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, "-c", AT_THE_GATE, str(tmp_path)]
    killed = subprocess.Popen(command, cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert killed.stdout is not None
    assert killed.stdin is not None
    assert killed.stdout.readline() == b"in\n"
    killed.kill()
    killed.wait()
    killed.stdin.close()
    killed.stdout.close()
    with take_lease(Layout(tmp_path)).at_the_gate():
        pass
