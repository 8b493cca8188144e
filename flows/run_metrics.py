"""What Prometheus is told of runs: text files in the registry, each replaced whole.

The model server shows them on its /metrics, beside its own; node_exporter's textfile collector reads them as they are,
where no server runs. The registry is where both a retrain and a server are; nothing there depends on them. Times are
seconds since 1970: an age is ``time() - x`` in PromQL.
"""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from deploy.event_log import MOVES
from deploy.files import write_bytes
from flows.lease import SupersededError
from flows.registries import registry_of, registry_place
from flows.workspace import BusyError, data_version
from tasks.layout import Layout

if TYPE_CHECKING:
    from flows.drift_check import DriftReport


@contextmanager
def recorded(layout: Layout) -> Iterator[None]:
    """Tells of the retrain in this block, also of one that fails; not of one that gives way to another."""
    start = time.time()
    try:
        yield
    except (BusyError, SupersededError):
        raise  # the other one tells of itself
    except BaseException:
        record_retrain(layout, start=start, end=time.time(), succeeded=False)
        raise
    record_retrain(layout, start=start, end=time.time(), succeeded=True)


def record_retrain(layout: Layout, *, start: float, end: float, succeeded: bool) -> None:
    """Writes retrain.prom. A retrain that found nothing to do is one, and a good one.

    Args:
        layout: The workspace.
        start: Seconds since 1970.
        end: The same.
        succeeded: Whether it came to its end, promotion or not.
    """
    path = _folder(layout) / "retrain.prom"
    before = _read(path)
    registry = CollectorRegistry()

    def gauge(name: str, text: str, value: float, **labels: str) -> None:
        made = Gauge(f"tanuki_{name}", text, list(labels), registry=registry)
        (made.labels(**labels) if labels else made).set(value)

    gauge("retrain_succeeded", "Whether the last retrain came to its end.", float(succeeded))
    gauge("retrain_last_end_timestamp_seconds", "When the last retrain ended.", end)
    gauge("retrain_duration_seconds", "How long it took.", end - start)
    last = end if succeeded else before.get("tanuki_retrain_last_success_timestamp_seconds", {}).get("", 0.0)
    gauge("retrain_last_success_timestamp_seconds", "When the last good retrain ended; 0 for never.", last)
    version = data_version(layout) or ""
    since = before.get("tanuki_data_since_timestamp_seconds", {}).get(version, end)
    gauge("data_since_timestamp_seconds", "Since when the images are what they are.", since, version=version)
    if layout.report("validate_data").is_file():
        facts = json.loads(layout.report("validate_data").read_bytes())
        gauge("data_images", "Images that passed validation.", facts["num_accepted"])
    events = registry_of(layout).events()
    champion = events[-1].champion if events else None
    gauge("champion_version", "The version in production; 0 for none.", champion or 0)
    moved = next((event for event in reversed(events) if event.kind in MOVES), None)
    if moved is not None:
        promoted = datetime.fromisoformat(moved.time).timestamp()
        gauge("champion_since_timestamp_seconds", "Since when it is.", promoted)
    write_bytes(path, generate_latest(registry))


def record_drift(layout: Layout, report: "DriftReport") -> None:
    """Writes drift.prom."""
    registry = CollectorRegistry()
    looked_at = datetime.fromisoformat(report.looked_at).timestamp()
    Gauge("tanuki_drift_last_look_timestamp_seconds", "When drift was looked for.", registry=registry).set(looked_at)
    Gauge("tanuki_drift_found", "Whether there was drift.", registry=registry).set(report.outcome == "drift")
    Gauge("tanuki_drift_answers", "Captured answers that were compared.", registry=registry).set(report.num_compared)
    p_value = Gauge("tanuki_drift_p_value", "Of each test, after Holm.", ["test"], registry=registry)
    for name, test in report.tests.items():
        p_value.labels(name).set(test["adjusted_p_value"])
    write_bytes(_folder(layout) / "drift.prom", generate_latest(registry))


def _folder(layout: Layout) -> Path:
    """Beside the versions, where a server looks; in the workspace, where these are behind a URL."""
    place = registry_place(layout)
    return layout.run_metrics_dir if "://" in place else Path(place) / layout.run_metrics_dir.name


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Values by name and label's value; empty where there is no file, or one that is damaged."""
    try:
        families = list(text_string_to_metric_families(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
    return {
        family.name: {"".join(sample.labels.values()): sample.value for sample in family.samples} for family in families
    }
