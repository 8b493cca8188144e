"""In every Python process of a test's workspace: whoever asks for more than this machine is written down and refused.

Python imports a module of this name at its start, from PYTHONPATH, which children inherit.
"""

import errno
import ipaddress
import os
import sys
from typing import Any

LOCAL = (None, "", b"", "localhost", b"localhost")


def _is_local(host: Any) -> bool:
    if host in LOCAL:
        return True
    text = host.decode() if isinstance(host, bytes) else str(host)
    try:
        address = ipaddress.ip_address(text.split("%")[0])
    except ValueError:
        return text == os.uname().nodename
    return address.is_loopback or address.is_unspecified


def _asked_for(event: str, arguments: tuple[Any, ...]) -> Any:
    """Host of a call that needs a network; None for any other."""
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        return address[0] if isinstance(address, tuple) else None  # else a path: a socket of this machine
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        return arguments[0]
    return None


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if not event.startswith("socket.") or _is_local(host := _asked_for(event, arguments)):
        return
    with open(os.environ["TANUKI_TEST_NETWORK_LOG"], "a") as log:  # noqa: PTH123  nothing more is imported than needs be
        log.write(f"{sys.argv} {event} {host!r}\n")
    raise OSError(errno.ENETUNREACH, f"no network in tests: {host!r}")


if "TANUKI_TEST_NETWORK_LOG" in os.environ:
    sys.addaudithook(_refuse)
