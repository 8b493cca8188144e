"""`tanuki up`: one box, everything on it."""

import json
import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flows.workspace import find_workspace

if TYPE_CHECKING:
    from flows.up.status import UpStatus

app = typer.Typer()
out = Console(highlight=False, soft_wrap=True)


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
    run_up(layout, settings, lambda line: out.print(escape(line)))


def _tell(status: "UpStatus", *, as_json: bool) -> None:
    """Exit code 1 where a part is not well."""
    if as_json:
        print(json.dumps(status.as_dict(), indent=2, ensure_ascii=False))
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
