"""A picture of pictures: what was quarantined or is unusual, at a glance."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from deploy.errors import ImageError
from deploy.files import Readable
from deploy.images import decode_image

TILE_PX = 160
CAPTION_PX = 70
TITLE_PX = 30
COLUMNS = 6
MAX_TILES = 48
NAME_CHARACTERS = 24
CAPTION_CHARACTERS = 25
CAPTION_LINES = 3


@dataclass(frozen=True)
class Tile:
    """An image file, its name and what there is to say of it."""

    file: Readable
    name: str
    caption: str


def contact_sheet(tiles: Sequence[Tile], title: str) -> Image.Image:
    """The first images in a grid, each over its caption; a crossed box where a file does not decode.

    Args:
        tiles: At least one.
        title: What they have in common.
    """
    shown = tiles[:MAX_TILES]
    rows = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE_PX, TITLE_PX + rows * (TILE_PX + CAPTION_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text(
        (4, 6),
        f"{_one_line(title)}: {_count(len(shown), len(tiles))}",
        fill="black",
        font=ImageFont.load_default(size=16),
    )
    font = ImageFont.load_default(size=11)
    for index, tile in enumerate(shown):
        x, y = index % COLUMNS * TILE_PX, TITLE_PX + index // COLUMNS * (TILE_PX + CAPTION_PX)
        thumbnail = _thumbnail(tile.file)
        sheet.paste(thumbnail, (x + (TILE_PX - thumbnail.width) // 2, y + (TILE_PX - thumbnail.height) // 2))
        draw.text((x + 4, y + TILE_PX + 2), _one_line(tile.name)[-NAME_CHARACTERS:], fill="black", font=font)
        draw.multiline_text((x + 4, y + TILE_PX + 18), _wrapped(tile.caption), fill="firebrick", font=font, spacing=2)
    return sheet


def _count(shown: int, there_are: int) -> str:
    images = "1 image" if there_are == 1 else f"{there_are:,} images"
    return images if shown == there_are else f"the first {shown} of {images}"


def _one_line(name: str) -> str:
    """A name that is drawn in one line, whatever is in it."""
    return "".join(character if character.isprintable() else "?" for character in name)


def _wrapped(caption: str) -> str:
    lines = textwrap.wrap(_one_line(caption), CAPTION_CHARACTERS, max_lines=CAPTION_LINES, placeholder=" …")
    return "\n".join(lines)


def _thumbnail(file: Readable) -> Image.Image:
    side = TILE_PX - 8
    try:
        picture = Image.fromarray(decode_image(file.read_bytes()))
    except (ImageError, OSError):
        box = Image.new("RGB", (side, side), "gainsboro")
        draw = ImageDraw.Draw(box)
        draw.line([(0, 0), (side, side)], fill="grey", width=2)
        draw.line([(0, side), (side, 0)], fill="grey", width=2)
        return box
    if (factor := side // max(picture.size)) > 1:  # a few pixels are seen only large
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    picture.thumbnail((side, side))
    return picture
