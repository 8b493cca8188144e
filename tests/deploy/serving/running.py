"""A registry of tiny real bundles, and the real server over it, in a process of its own on loopback."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from deploy.registry import Registry
from tests.conftest import REPOSITORY
from tests.deploy.tiny_bundle import write_colour_bundle

CARD = "# Colours\n\nTells colours apart.\n"


def add_version(root: Path, folder: Path, *, sharpness: float = 8.0, promote: bool = True) -> int:
    """Registers a bundle, and promotes it."""
    bundle = write_colour_bundle(folder / f"bundle-{sharpness}", sharpness=sharpness)
    card = folder / "card.md"
    card.write_text(CARD)
    registry = Registry(root)
    version = registry.register(bundle.directory, {"git": "abc123"}, card=card)
    if promote:
        make_champion(root, version.id)
    return version.id


def make_champion(root: Path, version: int) -> None:
    registry = Registry(root)
    now = registry.champion()
    registry.promote(version, reason="a test", expected=now.id if now else None, forced=True)


@dataclass
class Running:
    """A server that answers."""

    process: subprocess.Popen[str]
    url: str
    port: int
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=30, verify=False)

    @property
    def grpc_port(self) -> int:
        return next(int(line["grpc_port"]) for line in self.lines() if line.get("grpc_port"))

    def lines(self) -> list[dict[str, Any]]:
        whole = self.log.read_text().rpartition("\n")[0]  # the last line may still be on its way
        # Not splitlines, for which a client's own characters, told in a line, end lines too.
        return [json.loads(line) for line in whole.split("\n") if line.startswith("{")]

    def metric(self, name: str) -> float:
        """A counter or gauge, all its labels summed."""
        found = [line.rsplit(" ", 1) for line in self.client.get("/metrics").text.splitlines() if line[:1] != "#"]
        return sum(float(value) for key, value in found if key == name or key.startswith(name + "{"))

    def stop(self, timeout_s: float = 60) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


@contextmanager
def serving(root: Path | str, folder: Path, *options: str, **more: str) -> Iterator[Running]:
    """Starts the server on a free port and waits until it answers."""
    log = folder / f"server-{time.monotonic_ns()}.log"
    command = [sys.executable, "-m", "deploy.serving", "--registry", str(root), "--port", "0", "--notice-s", "0.2"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **more}
    with log.open("w") as file:
        process = subprocess.Popen([*command, *options], cwd=folder, env=environment, stderr=file, text=True)
    try:
        port = _port(process, log)
        scheme = "https" if "--tls-cert" in options else "http"
        running = Running(process, f"{scheme}://127.0.0.1:{port}", port, log)
        with running.client:
            yield running
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def _port(process: "subprocess.Popen[str]", log: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        for line in log.read_text().splitlines():
            if line.startswith("{") and '"port"' in line:
                return int(json.loads(line)["port"])
        time.sleep(0.02)
    raise AssertionError(f"the server did not start: {log.read_text()}")


def make_certificate(folder: Path) -> Path:
    """A certificate of this machine, cert.pem in a folder, and key.pem beside it."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-out", "cert.pem",
         "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return folder / "cert.pem"


def eventually(condition: Any, timeout_s: float = 60) -> None:
    """Waits until something holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        time.sleep(0.02)
