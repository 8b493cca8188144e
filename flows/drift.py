"""The flow `drift`: a look for drift by the clock, as Prefect shows it."""

import json
from dataclasses import asdict
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_link_artifact, create_markdown_artifact
from prefect.events import emit_event

from flows.drift_check import DriftReport, look_for_drift
from flows.run_metrics import record_drift
from flows.workspace import find_workspace

DRIFT_FOUND = "tanuki.drift.found"


@flow(name="drift", flow_run_name="drift", persist_result=False, validate_parameters=False)
def drift(root: Path | str = ".", captures: Path | str | None = None) -> DriftReport:
    """Compares what the server captured with the test images, and emits an event where it finds drift.

    Args:
        root: The workspace.
        captures: Where the server puts it; data/captures where None.
    """
    layout = find_workspace(Path(root))
    report = look_for_drift(layout, None if captures is None else Path(captures))
    record_drift(layout, report)
    facts = json.dumps(asdict(report), indent=2, ensure_ascii=False)
    create_markdown_artifact(f"```\n{report.text()}\n```\n\n```json\n{facts}\n```", key="drift", description="Drift")
    page = (layout.drift_dir / "index.html").resolve()
    create_link_artifact(page.as_uri(), "Drift", key="drift-page", description="With pictures")
    if report.outcome == "drift":
        emit_event(
            event=DRIFT_FOUND,
            resource={"prefect.resource.id": "tanuki.drift", "prefect.resource.name": report.headline},
            payload=asdict(report),
        )
    return report
