"""Takes old flow runs of a workspace out of Prefect's databases, with their logs: behind `tanuki gc`.

There may be two: what `tanuki retrain` and the other commands talk to, and the box's own (`tanuki up`). Runs of other
workspaces and of other people's flows stay. A run says whose it is by its parameter ``root``, which for the runs of a
schedule is relative to the folder that its deployment changes into.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterEndTime
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from flows.server import prefect_server, server_on
from flows.up.status import is_up, read_facts
from tasks.layout import Layout

PAGE = 200  # what the server gives at once
DATABASE = "prefect.db"  # where a local server keeps what it knows
WORKING_DIRECTORY = "prefect.deployments.steps.set_working_directory"


@dataclass(frozen=True)
class HistorySweep:
    """What went out of Prefect's databases, or would.

    Args:
        runs: Flow runs.
        older_than_days: What ended later stayed.
    """

    runs: int
    older_than_days: int


def sweep_runs(layout: Layout, *, older_than_days: int, dry_run: bool) -> HistorySweep:
    """Removes the flow runs of this workspace that ended long ago, from every server that may know some.

    Args:
        layout: The workspace.
        older_than_days: Runs that ended later stay.
        dry_run: Only tell.

    Raises:
        WorkspaceError: If a temporary server does not start.
    """
    before = datetime.now(UTC) - timedelta(days=older_than_days)
    swept: set[UUID] = set()  # the box's server may be the configured one, too
    if PREFECT_API_URL.value() or (PREFECT_HOME.value() / DATABASE).is_file():
        with prefect_server(layout):
            swept |= _sweep(layout, before, dry_run=dry_run)
    with _box(layout) as url:
        if url is not None:
            with temporary_settings({PREFECT_API_URL: url}):
                swept |= _sweep(layout, before, dry_run=dry_run)
    return HistorySweep(len(swept), older_than_days)


@contextmanager
def _box(layout: Layout) -> Iterator[str | None]:
    """The address of the API of `tanuki up`, or of a server for the time of this block; None where there is neither."""
    facts = read_facts(layout) if is_up(layout) else None
    if facts is not None:
        yield facts["api"]
    elif (layout.prefect_home / DATABASE).is_file() and PREFECT_HOME.value().resolve() != layout.prefect_home.resolve():
        with server_on(layout, layout.prefect_home) as url:
            yield url
    else:
        yield None


def _sweep(layout: Layout, before: datetime, *, dry_run: bool) -> set[UUID]:
    """Which runs went from the server that is set."""
    with get_client(sync_client=True) as client:
        folders: dict[UUID | None, Path | None] = {None: None}
        ours = set()
        for run in _ended(client, before):
            if run.deployment_id not in folders:
                folders[run.deployment_id] = _folder(client, run.deployment_id)
            if _is_of(layout, run.parameters, folders[run.deployment_id]):
                ours.add(run.id)
        for id_ in () if dry_run else ours:
            client.delete_flow_run(id_)
    return ours


def _ended(client: SyncPrefectClient, before: datetime) -> list[FlowRun]:
    """All flow runs that ended before a time."""
    wanted = FlowRunFilter(end_time=FlowRunFilterEndTime.model_validate({"before_": before}))
    found: list[FlowRun] = []
    while page := client.read_flow_runs(
        flow_run_filter=wanted, sort=FlowRunSort.END_TIME_DESC, limit=PAGE, offset=len(found)
    ):
        found += page
    return found


def _folder(client: SyncPrefectClient, deployment_id: UUID | None) -> Path | None:
    """The folder that the runs of a deployment begin in; None where it is gone, or says none."""
    try:
        steps = client.read_deployment(deployment_id).pull_steps if deployment_id else None
    except ObjectNotFound:
        return None
    told = [step[WORKING_DIRECTORY]["directory"] for step in steps or () if WORKING_DIRECTORY in step]
    return Path(told[-1]) if told else None


def _is_of(layout: Layout, parameters: dict[str, Any], folder: Path | None) -> bool:
    """Whether a run was about this workspace, or about a clone of it that it keeps."""
    root = Path(str(parameters.get("root", ".")))
    if not root.is_absolute() and folder is None:
        return False  # nobody knows any more where it began
    place = (folder or Path()) / root
    return place.resolve() == layout.root.resolve() or place.resolve().is_relative_to(layout.operations_dir.resolve())
