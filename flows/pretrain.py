"""The flow `pretrain`: a backbone from a larger, related set, as tasks/pretrain.py makes it."""

import json
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.workspace import exclusive, find_workspace, run_recipe
from tasks.layout import Layout

WEEK_S = 7 * 24 * 3600.0


@flow(name="pretrain", flow_run_name="pretrain", persist_result=False, validate_parameters=False)
def pretrain(root: Path | str = ".") -> dict[str, Any]:
    """Trains a backbone as the section pretrain of params.yaml says; an interrupted run goes on where it was.

    Args:
        root: The workspace.

    Returns:
        The report: where the weights are, their digest, what they reached on the source task.
    """
    layout = find_workspace(Path(root))
    with exclusive(layout, "pretrain"):
        train_backbone(layout)
    report: dict[str, Any] = json.loads(layout.report("pretrain").read_text(encoding="utf-8"))
    return report


@task(name="pretrain", task_run_name="pretrain", cache_policy=NO_CACHE, persist_result=False)
def train_backbone(layout: Layout) -> None:
    """Runs the recipe in a process of its own: no torch in this one."""
    run_recipe(layout, "pretrain", timeout_s=WEEK_S)
