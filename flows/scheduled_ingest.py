"""The flow `scheduled-ingest`: takes in what lies in the inbox, then looks for reasons to retrain beside the clock."""

import logging
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.inbox import IngestReport, look
from flows.ingest_inbox import ingest
from flows.run_log import told
from flows.signals import new_backbone, new_data, watch
from flows.workspace import find_workspace
from tasks.layout import Layout

logger = logging.getLogger("flows.scheduled_ingest")  # Prefect loads this file under another name


@flow(name="scheduled-ingest", flow_run_name="ingest", persist_result=False, validate_parameters=False)
def scheduled_ingest(
    root: str = ".",
    inbox: str = "data/inbox",
    settle_s: float = 60,
    publish: bool = False,
    min_images: int = 100,
    min_share: float = 0.05,
) -> State[Any]:
    """Takes in an inbox and tells of new data and of a new backbone.

    Args:
        root: The workspace.
        inbox: A folder, or a URL; relative to the workspace.
        settle_s: Seconds without a change after which a file counts as whole.
        publish: Whether to commit the new data version to git, and push it where there is an upstream.
        min_images: So many images that no retrain has seen are a reason to retrain...
        min_share: ...and so is this share of those that one has seen.
    """
    return told(lambda: _ingest(find_workspace(Path(root)), inbox, settle_s, publish, min_images, min_share))


def _ingest(
    layout: Layout, inbox: str, settle_s: float, publish: bool, min_images: int, min_share: float
) -> State[Any]:
    place = inbox if "://" in inbox else str(layout.root / inbox)
    report = _take(layout, place, settle_s, publish) if "://" in place or Path(place).is_dir() else None
    signals = [new_data(layout, min_images=min_images, min_share=min_share), new_backbone(layout)]
    reasons = [signal.text for signal in signals if watch(layout, signal)]
    asked = f" A retrain was asked for: {'; '.join(reasons)}." if reasons else ""
    if report is None:
        return Completed(name="Nothing to do", message=f"Nothing lies in {inbox}.{asked}")
    added = report.added
    refused = (
        f" {len(added.refused):,} were refused, the first: {': '.join(added.refused[0])}." if added.refused else ""
    )
    known = f" {added.known:,} were there already." if added.known else ""
    return Completed(name="Ingested", message=f"{added.added:,} images added.{known}{refused}{asked}")


def _take(layout: Layout, inbox: str, settle_s: float, publish: bool) -> IngestReport | None:
    """None where nothing has settled; the report of all other cases is the ingest's own."""
    waiting = look(inbox, settle_s=settle_s)
    if not waiting.settled.images:
        return None
    report = ingest.fn(layout.root, inbox, settle_s=settle_s, publish=publish)
    logger.info("%s", report.text())
    return report
