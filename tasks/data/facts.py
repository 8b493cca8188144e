"""What an image's bytes say of it: size, mode, statistics and the hash that near-duplicates share.

A pure function of the bytes, so that index_images can keep it under their sha256. A picture is decoded once, to luma,
and everything is computed from that, reduced to at most 256 px.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.errors import ImageError
from deploy.files import sha256_bytes
from deploy.images import decode_luma
from tasks.data.manifest import Facts
from tasks.data.perceptual_hash import Frequencies, hashes, lowest_frequencies

STATISTICS_SIDE_PX: Final = 256
FLAT_CONTRAST: Final = 1.0
ONES: Final = np.ones(STATISTICS_SIDE_PX**2)

Luma = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Look:
    """An image that was looked at, but for its hash, which is cheaper for many at once.

    Args:
        facts: Without ``phash`` and ``group`` where there are ``frequencies``.
        frequencies: Of the picture; None where it does not decode, or its facts are complete.
        is_known: Whether the facts are from an earlier look.
    """

    facts: Facts
    frequencies: Frequencies | None
    is_known: bool = False


def image_facts(data: bytes, *, max_pixels: int) -> Facts:
    """The facts of one encoded image; with ``error`` set where it does not decode.

    Args:
        data: The file's bytes.
        max_pixels: Larger pictures are not decoded.
    """
    return with_hashes([look_at(data, sha256_bytes(data), max_pixels=max_pixels)])[0]


def look_at(data: bytes, sha256: str, *, max_pixels: int) -> Look:
    """Decodes an image and measures it.

    Args:
        data: The file's bytes.
        sha256: Theirs.
        max_pixels: Larger pictures are not decoded.
    """
    try:
        header, pixels = decode_luma(data, max_pixels=max_pixels)
    except ImageError as error:
        return Look(Facts(sha256=sha256, size_bytes=len(data), error=str(error), group=sha256), None)
    height, width = pixels.shape
    factor = max(1, -(-max(height, width) // STATISTICS_SIDE_PX))
    luma = reduced(pixels, factor)
    values = luma.astype(np.float64)
    brightness, variance = moments(values.ravel(), num=luma.size)
    facts = Facts(
        sha256=sha256,
        size_bytes=len(data),
        width=width,
        height=height,
        mode=header.mode,
        format=header.format,
        num_frames=header.num_frames,
        exif_orientation=header.exif_orientation,
        brightness=brightness,
        contrast=variance**0.5,
        sharpness=sharpness(luma),
    )
    return Look(facts, lowest_frequencies(values, height=height, width=width, factor=factor))


def with_hashes(looks: Sequence[Look]) -> list[Facts]:
    """The facts of images that were looked at, complete."""
    measured = [each.frequencies for each in looks if each.frequencies is not None]
    found = iter(hashes(np.stack(measured)) if measured else ())
    return [each.facts if each.frequencies is None else _with_hash(each.facts, next(found)) for each in looks]


def _with_hash(facts: Facts, phash: str) -> Facts:
    return replace(facts, phash=phash, group=near_duplicate_group(phash, facts.sha256, facts.contrast))


def near_duplicate_group(phash: str, sha256: str, contrast: float) -> str:
    """The name that near-duplicates share: the perceptual hash, exactly equal.

    A function of the image alone, so that no other image can move it to another group (and so to another split).
    A flat picture's hash says nothing, being equal for all blank pages: there only exact copies share a group.
    """
    return sha256 if contrast < FLAT_CONTRAST else phash


def reduced(luma: Luma, factor: int) -> Luma:
    """Means of blocks of ``factor`` x ``factor`` px, rounded; blocks at the right and lower edge may be smaller."""
    height, width = luma.shape
    picture = Image.frombuffer("L", (width, height), luma, "raw", "L", 0, 1)  # shares the pixels
    return luma if factor == 1 else np.asarray(picture.reduce(factor))


def sharpness(luma: Luma) -> float:
    """Variance of the Laplacian of luma (H, W); 0 where the picture is too small to have one.

    References:
        Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy".
    """
    height, width = luma.shape
    if min(height, width) < 3:
        return 0.0
    # All rows in one piece, which is faster than row by row; what wraps around lies in the two outer columns.
    pixels = luma.ravel().astype(np.int16)
    inner = pixels[width:-width]
    laplacian = pixels[: -2 * width] + pixels[2 * width :]
    twice = inner + inner
    laplacian -= twice
    laplacian -= twice
    laplacian[1:] += inner[:-1]
    laplacian[:-1] += inner[1:]
    rows = laplacian.reshape(height - 2, width)
    rows[:, 0] = rows[:, -1] = 0
    _, variance = moments(laplacian.astype(np.float64), num=(height - 2) * (width - 2))
    return variance


def moments(values: NDArray[np.float64], *, num: int) -> tuple[float, float]:
    """Mean and variance of ``num`` whole numbers, the others being 0.

    Their sums are exact in whatever order a processor adds them, so that facts are the same everywhere; dot products
    take a third of the time of ``values.sum()``.
    """
    total, squares = float(values @ ONES[: values.size]), float(values @ values)
    mean = total / num
    return mean, squares / num - mean**2
