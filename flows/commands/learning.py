"""Commands about ways to learn: a pretrained model as it is, all ways side by side, and what a model withstands."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from flows.workspace import exclusive, find_workspace, run_recipe

ATTACK_TIMEOUT_S = 24 * 3600.0

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

pretrained_app = typer.Typer(
    help="A pretrained model as it is: its own classifier, its own labels.", no_args_is_help=True
)
out = Console(highlight=False, soft_wrap=True)
asides = Console(stderr=True, highlight=False, soft_wrap=True)


def compare(
    context: typer.Context,
    ways: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[WAY...]", help="as_is, scratch, probe, top, full, adversarial; all where none is named."
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
        print(json.dumps(report, indent=2, ensure_ascii=False))
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
    head = ("way", "accuracy", "interval", "points to probe", "trained", "seconds", "ms", "under attack")
    rows = [head, *(_cells(each) for each in report["outcomes"])]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    notes = ["", *(each["note"] for each in report["outcomes"])]
    return [
        f"{'  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))}  {note}".rstrip()
        for row, note in zip(rows, notes, strict=True)
    ]


def _cells(outcome: dict[str, Any]) -> tuple[str, ...]:
    """A way's numbers as text."""
    robust = outcome["robust_accuracy"]
    ends = [100 * outcome[name] for name in ("difference", "difference_low", "difference_high")]
    return (
        outcome["title"],
        f"{outcome['accuracy']:.1%}",
        f"{outcome['accuracy_low']:.1%} to {outcome['accuracy_high']:.1%}",
        "" if outcome["name"] == "probe" else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*ends),
        f"{outcome['trained_parameters']:,}",
        f"{outcome['seconds']:.1f}",
        f"{1e3 * outcome['latency_s']:.1f}",
        "" if robust is None else f"{robust:.1%}",
    )


def attack(context: typer.Context, as_json: Json = False) -> None:
    """Attack the last retrain's model on test images: how often it is right when they are changed to mislead it."""
    layout = find_workspace(context.obj)
    with exclusive(layout, "attack"):
        run_recipe(layout, "attack", timeout_s=ATTACK_TIMEOUT_S)
    report: dict[str, Any] = json.loads(layout.report("attack").read_text(encoding="utf-8"))
    if as_json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
        return
    out.print(f"{report['num_images']} test images, each value changed by at most {report['epsilon']:g} of 255")
    for name, found in report["accuracy"].items():
        shares = (found[key] for key in ("accuracy", "accuracy_low", "accuracy_high"))
        out.print(f"{name.replace('_', ' '):18}  {'{:.1%}  ({:.1%} to {:.1%})'.format(*shares)}")
    out.print(escape(report["meaning"]))


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
