"""Sockets to listen on, alone or with others of the same server."""

import socket

from deploy.serving.errors import ServingError
from deploy.serving.settings import Settings

BACKLOG = 2048


def listen(settings: Settings, *, port: int | None = None, is_shared: bool = False) -> socket.socket:
    """A listening socket for HTTP.

    Args:
        settings: Name the address.
        port: Instead of theirs.
        is_shared: Other processes of this server listen there too, and the kernel spreads connections over them.

    Raises:
        ServingError: If the port cannot be had.
    """
    address = (settings.host, settings.port if port is None else port)
    try:
        return socket.create_server(address, family=_family(settings), backlog=BACKLOG, reuse_port=is_shared)
    except (OSError, OverflowError) as error:
        raise _cannot(address, error, "--port") from error


def reserve(settings: Settings, port: int, option: str) -> socket.socket:
    """A socket that keeps a port for the workers, which share it, and never listens itself.

    Raises:
        ServingError: If somebody else has the port: sharing would take half of their requests.
    """
    address = (settings.host, port)
    try:
        with socket.create_server(address, family=_family(settings)):
            pass
        kept = socket.socket(_family(settings))
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Connections of a server before this one, which are still fading away, are no hindrance; another server is.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(address)
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    except (OSError, OverflowError) as error:
        raise _cannot(address, error, option) from error
    return kept


def _family(settings: Settings) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in settings.host else socket.AF_INET


def _cannot(address: tuple[str, int], error: Exception, option: str) -> ServingError:
    reason = getattr(error, "strerror", None) or error
    return ServingError(f"cannot listen on {address[0]}:{address[1]}: {reason}. Choose with --host, {option}.")
