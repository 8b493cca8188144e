"""What validate_data and evaluate found, as artifacts of a Prefect run: numbers, pictures, and the way to the pages."""

import base64
import csv
import io
import json
from pathlib import Path

from PIL import Image
from prefect.artifacts import create_image_artifact, create_link_artifact, create_table_artifact

from tasks.layout import Layout

SIDE_PX = 1600
JPEG_QUALITY = 80


def publish_validation(layout: Layout) -> None:
    """Puts the pages of the last validation into the Prefect run, also where it stopped the run.

    The pictures go along inside the artifacts, so that a server elsewhere shows them; Data Docs are linked where they
    lie.
    """
    pages = layout.validation_dir / "docs" / "index.html"
    if pages.is_file():
        create_link_artifact(pages.as_uri(), "Data Docs", key="data-docs", description="Every expectation")
    if layout.report("validate_data").is_file():
        facts = json.loads(layout.report("validate_data").read_text(encoding="utf-8"))
        table = [{"what": what, "value": json.dumps(value, ensure_ascii=False)} for what, value in facts.items()]
        create_table_artifact(table, key="data-validation", description="What is trained on, and what was left out")
    _publish_pictures(layout.validation_dir, "data")


def publish_evaluation(layout: Layout) -> None:
    """Puts the learning curve, the pictures of the evaluation and the way to its page and the gate's into the run."""
    if layout.epochs.is_file():
        with layout.epochs.open(encoding="utf-8", newline="") as file:
            create_table_artifact(list(csv.DictReader(file)), key="model-epochs", description="The learning curve")
    _publish_pictures(layout.evaluation_dir, "model")
    for page, name in ((layout.evaluation_page, "Evaluation"), (layout.decision_page, "Decision")):
        if page.is_file():
            create_link_artifact(page.as_uri(), name, key=f"model-{name.lower()}", description=f"{name}, as a page")


def _publish_pictures(folder: Path, room: str) -> None:
    for sheet in sorted(folder.glob("*.png")):
        key = f"{room}-{sheet.stem.lower().replace('_', '-')}"
        create_image_artifact(_inline(sheet.read_bytes()), key=key, description=sheet.stem.replace("_", " "))


def _inline(png: bytes) -> str:
    """A picture as an address that holds it."""
    with Image.open(io.BytesIO(png)) as picture:
        small = picture.convert("RGB")
    small.thumbnail((SIDE_PX, SIDE_PX))
    jpeg = io.BytesIO()
    small.save(jpeg, format="JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}"
