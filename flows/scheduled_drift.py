"""The flow `scheduled-drift`: a look for drift by the clock, whose state says what it came to.

Names of its final state: "Drift", "No drift", "Nothing to do" (no champion, nothing captured, or too little), and
Prefect's own Failed and Crashed. Drift is a reason to retrain, told once until it has gone again.
"""

import logging
import math
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.drift import drift
from flows.drift_check import DriftReport
from flows.registries import registry_of
from flows.run_log import told
from flows.signals import Signal, watch
from flows.workspace import find_workspace
from tasks.layout import Layout

logger = logging.getLogger("flows.scheduled_drift")  # Prefect loads this file under another name


@flow(name="scheduled-drift", flow_run_name="drift", persist_result=False, validate_parameters=False)
def scheduled_drift(root: str = ".", captures: str = "data/captures") -> State[Any]:
    """Compares what the server captured with the test images.

    Args:
        root: The workspace.
        captures: Where the server puts it; relative to the workspace.
    """
    return told(lambda: _look(find_workspace(Path(root)), captures))


def _look(layout: Layout, captures: str) -> State[Any]:
    if not (layout.root / captures).is_dir():
        return Completed(name="Nothing to do", message=f"{captures} is no folder: no server captures there.")
    if registry_of(layout).champion_id() is None:
        return Completed(name="Nothing to do", message="There is no champion yet, so nobody has answered anything.")
    report = drift.fn(layout.root, layout.root / captures)
    if report.outcome == "too few":
        return Completed(name="Nothing to do", message=report.headline)
    watch(layout, drift_signal(report))
    return Completed(name="Drift" if report.outcome == "drift" else "No drift", message=report.text())


def drift_signal(report: DriftReport) -> Signal:
    """Drift as a reason to retrain: level 1 where the smallest p is drift's level, 0.5 at the level's square root."""
    p_value = min(test["adjusted_p_value"] for test in report.tests.values())
    return Signal("drift", math.log(p_value) / math.log(report.level), f"version {report.version}: {report.headline}")
