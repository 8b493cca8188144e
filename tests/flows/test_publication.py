"""Publishing: bytes, then pointers, then names; found by GTO and DVC; nothing half-published, wherever it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.bundle import verify_bundle
from deploy.errors import RegistryError
from deploy.registry import Registry
from deploy.signing import generate_keys, require_signature
from flows.publication import Published, publish_champion
from flows.scheduled_retrain import scheduled_retrain
from flows.workspace import WorkspaceError, exclusive, find_workspace, lineage
from tasks.layout import Layout
from tests.conftest import Workspace, clone
from tests.deploy.tiny_bundle import write_colour_bundle
from tests.flows.test_cli import paragraph
from tests.flows.test_inbox import add_remote

PIPELINE = """
stages:
  export_onnx:
    cmd: python -c "import shutil; shutil.copytree('made', 'data/bundle')"
    deps: [made]
    outs: [data/bundle]
artifacts:
  tanuki: {path: data/bundle, type: model}
"""


@pytest.fixture(scope="module")
def published_from(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path) -> Path:
    """A workspace whose pipeline copies a bundle, with a champion; beside it its upstream."""
    folder = tmp_path_factory.mktemp("publication")
    workspace = clone(folder / "workspace", prefect_home)
    (workspace.root / "dvc.yaml").write_text(PIPELINE)
    (workspace.root / ".gitignore").write_text("/made\n", "utf-8")
    workspace.run("git", "add", "--all")
    workspace.run("git", "commit", "--quiet", "--message", "Pipeline")
    workspace.run("git", "init", "--quiet", "--bare", "--initial-branch", "main", "../upstream.git")
    workspace.run("git", "remote", "add", "origin", "../upstream.git")
    workspace.run("git", "push", "--quiet", "--set-upstream", "origin", "main")
    champion(workspace, find_workspace(workspace.root), 8.0)
    return folder


@pytest.fixture
def workspace(published_from: Path, tmp_path: Path, prefect_home: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of it that a test may do anything to."""
    shutil.copytree(published_from, tmp_path, dirs_exist_ok=True, symlinks=True)
    workspace = Workspace(tmp_path / "workspace", prefect_home)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(name, workspace.environment[name])
    add_remote(workspace, tmp_path / "storage")
    workspace.run("git", "push", "--quiet")
    return workspace


@pytest.fixture
def layout(workspace: Workspace) -> Layout:
    return find_workspace(workspace.root)


def champion(workspace: Workspace, layout: Layout, sharpness: float, *, tells: bool = False) -> None:
    """A new champion, as a retrain leaves it; its lineage is as empty as of old releases, unless it tells."""
    write_colour_bundle(layout.root / "made", sharpness=sharpness)
    workspace.dvc("repro", "--quiet")
    registry = Registry(layout.registry_dir)
    version = registry.register(layout.bundle_dir, lineage(layout) if tells else {})
    registry.promote(version.id, reason="better", expected=registry.champion_id())


@pytest.mark.slow
def test_a_run_by_the_clock_with_nothing_to_do_publishes_what_an_earlier_one_could_not(
    workspace: Workspace, layout: Layout, tmp_path: Path
) -> None:
    (layout.raw / "cat").mkdir(parents=True)
    (layout.raw / "cat" / "a.png").write_bytes(b"")  # there are images; nothing here looks at them
    (tmp_path / "storage").write_text("a file, so no folder of a remote")
    failed = scheduled_retrain.fn(str(layout.root), publish=True)
    assert (failed.name, "did not take the model" in str(failed.message)) == ("Failed", True)
    (tmp_path / "storage").unlink()
    first, second = (scheduled_retrain.fn(str(layout.root), publish=True) for _ in range(2))
    assert {first.name, second.name} == {"Nothing to do"}
    assert "Published version 1" in str(first.message)
    assert "Published" not in str(second.message)
    assert "tanuki@v1.0.0" in workspace.run("git", "ls-remote", "--tags", "origin").stdout


PUBLISH = """
import sys
from pathlib import Path
from flows.server import prefect_server
from tasks.layout import Layout
layout = Layout(Path(sys.argv[1]))
with prefect_server(layout):
    from flows.scheduled_retrain import _publish
    print("told:", _publish(layout))
"""


@pytest.mark.slow
def test_a_scheduled_retrain_says_what_is_not_published_because_the_workspace_went_on(
    workspace: Workspace, layout: Layout, tmp_path: Path
) -> None:
    """As an ingest during the run leaves it; the champion answers, so that the run has not failed."""
    (layout.root / "made" / "new.txt").write_text("came meanwhile")
    told = workspace.run(sys.executable, "-c", PUBLISH, layout.root).stdout
    assert "told:  Not published: images, code or params changed since" in told
    assert upstream_tags(workspace, tmp_path) == []
    (layout.root / "made" / "new.txt").unlink()
    assert workspace.run(sys.executable, "-c", PUBLISH, layout.root).stdout.endswith("told: \n")
    assert upstream_tags(workspace, tmp_path) == ["tanuki#prod#1", "tanuki@v1.0.0"]


@pytest.mark.slow
def test_a_champion_is_published_when_images_came_and_a_later_model_was_refused(
    workspace: Workspace, layout: Layout, tmp_path: Path
) -> None:
    upstream, fetched = tmp_path / "upstream.git", tmp_path / "fetched"
    storage = ("--remote-config", f"url={tmp_path / 'storage'}")
    workspace.run("git", "config", "user.name", "Only in this repository")
    workspace.dvc("remote", "modify", "storage", "url", "../storage")
    workspace.run("git", "commit", "--quiet", "--all", "--message", "A path")
    add_image(workspace, layout, "cat/a.png")
    champion(workspace, layout, 9.0, tells=True)
    digest = Registry(layout.registry_dir).version(2).digest
    add_image(workspace, layout, "cat/b.png")
    write_colour_bundle(layout.root / "made", sharpness=10.0)
    workspace.dvc("repro", "--quiet")
    before = [workspace.run("git", *command).stdout for command in (("status", "--porcelain"), ("rev-parse", "HEAD"))]
    published = publish_champion(layout)
    assert (published.version, published.tags) == (2, ("tanuki@v2.0.0", "tanuki#prod#1"))
    assert in_production(workspace, upstream) == "v2.0.0"
    workspace.dvc("artifacts", "get", upstream, "tanuki", "--stage", "prod", *storage, "--out", fetched / "bundle")
    assert verify_bundle(fetched / "bundle").digest == digest
    shutil.rmtree(layout.root / ".dvc" / "cache")  # what is fetched now comes out of the remote
    workspace.dvc("get", upstream, "data/raw", "--rev", "tanuki@v2.0.0", *storage, "--out", fetched / "raw")
    assert [file.name for file in (fetched / "raw" / "cat").iterdir()] == ["a.png"]
    after = [workspace.run("git", *command).stdout for command in (("status", "--porcelain"), ("rev-parse", "HEAD"))]
    assert after == before
    assert len(workspace.run("git", "worktree", "list").stdout.splitlines()) == 1
    assert publish_champion(layout) == Published(2, pushed_to="origin/main")


def add_image(workspace: Workspace, layout: Layout, name: str) -> None:
    (layout.raw / name).parent.mkdir(parents=True, exist_ok=True)
    (layout.raw / name).write_bytes(name.encode())  # nothing here looks at it
    workspace.dvc("add", "--quiet", "data/raw")


def upstream_tags(workspace: Workspace, tmp_path: Path) -> list[str]:
    return workspace.run("git", "--git-dir", tmp_path / "upstream.git", "tag", "--list").stdout.split()


def in_production(workspace: Workspace, repository: Path | str) -> str:
    """What GTO says is in production, read from a git repository."""
    told = workspace.run(
        Path(sys.executable).parent / "gto", "show", "tanuki#prod", "--repo", repository, "--json"
    ).stdout
    (found,) = json.loads(told)
    version: str = found["version"]
    return version


def test_what_is_published_is_found_by_gto_and_fetched_by_dvc(
    workspace: Workspace, layout: Layout, tmp_path: Path
) -> None:
    upstream = tmp_path / "upstream.git"
    (layout.root / "mine.txt").write_text("not to be published")
    workspace.run("git", "add", "mine.txt")
    public = generate_keys(tmp_path / "key")
    Registry(layout.registry_dir).sign(1, tmp_path / "key")
    with exclusive(layout, "retrain"):  # as the flow does
        first = publish_champion(layout)
    assert (first.version, first.remote, first.pushed_to) == (1, "storage", "origin/main")
    assert first.tags == ("tanuki@v1.0.0", "tanuki#prod#1")
    assert workspace.run("git", "show", "--name-only", "--format=", "HEAD").stdout.split() == [
        "data/bundle.sig",
        "dvc.lock",
    ]
    assert upstream_tags(workspace, tmp_path) == ["tanuki#prod#1", "tanuki@v1.0.0"]
    fetched = tmp_path / "fetched"
    workspace.dvc("artifacts", "get", upstream, "tanuki", "--stage", "prod", "--out", fetched)
    assert verify_bundle(fetched).digest == Registry(layout.registry_dir).version(1).digest
    workspace.dvc("get", upstream, "data/bundle.sig", "--rev", "tanuki#prod#1", "--out", fetched / "bundle.sig")
    assert require_signature(verify_bundle(fetched), public)
    assert publish_champion(layout) == Published(1, pushed_to="origin/main")
    assert in_production(workspace, upstream) == "v1.0.0"


@pytest.mark.slow
def test_each_change_of_champion_is_published(workspace: Workspace, layout: Layout, tmp_path: Path) -> None:
    upstream = tmp_path / "upstream.git"
    write_colour_bundle(layout.root / "made", sharpness=9.0)
    told = workspace.tanuki("publish", check=False)
    assert "export_onnx would run. Run `tanuki retrain`" in paragraph(told)
    write_colour_bundle(layout.root / "made", sharpness=8.0)
    assert "tagged tanuki@v1.0.0 and tanuki#prod#1, pushed to origin/main." in workspace.tanuki("publish").stderr
    champion(workspace, layout, 9.0)
    (workspace.root / "data" / "bundle.sig").write_text("of another version")
    workspace.run("git", "add", "data/bundle.sig")
    workspace.run("git", "commit", "--quiet", "--message", "Another signature")
    assert publish_champion(layout).tags == ("tanuki@v2.0.0", "tanuki#prod#2")
    assert in_production(workspace, upstream) == "v2.0.0"
    assert "data/bundle.sig" not in workspace.run("git", "ls-tree", "-r", "--name-only", "tanuki@v2.0.0").stdout
    told = workspace.tanuki("rollback", "--reason", "bad", "--publish")
    assert "Version 1 is champion again" in told.stdout
    assert "Published version 1: tagged tanuki#prod#3, pushed to origin/main." in told.stderr
    assert in_production(workspace, upstream) == "v1.0.0"


def test_what_cannot_be_told_truly_is_not_published(workspace: Workspace, layout: Layout, tmp_path: Path) -> None:
    before = workspace.run("git", "rev-parse", "HEAD").stdout
    (layout.root / "tasks" / "errors.py").write_text("edited")
    with pytest.raises(WorkspaceError, match=r"does not have yet:(?s:.*)tasks/errors\.py(?s:.*)Commit it"):
        publish_champion(layout)
    workspace.run("git", "checkout", "--quiet", "--", "tasks")
    workspace.run("git", "tag", "--annotate", "--message", "bundle of another", "tanuki@v1.0.0")
    with pytest.raises(WorkspaceError, match="Let one machine publish"):
        publish_champion(layout)
    workspace.run("git", "tag", "--delete", "tanuki@v1.0.0")
    write_colour_bundle(layout.bundle_dir, sharpness=9.0)
    assert "nothing to publish before the next promotion" in publish_champion(layout).text()
    assert workspace.run("git", "rev-parse", "HEAD").stdout == before
    assert upstream_tags(workspace, tmp_path) == []
    assert not (tmp_path / "storage").exists()


def test_without_a_remote_or_a_champion_it_says_what_to_do(workspace: Workspace, layout: Layout) -> None:
    (workspace.root / ".dvc" / "config").write_text("[core]\n    autostage = true\n")
    with pytest.raises(WorkspaceError, match="dvc remote add -d"):
        publish_champion(layout)
    shutil.rmtree(layout.registry_dir)
    with pytest.raises(RegistryError, match="no champion yet"):
        publish_champion(layout)


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from flows.publication import Published, publish_champion
from flows.workspace import exclusive, find_workspace
def hook(event, args):
    if event == "subprocess.Popen" and sys.argv[1] in " ".join(map(str, args[1])):
        os.kill(os.getpid(), signal.SIGKILL)
layout = find_workspace(Path.cwd())
sys.addaudithook(hook)
with exclusive(layout, "publish"):
    publish_champion(layout)
"""

# Git calls this where it holds its locks and nothing is done yet: that git and its tanuki die there.
KILLS_GIT = """#!/bin/sh
[ $1 != prepared ] || ! grep --quiet "$(cat .git/kill-at)" || kill -9 $PPID $(cut -d" " -f4 /proc/$PPID/stat)
"""


GIT = "git, at "  # as it writes that ref; else tanuki, before it runs that command
STEPS = (
    "push --quiet",
    "data status",
    "commit --quiet",
    f"{GIT}refs/heads/main",
    "tanuki@v1.0.0 HEAD",
    f"{GIT}refs/tags/tanuki@v1",
    "tanuki#prod#1",
    f"{GIT}refs/tags/tanuki#prod",
    "--atomic",
)


@pytest.mark.slow
def test_a_kill_at_each_step_leaves_nothing_half_published_and_the_next_run_goes_on(
    repository: Path, workspace: Workspace, layout: Layout, tmp_path: Path
) -> None:
    environment = {**workspace.environment, "PYTHONPATH": str(repository)}
    command = [sys.executable, "-c", KILLED_AT]
    hook = workspace.root / ".git" / "hooks" / "reference-transaction"
    for step in STEPS:
        if step.startswith(GIT):
            (workspace.root / ".git" / "kill-at").write_text(step.removeprefix(GIT))
            hook.write_text(KILLS_GIT)
            hook.chmod(0o755)
        killed = subprocess.run(
            [*command, step], cwd=workspace.root, env=environment, capture_output=True, text=True, check=False
        )
        hook.unlink(missing_ok=True)
        assert killed.returncode == -signal.SIGKILL, (step, killed.stderr)
        assert list((workspace.root / ".git").rglob("*.lock")) or not step.startswith(GIT)
        assert upstream_tags(workspace, tmp_path) == []
        told = workspace.run("git", "--git-dir", tmp_path / "upstream.git", "ls-tree", "--name-only", "main").stdout
        assert "dvc.lock" not in told.split()
    subprocess.run([*command, "never"], cwd=workspace.root, env=environment, check=True)
    assert upstream_tags(workspace, tmp_path) == ["tanuki#prod#1", "tanuki@v1.0.0"]
    assert workspace.run("git", "rev-list", "--count", "@{upstream}..HEAD").stdout == "0\n"
    assert workspace.run("git", "status", "--porcelain").stdout == ""
    shutil.rmtree(workspace.root / ".dvc" / "cache")
    shutil.rmtree(layout.bundle_dir)
    workspace.dvc("pull", "--quiet", os.fspath(Path("data") / "bundle"))
    assert verify_bundle(layout.bundle_dir).digest == Registry(layout.registry_dir).version(1).digest
