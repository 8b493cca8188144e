"""Pictures of an evaluation, drawn without display or dates, so that the same numbers make the same bytes.

Matplotlib's own font is the only one that every machine has. A label with letters that it lacks is drawn as the number
of its class, which per_class.csv and the page explain: a box would say nothing.
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray
from PIL import Image

from deploy.files import atomic_path
from tasks.evaluation.metrics import ReliabilityBin, wilson_interval

THUMBNAIL_PX = 160
COLUMNS = 6
DOTS_PER_INCH = 110
MAX_COUNTED_CLASSES = 25  # more classes than this and the cells hold no numbers
MAX_NAMED_CLASSES = 60  # more than this and the axes hold no names
INTERVAL = 0.95
INK, ACCENT, FAINT = "#222222", "#b5432a", "#c9c9c9"


@dataclass(frozen=True)
class Mistake:
    """A picture that was answered wrongly.

    Args:
        image: Upright RGB uint8, (H, W, 3).
        truth: Its label, as it is to be drawn.
        predicted: What the model said, as it is to be drawn.
        probability: That the model gave to what it said.
    """

    image: NDArray[np.uint8]
    truth: str
    predicted: str
    probability: float


def drawable_names(labels: Sequence[str]) -> list[str]:
    """The labels, and ``#3`` for the third class where the font lacks a letter of its label."""
    letters = get_font(findfont(FontProperties())).get_charmap()
    return [
        label if all(ord(letter) in letters for letter in label) else f"#{number}"
        for number, label in enumerate(labels, start=1)
    ]


def draw_confusion(path: Path, counts: NDArray[np.int64], labels: Sequence[str]) -> None:
    """Draws how often each class (rows) was taken for each class (columns).

    Args:
        path: A PNG.
        counts: Images, (C, C); row the true class.
        labels: Of the C classes, as they are to be drawn.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.2 + 0.42 * len(labels), 4.5, 14))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(picture, ax=axes, shrink=0.7, label="share of the true class", format=PercentFormatter(1))
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(f"{counts.trace():,} of {counts.sum():,} test images right", loc="left")
    _name_classes(axes, labels)
    if len(labels) <= MAX_COUNTED_CLASSES:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else INK
            axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=8)
    _save(figure, path)


def draw_reliability(path: Path, bins: Sequence[ReliabilityBin], calibration_error: float) -> None:
    """Draws accuracy over confidence with its intervals, and how many answers stand behind each point."""
    figure = Figure(figsize=(5.6, 6.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    confidence = [each.confidence for each in bins]
    top.plot((0, 1), (0, 1), color=FAINT, linewidth=1.5, label="perfectly calibrated")
    accuracy = [each.accuracy for each in bins]
    bounds = [wilson_interval(round(each.accuracy * each.count), each.count, INTERVAL) for each in bins]
    reach = [
        (max(0.0, share - low), max(0.0, high - share)) for share, (low, high) in zip(accuracy, bounds, strict=True)
    ]
    label = f"this model, {INTERVAL:.0%} intervals"
    top.errorbar(confidence, accuracy, yerr=np.transpose(reach), fmt="o", color=ACCENT, ecolor=FAINT, label=label)
    top.set(xlim=(0, 1.02), ylim=(-0.04, 1.05), ylabel="accuracy")
    top.set_title(f"calibration error {calibration_error:.1%}", loc="left")
    top.legend(loc="upper left", frameon=False)
    bottom.bar(confidence, [each.count for each in bins], width=0.8 / max(len(bins), 10), color=INK)
    bottom.set(xlabel="confidence of the answer", ylabel="images")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    for axis in (top.xaxis, top.yaxis):
        axis.set_major_formatter(PercentFormatter(1))
    _save(figure, path)


def draw_mistakes(path: Path, mistakes: Sequence[Mistake]) -> None:
    """Draws wrongly answered pictures, each with what it is and what the model took it for."""
    rows = max(1, -(-len(mistakes) // COLUMNS))
    figure = Figure(figsize=(2 * COLUMNS, 2.75 * rows), layout="constrained")
    if not mistakes:
        figure.text(0.5, 0.5, "no mistakes on the test images", ha="center", va="center", fontsize=16, color=INK)
    for axes, mistake in zip(figure.subplots(rows, COLUMNS).flat if mistakes else (), mistakes, strict=False):
        axes.imshow(thumbnail(mistake.image), interpolation="nearest")
        says = f"says {mistake.predicted} {mistake.probability:.0%}"
        axes.set_title(_wrapped(f"is {mistake.truth}"), fontsize=9, color=INK, parse_math=False, loc="left")
        axes.set_xlabel(_wrapped(says), fontsize=9, color=ACCENT, parse_math=False, loc="left")
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    _save(figure, path)


def _name_classes(axes: Axes, labels: Sequence[str]) -> None:
    if len(labels) > MAX_NAMED_CLASSES:
        axes.set(xticks=[], yticks=[])
        return
    names = [textwrap.shorten(label, 24, placeholder="…") or label[:24] for label in labels]
    is_short = max(map(len, names)) <= 2
    axes.set_xticks(range(len(labels)), names, rotation=0 if is_short else 90, parse_math=False)
    axes.set_yticks(range(len(labels)), names, parse_math=False)


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture padded to a white square of THUMBNAIL_PX, small ones enlarged in whole steps."""
    picture = Image.fromarray(image)
    scale = THUMBNAIL_PX / max(picture.size)
    scale = max(1, int(scale)) if scale >= 1 else scale
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    method = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    square = Image.new("RGB", (THUMBNAIL_PX, THUMBNAIL_PX), "white")
    square.paste(picture.resize(size, method), ((THUMBNAIL_PX - size[0]) // 2, (THUMBNAIL_PX - size[1]) // 2))
    return np.asarray(square)


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 26)[:2])


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
