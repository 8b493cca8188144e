"""The command `tanuki`. Each command is a few lines: what it does lives in the flows and in deploy.

Exit codes: 0 done, 1 a user's mistake (told in one paragraph), 2 wrong usage, 130 interrupted.
What a command needs is imported when it runs, so that `tanuki predict` waits for neither Prefect nor DVC.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy import json_log
from deploy.errors import TanukiError
from flows.commands import daily, data, learning, operate, production, versions
from flows.commands.terminal import asides

INTERRUPTED = 130

TOPICS = {
    "Every day": daily.app,
    "Labelled images": data.app,
    "Versions of the model": versions.app,
    "Production": production.app,
    "Ways to learn": learning.app,
    "The box": operate.app,
}

app = typer.Typer(
    name="tanuki",
    help="Keeps an image classifier fresh: labelled images in, a better-or-nothing ONNX model out.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for topic, commands in TOPICS.items():
    for command in commands.registered_commands:
        command.rich_help_panel = topic
    app.add_typer(commands)
app.add_typer(learning.pretrained_app, name="pretrained", rich_help_panel="Ways to learn")


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


def _configure_logging(verbose: bool) -> None:
    """Lines of our own code to the terminal; other libraries' warnings only."""
    handler = logging.StreamHandler()
    is_json = json_log.is_wanted()
    handler.setFormatter(
        json_log.JsonFormatter() if is_json else logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S")
    )
    asides.quiet = is_json
    for room in ("flows", "tasks", "deploy"):
        logger = logging.getLogger(room)
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.addHandler(handler)
        logger.propagate = False


if __name__ == "__main__":
    main()
