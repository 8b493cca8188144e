"""The flow `retrain`: every stage in turn, then the gate. DVC decides whether a stage must run; the gate, what ships.

A task carries out one stage and knows when to try again: fetch_backbone, which may touch a network, is retried where
its trouble may pass; the others are functions of what lies on the disk, and doing those twice gives the same answer.
"""

import logging
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task

from flows import promotion, publication, reports, run_metrics
from flows.lease import Lease, take_lease
from flows.run_artifacts import publish_evaluation, publish_validation
from flows.workspace import TEMPORARY_FAILURE, StageError, StageRun, exclusive, find_workspace, reproduce, track_raw
from tasks.layout import Layout

HOUR_S = 3600.0

logger = logging.getLogger(__name__)

StageTask = Task[[Layout], State[StageRun]]


@dataclass(frozen=True)
class Retrained:
    """What a retrain came to.

    Args:
        stages: Each stage's run, in order.
        verdict: What the gate said and what became of it.
        published: What of the champion was published; None where that was not asked for.
    """

    stages: tuple[StageRun, ...]
    verdict: promotion.Verdict
    published: publication.Published | None = None


def may_pass(_task: Task[..., object], _run: TaskRun, state: State[object]) -> bool:
    """Whether a failed stage said that its trouble may pass by itself."""
    failure = state.result(raise_on_failure=False)
    return isinstance(failure, StageError) and failure.exit_code == TEMPORARY_FAILURE


def stage_task(name: str, *, timeout_s: float, retry_delays_s: tuple[float, ...] = ()) -> StageTask:
    """A Prefect task that brings one stage up to date.

    The state is named "Up to date" where DVC had nothing to do, so that the Prefect UI shows what ran and what did not.
    """

    @task(
        name=name,
        task_run_name=name,
        retries=len(retry_delays_s),
        retry_delay_seconds=list(retry_delays_s) or None,
        retry_condition_fn=may_pass,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def run(layout: Layout) -> State[StageRun]:
        logger.info("[%s]", name)
        done = reproduce(layout, name, timeout_s=timeout_s)
        logger.info("[%s] %s (%.1f s)", name, done.outcome, done.seconds)
        return Completed(name=done.outcome.capitalize(), message=f"{done.seconds:.1f} s", data=done)

    return run


fetch_backbone = stage_task("fetch_backbone", timeout_s=HOUR_S, retry_delays_s=(3, 10))
index_images = stage_task("index_images", timeout_s=12 * HOUR_S)
validate_data = stage_task("validate_data", timeout_s=HOUR_S)
cache_features = stage_task("cache_features", timeout_s=48 * HOUR_S)
train_head = stage_task("train_head", timeout_s=4 * HOUR_S)
finetune = stage_task("finetune", timeout_s=48 * HOUR_S)
export_onnx = stage_task("export_onnx", timeout_s=HOUR_S)
evaluate = stage_task("evaluate", timeout_s=12 * HOUR_S)


@flow(name="retrain", flow_run_name="retrain", persist_result=False, validate_parameters=False)
def retrain(
    root: Path | str = ".",
    promote: bool = True,
    publish: bool = False,
    key: Path | str | None = None,
    lease: Lease | None = None,
) -> Retrained:
    """Brings the model up to date with the data, and the champion up to date with the model if that is better.

    Args:
        root: The workspace.
        promote: Whether a challenger that passes the gate becomes champion.
        publish: Whether the champion then goes to the DVC remote and to git.
        key: File of the private key that signs what the gate promotes; $TANUKI_SIGNING_KEY where None.
        lease: A scheduled run's, which tells of itself to Prometheus; where None, the next of this workspace.
    """
    private_key = promotion.signing_key(None if key is None else Path(key))
    layout = find_workspace(Path(root))
    with exclusive(layout, "retrain"), nullcontext() if lease else run_metrics.recorded(layout):
        lease = lease or take_lease(layout)  # a scheduled run on older data, still under way, comes too late then
        if publish:
            publication.check_publishable(layout)
        track_raw(layout)
        backbone = fetch_backbone.submit(layout)  # beside the two that read no weights
        indexed = index_images(layout)
        try:
            validated = validate_data(layout)
        finally:
            publish_validation(layout)
        backbone.wait()
        states = [
            backbone.state,
            indexed,
            validated,
            cache_features(layout),
            train_head(layout),
            finetune(layout),
            export_onnx(layout),
            evaluate(layout),
        ]
        verdict = judge(layout, promote, private_key, lease)
        published = publish_champion(layout) if publish and verdict.champion else None
    retrained = Retrained(tuple(state.result() for state in states), verdict, published)
    reports.publish(layout, retrained.stages, verdict)
    publish_evaluation(layout)
    return retrained


@task(name="gate", task_run_name="gate", cache_policy=NO_CACHE, persist_result=False)
def judge(layout: Layout, promote: bool, key: Path | None, lease: Lease) -> promotion.Verdict:
    """Registers the bundle, puts it before the gate, and signs and promotes it if it passes."""
    with lease.at_the_gate():
        return promotion.judge(layout, promote=promote, key=key)


@task(
    name="publish",
    task_run_name="publish",
    retries=2,
    retry_delay_seconds=[3, 10],
    cache_policy=NO_CACHE,
    persist_result=False,
)
def publish_champion(layout: Layout) -> publication.Published:
    """Pushes the champion's bytes, commits what names them, tags and pushes that."""
    return publication.publish_champion(layout)
