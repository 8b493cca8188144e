"""The command ``tanuki-serve``: options, logs, and whether one process answers or several do."""

import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

import orjson

from deploy.errors import TanukiError
from deploy.serving.settings import parse_settings

LOGGED_FACTS = ("request_id", "status", "ms", "host", "port", "grpc_port")


class JsonFormatter(logging.Formatter):
    """A line of JSON for each record.

    Args:
        worker: The number of the process, where there are several.
    """

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._of = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            **self._of,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {key: vars(record)[key] for key in LOGGED_FACTS if key in vars(record)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


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
