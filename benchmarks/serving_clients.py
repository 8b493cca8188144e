"""Clients of a server on loopback, each in another process: wrk for HTTP/1.1, h2load for gRPC, and one of our own.

Ours also keeps to a pace, or holds each answer to what the version that it names says; it costs more processor time.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil

WRK = """
local file = io.open("{body}", "rb")
wrk.method, wrk.body = "POST", file:read("*a")
{headers}
done = function(summary, latency)
  local failed = summary.errors
  io.write(string.format('{{"seconds": %f, "answers": %d, "p50": %f, "p99": %f, "failed": %d}}\\n',
    summary.duration / 1e6, summary.requests, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    failed.status + failed.connect + failed.read + failed.write + failed.timeout))
end
"""


@dataclass(frozen=True)
class Window:
    """A few seconds of answers.

    Args:
        rate: Answers a second.
        cpu_ms: Processor time of an answer, on the server's side.
        p50_ms: Median latency.
        p99_ms: Of a hundred answers the slowest but one.
        answers: How many.
        refused: Requests that were told to come again later (429).
        versions: Answers of each version, where they were looked at.
    """

    rate: float
    cpu_ms: float
    p50_ms: float
    p99_ms: float
    answers: int
    refused: int = 0
    versions: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Request:
    """What is asked again and again.

    Args:
        path: Of the URL.
        headers: But for those that every client adds.
        body: Its bytes.
    """

    path: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    def http(self) -> bytes:
        """As it goes over the wire."""
        head = "".join(f"{name}: {value}\r\n" for name, value in self.headers)
        return f"POST {self.path} HTTP/1.1\r\nhost: x\r\n{head}content-length: {len(self.body)}\r\n\r\n".encode() + (
            self.body
        )


def cpu_s(server: psutil.Process) -> float:
    """Processor time of a server so far, its children's included."""
    return sum(sum(each.cpu_times()[:2]) for each in (server, *server.children(recursive=True)))


def wrk(request: Request, port: int, server: psutil.Process, clients: int, seconds: float) -> Window:
    """As fast as that many connections can ask."""
    with tempfile.TemporaryDirectory() as scratch:
        body, script = Path(scratch, "body"), Path(scratch, "ask.lua")
        body.write_bytes(request.body)
        headers = "\n".join(f'wrk.headers["{name}"] = "{value}"' for name, value in request.headers)
        script.write_text(WRK.format(body=body, headers=headers))
        url = f"http://127.0.0.1:{port}{request.path}"
        command = [
            "wrk",
            "-t1",
            "--timeout",
            "30s",
            f"-c{clients}",
            f"-d{max(1, round(seconds))}s",
            "-s",
            str(script),
            url,
        ]
        before = cpu_s(server)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        cpu = cpu_s(server) - before
    told = json.loads(said)
    if told["failed"]:
        raise RuntimeError(f"{told['failed']} requests failed: {said}")
    return Window(
        told["answers"] / told["seconds"], 1e3 * cpu / told["answers"], told["p50"], told["p99"], told["answers"]
    )


def h2load(message: bytes, port: int, server: psutil.Process, clients: int, seconds: float) -> Window:
    """ModelInfer over gRPC on as many connections, one call at a time on each."""
    with tempfile.TemporaryDirectory() as scratch:
        body, log = Path(scratch, "body"), Path(scratch, "log")
        body.write_bytes(b"\x00" + len(message).to_bytes(4, "big") + message)
        url = f"http://127.0.0.1:{port}/inference.GRPCInferenceService/ModelInfer"
        headers = ["-H", "content-type: application/grpc", "-H", "te: trailers"]
        options = [f"-c{clients}", "-m1", "-t1", f"-D{max(1, round(seconds))}", f"--log-file={log}", f"-d{body}"]
        before = cpu_s(server)
        said = subprocess.run(["h2load", *options, *headers, url], capture_output=True, text=True, check=True).stdout
        cpu = cpu_s(server) - before
        rows = [line.split() for line in log.read_text().splitlines()]
    if any(status != "200" for _, status, _ in rows):
        raise RuntimeError(said)
    latencies_ms = np.array([int(micros) for *_, micros in rows]) / 1e3
    p50, p99 = np.quantile(latencies_ms, (0.5, 0.99))
    found = re.search(r"([\d.]+) req/s", said)
    assert found is not None, said
    return Window(float(found[1]), 1e3 * cpu / len(rows), float(p50), float(p99), len(rows))


def ask(
    request: Request,
    port: int,
    server: psutil.Process,
    clients: int,
    seconds: float,
    *,
    period_s: float = 0,
    expected: dict[str, list[float]] | None = None,
) -> Window:
    """Our own client: each connection asks at most once in a period.

    Args:
        request: What is asked.
        port: Of the server.
        server: Its process.
        clients: Connections.
        seconds: For so long.
        period_s: 0 for as fast as answers come.
        expected: The probabilities that each version answers; another answer fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "request")
        data.write_bytes(request.http())
        arguments = [data, port, clients, seconds, period_s, json.dumps(expected)]
        command = [sys.executable, "-m", "benchmarks.serving_clients", *map(str, arguments)]
        before = cpu_s(server)
        said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        cpu = cpu_s(server) - before
    latencies = said["latencies_ms"]
    p50, p99 = np.quantile(latencies, (0.5, 0.99))
    return Window(
        len(latencies) / said["seconds"],
        1e3 * cpu / len(latencies),
        float(p50),
        float(p99),
        len(latencies),
        said["refused"],
        tuple(sorted(said["versions"].items())),
    )


def main(request: str, port: str, clients: str, seconds: str, period_s: str, expected: str) -> None:
    """The other process."""
    import uvloop

    data, known = Path(request).read_bytes(), json.loads(expected)
    until = time.perf_counter() + float(seconds)
    askers: list[Asker] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(int(clients)):
            make = partial(Asker, data, until, float(period_s), known)
            askers.append((await loop.create_connection(make, "127.0.0.1", int(port)))[1])
        await asyncio.gather(*(asker.over for asker in askers))

    start = time.perf_counter()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    versions: dict[str, int] = {}
    for version in (version for asker in askers for version in asker.versions):
        versions[version] = versions.get(version, 0) + 1
    told = {
        "seconds": time.perf_counter() - start,
        "latencies_ms": [each for asker in askers for each in asker.latencies_ms],
        "refused": sum(asker.refused for asker in askers),
        "versions": versions,
    }
    print(json.dumps(told))


class Asker(asyncio.Protocol):
    """One connection."""

    def __init__(self, request: bytes, until: float, period_s: float, expected: dict[str, list[float]] | None) -> None:
        self._request, self._until, self._period_s, self._expected = request, until, period_s, expected
        self.latencies_ms: list[float] = []
        self.versions: list[str] = []
        self.refused = 0
        self.over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._answer += data
        head, separator, body = self._answer.partition(b"\r\n\r\n")
        if not separator or len(body) < int(head.split(b"content-length: ")[1].split(b"\r\n")[0]):
            return
        now = time.perf_counter()
        if head.startswith(b"HTTP/1.1 429"):
            self.refused += 1
        elif not head.startswith(b"HTTP/1.1 200") or not self._is_right(head, body):
            self.over.set_exception(RuntimeError(repr(self._answer)))
            return
        else:
            self.latencies_ms.append(1e3 * (now - self._asked_at))
        if (pause_s := self._asked_at + self._period_s - now) > 0:
            asyncio.get_running_loop().call_later(pause_s, self._ask)
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(error or RuntimeError("the server closed the connection"))

    def _is_right(self, head: bytes, body: bytes) -> bool:
        """Whether the version that it names says that."""
        if self._expected is None:
            return True
        length = int(head.split(b"inference-header-content-length: ")[1].split(b"\r\n")[0])
        version = json.loads(body[:length])["model_version"]
        self.versions.append(version)
        return np.allclose(np.frombuffer(body[length:], np.float32), self._expected[version], atol=1e-5)

    def _ask(self) -> None:
        self._asked_at = time.perf_counter()
        if self._asked_at >= self._until:
            self.over.set_result(None)
            self._transport.close()
            return
        self._answer = b""
        self._transport.write(self._request)


if __name__ == "__main__":
    main(*sys.argv[1:])
