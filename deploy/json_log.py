"""Log lines as JSON, one object a line: what the server writes always, and `tanuki` where TANUKI_LOG_FORMAT=json."""

import json
import logging
import os
from datetime import UTC, datetime

FACTS = ("request_id", "status", "ms", "host", "port", "grpc_port")


def is_wanted() -> bool:
    """Whether `tanuki` is to log JSON."""
    return os.environ.get("TANUKI_LOG_FORMAT") == "json"


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
        line |= {key: vars(record)[key] for key in FACTS if key in vars(record)}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
