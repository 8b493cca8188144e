"""What `tanuki up --status` tells: each part, the deployments with their last and next runs, the automations.

Import it only where this process's environment names the server (flows/up/settings.py).
"""

import json
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from flows.registries import registry_of
from flows.up.settings import WORK_POOL
from flows.workspace import is_held
from tasks.layout import Layout

if TYPE_CHECKING:
    from uuid import UUID

    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect.client.schemas.sorting import FlowRunSort


@dataclass(frozen=True)
class PartStatus:
    """One part.

    Args:
        name: up, server, worker or model.
        is_well: Whether it does its work.
        text: Where it is, or what is wrong.
    """

    name: str
    is_well: bool
    text: str


@dataclass(frozen=True)
class ScheduleStatus:
    """One deployment.

    Args:
        name: As in deploy/prefect.yaml.
        is_active: Whether a schedule of it is active.
        last_state: Name of the last run's state; None before the first.
        last_message: What the last run had to say.
        last_at: When it began or should have.
        next_at: When the next run is due.
    """

    name: str
    is_active: bool
    last_state: str | None
    last_message: str | None
    last_at: str | None
    next_at: str | None


@dataclass(frozen=True)
class UpStatus:
    """The whole box."""

    parts: tuple[PartStatus, ...]
    schedules: tuple[ScheduleStatus, ...]
    automations: tuple[str, ...]

    @property
    def is_well(self) -> bool:
        return all(part.is_well for part in self.parts)

    def as_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"is_well": self.is_well, **asdict(self)}


def is_up(layout: Layout) -> bool:
    """Whether a `tanuki up` runs here."""
    return is_held(layout.up_lock)


def read_facts(layout: Layout) -> dict[str, Any] | None:
    """Where the parts answer; None where nothing was started, or all was ended."""
    if not layout.up_facts.is_file():
        return None
    facts: dict[str, Any] = json.loads(layout.up_facts.read_bytes())
    return facts


def read_status(layout: Layout) -> UpStatus:
    """Looks at every part."""
    facts = read_facts(layout)
    if facts is None:
        starting = "is starting, or stopping" if is_up(layout) else "does not run. Start it: tanuki up"
        return UpStatus((PartStatus("up", False, starting),), (), ())
    supervised = is_up(layout)
    up = f"process {facts['pid']}, since {facts['since']}" if supervised else "was killed; what it started may go on"
    server = _get(f"{facts['api']}/health") is not None
    parts = [
        PartStatus("up", supervised, up),
        PartStatus(
            "server", server, facts["ui"] if server else f"does not answer; see {facts['parts']['server']['log']}"
        ),
        PartStatus("worker", False, "unknown: the server does not say"),
        _model(layout, facts),
    ]
    if not server:
        return UpStatus(tuple(parts), (), ())
    import httpx

    try:
        parts[2] = _worker(facts)
        return UpStatus(tuple(parts), *_schedules())
    except httpx.HTTPError as error:  # too busy, or it has just ended
        parts[1] = PartStatus("server", False, f"{facts['ui']}: {error}")
        return UpStatus(tuple(parts), (), ())


def _worker(facts: dict[str, Any]) -> PartStatus:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        told = client.request(
            "POST", "/work_pools/{work_pool_name}/workers/filter", path_params={"work_pool_name": WORK_POOL}, json={}
        ).json()
    online = [worker for worker in told if worker["status"] == "ONLINE"]
    if online:
        return PartStatus(
            "worker", True, f"asks the pool {WORK_POOL}, last heard of {online[0]['last_heartbeat_time']}"
        )
    return PartStatus("worker", False, f"is not heard of; see {facts['parts']['worker']['log']}")


def _model(layout: Layout, facts: dict[str, Any]) -> PartStatus:
    if _get(f"{facts['model']}/v2/health/live") is None:
        return PartStatus("model", False, f"does not answer; see {facts['parts']['model']['log']}")
    champion = registry_of(layout).champion_id()
    if champion is None:
        return PartStatus("model", True, f"{facts['model']}, no champion yet")
    if _get(f"{facts['model']}/v2/models/tanuki/versions/{champion}/ready") is None:
        return PartStatus("model", False, f"{facts['model']} does not answer with the champion, version {champion}")
    return PartStatus("model", True, f"{facts['model']} answers with version {champion}")


def _schedules() -> tuple[tuple[ScheduleStatus, ...], tuple[str, ...]]:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.sorting import DeploymentSort, FlowRunSort

    now = datetime.now(UTC)
    rows = []
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments(limit=200, sort=DeploymentSort.NAME_ASC):
            last = _run_of(client, deployment.id, {"before_": now}, FlowRunSort.EXPECTED_START_TIME_DESC)
            coming = _run_of(client, deployment.id, {"after_": now}, FlowRunSort.EXPECTED_START_TIME_ASC)
            state = None if last is None else last.state
            rows.append(
                ScheduleStatus(
                    name=deployment.name,
                    is_active=not deployment.paused and any(each.active for each in deployment.schedules),
                    last_state=None if state is None else state.name,
                    last_message=None if state is None else state.message,
                    last_at=None if last is None else _time(last.start_time or last.expected_start_time),
                    next_at=None if coming is None else _time(coming.expected_start_time),
                )
            )
        automations = tuple(sorted(each.name for each in client.read_automations() if each.enabled))
    return tuple(sorted(rows, key=lambda row: row.name)), automations


def _run_of(
    client: "SyncPrefectClient", deployment: "UUID", expected: dict[str, datetime], sort: "FlowRunSort"
) -> "FlowRun | None":
    """The first run of a deployment that is expected then, in that order."""
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
    )

    runs = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment])),
        flow_run_filter=FlowRunFilter(expected_start_time=FlowRunFilterExpectedStartTime.model_validate(expected)),
        sort=sort,
        limit=1,
    )
    return runs[0] if runs else None


def _time(time: datetime | None) -> str | None:
    return None if time is None else time.astimezone(UTC).isoformat(timespec="seconds")


def _get(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            data: bytes = response.read()
            return data
    except (urllib.error.URLError, OSError):
        return None
