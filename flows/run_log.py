"""What flows that a worker runs have in common: our log lines, and mistakes that end as one paragraph."""

import errno
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from deploy.errors import TanukiError
from flows.workspace import BusyError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
ROOMS = ("flows", "tasks", "deploy")

logger = logging.getLogger(__name__)


def told(run: Callable[[], State[Any]]) -> State[Any]:
    """The state that a scheduled run ends in: its own, or one whose message a person can act on.

    The names of states make the names of Prefect's events, which notifications listen to.
    """
    with _our_lines():
        try:
            return run()
        except BusyError as error:
            return Completed(name="Skipped", message=str(error))
        except TanukiError as error:
            logger.error("%s", error)
            return Failed(message=str(error))
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            logger.exception("no room")
            return Failed(
                message=f"{error}. Nothing was lost: make room on that disk (`tanuki gc --dry-run` tells what could "
                "go), and the next run goes on."
            )


@contextmanager
def _our_lines() -> Iterator[None]:
    """Prefect takes our loggers' lines into the run's log (PREFECT_LOGGING_EXTRA_LOGGERS) if they have a level."""
    for room in ROOMS:
        logging.getLogger(room).setLevel(logging.INFO)
    yield
