"""`tanuki compare`: experiments in a clone, so that the workspace stays as it is, whenever the run is killed."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from flows.compare import WAYS, chosen_ways, close_sandbox, open_sandbox, scratch_seconds
from flows.workspace import git
from tasks.layout import Layout
from tasks.params import Params
from tests.conftest import Workspace, wait_for


def tracked(workspace: Workspace) -> dict[str, bytes | None]:
    """All files that git knows or sees, and their bytes."""
    names = workspace.run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").stdout.split("\0")
    paths = {name: workspace.root / name for name in names if name}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


@pytest.mark.slow
def test_the_sandbox_holds_the_workspace_as_it_is_and_leaves_it_alone(workspace: Workspace) -> None:
    layout = Layout(workspace.root)
    workspace.set_param("seed", 7)
    (workspace.root / "tasks" / "more.py").write_text("MORE = 1\n")
    workspace.run("git", "add", "tasks/more.py")
    (workspace.root / "LICENSE").unlink()
    before, status = tracked(workspace), workspace.run("git", "status", "--porcelain").stdout
    for _ in range(2):  # as the first time, and over what a killed run left
        sandbox = open_sandbox(layout, git(layout, "rev-parse", "HEAD"))
        assert "seed: 7" in sandbox.params.read_text()
        assert (sandbox.root / "tasks" / "more.py").is_file()
        assert not (sandbox.root / "LICENSE").exists()
        (sandbox.root / "params.yaml").write_text("half written")
        (sandbox.root / ".git" / "index").write_bytes(b"torn")
    assert tracked(workspace) == before
    assert workspace.run("git", "status", "--porcelain").stdout == status
    close_sandbox(layout)
    assert not layout.compare_sandbox.exists()


def test_random_weights_get_as_long_as_the_slowest_other_way_but_attacks(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    assert scratch_seconds(layout) == 10  # alone
    for name, seconds in (("probe", 1.0), ("full", 30.4), ("adversarial", 500.0)):
        (layout.compare_dir / name).mkdir(parents=True)
        for stage in ("train_head", "finetune"):
            (layout.compare_dir / name / f"{stage}_times.json").write_text(json.dumps({"seconds": seconds / 2}))
    assert scratch_seconds(layout) == 30


def test_feature_extraction_is_always_among_the_ways() -> None:
    assert [way.name for way in chosen_ways(("top", "as_is"))] == ["as_is", "probe", "top"]
    assert [way.name for way in chosen_ways(("probe",))] == ["probe"]
    assert chosen_ways(()) == list(WAYS)


def test_every_way_can_be_gone_where_training_has_several_processes(repository: Path) -> None:
    yaml = YAML(typ="safe")
    for way in WAYS:
        values = yaml.load(repository / "params.yaml")
        values["finetune"]["num_processes"] = 2
        for key, text in way.changes.items():
            section, name = key.split(".")
            values[section][name] = yaml.load(text)
        Params.model_validate(values)


@pytest.mark.slow
def test_ways_are_compared_listed_and_a_kill_leaves_the_workspace_as_it_was(
    tmp_path: Path, prefect_home: Path, retrained: Path
) -> None:
    workspace = Workspace(tmp_path / "workspace", prefect_home)
    shutil.copytree(retrained, workspace.root, symlinks=True)
    process = workspace.start(sys.executable, "-m", "flows.cli", "compare", "as_is", "top")
    wait_for("[as_is]", process)
    before = tracked(workspace)
    wait_for("finetune starts", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert tracked(workspace) == before
    assert json.loads(workspace.tanuki("status", "--json").stdout)["busy"] is None
    report = json.loads(workspace.tanuki("compare", "as_is", "top", "--json").stdout)
    assert tracked(workspace) == before
    as_is, probe, top = report["outcomes"]
    assert (probe["name"], probe["difference"]) == ("probe", 0)
    assert as_is["trained_parameters"] == 0
    assert as_is["accuracy"] > 0.5
    assert top["accuracy_low"] < top["accuracy"] <= top["accuracy_high"]
    for way in (as_is, probe, top):
        assert way["robust_accuracy_low"] <= way["robust_accuracy"] < way["accuracy"]
    assert as_is["robust_accuracy"] != probe["robust_accuracy"], "each its own"
    listed = workspace.dvc("exp", "list", "--name-only").stdout.split()
    assert set(listed) == {"compare-as_is", "compare-probe", "compare-top"}
    assert not (workspace.root / ".dvc" / "tmp" / "tanuki-compare").exists()
