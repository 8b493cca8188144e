"""What an image's bytes say of it: size, mode, statistics and the hash that near-duplicates share.

A pure function of the bytes, so that index_images can keep it under their sha256. A picture is decoded once, to luma,
and everything is computed from that, reduced to at most 256 px, in memory that a thread keeps: fresh arrays of this
size are given back to the system and taken from it anew for each picture, which can cost more than the arithmetic.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.errors import ImageError
from deploy.files import sha256_bytes
from deploy.images import Pixels, decode_luma
from tasks.data.manifest import Facts
from tasks.data.perceptual_hash import Frequencies, hashes, lowest_frequencies

STATISTICS_SIDE_PX: Final = 256
FLAT_CONTRAST: Final = 1.0
MAX_VALUES: Final = STATISTICS_SIDE_PX**2
ONES: Final = np.ones(MAX_VALUES)

Luma = NDArray[np.int16]


class _Scratch(threading.local):
    """Memory of one thread, 1.5 MB."""

    def __init__(self) -> None:
        self.padded = np.empty(4 * MAX_VALUES, np.uint8)
        self.part = np.empty(MAX_VALUES, np.uint16)
        self.luma = np.empty(MAX_VALUES, np.int16)
        self.laplacian = np.empty((2, MAX_VALUES), np.int16)
        self.values = np.empty(MAX_VALUES)


_scratch = _Scratch()


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
    values = _as_floats(luma)
    brightness, variance = moments(values.ravel(), num=luma.size)
    frequencies = lowest_frequencies(values, height=height, width=width, factor=factor)
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
    return Look(facts, frequencies)


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


def reduced(luma: Pixels, factor: int) -> Luma:
    """Means of blocks of ``factor`` x ``factor`` px, rounded; blocks at the right and lower edge may be smaller.

    The result lies in the thread's scratch memory: its next call overwrites it.
    """
    if factor == 2:
        return _halved(luma)
    height, width = luma.shape
    if factor > 1:
        picture = Image.frombuffer("L", (width, height), luma, "raw", "L", 0, 1)  # shares the pixels
        luma = np.asarray(picture.reduce(factor))
    whole = _scratch.luma[: luma.size].reshape(luma.shape)
    np.copyto(whole, luma)
    return whole


def _halved(luma: Pixels) -> Luma:
    """`reduced` by 2, the factor of most data sets' photos, with two px in one number: half of Pillow's time."""
    height, width = (length + length % 2 for length in luma.shape)
    if luma.shape != (height, width):  # doubling the last line leaves the means as they are
        padded = _scratch.padded[: height * width].reshape(height, width)
        padded[: luma.shape[0], : luma.shape[1]] = luma
        padded[luma.shape[0] :, : luma.shape[1]] = luma[-1]
        padded[:, luma.shape[1] :] = padded[:, luma.shape[1] - 1 : luma.shape[1]]
        luma = padded
    even, odd = luma.view(np.uint16).reshape(height // 2, 2, width // 2).swapaxes(0, 1)
    sums, part = (each[: even.size].reshape(even.shape) for each in (_scratch.luma.view(np.uint16), _scratch.part))
    np.bitwise_and(even, 255, out=sums)
    sums += np.right_shift(even, 8, out=part)
    sums += np.bitwise_and(odd, 255, out=part)
    sums += np.right_shift(odd, 8, out=part)
    sums += 2
    sums >>= 2
    return sums.view(np.int16)


def sharpness(luma: Luma) -> float:
    """Variance of the Laplacian of luma (H, W); 0 where the picture is too small to have one.

    References:
        Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy".
    """
    height, width = luma.shape
    if min(height, width) < 3:
        return 0.0
    # All rows in one piece, which is faster than row by row; what wraps around lies in the two outer columns.
    pixels = luma.ravel()
    inner = pixels[width:-width]
    laplacian, fourfold = (each[: inner.size] for each in _scratch.laplacian)
    np.add(pixels[: -2 * width], pixels[2 * width :], out=laplacian)
    laplacian -= np.multiply(inner, 4, out=fourfold)
    laplacian[1:] += inner[:-1]
    laplacian[:-1] += inner[1:]
    rows = laplacian.reshape(height - 2, width)
    rows[:, 0] = rows[:, -1] = 0
    _, variance = moments(_as_floats(laplacian), num=(height - 2) * (width - 2))
    return variance


def _as_floats(whole: NDArray[np.int16]) -> NDArray[np.float64]:
    """Whole numbers as floats, in the thread's scratch memory: its next call overwrites them."""
    values = _scratch.values[: whole.size].reshape(whole.shape)
    np.copyto(values, whole)
    return values


def moments(values: NDArray[np.float64], *, num: int) -> tuple[float, float]:
    """Mean and variance of ``num`` whole numbers, the others being 0.

    Their sums are exact in whatever order a processor adds them, so that facts are the same everywhere; dot products
    take a third of the time of ``values.sum()``.
    """
    total, squares = float(values @ ONES[: values.size]), float(values @ values)
    mean = total / num
    return mean, squares / num - mean**2
