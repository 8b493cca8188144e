"""What of production is worth a label: pictures for a person, as `tanuki add` reads them. Behind `tanuki label-queue`.

Only pictures that the server kept as they were sent (--capture-pictures originals) can be trained on. The label column
is left empty: a model's own guesses must not come back as truth because somebody forgot to look.
"""

import csv
import io
import logging
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from deploy.capture_files import Captured, read_captured
from deploy.files import sha256_bytes, write_bytes, write_text
from deploy.images import read_header
from flows.registries import registry_of
from tasks.data.contact_sheet import Tile, contact_sheet
from tasks.data.manifest import read_manifest
from tasks.drift.selection import choose_to_label
from tasks.errors import DataError
from tasks.layout import Layout
from tasks.params import load_params

COLUMNS = ("path", "label", "suggested", "probability", "time", "request_id")
SUFFIXES = {"JPEG": ".jpg", "JPEG2000": ".jp2", "DIB": ".bmp", "TIFF": ".tif"}  # of the others: their name
CANDIDATES = 5000  # captured pictures, at random, that are chosen from

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class QueueReport:
    """What was put out to label.

    Args:
        table: The CSV; its column label is for a person to fill.
        sheet: A picture of all.
        num_chosen: Pictures put out.
        num_captured: Pictures to choose from, the known ones not counted.
        num_known: Pictures that are in data/raw already, or were sent more than once.
    """

    table: str
    sheet: str
    num_chosen: int
    num_captured: int
    num_known: int

    def text(self) -> str:
        """The same for a terminal."""
        return (
            f"{self.num_chosen:,} of {self.num_captured:,} captured pictures are in {Path(self.table).parent}; "
            f"{self.sheet} shows them.\n"
            f"Next: fill in the column label of {self.table}, delete the rows that you leave out, then\n"
            f"tanuki add {self.table}"
        )


def write_label_queue(layout: Layout, folder: Path, captures: Path | None = None, *, number: int) -> QueueReport:
    """Writes the most useful captured pictures with a table to fill in.

    Args:
        layout: The workspace.
        folder: Where to; new, or empty.
        captures: Where the server captured; data/captures where None.
        number: Pictures at most.

    Raises:
        DataError: If the folder holds something, or no picture was captured that could be trained on.
        RegistryError: If there is no champion.
    """
    if folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder} is not empty: what somebody labelled there would be lost. Name another folder.")
    params = load_params(layout.params)
    source = captures or layout.captures_dir
    registry = registry_of(layout)
    since = datetime.now(UTC) - timedelta(days=params.drift.window_days)
    captured = read_captured(
        source,
        bundle=registry.require_champion().digest,
        since=since,
        limit=CANDIDATES,
        seed=params.seed,
        only_with_pictures=True,
    )
    rows, pictures = _new_pictures(layout, captured)
    if not rows:
        raise DataError(
            f"{source} holds no picture of the last {params.drift.window_days:g} days that the champion answered and "
            "that data/raw has not got. The server keeps them with --capture-pictures originals; thumbnails are too "
            "small."
        )
    order = choose_to_label(captured.probabilities[rows], captured.embeddings[rows], number=number, seed=params.seed)
    tiles = []
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for place in order:
        row, data = rows[place], pictures[place]
        path = Path("images") / f"{sha256_bytes(data)[:16]}{_suffix(data)}"
        write_bytes(folder / path, data)
        probability = float(captured.probabilities[row].max())
        suggested = captured.labels[row]
        values = (str(path), "", suggested, f"{probability:.4f}", captured.times[row].isoformat(timespec="seconds"))
        writer.writerow(dict(zip(COLUMNS, (*values, captured.request_ids[row]), strict=True)))
        tiles.append(Tile(folder / path, path.name, f"{suggested} {probability:.0%}?"))
    sheet = io.BytesIO()
    contact_sheet(tiles, "to label").save(sheet, format="PNG")
    write_bytes(folder / "sheet.png", sheet.getvalue())
    write_text(folder / "labels.csv", table.getvalue())
    return QueueReport(
        str(folder / "labels.csv"), str(folder / "sheet.png"), len(order), len(rows), len(captured.labels) - len(rows)
    )


def _new_pictures(layout: Layout, captured: Captured) -> tuple[list[int], list[bytes]]:
    """Rows and bytes of the pictures that data/raw has not got, each once."""
    seen = set(read_manifest(layout.images)["sha256"]) if layout.images.is_file() else set()
    rows, pictures = [], []
    for row, data in enumerate(captured.pictures):
        if data is not None and (digest := sha256_bytes(data)) not in seen:
            seen.add(digest)
            rows.append(row)
            pictures.append(data)
    return rows, pictures


def _suffix(data: bytes) -> str:
    kind = read_header(data).format
    return SUFFIXES.get(kind, f".{kind.lower()}")
