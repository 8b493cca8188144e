"""What people keep in a folder of images beside the images: odd labels, odd formats, broken files."""

import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = {"0": "no", "1": "1e-3", "2": "two words", "3": "たぬき"}
EXIF_ORIENTATION = 0x0112


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def enormous_png() -> bytes:
    """A few bytes that claim 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def awkward_files() -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Pictures in odd formats that must be learnt from, and files that must be left out."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), np.uint8)
    picture = Image.fromarray(noise)
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = 6
    frames = [Image.fromarray(np.roll(noise, shift, 0)) for shift in range(3)]
    good = {
        "cmyk.jpg": encoded(Image.fromarray(noise[::-1]).convert("CMYK"), "JPEG"),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "sixteen.png": encoded(Image.fromarray(noise[:, :, 0].astype(np.uint16) * 257), "PNG"),
        "turned.jpg": encoded(picture, "JPEG", exif=turned),
    }
    bad = {
        "unreadable.png": b"this is no picture",
        "empty.jpg": b"",
        "truncated.jpg": encoded(picture, "JPEG")[:700],
        "enormous.png": enormous_png(),
    }
    return good, bad


def make_awkward(raw: Path) -> None:
    """Renames four of the digits' classes in data/raw and puts beside the images what nobody checked."""
    for digit, label in LABELS.items():
        (raw / digit).rename(raw / label)
    shutil.copytree(raw / "4", raw / ".hidden")
    good, bad = awkward_files()
    for name, data in {**good, **bad}.items():
        (raw / "no" / name).write_bytes(data)
