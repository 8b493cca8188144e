"""Commands about ways to learn: a pretrained model as it is, all ways side by side, and what a model withstands."""

import json
from typing import Annotated, Any

import typer
from rich.markup import escape

from flows.commands.terminal import Json, asides, out, print_json
from flows.workspace import exclusive, find_workspace, run_recipe

ATTACK_TIMEOUT_S = 24 * 3600.0

app = typer.Typer()
pretrained_app = typer.Typer(
    help="A pretrained model as it is: its own classifier, its own labels.", no_args_is_help=True
)


@app.command()
def compare(
    context: typer.Context,
    ways: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WAY...]",
            help="as_is, scratch, top, full, adversarial, beside probe, which always runs; all where none is named.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run every way to learn from your images as DVC experiments, and say what these images need."""
    layout = find_workspace(context.obj)
    asides.print("Starting Prefect and the experiments ...", style="dim")
    from flows.compare import WAYS
    from flows.compare import compare as compare_flow
    from flows.server import prefect_server

    names = [way.name for way in WAYS]
    if unknown := sorted(set(ways or ()) - set(names)):
        raise typer.BadParameter(f"No such way: {', '.join(unknown)}. There is: {', '.join(names)}.")
    with prefect_server(layout):
        report = compare_flow(layout.root, ways=tuple(ways or ()))
    if as_json:
        print_json(report)
        return
    for line in ways_lines(report):
        out.print(escape(line))
    for sentence in report["needs"]:
        out.print(escape(sentence))
    out.print(
        escape("Look at      data/reports/compare/index.html, or `dvc exp show`; `dvc exp apply compare-top` takes one")
    )


def ways_lines(report: dict[str, Any]) -> list[str]:
    """The ways as a terminal shows them, a line each."""
    metric = "balanced" if report["balanced"] else "accuracy"
    head = ("way", metric, "interval", "points to probe", "trained", "seconds", "ms", "under attack")
    missing = [(each["title"], *["–"] * (len(head) - 1)) for each in report["missing"]]
    rows = [head, *(_cells(each) for each in report["outcomes"]), *missing]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    notes = ["", *(each["note"] for each in report["outcomes"]), *(each["reason"] for each in report["missing"])]
    return [
        f"{'  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))}  {note}".rstrip()
        for row, note in zip(rows, notes, strict=True)
    ]


def _cells(outcome: dict[str, Any]) -> tuple[str, ...]:
    """A way's numbers as text."""
    robust = [outcome[name] for name in ("robust_accuracy", "robust_accuracy_low", "robust_accuracy_high")]
    ends = [100 * outcome[name] for name in ("difference", "difference_low", "difference_high")]
    return (
        outcome["title"],
        f"{outcome['accuracy']:.1%}",
        f"{outcome['accuracy_low']:.1%} to {outcome['accuracy_high']:.1%}",
        "" if outcome["name"] == "probe" else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ends),
        f"{outcome['trained_parameters']:,}",
        f"{outcome['seconds']:.1f}",
        f"{1e3 * outcome['latency_s']:.1f}",
        "{:.1%} ({:.1%} to {:.1%})".format(*robust),
    )


@app.command()
def attack(context: typer.Context, as_json: Json = False) -> None:
    """Attack the last retrain's model on test images: how often it is right when they are changed to mislead it."""
    layout = find_workspace(context.obj)
    with exclusive(layout, "attack"):
        run_recipe(layout, "attack", timeout_s=ATTACK_TIMEOUT_S)
    report: dict[str, Any] = json.loads(layout.report("attack").read_text(encoding="utf-8"))
    if as_json:
        print_json(report)
        return
    out.print(f"{report['num_images']} test images, each value changed by at most {report['epsilon']:g} of 255")
    for name, found in report["accuracy"].items():
        shares = (found[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
        out.print(f"{name.replace('_', ' '):18}  {'{:.1%}  ({:.1%} to {:.1%})'.format(*shares)}")
    out.print(escape(report["meaning"]))


@app.command()
def pretrain(context: typer.Context, as_json: Json = False) -> None:
    """Train a backbone on a larger, related set, as the section pretrain of params.yaml says."""
    layout = find_workspace(context.obj)
    asides.print("Starting Prefect and the training ...", style="dim")
    from flows.server import prefect_server

    with prefect_server(layout):
        from flows.pretrain import pretrain as pretrain_flow

        made = pretrain_flow(layout.root)
    if as_json:
        print_json(made)
    else:
        out.print(f"{made['weights']}: {made['architecture']}, {made['size_bytes'] / 1e6:.1f} MB")
        out.print(
            f"Next: backbone.source: [bold]file:{made['weights']}[/] in params.yaml, then [bold]tanuki retrain[/]"
        )


@app.command()
def extract(
    context: typer.Context,
    parts: Annotated[int, typer.Option(help="Processes that share the work: one a GPU or a machine.", min=1)],
    dask: Annotated[str | None, typer.Option(help="Address of a Dask cluster's scheduler (the extra scale).")] = None,
) -> None:
    """Fill the feature store in parts, side by side, so that the next retrain finds all features there."""
    layout = find_workspace(context.obj)
    asides.print("Starting Prefect and the extraction ...", style="dim")
    from flows.server import prefect_server

    with prefect_server(layout):
        from flows.extract import extract as extract_flow
        from flows.extract import on_dask

        (on_dask(dask) if dask else extract_flow)(layout.root, parts=parts)
    out.print("Next: [bold]tanuki retrain[/]")


@pretrained_app.command("export")
def export_pretrained(context: typer.Context, as_json: Json = False) -> None:
    """Make a bundle of the backbone's own classifier with its own labels, without a step of training."""
    from flows.pretrained import export_pretrained

    layout = find_workspace(context.obj)
    made = export_pretrained(layout)
    if as_json:
        print_json(made)
        return
    out.print(
        escape(f"{made['bundle']}: {made['architecture']} as it is, {made['num_classes']:,} classes, ")
        + f"{made['size_bytes'] / 1e6:.1f} MB, bundle {made['bundle_digest'][:12]}"
    )
    out.print(escape(f"Next: tanuki predict --bundle {made['bundle']} FILE..., tanuki serve --bundle {made['bundle']}"))
