"""Benchmarks that are taken in pieces tell what they have, wherever they were stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROTOTYPES = {"way": "prototypes", "num_train": 70, "num_val": 10, "num_test": 20, "accuracy": 0.8, "nll": 0.6}
PROBE = {**PROTOTYPES, "way": "probe", "accuracy": 0.9}
SPEED = {"way": "speed", "accuracy": 0.7, "nll": 0.9, "cpu_s": 50.0}
TOP = {**PROTOTYPES, "way": "top", "kept": ["top"], "cpu_s": 10.0}
IMBALANCE = {"way": "imbalance", "balanced_0": 0.5, "balanced_1": 0.6, "class_ratio": 10.0}


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([PROTOTYPES], "| prototypes | 1 | 0.800 |  | 0.800 to 0.800 |  |"),
        ([PROBE, PROTOTYPES], "| prototypes | 1 | 0.800 |  | 0.800 to 0.800 | -10.0 |"),
        (
            [SPEED, TOP],
            "5.0 times less processor time than as tutorials write it (5.0 to 5.0, 1 seeds), for +10.0 points",
        ),
        ([IMBALANCE], "balanced accuracy 0.500, adjusted 0.600"),
    ],
    ids=["before the probe", "whole", "beside the tutorial", "of the probe nothing"],
)
def test_a_learning_benchmark_whose_minutes_are_over_prints_what_it_has(
    repository: Path, tmp_path: Path, found: list[dict[str, object]], told: str
) -> None:
    (tmp_path / "datasets" / "photos").mkdir(parents=True)
    results = tmp_path / "learning.jsonl"
    same = {"set": "photos", "architecture": "squeezenet1_1", "seed": 0, "seconds": 1.0}
    results.write_text("".join(f"{json.dumps({**same, **each})}\n" for each in found))
    command = [sys.executable, "-m", "benchmarks.learning", "photos", "squeezenet1_1", "--minutes", "0"]
    done = subprocess.run(
        [*command, "--results", str(results), "--workspace", str(tmp_path / "workspace")],
        cwd=repository,
        env={**os.environ, "TANUKI_MATERIAL": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("photos, squeezenet1_1, ")
    assert told in done.stdout
    assert ("70 train, 10 val, 20 test images (seed 0)" in done.stdout) is (found != [IMBALANCE])
