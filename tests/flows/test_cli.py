"""The command `tanuki` as a user meets it: real processes in a real clone, short of a whole retrain."""

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.registry import Registry
from tests.conftest import Workspace
from tests.deploy.tiny_bundle import write_colour_bundle


def paragraph(run: subprocess.CompletedProcess[str]) -> str:
    """What a user's mistake printed: exit code 1, one paragraph, no traceback."""
    assert run.returncode == 1, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert "\n\n" not in run.stderr.strip()
    return run.stderr


def test_outside_a_workspace_it_says_where_to_go(workspace: Workspace, tmp_path: Path) -> None:
    told = paragraph(workspace.tanuki("--root", tmp_path, "status", check=False))
    assert "no tanuki workspace" in told
    assert "--root" in told


def test_without_a_git_repository_it_says_how_to_make_one(workspace: Workspace) -> None:
    (workspace.root / ".git").rename(workspace.root / "not-git")
    assert "git init" in paragraph(workspace.tanuki("status", check=False))


def test_without_images_a_retrain_says_how_to_get_some(workspace: Workspace) -> None:
    told = paragraph(workspace.tanuki("retrain", check=False))
    assert "tanuki add" in told
    assert "tanuki sample" in told


def test_every_mistake_in_params_is_told_at_once(workspace: Workspace) -> None:
    workspace.set_param("finetune.layer_decay", 3)
    workspace.set_param("train_head.foldz", 5)
    workspace.set_param("gate.draws", "many")
    told = workspace.run(sys.executable, "-m", "tasks", "fetch_backbone", check=False)
    message = paragraph(told)
    assert "3 mistake(s)" in message
    assert all(key in message for key in ("finetune.layer_decay", "train_head.foldz", "gate.draws"))


def test_a_number_written_as_text_is_a_mistake(workspace: Workspace) -> None:
    workspace.set_param("features.recheck", "32")
    assert "features.recheck" in paragraph(workspace.run(sys.executable, "-m", "tasks", "fetch_backbone", check=False))


def test_wrong_usage_exits_with_2(workspace: Workspace) -> None:
    assert workspace.tanuki("promote", "1", check=False).returncode == 2
    assert workspace.tanuki("no-such-command", check=False).returncode == 2
    assert workspace.run(sys.executable, "-m", "tasks", "no_such_stage", check=False).returncode == 2


def test_without_a_champion_predict_says_how_to_get_one(workspace: Workspace, tmp_path: Path) -> None:
    assert "tanuki retrain" in paragraph(workspace.tanuki("predict", tmp_path / "x.jpg", check=False))


def test_a_version_that_is_not_there_is_named_with_those_that_are(workspace: Workspace) -> None:
    assert "no version 7" in paragraph(workspace.tanuki("lineage", "7", check=False))


def test_a_bundle_is_verified_by_its_folder_or_its_version_and_a_damaged_one_fails(workspace: Workspace) -> None:
    made = write_colour_bundle(workspace.root / "made")
    version = Registry(workspace.root / "data" / "registry").register(made.directory, {})
    for what in ("made", "1"):
        told = json.loads(workspace.tanuki("verify", what, "--json").stdout)
        assert told["digest"] == made.digest
        assert told["golden"]["num_pictures"] == 3
        assert told["golden"]["max_probability_difference"] < 1e-3
    assert "is whole" in workspace.tanuki("verify", "made").stdout
    back = version.directory / "back.onnx"
    back.chmod(0o644)
    back.write_bytes(back.read_bytes()[:-1] + b"x")
    assert "back.onnx was changed" in paragraph(workspace.tanuki("verify", "1", "--json", check=False))
    assert "is no bundle" in paragraph(workspace.tanuki("verify", "elsewhere", check=False))
    assert "no version 7" in paragraph(workspace.tanuki("verify", "7", check=False))


def test_a_version_is_signed_and_the_signature_can_be_required(workspace: Workspace) -> None:
    Registry(workspace.root / "data" / "registry").register(write_colour_bundle(workspace.root / "made").directory, {})
    key, public = workspace.root / "release.key", workspace.root / "release.key.pub"
    assert "release.key.pub verifies" in workspace.tanuki("keygen", "release.key").stdout
    assert "is not signed" in paragraph(workspace.tanuki("verify", "1", "--public-key", public, check=False))
    workspace.tanuki("sign", "1", "--key", key)
    told = json.loads(workspace.tanuki("verify", "1", "--public-key", public, "--json").stdout)
    assert told["signed_by"]
    write_colour_bundle(workspace.root / "data" / "bundle")
    assert "an output of DVC" in paragraph(workspace.tanuki("sign", "data/bundle", "--key", key, check=False))


def test_the_sample_is_laid_out_once_and_everything_would_run(workspace: Workspace) -> None:
    workspace.tanuki("sample")
    assert len(list((workspace.root / "data" / "raw").rglob("*.png"))) == 1797
    assert workspace.run("git", "status", "--porcelain").stdout.split() == ["A", "data/raw.dvc"]
    status = json.loads(workspace.tanuki("status", "--json").stdout)
    assert status["champion"] is None
    assert len(status["would_run"]) == 8
    assert "not empty" in paragraph(workspace.tanuki("sample", check=False))


def test_a_busy_workspace_names_who_holds_it(workspace: Workspace) -> None:
    lock = workspace.root / ".dvc" / "tmp" / "tanuki.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("`tanuki retrain` (process 1)")
        file.flush()
        assert "`tanuki retrain` (process 1)" in paragraph(workspace.tanuki("sample", check=False))
    workspace.tanuki("sample")


def test_the_doctor_finds_a_healthy_machine_healthy_and_a_missing_identity_worth_a_word(workspace: Workspace) -> None:
    findings = json.loads(workspace.tanuki("doctor", "--json").stdout)
    assert not [finding for finding in findings if finding["level"] == "problem"]
    assert {"Python", "packages", "git", "params.yaml", "disk", "processor"} <= {each["subject"] for each in findings}
    bare = {**workspace.environment, "HOME": str(workspace.root), "GIT_CONFIG_NOSYSTEM": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "flows.cli", "doctor"], cwd=workspace.root, env=bare, capture_output=True, text=True
    )
    assert "git config --global user.name" in run.stdout


def test_the_doctor_fails_where_params_are_broken(workspace: Workspace) -> None:
    workspace.set_param("gate.draws", 1)
    run = workspace.tanuki("doctor", check=False)
    assert run.returncode == 1
    assert "gate.draws" in run.stdout


def test_the_doctor_names_settings_of_dvc_that_cannot_be_read(workspace: Workspace) -> None:
    (workspace.root / ".dvc" / "config").write_text("[core\n")
    run = workspace.tanuki("doctor", "--json", check=False)
    found = {finding["subject"]: finding for finding in json.loads(run.stdout)}
    assert run.returncode == 1
    assert found["DVC remote"]["level"] == "problem"
    assert "cannot be read" in found["DVC remote"]["text"]


@pytest.mark.parametrize(
    "command",
    [
        "sample",
        "add",
        "ingest",
        "relabel",
        "remove",
        "retrain",
        "compare",
        "attack",
        "status",
        "predict",
        "versions",
        "promote",
        "rollback",
        "lineage",
        "verify",
        "keygen",
        "sign",
        "pretrain",
        "publish",
        "doctor",
    ],
)
def test_every_command_has_help(command: str) -> None:
    run = subprocess.run([sys.executable, "-m", "flows.cli", command, "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "Usage" in run.stdout


def test_a_full_disk_is_told_in_one_paragraph_and_a_second_try_succeeds(workspace: Workspace, digits: Path) -> None:
    """A limit on the size of files stands in for a full disk: the same OSError from the same write."""
    shutil.copytree(digits, workspace.root / "data" / "raw")
    limited = f"ulimit -f 8 && exec {sys.executable} -m tasks index_images"
    told = workspace.run("bash", "-c", limited, check=False)
    assert "index_images: " in paragraph(told)
    workspace.run(sys.executable, "-m", "tasks", "index_images")
    assert not list((workspace.root / "data" / "manifest").glob(".*.parquet"))
