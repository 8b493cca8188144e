"""Takes old flow runs of a workspace out of Prefect's database, with their logs: behind `tanuki gc`."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterEndTime
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.settings import PREFECT_API_URL, PREFECT_HOME

from flows.server import prefect_server
from tasks.layout import Layout

PAGE = 200  # what the server gives at once
DATABASE = "prefect.db"  # where the local server keeps what it knows


@dataclass(frozen=True)
class HistorySweep:
    """What went out of Prefect's database, or would.

    Args:
        runs: Flow runs.
        older_than_days: What ended later stayed.
    """

    runs: int
    older_than_days: int


def sweep_runs(layout: Layout, *, older_than_days: int, dry_run: bool) -> HistorySweep:
    """Removes the flow runs of this workspace that ended long ago, from the configured server or the local database.

    Runs of other workspaces and of other people's flows stay: a run says in its parameters whose it is.

    Args:
        layout: The workspace.
        older_than_days: Runs that ended later stay.
        dry_run: Only tell.
    """
    if not PREFECT_API_URL.value() and not (PREFECT_HOME.value() / DATABASE).is_file():
        return HistorySweep(0, older_than_days)
    before = datetime.now(UTC) - timedelta(days=older_than_days)
    with prefect_server(layout), get_client(sync_client=True) as client:
        ours = [run for run in _ended(client, before) if _is_of(layout, run)]
        for run in () if dry_run else ours:
            client.delete_flow_run(run.id)
    return HistorySweep(len(ours), older_than_days)


def _ended(client: SyncPrefectClient, before: datetime) -> list[FlowRun]:
    """All flow runs that ended before a time."""
    wanted = FlowRunFilter(end_time=FlowRunFilterEndTime.model_validate({"before_": before}))
    found: list[FlowRun] = []
    while page := client.read_flow_runs(
        flow_run_filter=wanted, sort=FlowRunSort.END_TIME_DESC, limit=PAGE, offset=len(found)
    ):
        found += page
    return found


def _is_of(layout: Layout, run: FlowRun) -> bool:
    root = run.parameters.get("root")
    return isinstance(root, str) and Path(root).resolve() == layout.root.resolve()
