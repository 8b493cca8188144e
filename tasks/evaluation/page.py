"""Pages for people: one HTML file each, pictures and style inside, so that it can be mailed and read offline.

The texts are escaped by Jinja, whatever letters a label holds. Called by tasks.evaluate, and by the gate's flow.
"""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

TEMPLATES = Path(__file__).parent / "templates"


def render_page(template: str, **facts: Any) -> str:
    """A page's HTML.

    Args:
        template: A file of templates/.
        facts: What it tells.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**facts).lstrip()


def inline_png(picture: bytes | NDArray[np.uint8]) -> str:
    """A PNG's bytes, or RGB pixels (H, W, 3), as the address of an image that needs no other file."""
    if not isinstance(picture, bytes):
        data = io.BytesIO()
        Image.fromarray(picture).save(data, "PNG")
        picture = data.getvalue()
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
