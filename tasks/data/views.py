"""Views: the few fixed ways in which a training picture is shown to the frozen backbone.

A view is a name. What it does to a picture is a function of the picture's sha256, the name and the augment settings
alone, so that its features can be stored under them and no seed or order of work changes a stored feature.
``centre`` is the picture as it is (the preprocessing graph crops its centre), ``flip`` its mirror image, and ``crop-N``
the N-th random square. Crops are already what the network shall see: preprocess them with ``crop_fraction=1.0``.
Called by tasks.cache_features, tasks.train_head and the augmented stages of tasks.finetune.
"""

import hashlib
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

CENTRE = "centre"
FLIP = "flip"
CROP = "crop-"


def view_names(num_views: int, hflip: bool) -> tuple[str, ...]:
    """The first ``num_views`` views: centre, then its mirror image where allowed, then random squares.

    Args:
        num_views: How many, at least 1.
        hflip: May a picture be mirrored?
    """
    fixed = (CENTRE, FLIP) if hflip else (CENTRE,)
    crops = tuple(f"{CROP}{number}" for number in range(1, num_views + 1))
    return (fixed + crops)[:num_views]


def training_views(
    views: int | Literal["auto"], *, num_train: int, min_area_fraction: float, hflip: bool
) -> tuple[str, ...]:
    """The view variants that the features of the training images are taken from.

    Args:
        views: How many, or auto: 4 below 500 training images, 2 below 20,000, else 1 (as METHOD.md's table has it).
        num_train: Number of training images.
        min_area_fraction: See `apply_view`.
        hflip: See `apply_view`.
    """
    if views == "auto":
        views = 4 if num_train < 500 else 2 if num_train < 20_000 else 1
    return tuple(
        view_variant(name, min_area_fraction=min_area_fraction, hflip=hflip) for name in view_names(views, hflip)
    )


def is_crop(view: str) -> bool:
    """Whether a view (or variant) is a random square, to be preprocessed with ``crop_fraction=1.0``."""
    return view.startswith(CROP)


def view_variant(view: str, *, min_area_fraction: float, hflip: bool) -> str:
    """The name of a view with those settings that change its pixels, such as ``crop-1@0.5`` or ``crop-1@0.5h``."""
    return f"{view}@{min_area_fraction:g}{'h' if hflip else ''}" if is_crop(view) else view


def apply_view(
    image: NDArray[np.uint8], view: str, *, key: str, min_area_fraction: float, hflip: bool
) -> NDArray[np.uint8]:
    """Shows one view of a picture.

    A crop is a square of a uniform share in [min_area_fraction, 1] of the largest square of the picture, anywhere in
    it, mirrored half of the time if ``hflip``.

    Args:
        image: (H, W, 3) uint8.
        view: Its name, as `view_names` gives it (a variant of it does as well).
        key: The picture's sha256.
        min_area_fraction: Smallest share of the largest square that a crop keeps, in (0, 1].
        hflip: May a crop be mirrored?

    Returns:
        (h, w, 3) uint8, contiguous.

    Raises:
        ValueError: If there is no such view.
    """
    name = view.partition("@")[0]
    if name == CENTRE:
        return np.ascontiguousarray(image)
    if name == FLIP:
        return np.ascontiguousarray(image[:, ::-1])
    if not is_crop(name):
        raise ValueError(f"no such view: {view!r}")
    area, down, right, mirror = _draws(key, name)
    height, width = image.shape[:2]
    share = min_area_fraction + (1 - min_area_fraction) * area
    side = max(1, round(min(height, width) * math.sqrt(share)))
    top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
    square = image[top : top + side, left : left + side]
    return np.ascontiguousarray(square[:, ::-1] if hflip and mirror < 0.5 else square)


def _draws(key: str, name: str) -> list[float]:
    """Four numbers in [0, 1) from a hash, the same on every machine and for every version of every library."""
    digest = hashlib.sha256(f"{key} {name}".encode()).digest()
    return [int.from_bytes(digest[start : start + 6]) / 2**48 for start in range(0, 24, 6)]
