"""Recipe suspects: the accepted images whose label is probably wrong, most probable first, as a list and as a picture.

No stage: nothing depends on it, and it costs a fit a fold. Every image is judged by a probe that has seen neither it
nor its near-duplicates, whatever its split; these probes are thrown away.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from deploy.files import atomic_path, write_text
from tasks.data.contact_sheet import Tile, contact_sheet
from tasks.data.features import load_features
from tasks.data.image_store import open_images
from tasks.data.manifest import read_manifest
from tasks.errors import DataError
from tasks.models.backbone_card import read_card
from tasks.models.head import read_head, read_notes
from tasks.training.confident_learning import rank_labels
from tasks.training.linear_probe import out_of_fold_probabilities

if TYPE_CHECKING:
    import pandas as pd

    from tasks.layout import Layout
    from tasks.params import TrainHeadParams

COLUMNS = ("path", "label", "suggested", "label_probability", "suggested_probability")


@dataclass(frozen=True)
class SuspectsReport:
    """What was found.

    Args:
        num_judged: Images that a probe could judge.
        num_suspects: Of those, how many probably carry a wrong label.
        confusions: Suspects by ``LABEL -> SUGGESTED``, the most frequent first.
    """

    num_judged: int
    num_suspects: int
    confusions: dict[str, int]


def run(layout: Layout, *, seed: int, train_head: TrainHeadParams) -> SuspectsReport:
    """Writes data/reports/suspects/suspects.csv and, where there are any, suspects.png.

    Raises:
        DataError: If no class has images that could be held out.
        StoreError: If features or the probe are missing: run a retrain first.
    """
    card, labels = read_card(layout.backbone_card), read_head(layout.head_dir).labels
    notes = read_notes(layout.head_dir)
    if notes["log10_c"] is None:
        raise DataError("Labels are judged by the linear probe: set train_head.method to probe, then retrain.")
    images = read_manifest(layout.accepted)
    images = images[images["label"].isin(labels)]
    judged, names, probabilities = out_of_fold_probabilities(
        load_features(layout.features_dir, card, images["sha256"].astype(str).tolist()),
        images["label"].astype(str).tolist(),
        images["group"].astype(str).tolist(),
        seed=seed,
        log10_c=notes["log10_c"],
        folds=train_head.folds,
        max_iterations=train_head.max_iterations,
    )
    if not judged.any():
        raise DataError("No class has two images that are not near-duplicates, so no label can be judged. Add images.")
    suspects = _suspects(images[judged], names, probabilities)
    _write(layout, suspects)
    pairs = Counter(f"{row['label']} -> {row['suggested']}" for row in suspects)
    return SuspectsReport(int(judged.sum()), len(suspects), dict(sorted(pairs.items(), key=lambda item: -item[1])))


def _suspects(
    images: pd.DataFrame, names: tuple[str, ...], probabilities: np.ndarray[tuple[int, int], np.dtype[np.float64]]
) -> list[dict[str, str]]:
    """A record of `COLUMNS` for each suspect, the most suspect first."""
    targets = np.array([names.index(label) for label in images["label"]], dtype=np.intp)
    ranking = rank_labels(probabilities, targets)
    paths = images["path"].tolist()
    return [
        {
            "path": paths[row],
            "label": names[targets[row]],
            "suggested": names[ranking.suggested[row]],
            "label_probability": f"{probabilities[row, targets[row]]:.4f}",
            "suggested_probability": f"{probabilities[row, ranking.suggested[row]]:.4f}",
        }
        for row in ranking.order[: ranking.num_suspects]
    ]


def _write(layout: Layout, suspects: list[dict[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(suspects)
    layout.suspects_sheet.unlink(missing_ok=True)
    write_text(layout.suspects, buffer.getvalue())
    if suspects:
        images = open_images(layout.raw)
        tiles = [
            Tile(images.file(row["path"]), row["path"], f"{row['label']}, or {row['suggested']}?") for row in suspects
        ]
        with atomic_path(layout.suspects_sheet) as temporary:
            contact_sheet(tiles, "labels that look wrong").save(temporary, format="PNG")
