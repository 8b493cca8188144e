"""The command ``tanuki-serve``: options, logs, and whether one process answers or several do."""

import logging
import sys
from collections.abc import Sequence

from deploy.errors import TanukiError
from deploy.json_log import JsonFormatter
from deploy.serving.settings import parse_settings


def configure_logging(worker: int | None = None) -> None:
    """Our lines, and the warnings of others, as JSON on stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter(worker))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    ours = logging.getLogger("deploy")
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.INFO)


def main(arguments: Sequence[str] | None = None, *, program: str | None = None) -> None:
    """The command; a user's mistake is one paragraph and exit code 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    settings = parse_settings(arguments, program=program)
    configure_logging()
    try:
        if settings.workers > 1:
            from deploy.serving.workers import run_workers  # whose process needs nothing of what answers

            sys.exit(run_workers(settings, arguments))
        from deploy.serving.server import serve

        serve(settings)
    except (TanukiError, OSError) as error:
        print(f"tanuki: {error}", file=sys.stderr)
        sys.exit(1)
