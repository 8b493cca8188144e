"""The flow `scheduled-retrain`: a retrain by itself, in a clone, that says in its state what it came to.

Names of its final state: "Nothing to do", "Promoted", "Refused", "Undecided", "Skipped" (somebody was at work),
"Superseded" (a later run was quicker), and Prefect's own Failed and Crashed. A run that finds the same data, code and
params as the last one does nothing; so a run twice, a late run and a run too many cost seconds.
"""

import logging
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows import promotion, publication
from flows.clones import Snapshot, adopt, borrow_clone, finish, prepare_clone, take_snapshot
from flows.lease import SupersededError, take_lease
from flows.promotion import Verdict
from flows.registries import registry_of
from flows.retrain import publish_champion, retrain
from flows.run_log import told
from flows.run_metrics import recorded
from flows.warm import warm_python
from flows.workspace import BusyError, WorkspaceError, exclusive, find_workspace, out_of_date
from tasks.layout import Layout

STATES = {
    "first": "Promoted",
    "promote": "Promoted",
    "refuse": "Refused",
    "undecided": "Undecided",
    "champion": "Nothing to do",
}

PATIENCE_S = 300.0  # for a person at work in the workspace; other schedules hold it for seconds

logger = logging.getLogger("flows.scheduled_retrain")  # Prefect loads this file under another name


@flow(name="scheduled-retrain", flow_run_name="retrain: {reason}", persist_result=False, validate_parameters=False)
def scheduled_retrain(
    root: str = ".", promote: bool = True, publish: bool = False, reason: str = "by the clock"
) -> State[Any]:
    """Brings the model up to date with the workspace's data, and the champion with the model if that is better.

    Args:
        root: The workspace.
        promote: Whether a challenger that passes the gate becomes champion.
        publish: Whether the champion then goes to the DVC remote and to git.
        reason: What set it off, in words.
    """
    return told(lambda: _recorded(find_workspace(Path(root)), promote, publish, reason))


def _recorded(main: Layout, promote: bool, publish: bool, reason: str) -> State[Any]:
    """A run that fails before its first stage has failed, too."""
    try:
        with recorded(main):
            return _retrain(main, promote, publish, reason)
    except SupersededError as error:
        return Completed(name="Superseded", message=str(error))


def _retrain(main: Layout, promote: bool, publish: bool, reason: str) -> State[Any]:
    with exclusive(main, "retrain by schedule", wait_s=PATIENCE_S):
        if idle := _why_idle(main, promote):
            done = _publish_rest(main) if publish else ""
            return Completed(name="Nothing to do", message=idle + done)
        lease = take_lease(main)  # under the lock, so that leases have the order of the data that runs read
        snapshot = take_snapshot(main)
    logger.info("retrain with lease %d, %s", lease.number, reason)
    with warm_python(main, None), borrow_clone(main) as clone:
        logger.info("in the clone %s, at commit %s", clone.root, snapshot.commit[:8])
        prepare_clone(main, clone, snapshot)
        try:
            verdict = retrain.fn(clone.root, promote=promote, lease=lease).verdict
        finally:
            _bring_back(main, clone, snapshot)
        finish(clone)
    unpublished = _publish(main) if publish and verdict.champion else ""
    return Completed(name=STATES[verdict.outcome] if promote else "Judged", message=_message(verdict) + unpublished)


def _publish(main: Layout) -> str:
    """Publishes the champion; where the workspace went on meanwhile, why not, in words: the run has not failed."""
    try:
        with exclusive(main, "publish by schedule", wait_s=PATIENCE_S):
            published = publish_champion(main)
    except publication.MovedOnError:
        return (
            " Not published: images, code or params changed since, git would name others than the model was made with, "
            "and its version does not tell which. What the next retrain promotes is published."
        )
    except BusyError as error:
        return f" Not published yet: {error} The next run publishes it."
    return "" if published.is_known else f" {published.text()}"


def _why_idle(main: Layout, promote: bool) -> str | None:
    """Why a run has nothing to do; None where it has."""
    if not main.raw.is_dir() or not any(main.raw.iterdir()):
        return f"{main.raw} holds no images yet. `tanuki add FOLDER` copies yours in."
    if promotion.is_judged(main, promote=promote) and not out_of_date(main):
        champion = registry_of(main).champion_id()
        return f"Nothing changed since the last retrain; version {champion} stays champion."
    return None


def _publish_rest(main: Layout) -> str:
    """Publishes what an earlier run promoted and could not publish; what it did, in words."""
    if registry_of(main).champion_id() is None:
        return ""
    published = publication.publish_champion(main)
    return f" {published.text()}" if published.commit or published.tags else ""


def _bring_back(main: Layout, clone: Layout, snapshot: Snapshot) -> None:
    """Also after a failure: the stages that succeeded need not run again, and the report says what was wrong.

    Trouble here, as on a full disk, must not be told in place of that failure.
    """
    try:
        with exclusive(main, "retrain by schedule", wait_s=PATIENCE_S):
            adopt(main, clone, snapshot)
    except (WorkspaceError, OSError) as error:
        logger.warning("what this run came to stays in its clone, the next run does it again: %s", error)


def _message(verdict: Verdict) -> str:
    warnings = [f"Warning: {warning}." for warning in verdict.warnings]
    return " ".join([f"Version {verdict.version}: {verdict.reasons[0]}", *verdict.reasons[1:], *warnings])
