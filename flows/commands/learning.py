"""Commands about ways to learn: a pretrained model as it is, and all ways side by side."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from flows.workspace import find_workspace

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

pretrained_app = typer.Typer(
    help="A pretrained model as it is: its own classifier, its own labels.", no_args_is_help=True
)
out = Console(highlight=False, soft_wrap=True)


@pretrained_app.command("export")
def export_pretrained(context: typer.Context, as_json: Json = False) -> None:
    """Make a bundle of the backbone's own classifier with its own labels, without a step of training."""
    from flows.pretrained import export_pretrained

    layout = find_workspace(context.obj)
    made = export_pretrained(layout)
    if as_json:
        print(json.dumps(made, indent=2, ensure_ascii=False))
        return
    out.print(
        escape(f"{made['bundle']}: {made['architecture']} as it is, {made['num_classes']:,} classes, ")
        + f"{made['size_bytes'] / 1e6:.1f} MB, bundle {made['bundle_digest'][:12]}"
    )
    out.print(escape(f"Next: tanuki predict --bundle {made['bundle']} FILE..., tanuki serve --bundle {made['bundle']}"))
