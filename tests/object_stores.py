"""An S3 on loopback: moto's server, the protocol without Amazon."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

BUCKET = "storage"


@contextmanager
def s3_on_loopback() -> Iterator[dict[str, str]]:
    """A server with one empty bucket; the environment that a client needs to find it."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("s3fs") is None:
        pytest.skip("needs the packages moto and s3fs")
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        environment = {**keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
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
        server.stop()
