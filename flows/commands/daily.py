"""Commands of every day: retrain, see where things stand, ask the champion."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from flows.commands.data import prepare_raw
from flows.commands.terminal import Json, Publish, SigningKey, asides, out, print_json, publish_now
from flows.workspace import find_workspace
from tasks.layout import Layout

if TYPE_CHECKING:
    from deploy.bundle import Bundle

app = typer.Typer()


@app.command()
def retrain(
    context: typer.Context,
    promote: Annotated[bool, typer.Option(help="Let a model that passes the gate become champion.")] = True,
    sample: Annotated[bool, typer.Option("--sample", help="Lay out the sample set if data/raw is empty.")] = False,
    publish: Publish = False,
    key: SigningKey = None,
    as_json: Json = False,
) -> None:
    """Run every stage that something changed for, put the model before the gate, promote it if it is better."""
    layout = find_workspace(context.obj)
    from flows import promotion, reports, run_metrics
    from flows.workspace import data_changed, stale_stages

    promotion.signing_key(key)
    prepare_raw(layout, sample=sample)
    start = time.time()
    stale = None  # any may be
    if not data_changed(layout) and promotion.is_judged(layout, promote=promote):
        stale = stale_stages(layout)
        if not stale:
            if publish:
                publish_now(layout)
            run_metrics.record_retrain(layout, start=start, end=time.time(), succeeded=True)
            summary = reports.summarise(layout, stages=(), verdict=None)
            print_json(summary.as_dict()) if as_json else out.print(summary.text())
            return
    asides.print("Starting Prefect and the pipeline ...", style="dim")
    from flows.server import prefect_server
    from flows.warm import warm_python

    with warm_python(layout, stale), prefect_server(layout):
        from flows.retrain import retrain as retrain_flow

        done = retrain_flow(layout.root, promote=promote, publish=publish, key=key)
    if done.published is not None:
        asides.print(escape(done.published.text()))
    summary = reports.summarise(layout, stages=done.stages, verdict=done.verdict)
    print_json(summary.as_dict()) if as_json else out.print(summary.text())


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show the champion, the data version, and what a retrain would run and why."""
    from flows.reports import standing

    layout = find_workspace(context.obj)
    now = standing(layout)
    if as_json:
        print_json(now.as_dict())
    else:
        out.print(now.text())


@app.command()
def predict(
    context: typer.Context,
    files: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(help="Labels to show for each.", min=1)] = 3,
    version: Annotated[int | None, typer.Option(help="A version instead of the champion.", min=1)] = None,
    folder: Annotated[Path | None, typer.Option("--bundle", help="A bundle's folder instead.")] = None,
    as_json: Json = False,
) -> None:
    """Classify images with the champion; in a clone that has none, with the model that `dvc pull` brought."""
    from deploy.bundle import read_bundle
    from deploy.predictor import Predictor

    if folder and version:
        raise typer.BadParameter("Name a version or a bundle's folder, not both.")
    bundle, number = (read_bundle(folder), None) if folder else _bundle_to_ask(find_workspace(context.obj), version)
    with Predictor(bundle) as predictor:
        answers = predictor.predict_files(files, top_k=top)
    if as_json:
        print_json([{**asdict(answer), "version": number} for answer in answers])
    else:
        for answer in answers:
            labels = "  ".join(f"{label} {share:.1%}" for label, share in answer.top) if answer.error is None else ""
            out.print(f"{escape(answer.source)}: {escape(labels or f'not classified: {answer.error}')}")
    if any(answer.error for answer in answers):
        raise typer.Exit(1)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
)
def serve(context: typer.Context, folder: Annotated[Path | None, typer.Option("--bundle")] = None) -> None:
    """Answer over HTTP with the champion, whichever that is, or `--bundle FOLDER`; its --help tells all options."""
    from deploy.serving.command import main as run_server
    from flows.registries import registry_place

    if folder:
        from flows.pretrained import registry_of_one

        with registry_of_one(folder) as registry_dir:
            run_server(["--registry", str(registry_dir), *context.args], program="tanuki serve")
        return
    is_told = {"--registry", "-h", "--help"} & set(context.args)
    registry = [] if is_told else ["--registry", registry_place(find_workspace(context.obj))]
    run_server([*registry, *context.args], program="tanuki serve")


def _bundle_to_ask(layout: Layout, version: int | None) -> "tuple[Bundle, int | None]":
    """The bundle that answers, and its version; None for the last bundle made, in a clone without a registry.

    The registry is no part of a clone: it is about one place's production. `dvc pull` brings data/bundle.
    """
    from deploy.bundle import read_bundle
    from flows.registries import registry_of

    registry = registry_of(layout)
    if version is None and not registry.versions() and layout.bundle_dir.is_dir():
        asides.print("No version is registered here: data/bundle answers, which no gate was asked about.", style="dim")
        return read_bundle(layout.bundle_dir), None
    chosen = registry.version(version) if version else registry.require_champion()
    return registry.bundle(chosen.id), chosen.id
