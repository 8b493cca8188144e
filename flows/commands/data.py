"""Commands about labelled images: in, out, under another label, and what is wrong with them."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from deploy.errors import TanukiError
from flows.commands.terminal import Json, asides, out, print_json
from flows.workspace import exclusive, find_workspace, track_raw
from tasks.layout import Layout

if TYPE_CHECKING:
    from flows.corrections import CorrectionReport
    from flows.inbox import IngestReport
    from flows.ingest import AddReport

app = typer.Typer()


@app.command()
def sample(context: typer.Context) -> None:
    """Lay out the sample set: 1,797 handwritten digits in data/raw."""
    layout = find_workspace(context.obj)
    with exclusive(layout, "sample"):
        lay_out_sample(layout)
    out.print("Next: [bold]tanuki retrain[/]")


@app.command()
def add(
    context: typer.Context,
    source: Annotated[
        str, typer.Argument(help="A folder a class, a table of path,label[,split], tar shards, or a URL of folders.")
    ],
    replace: Annotated[bool, typer.Option("--replace", help="Drop the sample set first.")] = False,
    as_json: Json = False,
) -> None:
    """Copy labelled images into data/raw, each checked and none twice, and put them under DVC."""
    from flows.ingest import add_images
    from flows.shards import shard_bytes

    layout = find_workspace(context.obj)
    with exclusive(layout, "add"):
        report = add_images(
            source, layout.raw, replace=replace, log=layout.raw_changes, shard_bytes=shard_bytes(layout)
        )
        track_raw(layout)
    print_json(asdict(report)) if as_json else _tell_changed(report)


@app.command()
def ingest(
    context: typer.Context,
    inbox: Annotated[str, typer.Argument(help="A folder, or a URL, that others drop folders of classes into.")],
    publish: Annotated[
        bool, typer.Option("--publish", help="Commit data/raw.dvc to git; push to its upstream.")
    ] = False,
    settle: Annotated[float, typer.Option(help="Seconds without a change until a file counts as whole.", min=0)] = 10,
    as_json: Json = False,
) -> None:
    """Take in an inbox: check, add, push to the DVC remote, and only then remove there what was taken."""
    from flows.inbox import look

    layout = find_workspace(context.obj)
    waiting = look(inbox, settle_s=settle)
    if not waiting.settled.images:
        facts = {"settled": 0, "unsettled": waiting.unsettled, "left_out": waiting.settled.skipped}
        left = f"{len(waiting.unsettled):,} images may still be written to, {len(waiting.settled.skipped):,} are none."
        print_json(facts) if as_json else out.print(f"Nothing to take from {escape(inbox)}: {left}")
        return
    asides.print("Starting Prefect ...", style="dim")
    from flows.server import prefect_server

    with prefect_server(layout):
        from flows.ingest_inbox import ingest as ingest_flow

        report = ingest_flow(layout.root, inbox, settle_s=settle, publish=publish)
    print_json(asdict(report)) if as_json else _tell_changed(report)


@app.command()
def relabel(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="LABEL FILE...", help="The right label, and the images it is right for."),
    ] = None,
    table: Annotated[Path | None, typer.Option("--from", help="A CSV with the columns path and label instead.")] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; kept in the log.")] = None,
    as_json: Json = False,
) -> None:
    """Move images of data/raw to another label, all or none, recorded in data/raw-changes.jsonl."""
    from flows import corrections

    if (len(words or ()) < 2) == (table is None) or (words and table):
        raise typer.BadParameter("Name a label and the files it is right for, or a CSV with --from.")
    label, *files = words or [""]
    wanted = [corrections.Wanted(Path(file), label) for file in files]
    layout = find_workspace(context.obj)
    with exclusive(layout, "relabel"):
        wanted = corrections.read_wanted(table, with_labels=True) if table else wanted
        report = corrections.relabel(layout, wanted, reason=reason)
        track_raw(layout)
    print_json(asdict(report)) if as_json else _tell_changed(report)


@app.command()
def remove(
    context: typer.Context,
    reason: Annotated[str, typer.Option("--reason", help="Why; kept in the log.")],
    files: Annotated[list[Path] | None, typer.Argument(help="Images, relative to data/raw or by real path.")] = None,
    table: Annotated[Path | None, typer.Option("--from", help="A CSV with the column path instead.")] = None,
    as_json: Json = False,
) -> None:
    """Take images out of data/raw, all or none, recorded in data/raw-changes.jsonl."""
    from flows import corrections

    if bool(files) == (table is not None):
        raise typer.BadParameter("Name the files, or a CSV with --from.")
    layout = find_workspace(context.obj)
    with exclusive(layout, "remove"):
        named = [corrections.Wanted(file, None) for file in files or ()]
        wanted = corrections.read_wanted(table, with_labels=False) if table else named
        track_raw(layout)  # first, so that DVC's cache has the bytes of what goes
        report = corrections.remove(layout, wanted, reason=reason)
        track_raw(layout)
    print_json(asdict(report)) if as_json else _tell_changed(report)


@app.command("layout")
def change_layout(context: typer.Context) -> None:
    """Bring data/raw into the layout that data.layout of params.yaml names: a file an image, or shards."""
    from flows.shards import change_layout

    layout = find_workspace(context.obj)
    with exclusive(layout, "layout"):
        out.print(change_layout(layout))
        track_raw(layout)
    out.print("Next: [bold]tanuki retrain[/] comes to the same model; no image is decoded again")


@app.command()
def suspects(
    context: typer.Context,
    top: Annotated[int, typer.Option(help="How many to show.", min=1)] = 20,
    as_json: Json = False,
) -> None:
    """List the images whose label is probably wrong, with a picture of them; needs the features of a retrain."""
    from flows.suspects import find_suspects, suspects_text

    layout = find_workspace(context.obj)
    found = find_suspects(layout)
    if as_json:
        print_json([asdict(suspect) for suspect in found])
    else:
        out.print(escape(suspects_text(layout, found, top=top)))


def prepare_raw(layout: Layout, *, sample: bool) -> None:
    """Sees to it that there are images to train on, and that DVC knows them as they are now."""
    if not layout.raw.is_dir() or not any(layout.raw.iterdir()):
        if not sample:
            raise TanukiError(
                f"{layout.raw} holds no images. `tanuki add FOLDER` copies yours in (a folder a class), "
                "`tanuki sample` lays out handwritten digits to try with, `dvc pull` fetches what was pushed."
            )
        with exclusive(layout, "sample"):
            lay_out_sample(layout)
    elif not layout.raw_pointer.is_file():
        with exclusive(layout, "retrain"):
            track_raw(layout)


def lay_out_sample(layout: Layout) -> None:
    """The sample set, in the layout that params.yaml names, under DVC."""
    from flows.sample import lay_out_sample
    from flows.shards import change_layout

    number = lay_out_sample(layout.raw)
    change_layout(layout)
    track_raw(layout)
    asides.print(f"{number} handwritten digits are in {os.path.relpath(layout.raw)}, tracked by DVC.")


def _tell_changed(report: "AddReport | CorrectionReport | IngestReport") -> None:
    out.print(escape(report.text()))
    out.print("Next: [bold]tanuki retrain[/]")
