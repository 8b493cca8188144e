"""What the commands share: where they print, and the options that several of them take."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows.workspace import exclusive
from tasks.layout import Layout

out = Console(highlight=False, soft_wrap=True)
asides = Console(stderr=True, highlight=False, soft_wrap=True)  # what must not stand in a script's JSON

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Publish = Annotated[
    bool,
    typer.Option("--publish", envvar="TANUKI_PUBLISH", help="Publish the champion then, like `tanuki publish`."),
]
SigningKey = Annotated[
    Path | None,
    typer.Option("--key", envvar="TANUKI_SIGNING_KEY", help="Sign the version that becomes champion with this key."),
]


def print_json(value: Any) -> None:
    """Prints for scripts."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def publish_now(layout: Layout) -> None:
    """Publishes the champion and says what of it was."""
    from flows.publication import publish_champion

    with exclusive(layout, "publish"):
        asides.print(escape(publish_champion(layout).text()))
