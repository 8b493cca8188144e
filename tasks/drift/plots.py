"""Pictures of a comparison, as PNG: where the window lies beside the reference, and which classes shifted."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from tasks.drift.compare import ClassShift
from tasks.evaluation.plots import ACCENT, DOTS_PER_INCH, FAINT, INK, drawable_names

CLASSES_DRAWN = 20


def draw_projection(points: NDArray[np.float64], num_reference: int, novel: NDArray[np.int64]) -> bytes:
    """Draws reference and window in the reference's two main components.

    Args:
        points: Of both, the reference's first, (N + M, 2).
        num_reference: N.
        novel: Positions in the window of its most novel pictures, the first of them numbered 1.
    """
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.add_subplot()
    reference, window = points[:num_reference], points[num_reference:]
    for name, each, colour in (("reference", reference, FAINT), ("window", window, ACCENT)):
        axes.scatter(each[:, 0], each[:, 1], s=12, color=colour, label=f"{name} ({len(each):,})", linewidths=0)
    for number, position in enumerate(novel, start=1):
        axes.annotate(
            str(number), tuple(window[position]), xytext=(3, 3), textcoords="offset points", fontsize=8, color=INK
        )
    axes.set(xticks=[], yticks=[], xlabel="first main component", ylabel="second")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    return _png(figure)


def draw_classes(shifts: Sequence[ClassShift]) -> bytes:
    """Draws how often classes were predicted then and now, those that differ most."""
    shown = shifts[:CLASSES_DRAWN]
    figure = Figure(figsize=(7.2, 0.8 + 0.34 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    places = np.arange(len(shown))
    axes.barh(places - 0.2, [each.reference_share for each in shown], height=0.38, color=FAINT, label="reference")
    axes.barh(places + 0.2, [each.window_share for each in shown], height=0.38, color=ACCENT, label="window")
    names = drawable_names([each.label for each in shown])
    marked = [f"{name} *" if each.is_shifted else name for name, each in zip(names, shown, strict=True)]
    axes.set_yticks(places, marked, parse_math=False)
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("share of the predictions (* shifted)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="best", frameon=False)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return data.getvalue()
