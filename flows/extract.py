"""The flow `extract`: the frozen trunk on all images that are new, in parts, on this machine's GPUs or a Dask cluster.

Each part is a process of its own (`python -m tasks cache_features --part I/N`), which takes the images whose content
falls into it and adds them to the store; the stage cache_features finds them there afterwards. Nothing but a path and
two numbers goes to a worker, nothing comes back. A worker sees the workspace under the same path, on a shared file
system. A part whose worker was lost is done again, and does only what it had not stored.
"""

import importlib.util
from pathlib import Path
from typing import Any

from prefect import Flow, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from flows.workspace import (
    StageError,
    WorkspaceError,
    exclusive,
    find_workspace,
    reproduce,
    run_part,
    track_raw,
)
from tasks.layout import Layout

HOUR_S = 3600.0
BEFORE = ("fetch_backbone", "index_images", "validate_data")


def was_lost(_task: Task[..., object], _run: TaskRun, state: State[object]) -> bool:
    """Whether a part ended for a reason of its machine's, not for one of the images or the backbone."""
    failure = state.result(raise_on_failure=False)
    return not isinstance(failure, StageError) or failure.exit_code < 0


@task(
    name="extract_part",
    task_run_name="part-{index}-of-{count}",
    retries=2,
    retry_condition_fn=was_lost,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def extract_part(root: str, index: int, count: int) -> None:
    """Extracts one part, on whatever machine this runs."""
    run_part(Layout(Path(root)), index, count, timeout_s=48 * HOUR_S)


@flow(name="extract", flow_run_name="extract", persist_result=False, validate_parameters=False)
def extract(root: Path | str = ".", parts: int = 1) -> None:
    """Fills the feature store for the images as they are, without training.

    Args:
        root: The workspace.
        parts: Into how many processes the work is split.

    Raises:
        StageError: If parts failed; what each of them said.
    """
    layout = find_workspace(Path(root))
    with exclusive(layout, "extract"):
        track_raw(layout)
        for stage in BEFORE:
            reproduce(layout, stage, timeout_s=12 * HOUR_S)
        futures = [extract_part.submit(str(layout.root), index, parts) for index in range(1, parts + 1)]
        for future in futures:
            future.wait()
        failures = [future.result(raise_on_failure=False) for future in futures]
        said = [str(failure) for failure in failures if isinstance(failure, BaseException)]
        if said:
            raise StageError("\n".join(dict.fromkeys(said)), 1)


def on_dask(address: str) -> Flow[..., Any]:
    """The same flow with its parts on the workers of a Dask cluster that is there already.

    Raises:
        WorkspaceError: If the extra `scale` is not installed.
    """
    if importlib.util.find_spec("prefect_dask") is None:
        raise WorkspaceError(
            "Dask is not installed. Install the extra (`pip install 'tanuki[scale]'`), here and on the workers."
        )
    from prefect_dask import DaskTaskRunner

    return extract.with_options(task_runner=DaskTaskRunner(address=address))
