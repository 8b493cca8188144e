"""Commands that keep a box going: everything on it, what may go from it, what is wrong with it."""

import os
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from deploy import json_log
from flows.commands.terminal import Json, out, print_json
from flows.workspace import exclusive, find_workspace

if TYPE_CHECKING:
    from flows.up.status import UpStatus

app = typer.Typer()


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def up(
    context: typer.Context,
    host: Annotated[str, typer.Option(help="Address of the model server; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the model server.")] = 8000,
    prefect_host: Annotated[
        str, typer.Option(help="Address of Prefect's server and pages, which know no password.")
    ] = "127.0.0.1",
    prefect_port: Annotated[int, typer.Option(help="Port of Prefect's server and pages.")] = 4200,
    database: Annotated[
        str | None,
        typer.Option(
            help="Prefect's database: postgresql+asyncpg://USER:PASSWORD@HOST/NAME; SQLite, if not given.",
            envvar="TANUKI_DATABASE",
            show_envvar=True,
        ),
    ] = None,
    notify: Annotated[
        list[str] | None,
        typer.Option(
            help="Whom to tell of promotions, refusals and failures: https://... or mailto://...; may be repeated.",
            envvar="TANUKI_NOTIFY",
            show_envvar=True,
        ),
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Show all parts of what runs here, and do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --status: print JSON, for scripts.")] = False,
) -> None:
    """Run everything on this box until Ctrl-C: Prefect, its worker, the schedules, the model server.

    What is not told here goes on to the model server, such as --capture-dir; see `tanuki serve --help`.
    """
    layout = find_workspace(context.obj)
    if status:
        from flows.up.status import read_facts, read_status

        facts = read_facts(layout)
        if facts is not None:
            os.environ.update({"PREFECT_HOME": str(layout.prefect_home), "PREFECT_API_URL": facts["api"]})
        _tell(read_status(layout), as_json=as_json)
        return
    from deploy.serving.settings import parse_settings
    from flows.up.settings import UpSettings
    from flows.up.supervisor import run_up
    from flows.up.terminal import print_json_line

    parse_settings(["--registry", str(layout.registry_dir), *context.args], program="tanuki up")
    settings = UpSettings(
        host=host,
        port=port,
        prefect_host=prefect_host,
        prefect_port=prefect_port,
        database=database,
        notify=tuple(notify or ()),
        serve_options=tuple(context.args),
    )
    run_up(layout, settings, print_json_line if json_log.is_wanted() else partial(print, flush=True))


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
        print_json({**report.as_dict(), "runs": None if swept is None else swept.runs})
        return
    out.print(escape(report.text()))
    if swept is not None:
        out.print(
            f"{'Would remove' if dry_run else 'Removed'} {swept.runs} runs older than {keep_runs} days from Prefect."
        )


@app.command()
def doctor(context: typer.Context, as_json: Json = False) -> None:
    """Check Python, packages, git, DVC, the processor, the disk and Prefect; says what to do."""
    from flows.doctor import examine

    findings = examine(context.obj)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        marks = {"ok": "[green]ok  [/]", "warning": "[yellow]warn[/]", "problem": "[red]BAD [/]"}
        for finding in findings:
            out.print(f"{marks[finding.level]} {finding.subject}: {escape(finding.text)}")
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _tell(status: "UpStatus", *, as_json: bool) -> None:
    """Exit code 1 where a part is not well."""
    if as_json:
        print_json(status.as_dict())
    else:
        for part in status.parts:
            out.print(f"{'[green]ok  [/]' if part.is_well else '[red]BAD [/]'} {part.name:<7} {escape(part.text)}")
        if status.schedules:
            table = Table("schedule", "last run (UTC)", "came to", "next (UTC)")
            for row in status.schedules:
                came_to = "" if row.last_state is None else f"{row.last_state}: {row.last_message or ''}"
                coming = row.next_at or "" if row.is_active else "paused"
                table.add_row(row.name, row.last_at or "", escape(came_to), coming)
            out.print(table)
            out.print(f"automations: {escape(', '.join(status.automations))}")
    if not status.is_well:
        raise typer.Exit(1)
