"""A backbone's own classifier as a bundle, and what lets any bundle be served: behind `tanuki pretrained export`."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploy.registry import Registry
from flows.workspace import exclusive, run_recipe
from tasks.layout import Layout

HOUR_S = 3600.0


def export_pretrained(layout: Layout) -> dict[str, Any]:
    """Writes data/pretrained/bundle; the report of tasks/export_pretrained.py."""
    with exclusive(layout, "pretrained export"):
        run_recipe(layout, "export_pretrained", timeout_s=HOUR_S)
    report: dict[str, Any] = json.loads(layout.report("export_pretrained").read_text(encoding="utf-8"))
    return report


@contextmanager
def registry_of_one(bundle_dir: Path) -> Iterator[Path]:
    """A registry, gone afterwards, whose champion is a bundle that lies in a folder.

    Raises:
        BundleError: If it is not whole.
    """
    with tempfile.TemporaryDirectory(prefix="tanuki-") as folder:
        registry = Registry(Path(folder))
        version = registry.register(bundle_dir, {})
        registry.promote(version.id, reason=f"`tanuki serve --bundle {bundle_dir}`", expected=None)
        yield registry.root
