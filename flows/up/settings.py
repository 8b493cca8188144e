"""How `tanuki up` is run, and the environment that its parts share."""

import os
import urllib.parse
from dataclasses import dataclass

from deploy.errors import TanukiError
from flows.settings import QUIET
from flows.workspace import environment
from tasks.layout import Layout

MARK = "TANUKI_UP"  # in the environment of every process that `tanuki up` started, with the workspace's path
WORK_POOL = "tanuki"
DAY_S = 86_400

HEARTBEAT_S = 30  # of a flow run: the shortest that Prefect takes
SILENT_S = 3 * HEARTBEAT_S  # without one, a run is taken for dead


@dataclass(frozen=True)
class UpSettings:
    """Operation only.

    Args:
        host: Address of the model server.
        port: Its port.
        prefect_host: Address of Prefect's server, which asks nobody for a password.
        prefect_port: Its port.
        database: Address of Prefect's database; None for SQLite in the workspace.
        notify: Addresses to tell: a webhook (https://...), or any that Apprise knows (mailto://...).
        serve_options: More options of `tanuki serve`.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    prefect_host: str = "127.0.0.1"
    prefect_port: int = 4200
    database: str | None = None
    notify: tuple[str, ...] = ()
    serve_options: tuple[str, ...] = ()

    @property
    def api_url(self) -> str:
        return f"http://{reachable(self.prefect_host)}:{self.prefect_port}/api"

    @property
    def ui_url(self) -> str:
        return f"http://{reachable(self.prefect_host)}:{self.prefect_port}"

    @property
    def model_url(self) -> str:
        return f"http://{reachable(self.host)}:{self.port}"


def reachable(host: str) -> str:
    """The address by which this machine reaches a server that listens on ``host``."""
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def check(settings: UpSettings) -> None:
    """Refuses what Prefect would only trip over.

    Raises:
        TanukiError: If an address is none; names what was expected, and no secret.
    """
    if settings.database is not None and not settings.database.startswith(
        ("postgresql+asyncpg://", "sqlite+aiosqlite:")
    ):
        raise TanukiError(
            "--database (TANUKI_DATABASE) is no address that Prefect knows. Expected "
            "postgresql+asyncpg://USER:PASSWORD@HOST:5432/NAME, or nothing for SQLite."
        )
    for number, address in enumerate(settings.notify, start=1):
        if not urllib.parse.urlsplit(address).scheme:
            raise TanukiError(
                f"Address {number} of --notify (TANUKI_NOTIFY) has no scheme. Expected https://HOST/PATH for a "
                "webhook, mailto://USER:PASSWORD@HOST for e-mail, or another address that Apprise knows."
            )


def part_environment(layout: Layout, settings: UpSettings) -> dict[str, str]:
    """What every part sees; of the tunable ones, a variable that is set wins."""
    tunable = {
        **QUIET,
        "PREFECT_LOGGING_ROOT_LEVEL": "WARNING",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO",
        "PREFECT_LOGGING_COLORS": "false",
        "PREFECT_CLI_COLORS": "false",
        # Old runs and events leave the database, which otherwise grows for ever.
        "PREFECT_SERVER_SERVICES_DB_VACUUM_ENABLED": "events,flow_runs",
        "PREFECT_SERVER_SERVICES_DB_VACUUM_RETENTION_PERIOD": str(90 * DAY_S),
        # In memory, which is the default, a slot of a concurrency limit is taken for ever when the server is killed.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "PREFECT_WORKER_QUERY_SECONDS": "5",
        "PREFECT_SERVER_DATABASE_TIMEOUT": "60",  # on a busy machine SQLite has others wait for longer than 10 s
    }
    own = {
        MARK: str(layout.root),
        "PREFECT_HOME": str(layout.prefect_home),
        "PREFECT_API_URL": settings.api_url,
        "PREFECT_UI_URL": settings.ui_url,
        "PREFECT_SERVER_UI_API_URL": settings.api_url,
    }
    if settings.database is not None:
        own["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = settings.database
    quiet = {name: value for name, value in tunable.items() if os.environ.get(name, QUIET.get(name)) == QUIET.get(name)}
    return {**environment(), **quiet, **own}
