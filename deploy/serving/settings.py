"""How a server is run: one record, whose fields are the options of the command line."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

SHARE = r"(1(\.0*)?|0?\.\d*[1-9]\d*)"  # above 0, at most 1
CANARY = re.compile(rf"\d{{1,9}}={SHARE}", re.ASCII)
SHADOW = re.compile(rf"\d{{1,9}}(={SHARE})?", re.ASCII)
KEPT_PICTURES = ("none", "thumbnails", "originals")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Second:
    """A version beside the champion.

    Args:
        version: Its number.
        share: Of the requests that name no version, in 0..1.
        answers: Whether it answers them; else its answers are only compared.
    """

    version: int
    share: float
    answers: bool


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
    workers: Annotated[
        int, "processes that share the port and the threads; for many cores, where one loop is short"
    ] = 1
    threads: Annotated[int | None, "threads that answer; as many as cores may be used, if not given"] = None
    public_key: Annotated[Path | None, "only bundles signed by this key (`tanuki keygen`) answer"] = None
    shadow: Annotated[str | None, "VERSION or VERSION=SHARE: asked behind the champion, compared, not returned"] = None
    canary: Annotated[str | None, "VERSION=SHARE: answers that share of the requests, and is compared"] = None
    second_failures: Annotated[
        float,
        "share of its last 200 pictures on which a shadow or canary may fail, or still be at work when the request is "
        "given up, beyond the champion's own and chance; from the 5th failure on it is stopped",
    ] = 0.05
    keep: Annotated[int, "earlier versions that stay loaded and addressable"] = 2
    watch_s: Annotated[
        float, "seconds between two looks at the champion pointer; behind a URL a look is two requests"
    ] = 0.5
    token_file: Annotated[Path | None, "file of bearer tokens, one a line; anybody may ask, if not given"] = None
    tls_cert: Annotated[Path | None, "certificate chain (PEM); with --tls-key"] = None
    tls_key: Annotated[Path | None, "private key of the certificate (PEM)"] = None
    max_body_mb: Annotated[float, "largest body of a request, 10^6 bytes; compressed ones by what they unpack to"] = 32
    max_bodies_mb: Annotated[
        float,
        "bodies of all requests together, 10^6 bytes, or one whole body; above it clients are told 429; gRPC's count "
        "once they are read",
    ] = 256
    max_json_mb: Annotated[float, "largest JSON part of a request, 10^6 bytes: tensors belong into binary or JPEG"] = 8
    max_megapixels: Annotated[float, "largest picture, looked up in its header before it is decoded"] = 50
    max_pictures: Annotated[int, "pictures in a request"] = 64
    max_waiting: Annotated[int, "pictures that may wait for an answer; above it clients are told 429"] = 256
    max_wait_s: Annotated[float, "seconds that these may take, by what the last ones took; above it 429 as well"] = 5
    max_connections: Annotated[int, "open connections; above it clients are told 503"] = 1024
    timeout_s: Annotated[float, "seconds until a request is given up, unless it asks for less"] = 30
    body_timeout_s: Annotated[
        float, "seconds for a client to send its request, or to read what it was answered before"
    ] = 30
    capture_dir: Annotated[Path | None, "folder for a sample of the answers as Parquet; none is kept, if not given"] = (
        None
    )
    capture_fraction: Annotated[float, "share of the answers that is kept"] = 0.1
    capture_mb: Annotated[float, "the folder's size, 10^6 bytes; above it the oldest files go"] = 256
    capture_days: Annotated[float, "days after which what was captured goes"] = 30
    capture_pictures: Annotated[
        str, "of the pictures: none, thumbnails to look at, or originals to label, as sent, their metadata included"
    ] = "none"
    notice_s: Annotated[float, "after SIGTERM, not ready any more: seconds in which clients are told to leave"] = 1
    grace_s: Annotated[float, "after that: seconds for what is under way"] = 20
    log_requests: Annotated[bool, "a line for each request, not only for those that fail"] = False

    @property
    def second(self) -> Second | None:
        """The version beside the champion, if there is one."""
        text = self.shadow or self.canary
        if text is None:
            return None
        version, _, share = text.partition("=")
        return Second(int(version), float(share or 1), answers=self.shadow is None)

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 1e6)

    @property
    def max_bodies_bytes(self) -> int:
        return int(max(self.max_bodies_mb, self.max_body_mb) * 1e6)

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
    if settings.shadow and settings.canary:
        mistakes.append("--shadow and --canary are about the same second version: give one of them")
    if settings.shadow is not None and not SHADOW.fullmatch(settings.shadow):
        mistakes.append("--shadow wants a version, or VERSION=SHARE with a share above 0 and at most 1")
    if settings.canary is not None and not CANARY.fullmatch(settings.canary):
        mistakes.append("--canary wants VERSION=SHARE with a share above 0 and at most 1, such as 7=0.1")
    if settings.second_failures > 1:
        mistakes.append("--second-failures must be a share of 0 to 1")
    if settings.workers < 1:
        mistakes.append("--workers must be at least 1")
    if settings.capture_pictures not in KEPT_PICTURES:
        mistakes.append(f"--capture-pictures must be one of {', '.join(KEPT_PICTURES)}")
    if settings.max_waiting < settings.max_pictures:
        mistakes.append(f"--max-waiting must hold a whole request: at least --max-pictures, {settings.max_pictures}")
    return mistakes
