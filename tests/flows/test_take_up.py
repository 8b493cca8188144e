"""A start of `tanuki up` over runs that the last stop left: with Prefect's own server, and no worker."""

import sys

import pytest

from tests.conftest import Workspace

SCENE = """
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from sqlite3 import connect
from urllib.parse import urlsplit

from flows.server import server_on
from flows.up.settings import UpSettings, part_environment
from flows.up.supervisor import _prepare
from tasks.layout import Layout

layout = Layout(Path(sys.argv[1]))
layout.prefect_home.mkdir(parents=True)
with server_on(layout, layout.prefect_home) as url:
    settings = UpSettings(prefect_port=urlsplit(url).port)
    environment = part_environment(layout, settings)
    _prepare(layout, settings, environment, print)

    from prefect.client.orchestration import get_client
    from prefect.states import Cancelling, Running, Scheduled
    with get_client(sync_client=True) as client:
        (retrain,) = (each for each in client.read_deployments() if each.name == "retrain")
        client._client.post(f"/deployments/{retrain.id}/pause_deployment").raise_for_status()
        for run in client.read_flow_runs():
            client.delete_flow_run(run.id)
        for name in ("running", "cancelling"):
            made = client.create_flow_run_from_deployment(retrain.id, name=name)
            client.set_flow_run_state(made.id, Running(), force=True)
            if name == "cancelling":
                client.set_flow_run_state(made.id, Cancelling(), force=True)
        for hours in (3, 2, 1):
            due = datetime.now(UTC) - timedelta(hours=hours)
            client.create_flow_run_from_deployment(
                retrain.id, name=f"missed {hours} h ago", state=Scheduled(scheduled_time=due)
            )
        with connect(layout.prefect_home / "prefect.db", timeout=30) as database:  # as the scheduler makes them
            database.execute("update flow_run set auto_scheduled = 1 where name like 'missed%'")
        database.close()
        _prepare(layout, settings, environment, print)
        for run in sorted(client.read_flow_runs(), key=lambda run: run.name):
            if run.deployment_id == retrain.id:
                print(f"{run.parameters.get('reason', run.name)}: {run.state.name}")
"""


@pytest.mark.slow
def test_a_start_goes_on_with_what_was_cut_short_ends_what_was_cancelled_and_drops_what_was_missed(
    workspace: Workspace,
) -> None:
    told = workspace.run(sys.executable, "-c", SCENE, workspace.root).stdout
    found = told.splitlines()
    assert {"running: Stopped", "cancelling: Cancelled"} <= set(found), told
    assert found.count("going on after a stop: Scheduled") == 1, told
    missed = [line for line in found if line.startswith("missed")]
    assert missed == ["missed 1 h ago: Scheduled", "missed 2 h ago: Cancelled", "missed 3 h ago: Cancelled"], told
