"""`tanuki drift` and `tanuki label-queue`: what production sees, and what of it is worth a label."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from flows.commands.terminal import Json, out, print_json
from flows.workspace import find_workspace

app = typer.Typer()

Captures = Annotated[
    Path | None, typer.Option(help="Where the server captures (its --capture-dir); data/captures, if not given.")
]


@app.command()
def drift(context: typer.Context, captures: Captures = None, as_json: Json = False) -> None:
    """Compare what the server captured with the test images: pictures, predictions, confidence."""
    from flows.drift_check import look_for_drift
    from flows.run_metrics import record_drift

    layout = find_workspace(context.obj)
    report = look_for_drift(layout, captures)
    record_drift(layout, report)
    if as_json:
        print_json(asdict(report))
    else:
        out.print(escape(report.text()))
        out.print(f"Look at {(layout.drift_dir / 'index.html').relative_to(layout.root)}")


@app.command("label-queue")
def label_queue(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Where to; new, or empty.")],
    number: Annotated[int, typer.Option("--number", "-n", help="Pictures at most.", min=1)] = 100,
    captures: Captures = None,
    as_json: Json = False,
) -> None:
    """Write the captured pictures that are most worth a label, with a table for `tanuki add` to fill in."""
    from flows.label_queue import write_label_queue

    report = write_label_queue(find_workspace(context.obj), folder, captures, number=number)
    if as_json:
        print_json(asdict(report))
    else:
        out.print(escape(report.text()))
