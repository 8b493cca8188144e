"""The flow `ingest`: what others dropped into an inbox becomes a version of the data, and only then leaves it."""

from dataclasses import replace
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows import inbox as steps
from flows.ingest import Added
from flows.publication import check_publishable
from flows.workspace import exclusive, find_workspace
from tasks.layout import Layout


@flow(name="ingest", flow_run_name="ingest", persist_result=False, validate_parameters=False)
def ingest(root: Path | str, inbox: str, settle_s: float, publish: bool = False) -> steps.IngestReport:
    """Takes in what has settled in an inbox.

    Args:
        root: The workspace.
        inbox: A folder or a URL.
        settle_s: Seconds without a change after which a file counts as whole.
        publish: Whether to commit the new data version to git, and push it where there is an upstream.
    """
    layout = find_workspace(Path(root))
    with exclusive(layout, "ingest"):
        if publish:
            check_publishable(layout)
        waiting = steps.look(inbox, settle_s=settle_s)
        added = take_images(layout, waiting)
        report = steps.IngestReport(added.report, waiting.unsettled)
        if not added.kept:
            return report
        report = replace(report, remote=push_to_remote(layout))
        if publish:
            commit, branch = publish_version(layout)
            report = replace(report, commit=commit, pushed_to=branch)
        return replace(report, emptied=empty_inbox(waiting, added))


@task(name="take", task_run_name="take", cache_policy=NO_CACHE, persist_result=False)
def take_images(layout: Layout, waiting: steps.Waiting) -> Added:
    """Verifies and copies into data/raw, then `dvc add`."""
    return steps.take(layout, waiting)


@task(
    name="push",
    task_run_name="push",
    retries=2,
    retry_delay_seconds=[3, 10],
    cache_policy=NO_CACHE,
    persist_result=False,
)
def push_to_remote(layout: Layout) -> str | None:
    """`dvc push`, and a look at what the remote has."""
    return steps.secure(layout)


@task(name="publish", task_run_name="publish", cache_policy=NO_CACHE, persist_result=False)
def publish_version(layout: Layout) -> tuple[str | None, str | None]:
    """`git commit` of data/raw.dvc and the log, and `git push`."""
    return steps.publish(layout)


@task(name="empty", task_run_name="empty", cache_policy=NO_CACHE, persist_result=False)
def empty_inbox(waiting: steps.Waiting, added: Added) -> int:
    """Removes from the inbox what is safe elsewhere."""
    return steps.empty(waiting, added)
