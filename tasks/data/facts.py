"""What an image's bytes say of it: size, mode, statistics and the hash that near-duplicates share.

A pure function of the bytes, so that index_images can keep it under their sha256.
"""

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.errors import ImageError
from deploy.files import sha256_bytes
from deploy.images import decode_image, read_header
from tasks.data.manifest import Facts

STATISTICS_SIDE_PX = 256
FLAT_CONTRAST = 1.0


def image_facts(data: bytes, *, max_pixels: int) -> Facts:
    """The facts of one encoded image; with ``error`` set where it does not decode.

    Args:
        data: The file's bytes.
        max_pixels: Larger pictures are not decoded.
    """
    sha256 = sha256_bytes(data)
    try:
        header = read_header(data, max_pixels=max_pixels)
        pixels = decode_image(data, max_pixels=max_pixels)
    except ImageError as error:
        return Facts(sha256=sha256, size_bytes=len(data), error=str(error), group=sha256)
    luma = Image.fromarray(pixels).convert("L")
    small = np.asarray(luma.reduce(max(1, -(-max(luma.size) // STATISTICS_SIDE_PX))), dtype=np.float32)
    contrast = float(small.std())
    phash = str(imagehash.phash(luma))
    return Facts(
        sha256=sha256,
        size_bytes=len(data),
        width=pixels.shape[1],
        height=pixels.shape[0],
        mode=header.mode,
        format=header.format,
        num_frames=header.num_frames,
        exif_orientation=header.exif_orientation,
        phash=phash,
        brightness=float(small.mean()),
        contrast=contrast,
        sharpness=sharpness(small),
        group=near_duplicate_group(phash, sha256, contrast),
    )


def near_duplicate_group(phash: str, sha256: str, contrast: float) -> str:
    """The name that near-duplicates share: the perceptual hash, exactly equal.

    A function of the image alone, so that no other image can move it to another group (and so to another split).
    A flat picture's hash says nothing, being equal for all blank pages: there only exact copies share a group.
    """
    return sha256 if contrast < FLAT_CONTRAST else phash


def sharpness(luma: NDArray[np.float32]) -> float:
    """Variance of the Laplacian of luma (H, W) in 0..255; 0 where the picture is too small to have one.

    References:
        Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy".
    """
    if min(luma.shape) < 3:
        return 0.0
    inner = luma[1:-1, 1:-1]
    laplacian = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * inner
    return float(laplacian.var())
