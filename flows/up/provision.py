"""What the Prefect server of a box is to know, and what self-hosters otherwise forget; written again only if changed.

    a work pool and the deployments of deploy/prefect.yaml, with their schedules and triggers
    an automation that ends zombie runs: a run that is silent for too long is dead, and would hold its slot for ever
    automations that tell a webhook or an address what was promoted, refused and why, or failed and what to do
    after a stop: a retrain that it cut short is begun again, and of missed runs one is left

Import it only where this process's environment names the server (flows/up/settings.py): Prefect reads that when it is
imported.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.notifications import CustomWebhookNotificationBlock, SlackWebhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import DeploymentSort, FlowRunSort
from prefect.events.actions import ActionTypes, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed
from prefect.types import SecretDict
from prefect.workers.process import ProcessWorker
from pydantic import SecretStr
from ruamel.yaml import YAML

from deploy.files import sha256_bytes, write_json
from flows.up.settings import SILENT_S, WORK_POOL, UpSettings
from flows.workspace import WorkspaceError
from tasks.layout import Layout

RUN_EVENT = "prefect.flow-run."
OURS = "tanuki: "  # how the names of our automations begin
BLOCK = "tanuki-notify"
RECIPE = 1  # raised where this module provisions otherwise than before
QUIET_S = 3600.0  # between two messages that a deployment failed
CUT_SHORT = (
    "The process of this run is gone: the machine, `tanuki up` or its worker was stopped or killed. Nothing was lost."
)
RETRAIN = "retrain"  # the deployment that goes on where a stop cut it short; the others come again soon
STOPPED, GOING_ON = "Stopped", "going on after a stop"
MISSED = "Missed while nothing ran here; the last missed run stands in for all."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Occasion:
    """When to tell somebody.

    Args:
        name: What happened.
        states: Names of the final states of a run that say so.
        subject: A template of Prefect's.
        quiet_s: Seconds until the same is told again of the same deployment.
    """

    name: str
    states: tuple[str, ...]
    subject: str
    quiet_s: float = 0


OCCASIONS = (
    Occasion("tell of breaking dependencies", ("Newest breaks",), "tanuki: the newest dependencies break something"),
    Occasion("tell of promotions", ("Promoted",), "tanuki: a new model answers"),
    Occasion("tell of refusals", ("Refused", "Undecided"), "tanuki: a new model was not promoted"),
    Occasion(
        "tell of failures", ("Failed", "TimedOut", "Crashed"), "tanuki: {{ deployment.name }} failed", quiet_s=QUIET_S
    ),
)
BODY = "{{ flow_run.state.message }}\n\n{{ flow_run.name }}: {{ flow_run | ui_url }}"


def provision(layout: Layout, settings: UpSettings, environment: Mapping[str, str]) -> bool:
    """Tells the server what it is to know, if that has changed since the last time.

    What a person has changed in Prefect's pages meanwhile, such as a paused schedule, stays otherwise.

    Returns:
        Whether anything was to be told.

    Raises:
        WorkspaceError: If `prefect deploy` refuses deploy/prefect.yaml; says why.
    """
    told = layout.prefect_home / "tanuki-provisioned.json"
    wanted = _digest(layout, settings)
    with get_client(sync_client=True) as client:
        known = json.loads(told.read_bytes()) if told.is_file() else None
        if known == wanted and not _missing_deployments(layout, client):
            return False
        _make_work_pool(client)
        _deploy(layout, environment)
        _automate(client, _save_blocks(settings.notify))
    write_json(told, wanted)
    return True


def bury_the_dead(living: Collection[str], *, silent_s: float = 0.0) -> list[str]:
    """Marks runs as crashed that the server thinks are under way, although no process carries them out.

    A trigger of deploy/prefect.yaml then begins a retrain again, and whoever wants to know is told.

    Args:
        living: Ids of runs that a process carries out.
        silent_s: A run that has changed its state within this time may have no process yet.

    Returns:
        Their names.
    """
    since = datetime.now(UTC) - timedelta(seconds=silent_s)
    with get_client(sync_client=True) as client:
        dead = [
            run
            for run in _under_way(client)
            if str(run.id) not in living and (run.state is None or run.state.timestamp <= since)
        ]
        for run in dead:
            client.set_flow_run_state(run.id, _end_of(run, Crashed(message=CUT_SHORT)), force=True)
    return [run.name for run in dead]


def take_up() -> list[str]:
    """Marks the runs that the last stop cut short, and schedules a retrain among them again; nobody is told.

    Returns:
        Their names.
    """
    with get_client(sync_client=True) as client:
        cut_short = _under_way(client)
        retrains = {each.id for each in _deployments(client) if each.name == RETRAIN}
        for run in cut_short:
            if run.deployment_id in retrains and not _is_cancelled(run):
                # Before the old run is marked: a kill in between makes the same run again, which the key prevents.
                client.create_flow_run_from_deployment(
                    run.deployment_id, parameters={"reason": GOING_ON}, idempotency_key=f"after-{run.id}"
                )
            client.set_flow_run_state(run.id, _end_of(run, Crashed(name=STOPPED, message=CUT_SHORT)), force=True)
    return [run.name for run in cut_short]


def drop_missed_runs() -> int:
    """Cancels scheduled runs whose time has passed, but for the last of each deployment; how many."""
    now = datetime.now(UTC)
    kept: set[Any] = set()
    dropped = 0
    with get_client(sync_client=True) as client:
        for run in _runs(client, StateType.SCHEDULED):  # the last first
            due = run.next_scheduled_start_time or run.expected_start_time
            if due is None or due > now or not run.auto_scheduled:
                continue
            if run.deployment_id in kept:
                client.set_flow_run_state(run.id, Cancelled(message=MISSED), force=True)
                dropped += 1
            kept.add(run.deployment_id)
    return dropped


def deployment_names(layout: Layout) -> list[str]:
    """The deployments of deploy/prefect.yaml."""
    declared = YAML(typ="safe", pure=True).load(layout.schedules.read_bytes())
    return [each["name"] for each in declared["deployments"]]


def _digest(layout: Layout, settings: UpSettings) -> dict[str, Any]:
    addresses = sha256_bytes("\n".join((settings.database or "", *settings.notify)).encode())
    schedules = sha256_bytes(layout.schedules.read_bytes())
    return {"recipe": RECIPE, "root": str(layout.root), "schedules": schedules, "addresses": addresses}


def _missing_deployments(layout: Layout, client: SyncPrefectClient) -> set[str]:
    there = {each.name for each in _deployments(client)}
    return set(deployment_names(layout)) - there


def _deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    # The client's own defaults are refused by the server.
    return client.read_deployments(work_pool_filter=_of_our_pool(), limit=200, sort=DeploymentSort.NAME_ASC)


def _make_work_pool(client: SyncPrefectClient) -> None:
    try:
        client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=WORK_POOL, type="process", base_job_template=template))


def _deploy(layout: Layout, environment: Mapping[str, str]) -> None:
    file = str(layout.schedules.relative_to(layout.root))
    run = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", file],
        cwd=layout.root,
        env=dict(environment),
        capture_output=True,
        text=True,
        check=False,
    )
    # `prefect deploy --all` goes on after a deployment that it could not make, and ends with 0.
    with get_client(sync_client=True) as client:
        missing = _missing_deployments(layout, client)
    if run.returncode != 0 or missing:
        said = "\n".join([*run.stdout.splitlines(), *run.stderr.splitlines()][-15:])
        raise WorkspaceError(f"`prefect deploy` refuses {layout.schedules}:\n{said}\nMend that file.")


def _save_blocks(addresses: Sequence[str]) -> list[Any]:
    """Prefect's notification blocks for these addresses, which it keeps encrypted; their ids."""
    return [_block(address).save(f"{BLOCK}-{number}", overwrite=True) for number, address in enumerate(addresses, 1)]


def _block(address: str) -> NotificationBlock:
    if address.startswith(("http://", "https://")):
        told = {
            "subject": "{{subject}}",
            "body": "{{body}}",
            "text": "{{subject}}\n{{body}}",
        }  # text: Slack, Mattermost
        return CustomWebhookNotificationBlock(
            name=BLOCK,
            url="{{address}}",
            json_data=told,
            headers=None,
            cookies=None,
            secrets=SecretDict({"address": address}),
        )
    # The block for Slack hands on whatever is no address of Slack's to Apprise, and every Prefect server has it.
    return SlackWebhook(url=SecretStr(address))


def _automate(client: SyncPrefectClient, blocks: Sequence[Any]) -> None:
    """Replaces our automations by what they are to be now; those of deployments are Prefect's own affair."""
    for automation in client.read_automations():
        if automation.name.startswith(OURS):
            client.delete_automation(automation.id)
    wanted = [end_zombies(), *(notification(each, blocks) for each in OCCASIONS if blocks)]
    for each in wanted:
        client.create_automation(each)


def end_zombies() -> AutomationCore:
    """A run that sent a sign of life, and then neither another one nor its end."""
    return AutomationCore(
        name=f"{OURS}end zombie runs",
        description="A run that is silent for too long is dead; as long as it seems to run, it holds its slot.",
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={f"{RUN_EVENT}heartbeat"},
            expect={f"{RUN_EVENT}*"},  # states have names of our own, so any event will do
            match=ResourceSpecification({"prefect.resource.id": [f"{RUN_EVENT}*"]}),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=SILENT_S),
        ),
        actions=[ChangeFlowRunState(state=StateType.CRASHED, name="Crashed", message=CUT_SHORT, force=False)],
    )


def notification(occasion: Occasion, blocks: Sequence[Any]) -> AutomationCore:
    """Tells all addresses of what a run of a deployment came to."""
    actions: list[ActionTypes] = [
        SendNotification(block_document_id=block, subject=occasion.subject, body=BODY) for block in blocks
    ]
    return AutomationCore(
        name=f"{OURS}{occasion.name}",
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={f"{RUN_EVENT}{state}" for state in occasion.states},
            match=ResourceSpecification({"prefect.resource.id": [f"{RUN_EVENT}*"]}),
            for_each={"related:deployment:prefect.resource.id"} if occasion.quiet_s else set(),
            threshold=1,
            within=timedelta(seconds=occasion.quiet_s),
        ),
        actions=actions,
    )


def _runs(client: SyncPrefectClient, *states: StateType) -> list[FlowRun]:
    """Runs of our pool in these states, the last first."""
    found: list[FlowRun] = []
    while page := client.read_flow_runs(
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states)))),
        work_pool_filter=_of_our_pool(),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=200,
        offset=len(found),
    ):
        found += page
    return found


def _under_way(client: SyncPrefectClient) -> list[FlowRun]:
    return _runs(client, StateType.RUNNING, StateType.PENDING, StateType.CANCELLING)


def _is_cancelled(run: FlowRun) -> bool:
    return run.state is not None and run.state.type == StateType.CANCELLING


def _end_of(run: FlowRun, otherwise: State[Any]) -> State[Any]:
    """What a run without a process ended as; one that a person was cancelling came to what they wanted."""
    return Cancelled(message=CUT_SHORT) if _is_cancelled(run) else otherwise


def _of_our_pool() -> WorkPoolFilter:
    return WorkPoolFilter(name=WorkPoolFilterName(any_=[WORK_POOL]))
