"""One of several processes that answer on the same port; started by deploy/serving/workers.py and nobody else.

python -m deploy.serving.worker NUMBER SOCKET PORT GRPC_PORT OPTION...
"""

import math
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deploy.errors import TanukiError
from deploy.machine import available_cores
from deploy.serving.command import configure_logging
from deploy.serving.settings import Settings, parse_settings


@dataclass(frozen=True)
class Worker:
    """Which of them this process is.

    Args:
        number: From 0.
        end: Its end of the socket to the process that started it.
        port: The port of HTTP that all share.
    """

    number: int
    end: socket.socket
    port: int


def share_of(settings: Settings, number: int) -> Settings:
    """A worker's part of what the whole server may use: threads, waiting pictures and connections."""
    num = settings.workers
    threads = settings.threads or available_cores()
    return replace(
        settings,
        threads=max(1, threads // num + (number < threads % num)),
        max_waiting=max(settings.max_pictures, math.ceil(settings.max_waiting / num)),
        max_bodies_mb=settings.max_bodies_mb / num,
        max_connections=math.ceil(settings.max_connections / num),
    )


def main(arguments: Sequence[str]) -> None:
    """Answers until it is told to stop."""
    number, end, port, grpc_port = map(int, arguments[:4])
    settings = share_of(parse_settings(arguments[4:]), number)
    if settings.grpc_port is not None:
        settings = replace(settings, grpc_port=grpc_port)
    configure_logging(number)
    from deploy.serving.server import serve

    try:
        serve(settings, worker=Worker(number, socket.socket(fileno=end), port))
    except (TanukiError, OSError) as error:
        print(f"tanuki: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
