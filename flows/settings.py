"""Prefect's settings for a run from the command line. Called before prefect is imported; a set variable always wins."""

import os

QUIET = {
    # Nothing is sent anywhere unless asked.
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "DVC_NO_ANALYTICS": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    # Our own lines go to the run's log, and to the terminal by our own handler; Prefect's stay in the log.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks,deploy",
    "PREFECT_LOGGING_ROOT_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


def quiet_prefect() -> None:
    """Sets what is not set yet in this process's environment."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
