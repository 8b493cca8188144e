"""The main job, for real: a workspace in git and DVC, Prefect's own server, torch, onnxruntime; 400 handwritten digits.

One workspace (`lived_in` of tests/conftest.py) lives through these tests in order, as a user's would: first retrain,
nothing changed, a changed number, more images and a kill.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.awkward import LABELS, awkward_files
from tests.conftest import IMAGES_PER_CLASS, Workspace, locked_outputs, wait_for, write_digits

MORE_IMAGES = 4


def report(workspace: Workspace, stage: str) -> dict[str, object]:
    return json.loads((workspace.root / "data" / "reports" / f"{stage}.json").read_text())


def test_the_first_retrain_ends_with_a_champion(lived_in: Workspace, first_retrain: dict) -> None:
    assert first_retrain["decision"]["outcome"] == "first"
    assert first_retrain["champion"]["id"] == 1
    assert [stage["outcome"] for stage in first_retrain["stages"]] == ["ran"] * 8
    assert first_retrain["accuracy"]["bundle"]["accuracy"] > 0.7
    versions = json.loads(lived_in.tanuki("versions", "--json").stdout)
    assert [(version["id"], version["champion"]) for version in versions] == [(1, True)]


def test_the_champion_answers(lived_in: Workspace, first_retrain: dict) -> None:
    picture = lived_in.root / "data" / "raw" / "no" / "digit-0000.png"
    (answer,) = json.loads(lived_in.tanuki("predict", picture, "--json").stdout)
    assert answer["top"][0][0] == "no"
    assert "torch" not in imported_by_predict(lived_in, picture)


def imported_by_predict(workspace: Workspace, picture: Path) -> set[str]:
    code = (
        "import sys; sys.argv = ['tanuki', 'predict', sys.argv[1]]\n"
        "from flows.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    return set(workspace.run(sys.executable, "-c", code, picture).stdout.splitlines()[-1].split())


def test_a_second_retrain_finds_nothing_changed_within_20_seconds(lived_in: Workspace, first_retrain: dict) -> None:
    start = time.monotonic()
    told = lived_in.tanuki("retrain").stdout
    assert "Nothing changed" in told
    assert time.monotonic() - start < 20


def test_lineage_names_commit_data_params_metrics_and_decision(lived_in: Workspace, first_retrain: dict) -> None:
    lineage = json.loads(lived_in.tanuki("lineage", "1").stdout)
    assert lineage["git_commit"] == lived_in.run("git", "rev-parse", "HEAD").stdout.strip()
    assert lineage["data_version"].endswith(".dir")
    assert lineage["params"]["seed"] == 0
    assert lineage["metrics"]["evaluate"] == report(lived_in, "evaluate")
    assert lineage["dvc_outputs"] == locked_outputs(lived_in.root / "dvc.lock")
    assert lineage["decision"]["outcome"] == "first"


def test_dvcs_own_commands_work_on_it(lived_in: Workspace, first_retrain: dict) -> None:
    lived_in.run("git", "add", "--all")
    lived_in.run("git", "commit", "--quiet", "--message", "First model")
    assert "accuracy" in lived_in.dvc("metrics", "show").stdout
    drawn = lived_in.dvc("dag", "--mermaid").stdout
    assert all(stage["stage"] in drawn for stage in first_retrain["stages"])
    lived_in.dvc("plots", "show", "--out", "plots")
    assert "vega" in (lived_in.root / "plots" / "index.html").read_text()
    lived_in.set_param("seed", 1)
    assert "seed" in lived_in.dvc("params", "diff").stdout
    lived_in.set_param("seed", 0)


def test_a_changed_fine_tuning_number_runs_from_finetune_on(lived_in: Workspace, first_retrain: dict) -> None:
    lived_in.set_param("finetune.clip_norm", 0.5)
    told = json.loads(lived_in.tanuki("status", "--json").stdout)
    assert list(told["would_run"]) == ["finetune", "export_onnx", "evaluate"]
    lived_in.set_param("finetune.clip_norm", 1.0)
    assert json.loads(lived_in.tanuki("status", "--json").stdout)["would_run"] == {}


@pytest.mark.parametrize("share", [0.0, 0.3, 0.62, 0.9])
def test_a_dvc_lock_that_a_kill_left_half_written_is_put_back(
    lived_in: Workspace, first_retrain: dict, share: float
) -> None:
    lock = lived_in.root / "dvc.lock"
    whole = lock.read_bytes()
    lock.write_bytes(whole[: int(share * len(whole)) + 3])
    status = json.loads(lived_in.tanuki("status", "--json").stdout)
    assert status["would_run"] == {}
    assert lock.read_bytes() == whole


def test_an_experiment_changes_the_metrics_it_should(lived_in: Workspace, first_retrain: dict) -> None:
    before = report(lived_in, "train_head")
    lived_in.dvc("exp", "run", "--set-param", "train_head.num_c=2", "--name", "two-strengths")
    assert report(lived_in, "train_head") != before
    assert "train_head" in lived_in.dvc("metrics", "diff").stdout
    lived_in.run("git", "checkout", "--quiet", "--", "params.yaml", "dvc.lock")
    lived_in.dvc("checkout")
    assert report(lived_in, "train_head") == before


def fine_tuning(workspace: Workspace) -> subprocess.Popen[str]:
    """A retrain that has come to fine-tuning: the stage itself runs."""
    process = workspace.start(sys.executable, "-m", "flows.cli", "retrain")
    wait_for("finetune starts", process)
    return process


@pytest.mark.parametrize(
    ("reaches_all", "shell"),
    [(True, "/bin/bash"), (False, "/bin/bash"), (False, "/bin/sh")],
    ids=["all", "the-stage-alone", "the-stage-and-a-shell-that-stays"],
)
def test_ctrl_c_ends_a_retrain_within_seconds_and_says_so(
    lived_in: Workspace, first_retrain: dict, monkeypatch: pytest.MonkeyPatch, reaches_all: bool, shell: str
) -> None:
    monkeypatch.setenv("SHELL", shell)  # DVC's; Debian's sh waits for the stage and dies of the signal itself
    lived_in.set_param("finetune.clip_norm", 0.8)
    process = fine_tuning(lived_in)
    start = time.monotonic()
    if reaches_all:
        os.killpg(process.pid, signal.SIGINT)
    else:
        for each in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(each.pid) == process.pid:
                    each.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert time.monotonic() - start < 60
    assert "Interrupted. Nothing was lost" in told
    assert "Traceback" not in told
    lived_in.set_param("finetune.clip_norm", 1.0)


def test_a_stage_that_is_killed_is_told_of_as_such(lived_in: Workspace, first_retrain: dict) -> None:
    lived_in.set_param("finetune.clip_norm", 0.8)
    process = fine_tuning(lived_in)
    for each in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.cmdline()[-2:] == ["tasks", "finetune"]:
                each.kill()
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 1, told
    assert "finetune was killed. Where nobody did that, memory ran out" in told
    assert "Traceback" not in told
    lived_in.set_param("finetune.clip_norm", 1.0)


def test_a_second_retrain_while_one_runs_is_told_so_and_a_killed_one_leaves_the_champion(
    lived_in: Workspace, first_retrain: dict, tmp_path: Path
) -> None:
    number = write_digits(tmp_path / "more", IMAGES_PER_CLASS, IMAGES_PER_CLASS + MORE_IMAGES, names=LABELS)
    added = json.loads(lived_in.tanuki("add", tmp_path / "more", "--json").stdout)
    assert added["added"] == number
    first = fine_tuning(lived_in)
    os.killpg(first.pid, signal.SIGSTOP)  # in the middle of it, however long what follows takes
    second = lived_in.tanuki("retrain", check=False)
    assert "`tanuki retrain` (process " in lived_in.tanuki("status").stdout
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert second.returncode == 1
    assert "is busy" in second.stderr
    assert "Traceback" not in second.stderr
    assert json.loads(lived_in.tanuki("status", "--json").stdout)["champion"]["id"] == 1


def test_more_images_cost_only_themselves_and_the_kill_only_the_stage_that_ran(
    lived_in: Workspace, first_retrain: dict
) -> None:
    summary = json.loads(lived_in.tanuki("retrain", "--json").stdout)
    number = 10 * MORE_IMAGES
    unreadable = len(awkward_files()[1])  # those are looked at again each time
    assert report(lived_in, "index_images")["decoded"] == number + unreadable
    features = report(lived_in, "cache_features")
    assert 0 < features["extracted"] <= number * len(features["views"])
    outcomes = {stage["stage"]: stage["outcome"] for stage in summary["stages"]}
    assert list(outcomes.values()) == ["up to date"] * 5 + ["ran"] * 3  # from finetune on
    assert summary["decision"]["outcome"] in ("promote", "refuse", "undecided")
    assert len(json.loads(lived_in.tanuki("versions", "--json").stdout)) == 2


def test_a_forced_promotion_and_a_rollback_are_told_in_the_history(lived_in: Workspace, first_retrain: dict) -> None:
    lived_in.tanuki("promote", "2", "--reason", "asked for by the shop floor", check=False)
    lived_in.tanuki("rollback", "--reason", "it was slower")
    champion = [row["id"] for row in json.loads(lived_in.tanuki("versions", "--json").stdout) if row["champion"]]
    assert champion == [1]
    assert "it was slower" in (lived_in.root / "data" / "registry" / "events.jsonl").read_text()
