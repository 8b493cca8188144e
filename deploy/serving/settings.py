"""How a server is run: one record, whose fields are the options of the command line."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Settings:
    """Operation, not learning: Annotated[nothing here changes an answer. See the texts."""

    registry: Annotated[str, "folder or URL (s3://bucket/prefix) of the registry whose champion answers"]
    registry_copy: Annotated[
        Path | None, "folder for the copy of a registry behind a URL; the user's cache, if not given"
    ] = None
    name: Annotated[str, "the model's name in the protocol's paths"] = "tanuki"
    host: Annotated[str, "address to listen on; 0.0.0.0 for all"] = "127.0.0.1"
    port: Annotated[int, "port of HTTP; 0 for any free one"] = 8000
    grpc_port: Annotated[int | None, "port of gRPC, Triton's is 8001; 0 for any free one; no gRPC, if not given"] = None
    threads: Annotated[int | None, "threads that answer; as many as cores may be used, if not given"] = None
    public_key: Annotated[Path | None, "only bundles signed by this key (`tanuki keygen`) answer"] = None
    keep: Annotated[int, "earlier versions that stay loaded and addressable"] = 2
    watch_s: Annotated[
        float, "seconds between two looks at the champion pointer; behind a URL a look is two requests"
    ] = 0.5
    token_file: Annotated[Path | None, "file of bearer tokens, one a line; anybody may ask, if not given"] = None
    tls_cert: Annotated[Path | None, "certificate chain (PEM); with --tls-key"] = None
    tls_key: Annotated[Path | None, "private key of the certificate (PEM)"] = None
    max_body_mb: Annotated[float, "largest body of a request, 10^6 bytes; compressed ones by what they unpack to"] = 32
    max_json_mb: Annotated[float, "largest JSON part of a request, 10^6 bytes: tensors belong into binary or JPEG"] = 8
    max_megapixels: Annotated[float, "largest picture, looked up in its header before it is decoded"] = 50
    max_pictures: Annotated[int, "pictures in a request"] = 64
    max_waiting: Annotated[int, "pictures that may wait for an answer; above it clients are told 429"] = 256
    max_connections: Annotated[int, "open connections; above it clients are told 503"] = 1024
    timeout_s: Annotated[float, "seconds until a request is given up, unless it asks for less"] = 30
    body_timeout_s: Annotated[float, "seconds for a client to send its request"] = 30
    capture_dir: Annotated[Path | None, "folder for a sample of the answers as Parquet; none is kept, if not given"] = (
        None
    )
    capture_fraction: Annotated[float, "share of the answers that is kept"] = 0.1
    capture_mb: Annotated[float, "the folder's size, 10^6 bytes; above it the oldest files go"] = 256
    notice_s: Annotated[float, "after SIGTERM, not ready any more: seconds in which clients are told to leave"] = 1
    grace_s: Annotated[float, "after that: seconds for what is under way"] = 20
    log_requests: Annotated[bool, "a line for each request, not only for those that fail"] = False

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)

    @property
    def max_json_bytes(self) -> int:
        return int(self.max_json_mb * 1e6)

    @property
    def max_pixels(self) -> int:
        return int(self.max_megapixels * 1e6)


def parse_settings(arguments: Sequence[str] | None = None, *, program: str | None = None) -> Settings:
    """The settings of a command line; leaves with code 2 where it is wrong."""
    parser = argparse.ArgumentParser(program, description="Answers with the registry's champion, over HTTP.")
    hints = get_type_hints(Settings, include_extras=True)
    for each in fields(Settings):
        of, text = get_args(hints[each.name])
        flag = f"--{each.name.replace('_', '-')}"
        if of is bool:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        kind = next((kind for kind in get_args(of) if kind is not type(None)), of)
        is_needed = each.default is MISSING
        told = "" if is_needed or each.default is None else f" [{each.default}]"
        default = None if is_needed else each.default
        parser.add_argument(
            flag, type=kind, required=is_needed, default=default, metavar=kind.__name__.upper(), help=text + told
        )
    values = parser.parse_args(arguments)
    settings = Settings(**vars(values))
    if mistakes := _mistakes(settings):
        parser.error("; ".join(mistakes))
    return settings


def _mistakes(settings: Settings) -> list[str]:
    """What argparse cannot see."""
    mistakes = [
        f"--{each.name.replace('_', '-')} must not be negative"
        for each in fields(settings)
        if isinstance(value := getattr(settings, each.name), int | float) and value < 0
    ]
    if (settings.tls_cert is None) != (settings.tls_key is None):
        mistakes.append("--tls-cert and --tls-key go together")
    if settings.max_waiting < settings.max_pictures:
        mistakes.append(f"--max-waiting must hold a whole request: at least --max-pictures, {settings.max_pictures}")
    return mistakes
