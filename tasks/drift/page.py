"""A comparison as one HTML file for people."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import ImageError
from deploy.images import decode_image
from tasks.drift.compare import Comparison
from tasks.drift.plots import draw_classes, draw_projection
from tasks.evaluation.page import inline_png, render_page
from tasks.evaluation.plots import thumbnail

TESTS = {
    "pictures": "how well a classifier tells them from the reference (area under the ROC curve)",
    "predictions": "how much the mix of predicted classes differs (chi-square)",
    "confidence": "how far the distributions of confidence are apart (Kolmogorov and Smirnov)",
}


@dataclass(frozen=True)
class NovelPicture:
    """One of the most novel pictures.

    Args:
        label: What the model said.
        probability: Of that.
        novelty: Share of the reference that lies closer to the rest of it.
        time: When it was asked.
        request_id: By whom.
        picture: Encoded, or None where none was kept.
    """

    label: str
    probability: float
    novelty: float
    time: str
    request_id: str
    picture: bytes | None


def drift_page(
    report: Any,
    headline: str,
    *,
    level: float,
    comparison: Comparison | None,
    num_reference: int,
    novel: Sequence[NovelPicture],
) -> str:
    """The page.

    Args:
        report: What stands in the JSON beside it.
        headline: The gist.
        level: Of the tests.
        comparison: None where there was too little to compare.
        num_reference: Images of the reference.
        novel: The most novel pictures, in that order.
    """
    if comparison is None:
        return render_page("drift.html", report=report, headline=headline, comparison=None)
    tiles = [{**vars(each), "picture": _inline(each.picture)} for each in novel]
    return render_page(
        "drift.html",
        report=report,
        headline=headline,
        comparison=comparison,
        level=level,
        tests=[(name, what, comparison.tests[name]) for name, what in TESTS.items()],
        projection=inline_png(draw_projection(comparison.projection, num_reference, _first(comparison, len(novel)))),
        classes=inline_png(draw_classes(comparison.classes)),
        novel=tiles,
        has_pictures=any(tile["picture"] for tile in tiles),
    )


def _first(comparison: Comparison, number: int) -> NDArray[np.int64]:
    return comparison.most_novel[:number]


def _inline(picture: bytes | None) -> str | None:
    try:
        return None if picture is None else inline_png(thumbnail(decode_image(picture)))
    except ImageError:
        return None  # a page that lacks a picture is better than none
