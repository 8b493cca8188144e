"""A picture of pictures: what was quarantined, at a glance."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from deploy.errors import ImageError
from deploy.files import Readable
from deploy.images import decode_image

TILE_PX = 160
CAPTION_PX = 44
COLUMNS = 6
MAX_TILES = 48
CAPTION_CHARACTERS = 26


@dataclass(frozen=True)
class Tile:
    """An image file and two lines that say what it is."""

    file: Readable
    name: str
    caption: str


def contact_sheet(tiles: Sequence[Tile]) -> Image.Image:
    """The first images in a grid, each over its caption; a crossed box where a file does not decode.

    Args:
        tiles: At least one.
    """
    shown = tiles[:MAX_TILES]
    rows = -(-len(shown) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * TILE_PX, rows * (TILE_PX + CAPTION_PX)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for index, tile in enumerate(shown):
        x, y = index % COLUMNS * TILE_PX, index // COLUMNS * (TILE_PX + CAPTION_PX)
        thumbnail = _thumbnail(tile.file)
        sheet.paste(thumbnail, (x + (TILE_PX - thumbnail.width) // 2, y + (TILE_PX - thumbnail.height) // 2))
        draw.text((x + 4, y + TILE_PX + 4), tile.name[-CAPTION_CHARACTERS:], fill="black", font=font)
        draw.text((x + 4, y + TILE_PX + 20), tile.caption[:CAPTION_CHARACTERS], fill="firebrick", font=font)
    return sheet


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
    picture.thumbnail((side, side))
    return picture
