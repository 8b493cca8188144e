"""Commands about the registry's versions: which there are, which is champion, where one comes from, who signed it."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from deploy.errors import TanukiError
from flows.commands.terminal import Json, Publish, SigningKey, out, print_json, publish_now
from flows.workspace import exclusive, find_workspace
from tasks.layout import Layout

if TYPE_CHECKING:
    from deploy.bundle import Bundle

app = typer.Typer()

Reason = Annotated[str, typer.Option("--reason", help="Why; kept in the registry's history.")]
BundleOrVersion = Annotated[
    str, typer.Argument(metavar="BUNDLE|VERSION", help="A bundle's folder, or a version's number.")
]
VersionId = Annotated[int, typer.Argument(help="A number from `tanuki versions`.", min=1)]


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
        print_json(told) if as_json else _tell_live(told)
        return
    rows = version_rows(layout)
    if as_json:
        print_json(rows)
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
        publish_now(layout)


@app.command()
def rollback(context: typer.Context, reason: Reason, publish: Publish = False, key: SigningKey = None) -> None:
    """Put the previous champion back, after checking that its bundle is whole."""
    from flows.promotion import roll_back, signing_key

    layout = find_workspace(context.obj)
    with exclusive(layout, "rollback"):
        out.print(roll_back(layout, reason=reason, key=signing_key(key)))
    if publish:
        publish_now(layout)


@app.command("publish")
def publish_champion(context: typer.Context) -> None:
    """Publish the champion: bytes to the DVC remote, then commit, tag (GTO's convention) and push in git."""
    publish_now(find_workspace(context.obj))


@app.command()
def lineage(context: typer.Context, version: VersionId) -> None:
    """Print where a version comes from: git commit, DVC hashes, params, metrics, the gate's decision (JSON)."""
    from flows.reports import version_lineage

    print_json(version_lineage(find_workspace(context.obj), version))


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
        print_json(facts)
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


def _bundle_to_check(root: Path, what: str) -> "Bundle":
    """The bundle of a version, or the one in a folder; a folder needs no workspace."""
    from deploy.bundle import read_bundle
    from flows.registries import registry_of

    if what.isdecimal() and not Path(what).is_dir():
        return registry_of(find_workspace(root)).bundle(int(what))
    return read_bundle(Path(what))


def _tell_live(told: dict[str, Any]) -> None:
    if told["version"] is None:
        out.print(f"No version was champion at {told['at']}.")
    else:
        how = f"{told['how'].replace('_', ' ')} {told['since']}: {told['reason']}"
        out.print(escape(f"Version {told['version']} was champion at {told['at']} ({how})"))
    for warning in told["warnings"]:
        out.print(f"warning: {warning}")
