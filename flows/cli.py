"""The command `tanuki`. Each command is a few lines: what it does lives in the flows and in deploy.

Exit codes: 0 done, 1 a user's mistake (told in one paragraph), 2 wrong usage, 130 interrupted.
What a command needs is imported when it runs, so that `tanuki predict` waits for neither Prefect nor DVC.
"""

import json
import logging
import os
import sys
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.errors import TanukiError
from deploy.json_log import JsonFormatter
from flows.commands import operate, production
from flows.commands.learning import attack, compare, pretrained_app
from flows.workspace import exclusive, find_workspace, track_raw
from tasks.layout import Layout

if TYPE_CHECKING:
    from deploy.bundle import Bundle
    from flows.corrections import CorrectionReport
    from flows.inbox import IngestReport
    from flows.ingest import AddReport

app = typer.Typer(
    name="tanuki",
    help="Keeps an image classifier fresh: labelled images in, a better-or-nothing ONNX model out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(pretrained_app, name="pretrained")
app.add_typer(production.app)
app.command()(compare)
app.command()(attack)
out = Console(highlight=False, soft_wrap=True)
asides = Console(stderr=True, highlight=False, soft_wrap=True)  # what must not stand in a script's JSON

INTERRUPTED = 130

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the registry's history.")]
Publish = Annotated[
    bool,
    typer.Option("--publish", envvar="TANUKI_PUBLISH", help="Publish the champion then, like `tanuki publish`."),
]
SigningKey = Annotated[
    Path | None,
    typer.Option("--key", envvar="TANUKI_SIGNING_KEY", help="Sign the version that becomes champion with this key."),
]
BundleOrVersion = Annotated[
    str, typer.Argument(metavar="BUNDLE|VERSION", help="A bundle's folder, or a version's number.")
]
VersionId = Annotated[int, typer.Argument(help="A number from `tanuki versions`.", min=1)]


@app.callback()
def workspace(
    context: typer.Context,
    root: Annotated[Path, typer.Option(help="The workspace, or a folder in it.", envvar="TANUKI_ROOT")] = Path(),
    registry: Annotated[
        str | None,
        typer.Option(help="Another registry than data/registry: a folder or a URL.", envvar="TANUKI_REGISTRY"),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more while working.")] = False,
) -> None:
    """Keeps an image classifier fresh: labelled images in, a better-or-nothing ONNX model out."""
    context.obj = root
    if registry:
        os.environ["TANUKI_REGISTRY"] = registry  # where the flows look, in this process and in those it starts
    _configure_logging(verbose)


@app.command()
def sample(context: typer.Context) -> None:
    """Lay out the sample set: 1,797 handwritten digits in data/raw."""
    layout = find_workspace(context.obj)
    with exclusive(layout, "sample"):
        _lay_out_sample(layout)
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
    _print_json(asdict(report)) if as_json else _tell_changed(report)


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
        _print_json(facts) if as_json else out.print(f"Nothing to take from {escape(inbox)}: {left}")
        return
    asides.print("Starting Prefect ...", style="dim")
    from flows.server import prefect_server

    with prefect_server(layout):
        from flows.ingest_inbox import ingest as ingest_flow

        report = ingest_flow(layout.root, inbox, settle_s=settle, publish=publish)
    _print_json(asdict(report)) if as_json else _tell_changed(report)


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
    _print_json(asdict(report)) if as_json else _tell_changed(report)


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
    _print_json(asdict(report)) if as_json else _tell_changed(report)


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
    _prepare_raw(layout, sample=sample)
    start = time.time()
    stale = None  # any may be
    if promotion.is_judged(layout, promote=promote) and not data_changed(layout):
        stale = stale_stages(layout)
        if not stale:
            if publish:
                _publish(layout)
            run_metrics.record_retrain(layout, start=start, end=time.time(), succeeded=True)
            summary = reports.summarise(layout, stages=(), verdict=None)
            _print_json(summary.as_dict()) if as_json else out.print(summary.text())
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
    _print_json(summary.as_dict()) if as_json else out.print(summary.text())


@app.command()
def status(context: typer.Context, as_json: Json = False) -> None:
    """Show the champion, the data version, and what a retrain would run and why."""
    from flows.reports import standing

    layout = find_workspace(context.obj)
    now = standing(layout)
    if as_json:
        _print_json(now.as_dict())
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
        _print_json([{**asdict(answer), "version": number} for answer in answers])
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


@app.command()
def triton(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="The model repository; other models in it stay.")],
    version: Annotated[int | None, typer.Option(help="A version instead of the champion.", min=1)] = None,
    name: Annotated[str, typer.Option(help="The model's name there.")] = "tanuki",
    storage_uri: Annotated[str | None, typer.Option(help="Where KServe finds it: writes its manifest too.")] = None,
) -> None:
    """Write a version as a model repository that Triton serves, and KServe with it."""
    from deploy.triton_repository import write_triton_repository
    from flows.registries import registry_of

    registry = registry_of(find_workspace(context.obj))
    chosen = registry.version(version) if version else registry.require_champion()
    bundle = registry.bundle(chosen.id)
    made = write_triton_repository(folder, bundle, name=name, version=chosen.id, storage_uri=storage_uri)
    out.print(f"{escape(str(made))}: version {chosen.id}. Next: tritonserver --model-repository {escape(str(folder))}")


@app.command()
def versions(
    context: typer.Context,
    at: Annotated[
        str | None, typer.Option(help="Tell who was champion at a time (ISO 8601; UTC where it names no zone) instead.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the registry's versions, what the gate said of each, and which is champion."""
    from flows.reports import live_at, version_rows

    layout = find_workspace(context.obj)
    if at is not None:
        try:
            when = datetime.fromisoformat(at)
        except ValueError as error:
            raise typer.BadParameter(f"{at!r} is no time such as 2026-11-24T12:30.") from error
        told = live_at(layout, when if when.tzinfo else when.replace(tzinfo=UTC))
        _print_json(told) if as_json else _tell_live(told)
        return
    rows = version_rows(layout)
    if as_json:
        _print_json(rows)
        return
    if not rows:
        out.print("No version yet. Next: [bold]tanuki retrain[/]")
        return
    table = Table("version", "", "accuracy", "decision", "registered (UTC)", "bundle")
    for row in rows:
        accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.4f}"
        mark = "champion" if row["champion"] else ""
        said = {"rolled_back": "rolled back to"}.get(row["decision"], row["decision"].replace("_", " "))
        table.add_row(str(row["id"]), mark, accuracy, said, row["registered"], row["digest"][:12])
    out.print(table)


@app.command()
def promote(
    context: typer.Context, version: VersionId, reason: Reason, publish: Publish = False, key: SigningKey = None
) -> None:
    """Make a version champion whatever the gate said of it; the reason goes into the history."""
    from flows.promotion import force, signing_key

    layout = find_workspace(context.obj)
    with exclusive(layout, "promote"):
        out.print(force(layout, version, reason=reason, key=signing_key(key)))
    if publish:
        _publish(layout)


@app.command()
def rollback(context: typer.Context, reason: Reason, publish: Publish = False, key: SigningKey = None) -> None:
    """Put the previous champion back, after checking that its bundle is whole."""
    from flows.promotion import roll_back, signing_key

    layout = find_workspace(context.obj)
    with exclusive(layout, "rollback"):
        out.print(roll_back(layout, reason=reason, key=signing_key(key)))
    if publish:
        _publish(layout)


@app.command("publish")
def publish_champion(context: typer.Context) -> None:
    """Publish the champion: bytes to the DVC remote, then commit, tag (GTO's convention) and push in git."""
    _publish(find_workspace(context.obj))


@app.command()
def lineage(context: typer.Context, version: VersionId) -> None:
    """Print where a version comes from: git commit, DVC hashes, params, metrics, the gate's decision (JSON)."""
    from flows.reports import version_lineage

    _print_json(version_lineage(find_workspace(context.obj), version))


@app.command()
def verify(
    context: typer.Context,
    what: BundleOrVersion,
    public_key: Annotated[
        Path | None, typer.Option(help="Require a signature by this key.", envvar="TANUKI_PUBLIC_KEY")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check every digest of a bundle, its graphs, labels and signature, and run its golden pictures."""
    from deploy.golden import check_golden

    bundle, signed_by = _bundle_to_check(context.obj, what), None
    if public_key:
        from deploy.signing import require_signature

        signed_by = require_signature(bundle, public_key)
    check = check_golden(bundle)
    facts = {
        "directory": str(bundle.directory),
        "digest": bundle.digest,
        "format_version": bundle.format_version,
        "precision": bundle.precision,
        "labels": list(bundle.labels),
        "lineage": dict(bundle.lineage),
        "digests": dict(bundle.digests),
        "golden": asdict(check),
        "signed_by": signed_by,
    }
    if as_json:
        _print_json(facts)
        return
    out.print(
        f"{escape(str(bundle.directory))} is whole: bundle {bundle.digest[:12]} of format version "
        f"{bundle.format_version}, {len(bundle.digests)} files, {len(bundle.labels)} classes.\n"
        f"It answers its {check.num_pictures} golden pictures as it did when it was written: a probability differs by "
        f"at most {check.max_probability_difference:.1e}."
        + (f"\nIt was signed by the key {signed_by}." if signed_by else "")
    )


@app.command()
def keygen(file: Annotated[Path, typer.Argument(help="The private key to write; the public one is FILE.pub.")]) -> None:
    """Make a pair of keys to sign bundles with; the private one never leaves your hands."""
    from deploy.signing import generate_keys, key_id

    public_key = generate_keys(file)
    out.print(f"Key {key_id(public_key)}: {escape(str(file))} signs, {escape(str(public_key))} verifies.")


@app.command()
def sign(
    context: typer.Context,
    what: BundleOrVersion,
    key: Annotated[Path, typer.Option(help="The private key of `tanuki keygen`.", envvar="TANUKI_SIGNING_KEY")],
) -> None:
    """Sign a bundle that is whole, so that others can require it with the public key."""
    from deploy.signing import sign_bundle
    from flows.registries import registry_of

    if what.isdecimal() and not Path(what).is_dir():
        registry = registry_of(find_workspace(context.obj))
        signed_by = registry.sign(int(what), key)
        out.print(f"Version {what} of {escape(registry.place)} is signed by the key {signed_by}.")
        return
    bundle = _bundle_to_check(context.obj, what)
    folder = bundle.directory.resolve()
    made_in = Layout(folder.parents[1])
    if folder == made_in.bundle_dir and made_in.pipeline.is_file():
        raise TanukiError(
            f"{bundle.directory} is an output of DVC, which would make it again. Sign the version that a retrain "
            "registered: `tanuki versions`, then `tanuki sign VERSION --key FILE`."
        )
    signed_by = sign_bundle(bundle, key)
    out.print(f"{escape(str(bundle.directory))} is signed by the key {signed_by}.")


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
        _print_json([asdict(suspect) for suspect in found])
    else:
        out.print(escape(suspects_text(layout, found, top=top)))


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


@app.command("gc")
def collect_garbage(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what it would free.")] = False,
    forget: Annotated[
        list[int] | None,
        typer.Option(help="A version whose features, and data in DVC's cache, may go; may be given again.", min=1),
    ] = None,
    keep_last: Annotated[
        int | None, typer.Option(help="Remove versions never live first, but for so many of the youngest.", min=1)
    ] = None,
    keep_runs: Annotated[int, typer.Option(help="Days for which Prefect keeps this workspace's runs.", min=0)] = 90,
    runs: Annotated[bool, typer.Option(help="Look at Prefect's runs too, which takes a server.")] = True,
    as_json: Json = False,
) -> None:
    """Drop what neither the workspace, git nor a kept version needs: features, DVC's cache, old runs of Prefect."""
    from flows.garbage import collect_garbage

    layout = find_workspace(context.obj)
    with exclusive(layout, "gc"):
        report = collect_garbage(layout, dry_run=dry_run, forget=forget or (), keep_last=keep_last)
        swept = None
        if runs:
            from flows.run_history import sweep_runs

            swept = sweep_runs(layout, older_than_days=keep_runs, dry_run=dry_run)
    if as_json:
        _print_json({**report.as_dict(), "runs": None if swept is None else swept.runs})
        return
    out.print(escape(report.text()))
    if swept is not None:
        out.print(
            f"{'Would remove' if dry_run else 'Removed'} {swept.runs} runs older than {keep_runs} days from Prefect."
        )


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
        _print_json(made)
    else:
        out.print(f"{made['weights']}: {made['architecture']}, {made['size_bytes'] / 1e6:.1f} MB")
        out.print(
            f"Next: backbone.source: [bold]file:{made['weights']}[/] in params.yaml, then [bold]tanuki retrain[/]"
        )


@app.command()
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Check Python, packages, git, DVC, the processor, the disk and Prefect; says what to do."""
    from flows.doctor import examine

    findings = examine(context.obj)
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        marks = {"ok": "[green]ok  [/]", "warning": "[yellow]warn[/]", "problem": "[red]BAD [/]"}
        for finding in findings:
            out.print(f"{marks[finding.level]} {finding.subject}: {escape(finding.text)}")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


app.add_typer(operate.app)


def main() -> None:
    """Runs the command line and turns a user's mistake into one paragraph."""
    from flows.settings import quiet_prefect

    quiet_prefect()
    try:
        app()
    except TanukiError as error:
        _fail(str(error))
    except OSError as error:
        _fail(f"{error}. Nothing was lost; mend it and run the command again.")
    except SystemExit as end:
        if end.code == INTERRUPTED:  # Typer's code for Ctrl-C
            print("Interrupted. Nothing was lost; run the command again to go on.", file=sys.stderr)
        raise


def _fail(text: str) -> None:
    print(f"tanuki: {text}", file=sys.stderr)
    sys.exit(1)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def _configure_logging(verbose: bool) -> None:
    """Lines of our own code to the terminal; other libraries' warnings only."""
    handler = logging.StreamHandler()
    is_json = os.environ.get("TANUKI_LOG_FORMAT") == "json"
    handler.setFormatter(JsonFormatter() if is_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    asides.quiet = is_json
    for room in ("flows", "tasks", "deploy"):
        logger = logging.getLogger(room)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


def _prepare_raw(layout: Layout, *, sample: bool) -> None:
    """Sees to it that there are images to train on, and that DVC knows them as they are now."""
    if not layout.raw.is_dir() or not any(layout.raw.iterdir()):
        if not sample:
            raise TanukiError(
                f"{layout.raw} holds no images. `tanuki add FOLDER` copies yours in (a folder a class), "
                "`tanuki sample` lays out handwritten digits to try with, `dvc pull` fetches what was pushed."
            )
        with exclusive(layout, "sample"):
            _lay_out_sample(layout)
    elif not layout.raw_pointer.is_file():
        with exclusive(layout, "retrain"):
            track_raw(layout)


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


def _bundle_to_check(root: Path, what: str) -> "Bundle":
    """The bundle of a version, or the one in a folder; a folder needs no workspace."""
    from deploy.bundle import read_bundle
    from flows.registries import registry_of

    if what.isdecimal() and not Path(what).is_dir():
        return registry_of(find_workspace(root)).bundle(int(what))
    return read_bundle(Path(what))


def _lay_out_sample(layout: Layout) -> None:
    from flows.sample import lay_out_sample
    from flows.shards import change_layout

    number = lay_out_sample(layout.raw)
    change_layout(layout)
    track_raw(layout)
    asides.print(f"{number} handwritten digits are in {os.path.relpath(layout.raw)}, tracked by DVC.")


def _publish(layout: Layout) -> None:
    from flows.publication import publish_champion

    with exclusive(layout, "publish"):
        asides.print(escape(publish_champion(layout).text()))


def _tell_live(told: dict[str, Any]) -> None:
    if told["version"] is None:
        out.print(f"No version was champion at {told['at']}.")
    else:
        how = f"{told['how'].replace('_', ' ')} {told['since']}: {told['reason']}"
        out.print(escape(f"Version {told['version']} was champion at {told['at']} ({how})"))
    for warning in told["warnings"]:
        out.print(f"warning: {warning}")


def _tell_changed(report: "AddReport | CorrectionReport | IngestReport") -> None:
    out.print(escape(report.text()))
    out.print("Next: [bold]tanuki retrain[/]")


if __name__ == "__main__":
    main()
