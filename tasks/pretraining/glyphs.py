"""The generated source task: which character is this, whatever its font, hand, pen and scanner?

A backbone that is to read small pictures has to see many shapes first (62 Latin characters transfer worse
than raw pixels, some hundreds of several scripts transfer well). The characters come from the fonts that ship
with matplotlib, so the task needs no download. Every character of every font becomes two distance maps once
(to the outline, and to the skeleton), and a training picture is a distorted sample of one of them: warping a
distance map and then thresholding it gives affine and elastic variation and any stroke width in one pass, on
a whole batch at a time. Blur, background, polarity, noise and loss of resolution (the usual fate of a scanned
sign) follow.

No digit is a class: see ``select_characters``. Called by ``tasks.pretrain``.

References:
    Simard, Steinkraus and Platt 2003, "Best practices for convolutional neural networks" (elastic distortion).
    Zhang and Suen 1984, "A fast parallel algorithm for thinning digital patterns".
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from fontTools.ttLib import TTFont
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt
from torch.nn import functional

ATLAS_PX = 48
"""Side of a distance map."""
GLYPH_PX = 34
"""Longest side of a glyph inside its distance map; the rest is room for thicker strokes."""
DISTANCE_STEPS = 8
"""Steps a pixel in the stored distance maps (int8, so distances up to 15.9 px)."""
OVERSAMPLING = 2
"""Glyphs are drawn this many times larger than the map, for distances finer than a pixel."""
MEASURED_PX = 64
"""Font size at which a glyph is measured before it is scaled to its place."""
SHAPE_PX = 20
"""Side of the thumbnail by which two characters are held to be of the same shape."""

UNICODE_FONTS = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
TEX_FONTS = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10", "cmmi10", "cmsy10")
"""Computer Modern: TeX's own encodings, which agree with Unicode on the ASCII letters only (cmsy10: the capitals)."""

DIGITS = "0123456789"


@dataclass(frozen=True)
class Character:
    """A class of the source task and the code points that write it (itself and its mathematical alphabets)."""

    name: str
    code_points: tuple[int, ...]


@dataclass(frozen=True)
class GlyphAtlas:
    """Every glyph of the source task as distance maps, positive inside the ink.

    Attributes:
        class_names: One name a class: the characters, then ``invented-000`` and so on.
        distances: (G, 2, 48, 48) int8, in 1/8 px: to the outline (signed), and to the skeleton (never positive).
        labels: (G,) int64, the class of each glyph.
        is_validation: (G,) bool, glyphs that are never trained on.
    """

    class_names: tuple[str, ...]
    distances: torch.Tensor
    labels: torch.Tensor
    is_validation: torch.Tensor


@dataclass(frozen=True)
class GlyphDistortion:
    """How far a training picture may stray from its glyph; half-widths of uniform ranges unless said otherwise.

    Attributes:
        rotation_deg: Rotation.
        shear: Horizontal shear, in widths a height.
        log_aspect: Natural logarithm of the stretch.
        shift: Displacement, as a fraction of the picture's side.
        elastic: Standard deviation of the elastic field at its strongest, as a fraction of the picture's side.
        skeleton_fraction: Share of the pictures drawn along the skeleton with a pen of constant width.
        low_resolution_fraction: Share of the pictures that went through a coarse scan.
        plain_fraction: Share with bright ink on an even black ground, as a scanner gives; the others are any two greys.
        inverted_fraction: Share with dark ink on a bright ground.
        noise: Largest standard deviation of pixel noise, of a range of 0..1.
    """

    rotation_deg: float = 14.0
    shear: float = 0.25
    log_aspect: float = 0.3
    shift: float = 0.06
    elastic: float = 0.07
    skeleton_fraction: float = 0.5
    low_resolution_fraction: float = 0.7
    plain_fraction: float = 0.6
    inverted_fraction: float = 0.2
    noise: float = 0.06


def font_path(font: str) -> Path:
    """The file of a font that ships with matplotlib."""
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{font}.ttf"


@cache
def font_code_points(font: str) -> frozenset[int]:
    """Code points for which a font really has a glyph, from its ``cmap``; the ASCII letters alone for TeX's fonts."""
    with TTFont(font_path(font), lazy=True) as file:
        code_points = frozenset(file.getBestCmap())
    if font not in TEX_FONTS:
        return code_points
    letters = range(0x41, 0x5B) if font == "cmsy10" else (*range(0x41, 0x5B), *range(0x61, 0x7B))
    return code_points & frozenset(letters)


def base_character(code_point: int) -> str | None:
    """The character whose class a code point belongs to, or None if it is not a class of the source task.

    Letters count, symbols do not. A mathematical or full-width letter is another way to write its letter.
    Everything that Unicode calls a number or that decomposes into one (any script's digits, superscript, circled and
    mathematical digits, fractions, Roman numerals) is left out, and so are accented and compound characters, whose
    marks a small scan loses.
    """
    character = chr(code_point)
    if unicodedata.category(character)[0] != "L":
        return None
    folded = unicodedata.normalize("NFKC", character)
    if folded != character and not unicodedata.decomposition(character).startswith(("<font>", "<wide>")):
        if not unicodedata.decomposition(character).startswith(("<initial>", "<medial>", "<final>")):
            return None
        return character if len(folded) == 1 else None
    if len(unicodedata.normalize("NFD", folded)) != 1 or unicodedata.category(folded)[0] != "L":
        return None
    return folded


@cache
def _face(font: str, size_px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(font_path(font), size_px, layout_engine=ImageFont.Layout.BASIC)


def draw_glyph(code_point: int, font: str, side_px: int, longest_px: int) -> NDArray[np.uint8] | None:
    """A glyph in the middle of a square, scaled so that its longest side is ``longest_px``; None if it has no ink.

    Returns:
        (side_px, side_px) uint8, 255 is ink.
    """
    face = _face(font, MEASURED_PX)
    left, top, right, bottom = face.getbbox(chr(code_point))
    longest = max(right - left, bottom - top)
    if longest <= 0:
        return None
    face = _face(font, max(8, round(MEASURED_PX * longest_px / longest)))
    left, top, right, bottom = face.getbbox(chr(code_point))
    canvas = Image.new("L", (side_px, side_px))
    origin = ((side_px - right - left) / 2, (side_px - bottom - top) / 2)
    ImageDraw.Draw(canvas).text(origin, chr(code_point), fill=255, font=face)
    drawn = np.asarray(canvas)
    return drawn if drawn.max() > 127 else None


def select_characters(max_similarity: float, max_characters: int) -> list[Character]:
    """The characters of the source task, in code point order, no two of the same shape and none of a digit's.

    A capital that looks like its small letter or a Cyrillic letter that looks like a Latin one would be label noise;
    a letter that looks like a digit (O, l) would leak the target task. Of two similar shapes the first is kept, and
    the ASCII digits stand before all.

    Args:
        max_similarity: Cosine of two blurred thumbnails above which two shapes are the same, in 0..1.
        max_characters: Keep at most this many, spread evenly over all; 0 keeps all.
    """
    kept = _distinct_characters(max_similarity)
    if not 0 < max_characters < len(kept):
        return list(kept)
    return [kept[index * len(kept) // max_characters] for index in range(max_characters)]


@cache
def _distinct_characters(max_similarity: float) -> tuple[Character, ...]:
    written: dict[str, list[int]] = {}
    for code_point in sorted(frozenset().union(*(font_code_points(font) for font in UNICODE_FONTS))):
        base = base_character(code_point)
        if base is not None:
            written.setdefault(base, []).append(code_point)
    characters = [Character(base, tuple(points)) for base, points in sorted(written.items())]
    digit_shapes = [
        shape for font in UNICODE_FONTS for digit in DIGITS if (shape := _shape(ord(digit), font)) is not None
    ]
    return tuple(_drop_similar(characters, digit_shapes, max_similarity))


def _drop_similar(
    characters: Sequence[Character], taken: Sequence[NDArray[np.float32]], max_similarity: float
) -> list[Character]:
    shapes = np.zeros((len(taken) + len(characters), SHAPE_PX**2), np.float32)
    shapes[: len(taken)] = taken
    kept, num_shapes = list[Character](), len(taken)
    for character in characters:
        shape = _reference_shape(character)
        if shape is None or float((shapes[:num_shapes] @ shape).max()) > max_similarity:
            continue
        shapes[num_shapes] = shape
        num_shapes += 1
        kept.append(character)
    return kept


def _reference_shape(character: Character) -> NDArray[np.float32] | None:
    code_point = ord(character.name)
    font = next((font for font in UNICODE_FONTS if code_point in font_code_points(font)), None)
    return None if font is None else _shape(code_point, font)


def _shape(code_point: int, font: str) -> NDArray[np.float32] | None:
    """A centred unit vector of a glyph's thumbnail, (400,) float32."""
    drawn = draw_glyph(code_point, font, 2 * SHAPE_PX, 2 * SHAPE_PX - 4)
    if drawn is None:
        return None
    small = np.asarray(Image.fromarray(drawn).resize((SHAPE_PX, SHAPE_PX), Image.Resampling.BOX), np.float32).ravel()
    small = small - small.mean()
    norm = float(np.linalg.norm(small))
    return None if norm == 0 else small / np.float32(norm)


def thin(ink: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Skeletons of many drawings at once (Zhang and Suen 1984).

    Args:
        ink: (G, H, W), True is ink; the border must be free of it.

    Returns:
        (G, H, W), True on lines one pixel wide.
    """
    skeleton = ink.copy()
    active = np.arange(len(ink))
    while len(active):
        before = skeleton[active]
        after = _thin_once(_thin_once(before, first=True), first=False)
        skeleton[active] = after
        active = active[(before != after).any((1, 2))]
    return skeleton


def _thin_once(ink: NDArray[np.bool_], *, first: bool) -> NDArray[np.bool_]:
    around = [(-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1)]  # clockwise from north
    n, ne, e, se, s, sw, w, nw = (np.roll(ink, (-dy, -dx), (1, 2)) for dy, dx in around)
    ring = [n, ne, e, se, s, sw, w, nw]
    count = np.sum(ring, axis=0, dtype=np.int8)
    starts = np.sum([~a & b for a, b in zip(ring, [*ring[1:], n], strict=True)], axis=0, dtype=np.int8)
    corner = ~(n & e & s) & ~(e & s & w) if first else ~(n & e & w) & ~(n & s & w)
    kept: NDArray[np.bool_] = ink & ~((count >= 2) & (count <= 6) & (starts == 1) & corner)
    return kept


def distance_maps(drawn: NDArray[np.uint8]) -> NDArray[np.int8]:
    """Distance maps of many drawings.

    Args:
        drawn: (G, 96, 96) uint8, 255 is ink.

    Returns:
        (G, 2, 48, 48) int8 in 1/8 px: to the outline, positive inside; to the skeleton, negated.
    """
    large = drawn > 127
    small = large.reshape(len(drawn), ATLAS_PX, OVERSAMPLING, ATLAS_PX, OVERSAMPLING).mean((2, 4)) >= 0.5
    skeletons = thin(small)
    maps = np.empty((len(drawn), 2, ATLAS_PX, ATLAS_PX), np.int8)
    for index, (ink, skeleton) in enumerate(zip(large, skeletons, strict=True)):
        signed = distance_transform_edt(ink) - distance_transform_edt(~ink)
        outline = signed.reshape(ATLAS_PX, OVERSAMPLING, ATLAS_PX, OVERSAMPLING).mean((1, 3)) / OVERSAMPLING
        line = -distance_transform_edt(~skeleton) if skeleton.any() else outline - 1.0
        maps[index] = np.clip(np.stack([outline, line]) * DISTANCE_STEPS, -127, 127).round()
    return maps


def draw_invented(rng: np.random.Generator, num_hands: int) -> NDArray[np.uint8]:
    """A character that no script has, one to three curved strokes, as several hands write it.

    Returns:
        (num_hands, 96, 96) uint8, 255 is ink.
    """
    side, room = ATLAS_PX * OVERSAMPLING, GLYPH_PX * OVERSAMPLING
    strokes = [_stroke_points(rng) for _ in range(rng.integers(1, 4))]
    drawings = np.empty((num_hands, side, side), np.uint8)
    for hand in range(num_hands):
        moved = [_smooth(points + rng.normal(0, 0.06, points.shape)) for points in strokes]
        low = np.min([line.min(0) for line in moved], axis=0)
        high = np.max([line.max(0) for line in moved], axis=0)
        scale = (room - 6) / max(float((high - low).max()), 1e-3)
        canvas = Image.new("L", (side, side))
        pen = ImageDraw.Draw(canvas)
        for line in moved:
            at = (line - (low + high) / 2) * scale + side / 2
            pen.line([(float(x), float(y)) for x, y in at], fill=255, width=int(rng.integers(5, 10)), joint="curve")
        drawings[hand] = np.asarray(canvas)
    return drawings


def _stroke_points(rng: np.random.Generator) -> NDArray[np.float64]:
    """Control points of one stroke in the unit square: a walk with a turning direction."""
    num_points = int(rng.integers(2, 7))
    points = np.empty((num_points, 2))
    points[0] = rng.uniform(0, 1, 2)
    heading, turn = rng.uniform(0, 2 * math.pi), rng.normal(0, 0.9)
    for index in range(1, num_points):
        step = rng.uniform(0.25, 0.6) * np.array([math.cos(heading), math.sin(heading)])
        points[index] = np.clip(points[index - 1] + step, 0, 1)
        heading += turn + rng.normal(0, 0.5)
    return points


def _smooth(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """A quadratic B-spline through the middles of a polygon's sides, with its ends kept (Chaikin's corner cutting)."""
    for _ in range(3):
        cut = np.empty((2 * len(points) - 2, 2))
        cut[0::2] = 0.75 * points[:-1] + 0.25 * points[1:]
        cut[1::2] = 0.25 * points[:-1] + 0.75 * points[1:]
        points = np.concatenate([points[:1], cut, points[-1:]])
    return points


def build_atlas(
    *,
    seed: int,
    max_characters: int,
    num_invented: int,
    hands_per_invented: int,
    max_similarity: float,
    min_glyphs_to_hold_out: int = 5,
) -> GlyphAtlas:
    """Draw the whole source task once (some ten seconds for a thousand characters).

    One glyph of each class that has ``min_glyphs_to_hold_out`` or more is kept for validation.

    Args:
        seed: Of the invented characters and of the choice of validation glyphs.
        max_characters: At most this many characters of real scripts; 0 for all.
        num_invented: Characters made of random strokes, besides.
        hands_per_invented: Ways in which each invented character is written.
        max_similarity: See ``select_characters``.
        min_glyphs_to_hold_out: Smallest number of glyphs of a class of which one is held out.
    """
    rng = np.random.default_rng(seed)
    names, drawings, labels = list[str](), list[NDArray[np.uint8]](), list[int]()
    side, longest = ATLAS_PX * OVERSAMPLING, GLYPH_PX * OVERSAMPLING
    for character in select_characters(max_similarity, max_characters):
        glyphs = [
            drawn
            for code_point in character.code_points
            for font in (*UNICODE_FONTS, *TEX_FONTS)
            if code_point in font_code_points(font)
            and (drawn := draw_glyph(code_point, font, side, longest)) is not None
        ]
        drawings += glyphs
        labels += [len(names)] * len(glyphs)
        names.append(character.name)
    for number in range(num_invented):
        drawings += list(draw_invented(rng, hands_per_invented))
        labels += [len(names)] * hands_per_invented
        names.append(f"invented-{number:03d}")
    label_array = np.array(labels, np.int64)
    is_validation = np.zeros(len(label_array), bool)
    for label in range(len(names)):
        members = np.flatnonzero(label_array == label)
        if len(members) >= min_glyphs_to_hold_out:
            is_validation[rng.choice(members)] = True
    return GlyphAtlas(
        class_names=tuple(names),
        distances=torch.from_numpy(distance_maps(np.stack(drawings))),
        labels=torch.from_numpy(label_array),
        is_validation=torch.from_numpy(is_validation),
    )


def render(
    distances: torch.Tensor, distortion: GlyphDistortion, image_px: int, generator: torch.Generator
) -> torch.Tensor:
    """A batch of pictures, each a distorted view of one glyph.

    Args:
        distances: (B, 2, 48, 48) int8, rows of an atlas.
        distortion: How far to stray.
        image_px: Side of the pictures.
        generator: Source of all randomness; the same state gives the same pictures.

    Returns:
        (B, 1, image_px, image_px) float32 in 0..1.
    """
    batch = len(distances)
    grid = _warp(batch, distortion, image_px, generator)
    maps = distances.float() / DISTANCE_STEPS
    drawn_with_pen = _uniform(batch, 0, 1, generator) < distortion.skeleton_fraction
    chosen = torch.where(drawn_with_pen, maps[:, 1:], maps[:, :1])  # (B, 1, 48, 48)
    warped = functional.grid_sample(chosen, grid, mode="bilinear", padding_mode="border", align_corners=False)
    thinnest = -0.5 * maps[:, 0].amax((1, 2)).clamp(max=4.0).view(-1, 1, 1, 1)
    outline_offset = thinnest + (1.5 - thinnest) * _uniform(batch, 0, 1, generator)
    offset = torch.where(drawn_with_pen, _uniform(batch, 0.8, 3.4, generator), outline_offset)
    pressure = 0.5 * _smooth_field(batch, 1, image_px, 3, generator)
    softness = _uniform(batch, 0.2, 0.8, generator)
    ink = torch.sigmoid((warped + offset + pressure) / softness)  # (B, 1, S, S)
    ink = _scan(ink, distortion.low_resolution_fraction, generator)
    return _expose(ink, distortion, generator)


def _uniform(batch: int, low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand((batch, 1, 1, 1), generator=generator)


@cache
def _spline_basis(side_px: int, knots: int) -> torch.Tensor:
    """Cubic interpolation from ``knots`` values to ``side_px`` as a matrix, (side_px, knots)."""
    identity = torch.eye(knots).view(1, knots, knots, 1)
    values = functional.interpolate(identity, size=(side_px, 1), mode="bicubic", align_corners=True)
    return values[0, :, :, 0].T.contiguous()


def _smooth_field(batch: int, channels: int, side_px: int, knots: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth noise of about unit variance, (B, channels, side_px, side_px)."""
    coarse = torch.randn((batch, channels, knots, knots), generator=generator)
    basis = _spline_basis(side_px, knots)
    return basis @ (coarse @ basis.T)


def _warp(batch: int, distortion: GlyphDistortion, image_px: int, generator: torch.Generator) -> torch.Tensor:
    """Where in the distance map each pixel looks, (B, S, S, 2) in -1..1: an inverse affine map and an elastic field."""

    def between(half_width: float) -> torch.Tensor:
        return _uniform(batch, -half_width, half_width, generator).view(-1, 1, 1)

    angle, shear = between(math.radians(distortion.rotation_deg)), between(distortion.shear)
    zoom = ATLAS_PX / GLYPH_PX * _uniform(batch, 0.72, 1.04, generator).view(-1, 1, 1)  # glyph's share of the picture
    stretch = torch.exp(between(distortion.log_aspect) / 2)
    cos, sin = torch.cos(angle), torch.sin(angle)
    axis = (2 * torch.arange(image_px) + 1) / image_px - 1
    x, y = axis.view(1, 1, -1), axis.view(1, -1, 1)
    across = (cos * x + (cos * shear - sin) * y) * (stretch / zoom) + 2 * between(distortion.shift)
    down = (sin * x + (sin * shear + cos) * y) / (stretch * zoom) + 2 * between(distortion.shift)
    strength = 2 * distortion.elastic * _uniform(batch, 0, 1, generator)
    elastic = _smooth_field(batch, 2, image_px, 4, generator) * strength
    return torch.stack([across + elastic[:, 0], down + elastic[:, 1]], 3)


def _scan(ink: torch.Tensor, low_resolution_fraction: float, generator: torch.Generator) -> torch.Tensor:
    """Coarse scans of the leading share of the batch: area averages at 7 to 16 pixels a side, enlarged again."""
    side_px = ink.shape[-1]
    num_low = round(len(ink) * low_resolution_fraction)
    parts = list(ink[:num_low].chunk(4)) if num_low else []
    sides = torch.randint(7, 17, (len(parts),), generator=generator).tolist()
    if parts:
        sides[0] = 8
    scans = [functional.interpolate(part, size=(px, px), mode="area") for part, px in zip(parts, sides, strict=True)]
    enlarged = [functional.interpolate(scan, size=(side_px, side_px), mode="bilinear") for scan in scans]
    return torch.cat([*enlarged, ink[num_low:]])


def _expose(ink: torch.Tensor, distortion: GlyphDistortion, generator: torch.Generator) -> torch.Tensor:
    """Ink and ground get their brightness, a slope of light, sometimes the reverse polarity, and noise."""
    batch, side_px = len(ink), ink.shape[-1]
    plain = _uniform(batch, 0, 1, generator) < distortion.plain_fraction
    ground = torch.where(plain, 0.0, _uniform(batch, 0, 0.4, generator))
    bright = torch.where(plain, _uniform(batch, 0.8, 1.0, generator), ground + _uniform(batch, 0.25, 0.6, generator))
    light = 0.08 * _smooth_field(batch, 1, side_px, 3, generator) * ~plain
    picture = ground + (bright - ground) * ink + light
    inverted = _uniform(batch, 0, 1, generator) < distortion.inverted_fraction
    picture = torch.where(inverted, 1 - picture, picture)
    sigma = distortion.noise * _uniform(batch, 0, 1, generator) * ~plain
    return (picture + sigma * torch.randn(picture.shape, generator=generator)).clamp(0, 1)


@dataclass(frozen=True)
class GlyphSource:
    """The source task as ``tasks.pretraining.train`` wants it: endless new pictures, the same ones for the same seed.

    Attributes:
        atlas: What to draw.
        distortion: How far to stray.
        image_px: Side of the pictures.
        images_per_epoch: Pictures an epoch.
        seed: Of the pictures.
    """

    atlas: GlyphAtlas
    distortion: GlyphDistortion
    image_px: int
    images_per_epoch: int
    seed: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return self.atlas.class_names

    @property
    def identity(self) -> str:
        """What decides the pictures, besides the atlas."""
        return f"{self.distortion} {self.image_px} px, {self.images_per_epoch} an epoch, seed {self.seed}"

    def num_training_batches(self, batch_size: int) -> int:
        """Full batches an epoch."""
        return self.images_per_epoch // batch_size

    def training_batches(self, epoch: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pictures (B, 3, S, S) float32 in 0..1 and labels (B,): classes equally often, then glyphs of a class."""
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch + 1))
        glyphs = torch.arange(len(self.atlas.labels))[~self.atlas.is_validation]
        labels = self.atlas.labels[glyphs]
        order = glyphs[torch.argsort(labels, stable=True)]
        counts = torch.bincount(labels, minlength=len(self.class_names))
        starts = counts.cumsum(0) - counts
        drawable = torch.nonzero(counts).view(-1)
        for _ in range(self.num_training_batches(batch_size)):
            classes = drawable[torch.randint(len(drawable), (batch_size,), generator=generator)]
            within = (torch.rand(batch_size, generator=generator) * counts[classes]).long()
            yield self._pictures(order[starts[classes] + within], generator)

    def validation_batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pictures of the glyphs that are never trained on, as in ``training_batches``; always the same ones."""
        generator = torch.Generator().manual_seed(_mix(self.seed, 0))
        held_out = torch.nonzero(self.atlas.is_validation).view(-1)
        held_out = held_out[torch.randperm(len(held_out), generator=generator)]
        for part in torch.split(held_out, batch_size):
            yield self._pictures(part, generator)

    def _pictures(self, glyphs: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = render(self.atlas.distances[glyphs], self.distortion, self.image_px, generator)
        return pictures.expand(-1, 3, -1, -1), self.atlas.labels[glyphs]


def _mix(seed: int, stream: int) -> int:
    """One 63-bit seed for a stream of a seed."""
    return int(np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0] >> 1)
