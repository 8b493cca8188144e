"""Every kind of file that people have, and the pixels or the reason that come out."""

import io
import itertools
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from deploy.errors import ImageError
from deploy.images import decode_image, decode_luma, read_header

# File of the dirt pack → upright (height, width), or a piece of the reason why it is refused.
DIRT = {
    "16_bit_noise.tif": (32, 32),
    "1_trns.png": (64, 64),
    "broken.png": "no picture",
    "broken_data_stream.png": "cannot be decoded",
    "chi.gif": (240, 320),
    "decompression_bomb.gif": "too large",
    "exif_gps_typeerror.jpg": (531, 800),
    "flower.jpg": (360, 480),
    "flower2.jpg": (225, 300),
    "frozenpond.mpo": (480, 640),
    "hopper.avif": (128, 128),
    "hopper.bmp": (128, 128),
    "hopper.gif": (128, 128),
    "hopper.heif": "HEIC is not supported",
    "hopper.webp": (128, 128),
    "hopper_bad_exif.jpg": (500, 500),
    "hopper_bw_500.png": (500, 500),
    "hopper_gray.jpg": (128, 128),
    "hopper_orientation_3.jpg": (128, 128),
    "hopper_orientation_6.jpg": (128, 128),
    "hopper_orientation_8.webp": (128, 128),
    "icc_profile_big.jpg": (250, 425),
    "junk_jpeg_header.jpg": (768, 1024),
    "l_trns.png": (64, 64),
    "mode_16bit.png": (64, 128),
    "photoshop-200dpi-broken.jpg": (200, 200),
    "pil_sample_cmyk.jpg": (100, 100),
    "rgb.jpg": (100, 100),
    "sugarshack_bad_mpo_header.jpg": (480, 640),
    "transparent.gif": (150, 200),
    "transparent.png": (150, 200),
    "truncated_end_chunk.png": "cannot be decoded",
    "truncated_image.png": "truncated",
    "truncated_jpeg.jpg": "truncated",
    "uncompressed_la.png": (128, 128),
    "unknown_compression_method.png": "no picture",
    "xmp_tags_orientation.png": (268, 326),
    "zero_width.gif": "no picture",
}
TRANSPARENT_OR_DEEP = {"16_bit_noise.tif", "1_trns.png", "l_trns.png", "transparent.png", "uncompressed_la.png"}


@pytest.fixture
def dirt(material: Path) -> Path:
    return material / "dirt_pack"


def encoded(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def drawn(width: int = 31, height: int = 17) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_every_file_of_the_dirt_pack_has_a_verdict(dirt: Path) -> None:
    assert {file.name.removeprefix("pillow_") for file in dirt.glob("pillow_*")} == set(DIRT)


@pytest.mark.parametrize("name", [name for name, verdict in DIRT.items() if isinstance(verdict, tuple)])
def test_an_awkward_picture_becomes_upright_rgb(dirt: Path, name: str) -> None:
    data = (dirt / f"pillow_{name}").read_bytes()
    pixels = decode_image(data)
    header = read_header(data)
    assert (pixels.shape, pixels.dtype) == ((*DIRT[name], 3), np.uint8)
    assert (header.height, header.width) == DIRT[name]
    assert pixels.flags.c_contiguous
    if name not in TRANSPARENT_OR_DEEP:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
        np.testing.assert_array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("name", [name for name, verdict in DIRT.items() if isinstance(verdict, str)])
def test_a_broken_file_is_refused_with_a_reason_that_is_the_same_each_time(dirt: Path, name: str) -> None:
    data = (dirt / f"pillow_{name}").read_bytes()
    reasons = set()
    for _ in range(2):
        with pytest.raises(ImageError, match=DIRT[name]) as caught:
            decode_image(bytes(bytearray(data)))
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert " at 0x" not in reasons.pop()


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(ImageError, match="empty file"):
        decode_image(b"")


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_picture_with_too_many_pixels_is_refused_before_it_is_decoded(file_format: str) -> None:
    data = encoded(drawn(40, 30), format=file_format)
    assert decode_image(data, max_pixels=1200).shape == (30, 40, 3)
    with pytest.raises(ImageError, match="40x30 is more than 0"):
        decode_image(data, max_pixels=1199)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_all_exif_orientations_are_turned_upright(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if file_format == "JPEG" else {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(drawn(), format=file_format, exif=exif, **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    np.testing.assert_array_equal(decode_image(data), expected)
    header = read_header(data)
    assert (header.height, header.width) == expected.shape[:2]
    assert header.exif_orientation == orientation


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_lies_on_white(mode: str) -> None:
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0)).convert("LA" if mode == "LA" else "RGBA")
    data = encoded(clear.convert("P") if mode == "PA" else clear, format="PNG")
    assert (decode_image(data) == 255).all()


def test_16_bit_grey_keeps_its_whole_range() -> None:
    ramp = np.linspace(0, 65_535, 256).astype(np.uint16).reshape(16, 16)
    pixels = decode_image(encoded(Image.fromarray(ramp), format="PNG"))
    np.testing.assert_array_equal(pixels[:, :, 0].ravel(), np.rint(ramp.ravel() / 257))
    assert (pixels[:, :, :1] == pixels).all()


def test_float_grey_from_0_to_1_keeps_its_whole_range() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    pixels = decode_image(encoded(Image.fromarray(ramp), format="TIFF"))
    np.testing.assert_array_equal(pixels[:, :, 0].ravel(), np.arange(256))


def test_a_jpeg_with_a_damaged_middle_is_refused_though_pillow_would_show_it() -> None:
    data = bytearray(encoded(drawn(200, 200), format="JPEG", quality=90))
    middle = len(data) // 2
    data[middle : middle + 40] = b"\xff\xd9" * 20
    with pytest.raises(ImageError):
        decode_image(bytes(data))


def luma_of(data: bytes) -> np.ndarray:
    return np.asarray(Image.fromarray(decode_image(data)).convert("L")).astype(int)


@pytest.mark.parametrize("name", [name for name, verdict in DIRT.items() if isinstance(verdict, tuple)])
def test_luma_is_that_of_the_rgb_pixels_and_comes_with_the_header(dirt: Path, name: str) -> None:
    data = (dirt / f"pillow_{name}").read_bytes()
    header, luma = decode_luma(data)
    assert header == read_header(data)
    assert (luma.shape, luma.dtype) == (DIRT[name], np.uint8)
    difference = np.abs(luma - luma_of(data))
    if header.format not in ("JPEG", "MPO") or header.mode == "CMYK":
        assert not difference.any()
    assert difference.mean() < 1  # in a JPEG, where its colours leave what RGB can show


@pytest.mark.parametrize("name", [name for name, verdict in DIRT.items() if isinstance(verdict, str)])
def test_luma_is_refused_for_the_same_reason(dirt: Path, name: str) -> None:
    data = (dirt / f"pillow_{name}").read_bytes()
    with pytest.raises(ImageError) as pixels:
        decode_image(data)
    with pytest.raises(ImageError) as luma:
        decode_luma(data)
    assert str(luma.value) == str(pixels.value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_luma_is_turned_upright(orientation: int, file_format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(drawn().convert("L"), format=file_format, exif=exif)
    header, luma = decode_luma(data)
    assert header == read_header(data)
    np.testing.assert_allclose(luma.astype(int), luma_of(data), atol=1)


@settings(max_examples=150)
@given(st.data())
def test_any_damage_that_pixels_are_refused_for_luma_is_refused_for(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(SEEDS))
    broken = bytearray(whole[: data.draw(st.integers(len(whole) // 2, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    verdicts = []
    for decode in (decode_image, lambda each, max_pixels: decode_luma(each, max_pixels=max_pixels)[1]):
        try:
            verdicts.append(decode(bytes(broken), max_pixels=1_000_000).shape[:2])
        except ImageError:
            verdicts.append(None)
    assert verdicts[0] == verdicts[1]


@settings(max_examples=150)
@given(st.data())
def test_any_bytes_give_pixels_or_an_image_error(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from(SEEDS))
    broken = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3)) if broken else 0):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    try:
        pixels = decode_image(bytes(broken), max_pixels=1_000_000)
    except ImageError:
        return
    assert pixels.ndim == 3
    assert pixels.dtype == np.uint8


SEEDS = [encoded(drawn(), format=name) for name in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")]


def test_threads_see_the_same_pixels_and_leave_the_warning_filters_alone(dirt: Path) -> None:
    files = sorted(file for file in dirt.glob("pillow_*") if isinstance(DIRT[file.name.removeprefix("pillow_")], tuple))
    data = [file.read_bytes() for file in files]
    before = list(warnings.filters)
    alone = [decode_image(each) for each in data]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(decode_image, itertools.chain(data, data)))
    assert all(np.array_equal(a, b) for a, b in zip(together, alone + alone, strict=True))
    assert warnings.filters == before
