"""Encoded pictures to upright pixels, RGB or luma: the only decoder of training, caching, evaluation and serving.

JPEG goes through simplejpeg, which gives Pillow's pixels bit for bit in a third of the time; everything else, and a
JPEG that simplejpeg is unsure about, through Pillow. Nothing here scales, crops or normalises: that is inside the
model's graph. Safe to call from several threads.
"""

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from deploy.errors import ImageError

Pixels = NDArray[np.uint8]

MAX_PIXELS: Final = 100_000_000

# Formats that Pillow tells apart by a magic number and decodes by itself: no EPS, which would start Ghostscript.
# JPEG includes MPO.
FORMATS: Final = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "JPEG2000", "PPM")

# What libjpeg only warns of although pixels are missing or wrong. Stray bytes, which it also warns of, do no harm.
JPEG_DAMAGE: Final = ("Premature end", "premature end", "bad Huffman code", "arithmetic code", "instead of RST")

# Formats that Pillow opens in a state from which both header and pixels can be had; others move on to later frames.
ONE_PASS_FORMATS: Final = frozenset({"PNG", "BMP", "DIB", "PPM", "WEBP"})

# Second bytes of a JPEG's markers.
STARTS_OF_FRAME: Final = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive; Huffman all
START_OF_SCAN: Final = 0xDA
EXIF_OR_XMP: Final = 0xE1
JPEG_MODES: Final = {1: "L", 3: "RGB"}

ORIENTATION_TAG: Final = 0x0112
WHITE: Final = (255, 255, 255, 255)


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of its picture.

    Args:
        format: Pillow's name of the format, such as ``JPEG``.
        mode: Pillow's mode before conversion, such as ``L`` or ``CMYK``.
        width: Of the upright picture, in px.
        height: Of the upright picture, in px.
        num_frames: More than 1 for animations; only the first is ever decoded.
        exif_orientation: 1 (upright) to 8.
    """

    format: str
    mode: str
    width: int
    height: int
    num_frames: int
    exif_orientation: int


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """The first frame of an encoded picture as upright RGB.

    EXIF orientation is applied; transparency lies on white; 16-bit and float samples are scaled to 8 bits; colour
    profiles are ignored.

    Args:
        data: The file's bytes.
        max_pixels: More than this is refused before anything is decoded.

    Returns:
        uint8 (H, W, 3), contiguous.

    Raises:
        ImageError: If it is no picture that can be decoded in full. A short reason; the caller knows the name.
    """
    pixels = _decode_plain_jpeg(data, max_pixels, "RGB")
    if pixels is None:
        with _open(data, max_pixels) as image:
            image.load()
            # After load, because TIFF turns itself upright there and drops the tag.
            return np.ascontiguousarray(_upright(_to_rgb(image), _orientation(image)))
    # Pillow's EXIF reader costs more than many a decode: ask it only where there is something to read.
    if _plain_jpeg_header(data) is not None:
        return pixels
    return np.ascontiguousarray(_upright(pixels, read_header(data, max_pixels=max_pixels).exif_orientation))


def decode_luma(data: bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[ImageHeader, Pixels]:
    """What a file says of its picture, and the luma of the first frame as `decode_image` gives it, decoded in full.

    A JPEG holds its luma as it is: chroma is read through but not computed, which saves a fifth to a third of the time.
    It differs from the luma of the RGB pixels by their rounding, and where those were clipped.

    Returns:
        The header and uint8 (H, W), upright and contiguous.

    Raises:
        ImageError: Where `decode_image` would raise one.
    """
    stored = _decode_plain_jpeg(data, max_pixels, "GRAY")
    if stored is not None:
        header = _plain_jpeg_header(data) or read_header(data, max_pixels=max_pixels)
        return header, np.ascontiguousarray(_upright(stored, header.exif_orientation)[:, :, 0])
    with _open(data, max_pixels) as image:
        if image.format in ONE_PASS_FORMATS:
            image.load()  # first: what getexif raises while it loads a broken PNG would be lost
            header = _header(image)
            luma = _to_luma(image)[:, :, None]
            return header, np.ascontiguousarray(_upright(luma, header.exif_orientation)[:, :, 0])
    header = read_header(data, max_pixels=max_pixels)
    return header, np.asarray(Image.fromarray(decode_image(data, max_pixels=max_pixels)).convert("L"))


def read_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """What a file says of its picture, without decoding it.

    Raises:
        ImageError: If it is no picture, or one with more than ``max_pixels``.
    """
    with _open(data, max_pixels) as image:
        return _header(image)


def _header(image: Image.Image) -> ImageHeader:
    """Of an image that was opened and not yet loaded."""
    orientation = _orientation(image)
    # A TIFF already speaks of the upright size.
    turned = orientation >= 5 and image.format != "TIFF"
    width, height = reversed(image.size) if turned else image.size
    return ImageHeader(
        format=str(image.format),
        mode=image.mode,
        width=width,
        height=height,
        num_frames=_num_frames(image),
        exif_orientation=orientation,
    )


def _plain_jpeg_header(data: bytes) -> ImageHeader | None:
    """What Pillow would say of a JPEG whose segments are few and clear, in a fifth of the time.

    None for all others, and where there may be an orientation (Exif or XMP) or more pictures (MPF) to read.
    """
    position, found = 2, None
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker, size = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if marker == START_OF_SCAN:
            return found
        if marker == EXIF_OR_XMP or data[position + 4 : position + 8] == b"MPF\x00" or size < 2:
            return None
        if marker in STARTS_OF_FRAME:
            depth, height, width, num_components = struct.unpack(">BHHB", data[position + 4 : position + 10])
            if depth != 8 or num_components not in JPEG_MODES or found is not None:
                return None
            found = ImageHeader("JPEG", JPEG_MODES[num_components], width, height, 1, 1)
        position += 2 + size
    return None


def _decode_plain_jpeg(data: bytes, max_pixels: int, colorspace: str) -> Pixels | None:
    """RGB or GRAY as stored (not yet upright), or None where Pillow should look at the file.

    Raises:
        ImageError: If the JPEG is too large or damaged.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, stored, _ = simplejpeg.decode_jpeg_header(data)
        if stored in ("CMYK", "YCCK"):
            return None
        _check_size(width, height, max_pixels)
        pixels: Pixels = simplejpeg.decode_jpeg(data, colorspace=colorspace)
    except ValueError as error:
        if any(damage in str(error) for damage in JPEG_DAMAGE):
            raise ImageError(f"damaged or truncated JPEG ({error})") from error
        return None
    return pixels


@contextmanager
def _open(data: bytes, max_pixels: int) -> Iterator[Image.Image]:
    """Pillow's image, its size checked; whatever goes wrong inside becomes an ImageError."""
    if not data:
        raise ImageError("empty file")
    try:
        with _quiet_pillow, Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(*image.size, max_pixels)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(_unknown_format(data)) from error
    except Image.DecompressionBombError as error:
        raise ImageError(f"too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types for bad bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(f"cannot be decoded: {reason}") from error


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ImageError(f"no pixels: {width}x{height}")
    if width * height > max_pixels:
        raise ImageError(f"too large: {width}x{height} is more than {max_pixels / 1e6:g} megapixels")


def _unknown_format(data: bytes) -> str:
    """The reason for bytes that no decoder knows."""
    if data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"hevc"):
        return "HEIC is not supported: convert it to JPEG"
    return f"no picture in a format that is read ({', '.join(FORMATS)}), or broken from its first bytes"


def _to_rgb(image: Image.Image) -> Pixels:
    """uint8 (H, W, 3) of any Pillow mode."""
    if image.mode.startswith("I") or image.mode == "F":
        return np.repeat(_scaled_to_8_bits(np.asarray(image))[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, WHITE), rgba).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _to_luma(image: Image.Image) -> Pixels:
    """uint8 (H, W) of any Pillow mode: the luma of `_to_rgb`."""
    plain = image.mode in ("1", "L", "RGB") and not image.has_transparency_data
    return np.asarray((image if plain else Image.fromarray(_to_rgb(image))).convert("L"))


def _scaled_to_8_bits(samples: NDArray[np.generic]) -> Pixels:
    """Grey samples (H, W) of 16 or 32 bits, or floats, in 0..255.

    Full scale is 65,535 for 16 bits; otherwise the smallest of 1 (floats only), 255, 65,535 and the brightest sample
    itself that holds every sample of the picture.
    """
    values = np.nan_to_num(samples.astype(np.float64), nan=0.0)
    if samples.dtype.itemsize == 2:
        scale = 65_535.0
    else:
        steps = (1.0,) if samples.dtype.kind == "f" else ()
        scale = next((step for step in (*steps, 255.0, 65_535.0) if values.max() <= step), float(values.max()))
    return np.rint(np.clip(values / scale, 0, 1) * 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation, 1 where there is none or it makes no sense."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  a broken EXIF block raises anything, and says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _num_frames(image: Image.Image) -> int:
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # noqa: BLE001  a later frame is broken; only the first is ever used
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """(H, W, C) turned and mirrored as EXIF orientation 1 to 8 asks; a view."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


class _QuietPillow:
    """Ignores Pillow's warnings while any thread decodes: a verdict must not depend on the process's warning filters.

    ``warnings.catch_warnings`` alone is not safe when threads leave it in another order than they entered.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._caught: warnings.catch_warnings[None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._caught is not None:
                self._caught.__exit__(None, None, None)
                self._caught = None


_quiet_pillow = _QuietPillow()
