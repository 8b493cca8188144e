"""The sample set of a first run: the 1,797 real handwritten digits that ship with scikit-learn."""

import io
import shutil
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from deploy.errors import ImageError
from deploy.images import Pixels, decode_image
from tasks.errors import DataError

LABELS: Final = frozenset("0123456789")
SIDE_PX: Final = 8
MAX_FILE_BYTES: Final = 1000


def lay_out_sample(raw: Path) -> int:
    """Writes the digits as ``raw/LABEL/digit-0000.png``, 8x8 grey; the same bytes each time.

    Args:
        raw: The folder of raw images; missing or empty.

    Returns:
        The number of images written.

    Raises:
        DataError: If ``raw`` holds anything.
    """
    if raw.is_dir() and any(raw.iterdir()):
        raise DataError(f"{raw} is not empty. The sample set is for a first run; your images stay as they are.")
    # Written beside and renamed as a whole: a kill leaves either nothing or everything, with no sync a file.
    staged = raw.with_name(f".{raw.name}.sample")
    shutil.rmtree(staged, ignore_errors=True)
    images = sample_images()
    for path, data in images.items():
        (staged / path).parent.mkdir(parents=True, exist_ok=True)
        (staged / path).write_bytes(data)
    staged.replace(raw)
    return len(images)


def sample_images() -> dict[str, bytes]:
    """The sample set: encoded images by their path under raw."""
    images: dict[str, bytes] = {}
    for index, (label, grey) in enumerate(_digits()):
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, format="PNG")
        images[f"{label}/digit-{index:04d}.png"] = buffer.getvalue()
    return images


def is_sample(data: bytes) -> bool:
    """Whether an encoded picture, of at most `MAX_FILE_BYTES`, is one of the digits, whoever compressed it."""
    if len(data) > MAX_FILE_BYTES:
        return False
    try:
        pixels = decode_image(data, max_pixels=SIDE_PX**2)
    except ImageError:
        return False
    return pixels.shape == (SIDE_PX, SIDE_PX, 3) and pixels[:, :, 0].tobytes() in _known_digits()


@cache
def _digits() -> list[tuple[str, Pixels]]:
    """Label and grey pixels (8, 8) of every digit."""
    from sklearn.datasets import load_digits  # 1 s to import, and few commands need it

    digits = load_digits()
    greys = np.rint(digits.images * 255 / 16).astype(np.uint8)  # (N, 8, 8), from values 0..16
    return [(str(label), grey) for label, grey in zip(digits.target, greys, strict=True)]


@cache
def _known_digits() -> frozenset[bytes]:
    return frozenset(grey.tobytes() for _, grey in _digits())
