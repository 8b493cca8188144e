"""Labels that are probably wrong, for a person to look at: behind `tanuki suspects`."""

import csv
import shlex
from collections import defaultdict
from dataclasses import dataclass

from flows.workspace import run_recipe
from tasks.layout import Layout

HOUR_S = 3600.0


@dataclass(frozen=True)
class Suspect:
    """An image whose label is probably wrong.

    Args:
        path: Relative to data/raw.
        label: What it carries.
        suggested: What a probe that has not seen it says.
        label_probability: Of the label.
        suggested_probability: Of the suggested one.
    """

    path: str
    label: str
    suggested: str
    label_probability: float
    suggested_probability: float


def find_suspects(layout: Layout) -> list[Suspect]:
    """All suspects, the most probable first."""
    run_recipe(layout, "suspects", timeout_s=HOUR_S)
    with layout.suspects.open(encoding="utf-8", newline="") as file:
        return [
            Suspect(
                row["path"],
                row["label"],
                row["suggested"],
                float(row["label_probability"]),
                float(row["suggested_probability"]),
            )
            for row in csv.DictReader(file)
        ]


def suspects_text(layout: Layout, suspects: list[Suspect], *, top: int) -> str:
    """The first of them for a person, with the commands that would relabel them."""
    if not suspects:
        return "No label looks wrong."
    shown = suspects[:top]
    width = max(len(suspect.path) for suspect in shown)
    lines = [
        f"{suspect.path:<{width}}  {suspect.suggested} {suspect.suggested_probability:.1%}, "
        f"its label {suspect.label_probability:.1%}"
        for suspect in shown
    ]
    first = f" The first {top} of them:" if len(suspects) > top else ""
    one = len(suspects) == 1
    sheet, table = (path.relative_to(layout.root) for path in (layout.suspects_sheet, layout.suspects))
    return "\n".join(
        [
            f"{len(suspects):,} {'label looks' if one else 'labels look'} wrong (all in {table}).{first}",
            *lines,
            f"Look at {sheet} before you believe it. Where the suggestion is right:",
            *_relabel_commands(shown),
        ]
    )


def _relabel_commands(suspects: list[Suspect]) -> list[str]:
    """A line for each suggested label, ready to paste."""
    paths = defaultdict(list)
    for suspect in suspects:
        paths[suspect.suggested].append(suspect.path)
    return [f"tanuki relabel {shlex.join([label, *mine])}" for label, mine in paths.items()]
