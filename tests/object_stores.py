"""An S3 on loopback: moto's server, the protocol without Amazon. Where asked to, it kills the one that writes to it."""

import importlib.util
import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

import pytest

BUCKET = "storage"
KILL = "/-/kill"
WRITES = ("PUT", "POST", "DELETE")


class Killer:
    """A WSGI application that kills a process when it has carried out so many of its writes.

    The process never hears of the last one: it dies knowing nothing of what the store already holds.
    """

    def __init__(self, application: Callable[..., Iterable[bytes]]) -> None:
        self._application = application
        self._lock = threading.Lock()
        self._victim, self._left = 0, 0

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == KILL:
            told = parse_qs(environ["QUERY_STRING"])
            self._victim, self._left = int(told["process"][0]), int(told["writes"][0])
            start_response("200 OK", [])
            return []
        answer = list(self._application(environ, start_response))  # by now it is done
        if environ["REQUEST_METHOD"] in WRITES:
            with self._lock:
                self._left -= 1
                if self._victim and self._left == 0:
                    os.kill(self._victim, signal.SIGKILL)
        return answer


def kill_after(writes: int, *, process: int) -> None:
    """Has the S3 that AWS_ENDPOINT_URL names kill a process after so many writes; process 0: nobody."""
    with urllib.request.urlopen(f"{os.environ['AWS_ENDPOINT_URL']}{KILL}?process={process}&writes={writes}"):
        pass


@contextmanager
def s3_on_loopback() -> Iterator[dict[str, str]]:
    """A server with one empty bucket; the environment that a client needs to find it."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        pytest.skip("needs the packages moto and s3fs")
    import boto3
    import s3fs
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    server = make_server("127.0.0.1", 0, Killer(DomainDispatcherApplication(create_backend_app)), threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        environment = {**keys, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        client = boto3.client(
            "s3",
            endpoint_url=environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        s3fs.S3FileSystem.clear_instance_cache()  # instances of another test know another port
        yield environment
    finally:
        s3fs.S3FileSystem.clear_instance_cache()
        server.shutdown()
        thread.join()
        server.server_close()
