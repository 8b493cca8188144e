"""The flow `compare`: every way to learn from the same images, as DVC experiments, and what this data set needs.

The experiments run in a clone of the workspace that shares its DVC cache: the workspace's files are never touched, and
a kill leaves nothing to mend. Their commits are fetched into the workspace's git, where `dvc exp show` lists them. What
they share (images, features) is brought up to date in the workspace first; what a way did before and nothing changed
for comes out of DVC's run cache. A run that was killed goes on from its last epoch.
"""

import json
import logging
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from deploy.files import write_json
from flows.workspace import (
    WorkspaceError,
    cache_dir,
    dvc,
    exclusive,
    find_workspace,
    git,
    reproduce,
    run_experiment,
    run_recipe,
    set_dvc_cache,
    track_raw,
)
from tasks.layout import Layout

HOUR_S = 3600.0
SHARED_STAGES = ("fetch_backbone", "index_images", "validate_data", "cache_features", "train_head")
MIN_SCRATCH_S = 10
REPORTS = ("train_head", "finetune", "evaluate", "withstand")
PREFIX = "compare-"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Way:
    """A way to learn.

    Args:
        name: One word; the experiment is ``compare-NAME``.
        title: For people.
        changes: What it sets in params.yaml.
    """

    name: str
    title: str
    changes: Mapping[str, str]


PROBE = {"train_head.method": "probe"}
TUNED = {**PROBE, "finetune.enabled": "true"}
ALONE = {**TUNED, "finetune.num_processes": "1"}  # stages that several processes cannot share
SCRATCH = Way("scratch", "from random weights", {**ALONE, "finetune.stages": "[scratch]"})
WAYS = (
    Way("as_is", "pretrained, as it is", {"train_head.method": "as_is", "finetune.enabled": "false"}),
    SCRATCH,
    Way("probe", "feature extraction", {**PROBE, "finetune.enabled": "false"}),
    Way("top", "top layers fine-tuned", {**TUNED, "finetune.stages": "[top]"}),
    Way("full", "fine-tuned", {**TUNED, "finetune.stages": "[top,rest]"}),
    Way("adversarial", "fine-tuned against attacks", {**ALONE, "finetune.stages": "[top,rest,adversarial]"}),
)


@flow(name="compare", flow_run_name="compare", persist_result=False, validate_parameters=False)
def compare(root: Path | str = ".", ways: tuple[str, ...] = ()) -> dict[str, Any]:
    """Runs the ways and draws them up.

    Args:
        root: The workspace.
        ways: Names of those to run beside the probe, see `chosen_ways`; all where there are none.

    Returns:
        The report of tasks/compare.py.
    """
    layout = find_workspace(Path(root))
    chosen = chosen_ways(ways)
    with exclusive(layout, "compare"):
        head = _committed_head(layout)
        track_raw(layout)
        for stage in SHARED_STAGES:
            reproduce(layout, stage, timeout_s=48 * HOUR_S)
        shutil.rmtree(layout.compare_dir, ignore_errors=True)
        sandbox = open_sandbox(layout, head)
        for way in sorted(chosen, key=lambda each: each is SCRATCH):  # scratch takes as long as the others took
            changes = {"finetune.scratch.seconds": str(scratch_seconds(layout))} if way is SCRATCH else {}
            run_way(layout, sandbox, head, way, changes)
        write_json(layout.compare_ways, [{**asdict(way), "changes": dict(way.changes)} for way in chosen])
        run_recipe(layout, "compare", timeout_s=HOUR_S)
        close_sandbox(layout)
    report: dict[str, Any] = json.loads(layout.report("compare").read_text(encoding="utf-8"))
    return report


def chosen_ways(names: Sequence[str]) -> list[Way]:
    """The ways of these names, all where there are none, and always feature extraction, beside which they are told."""
    return [way for way in WAYS if not names or way.name in ("probe", *names)]


@task(name="way", task_run_name="{way.name}", cache_policy=NO_CACHE, persist_result=False)
def run_way(layout: Layout, sandbox: Layout, head: str, way: Way, more: Mapping[str, str]) -> None:
    """Runs one experiment and keeps what came of it."""
    logger.info("[%s] %s", way.name, way.title)
    lay_over(layout, sandbox)  # the experiment before has changed params.yaml and dvc.lock
    run_experiment(sandbox, f"{PREFIX}{way.name}", {**way.changes, **more}, timeout_s=48 * HOUR_S)
    run_recipe(sandbox, "withstand", timeout_s=HOUR_S)
    ref = f"refs/exps/{head[:2]}/{head[2:]}/{PREFIX}{way.name}"
    git(layout, "fetch", "--quiet", "--no-tags", str(sandbox.root), f"+{ref}:{ref}")
    kept = layout.compare_dir / way.name
    shutil.copytree(sandbox.bundle_dir, kept / "bundle")
    shutil.copy(sandbox.predictions, kept)
    for stage in REPORTS:
        shutil.copy(sandbox.report(stage), kept)
    for stage in ("train_head", "finetune"):
        shutil.copy(sandbox.times(stage), kept)


def scratch_seconds(layout: Layout) -> int:
    """The longest that learning took in any other way but against attacks, so that random weights get as long."""
    tuned = (layout.compare_dir / way.name for way in WAYS if way.name not in (SCRATCH.name, "adversarial"))
    seconds = [
        sum(_seconds(folder / layout.times(stage).name) for stage in ("train_head", "finetune"))
        for folder in tuned
        if folder.is_dir()
    ]
    return max((MIN_SCRATCH_S, *map(round, seconds)))


def _seconds(path: Path) -> float:
    return float(json.loads(path.read_text(encoding="utf-8"))["seconds"])


def open_sandbox(layout: Layout, head: str) -> Layout:
    """A clone at the workspace's commit, with its DVC cache and what its pointers name.

    One that a kill left is used again, with new repositories: what an interrupted fine-tuning had reached is in there.
    """
    sandbox = Layout(layout.compare_sandbox)
    for repository in (".git", ".dvc"):
        shutil.rmtree(sandbox.root / repository, ignore_errors=True)
    sandbox.root.mkdir(parents=True, exist_ok=True)
    fresh = sandbox.root.with_name(f"{sandbox.root.name}.git")
    shutil.rmtree(fresh, ignore_errors=True)
    git(layout, "clone", "--quiet", "--shared", "--no-checkout", str(layout.root), str(fresh))
    (fresh / ".git").rename(sandbox.root / ".git")
    shutil.rmtree(fresh)
    git(sandbox, "checkout", "--quiet", "--force", "--detach", head)
    for key in ("user.name", "user.email"):
        git(sandbox, "config", key, _identity(layout, key))
    lay_over(layout, sandbox)
    local = layout.root / ".dvc" / "config.local"
    if local.is_file():
        shutil.copy(local, sandbox.root / ".dvc")
    set_dvc_cache(sandbox, cache_dir(layout))
    dvc(sandbox, "checkout", "--quiet", "--force", "--allow-missing")
    return sandbox


def lay_over(layout: Layout, sandbox: Layout) -> None:
    """Makes the sandbox's files that git knows those of the workspace as they are now, committed or not."""
    known = {name for name in git(layout, "ls-files", "-z").split("\0") if name and (layout.root / name).is_file()}
    there = {name for name in git(sandbox, "ls-files", "-z").split("\0") if name}
    for name in there - known:
        (sandbox.root / name).unlink(missing_ok=True)
    for name in sorted(known):
        source, target = layout.root / name, sandbox.root / name
        if not target.is_file() or source.read_bytes() != target.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    git(sandbox, "add", "--all")


def close_sandbox(layout: Layout) -> None:
    """Removes the sandbox; what DVC made read-only in it, too."""
    for folder, _, files in os.walk(layout.compare_sandbox):
        for name in files:
            path = Path(folder) / name
            if not path.is_symlink() and not path.stat().st_mode & stat.S_IWUSR and path.stat().st_nlink == 1:
                path.chmod(0o644)
    shutil.rmtree(layout.compare_sandbox, ignore_errors=True)


def _committed_head(layout: Layout) -> str:
    try:
        return git(layout, "rev-parse", "--verify", "HEAD")
    except WorkspaceError as error:
        raise WorkspaceError(
            "DVC keeps experiments under a git commit, and this repository has none. Run `git add -A` and "
            "`git commit -m Start`."
        ) from error


def _identity(layout: Layout, key: str) -> str:
    """Who commits, as the workspace's git has it; experiments are commits."""
    try:
        return git(layout, "config", key)
    except WorkspaceError:
        return "tanuki" if key == "user.name" else "tanuki@localhost"
