"""What the server costs over onnxruntime itself: both in turns, window by window, so that others fall on both alike.

    python -m benchmarks.serving                        # mobilenet_v3_small of random weights at 224 px; needs torch
    python -m benchmarks.serving --registry DIR         # the champion of a registry instead
    python -m benchmarks.serving --soak 600             # memory at saturation for ten minutes, then 4x overload

prints a markdown table of medians. "share" is the server's answers a second over those of onnxruntime in the window
before, on as many threads; where the client is another process on the same cores, both cannot reach 1. "CPU" is the
processor time of an answer, which stays comparable on a busy machine; compare that between two days, never the rates.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from deploy.bundle import BundleFacts, write_bundle
from deploy.images import decode_image
from deploy.machine import available_cores
from deploy.predictor import Predictor
from deploy.registry import Registry
from deploy.serving.batcher import MAX_BATCH
from deploy.serving.inference_protocol import pack_bytes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SOAK_CLIENTS = 32
PAYLOADS = ("pixels", "jpeg", "predict")


@dataclass(frozen=True)
class Window:
    """A few seconds of answers.

    Args:
        rate: Answers a second.
        cpu_ms: Processor time of an answer.
        latencies_ms: Of each answer; none for onnxruntime itself.
        refused: Requests that were told to come again later (429).
    """

    rate: float
    cpu_ms: float
    latencies_ms: tuple[float, ...] = ()
    refused: int = 0


def main() -> None:
    if sys.argv[1:2] == ["client"]:
        run_client(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--registry", type=Path)
    parser.add_argument("--architecture", default="mobilenet_v3_small")
    parser.add_argument("--size-px", type=int, default=224)
    parser.add_argument("--picture", type=int, nargs=2, default=(224, 224), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--payloads", nargs="+", choices=PAYLOADS, default=PAYLOADS)
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 8, 32))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--options", nargs="+", default=(), help="the server's, each as --name=value", metavar="OPTION")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        root = arguments.registry or make_registry(folder, arguments.architecture, arguments.size_px)
        picture = draw(*arguments.picture)
        for payload in arguments.payloads:
            (folder / payload).write_bytes(request_of(payload, picture))
        if arguments.soak is not None:
            print(soak(root, folder, arguments.payloads[0], arguments.soak, arguments.seconds))
            return
        with serving(root, folder, *arguments.options) as (port, server):
            rows = measure(root, folder, picture, port, server, arguments)
    print(rows)


def soak(root: Path, folder: Path, payload: str, seconds: float, window_s: float) -> str:
    """Saturation for a while, and then four times what the server can do; what memory and latencies did.

    The overloaded server is asked by four times as many clients as it lets wait, each at its own pace: so often that
    all of them together ask four times as much as was answered at saturation.
    """
    memory: list[float] = []
    at_rest, many = SOAK_CLIENTS, 4 * SOAK_CLIENTS
    with serving(root, folder, f"--max-waiting={at_rest}", f"--max-pictures={at_rest}") as (port, server):
        request = folder / payload
        asked(request, port, server, at_rest, window_s)
        until = time.monotonic() + seconds
        calm: list[Window] = []
        while time.monotonic() < until:
            calm.append(asked(request, port, server, at_rest, min(window_s, max(0.1, until - time.monotonic()))))
            memory.append(server.memory_info().rss / 2**20)
        rate = statistics.median(window.rate for window in calm)
        rounds = [
            (
                asked(request, port, server, at_rest, window_s),
                asked(request, port, server, many, window_s, period_s=many / (4 * rate)),
            )
            for _ in range(5)
        ]
        after = server.memory_info().rss / 2**20
    third = max(1, len(memory) // 3)
    p99 = [
        [float(np.quantile(window.latencies_ms, 0.99)) for window in windows] for windows in zip(*rounds, strict=True)
    ]
    refused = [window.refused / (window.refused + len(window.latencies_ms)) for _, window in rounds]
    return "\n".join(
        [
            f"{sum(len(window.latencies_ms) for window in calm)} answers in {seconds:.0f} s, {rate:.0f} a second",
            f"memory {statistics.median(memory[:third]):.1f} MiB in the first third, "
            f"{statistics.median(memory[-third:]):.1f} in the last, {after:.1f} after the overload",
            f"p99 {statistics.median(p99[0]):.0f} ms with {at_rest} clients; asked four times as much, "
            f"{statistics.median(p99[1]):.0f} ms of those answered, {statistics.median(refused):.0%} told 429",
        ]
    )


def measure(
    root: Path, folder: Path, picture: bytes, port: int, server: psutil.Process, arguments: argparse.Namespace
) -> str:
    """A table's text: onnxruntime and the server in turns."""
    cases = [(payload, clients) for payload in arguments.payloads for clients in arguments.clients]
    registry = Registry(root)
    with Predictor(registry.bundle(registry.require_champion().id), threads=1) as predictor:
        raw(predictor, picture, seconds=1, with_decoding=True)
        found = {case: [] for case in cases}
        for _ in range(arguments.rounds):
            for payload, clients in cases:
                bare = raw(predictor, picture, seconds=arguments.seconds, with_decoding=payload != "pixels")
                served = asked(folder / payload, port, server, clients, arguments.seconds)
                found[payload, clients].append((bare, served))
    lines = [
        "| payload | clients | onnxruntime /s | server /s | share | p50 ms | p99 ms | CPU ms | above onnxruntime, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (payload, clients), windows in found.items():
        lines.append(f"| {payload} | {clients} | {' | '.join(cells(windows))} |")
    memory = server.memory_info().rss / 2**20
    return "\n".join([*lines, "", f"{available_cores()} cores, server memory {memory:.0f} MiB"])


def cells(windows: list[tuple[Window, Window]]) -> list[str]:
    """Medians over the rounds."""
    median = statistics.median
    latencies = [np.quantile(served.latencies_ms, (0.5, 0.99)) for _, served in windows]
    return [
        f"{median(bare.rate for bare, _ in windows):.0f}",
        f"{median(served.rate for _, served in windows):.0f}",
        f"{median(served.rate / bare.rate for bare, served in windows):.2f}",
        f"{median(p50 for p50, _ in latencies):.1f}",
        f"{median(p99 for _, p99 in latencies):.1f}",
        f"{median(served.cpu_ms for _, served in windows):.2f}",
        f"{median(served.cpu_ms - bare.cpu_ms for bare, served in windows):.2f}",
    ]


def raw(predictor: Predictor, picture: bytes, *, seconds: float, with_decoding: bool) -> Window:
    """Onnxruntime with a thread a core in this process, batches as the server makes them."""
    image, over, counts = decode_image(picture), threading.Event(), []

    def work() -> None:
        count = 0
        while not over.is_set():
            images = [decode_image(picture) if with_decoding else image for _ in range(MAX_BATCH)]
            predictor.answers(np.concatenate([predictor.pixels(each) for each in images]))
            count += MAX_BATCH
        counts.append(count)

    threads = [threading.Thread(target=work) for _ in range(available_cores())]
    start, cpu = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    time.sleep(seconds)
    over.set()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - start
    return Window(sum(counts) / elapsed, 1e3 * (time.process_time() - cpu) / sum(counts))


def asked(
    request: Path, port: int, server: psutil.Process, clients: int, seconds: float, *, period_s: float = 0
) -> Window:
    """The server, asked by another process; each client at most once in a period."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        "client",
        str(request),
        str(port),
        str(clients),
        str(seconds),
        str(period_s),
    ]
    before = sum(server.cpu_times()[:2])
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    cpu = sum(server.cpu_times()[:2]) - before
    latencies = tuple(said["latencies_ms"])
    return Window(len(latencies) / said["seconds"], 1e3 * cpu / max(1, len(latencies)), latencies, said["refused"])


def run_client(request: str, port: str, clients: str, seconds: str, period_s: str = "0") -> None:
    """The other process: asks from several connections, the next question as soon as an answer is there."""
    import uvloop

    data = Path(request).read_bytes()
    until = time.perf_counter() + float(seconds)
    latencies: list[float] = []
    askers: list[Asker] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(int(clients)):
            make = partial(Asker, data, until, latencies, float(period_s))
            askers.append((await loop.create_connection(make, "127.0.0.1", int(port)))[1])
        await asyncio.gather(*(asker.over for asker in askers))

    start = time.perf_counter()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
    elapsed = time.perf_counter() - start
    refused = sum(asker.refused for asker in askers)
    print(json.dumps({"seconds": elapsed, "latencies_ms": latencies, "refused": refused}))


class Asker(asyncio.Protocol):
    """One connection."""

    def __init__(self, request: bytes, until: float, latencies: list[float], period_s: float) -> None:
        self._request, self._until, self._latencies, self._period_s = request, until, latencies, period_s
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
        if head.startswith(b"HTTP/1.1 200"):
            self._latencies.append(1e3 * (now - self._asked_at))
        elif head.startswith(b"HTTP/1.1 429"):
            self.refused += 1
        else:
            self.over.set_exception(RuntimeError(self._answer.decode()))
            return
        if (pause_s := self._asked_at + self._period_s - now) > 0:
            asyncio.get_running_loop().call_later(pause_s, self._ask)
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.over.done():
            self.over.set_exception(error or RuntimeError("the server closed the connection"))

    def _ask(self) -> None:
        self._asked_at = time.perf_counter()
        if self._asked_at >= self._until:
            self.over.set_result(None)
            self._transport.close()
            return
        self._answer = b""
        self._transport.write(self._request)


def request_of(payload: str, picture: bytes) -> bytes:
    """The bytes of an HTTP request."""
    if payload == "predict":
        return b"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (len(picture), picture)
    image = decode_image(picture)
    tensor, datatype, shape = (
        (image.tobytes(), "UINT8", [1, *image.shape]) if payload == "pixels" else (pack_bytes([picture]), "BYTES", [1])
    )
    entry = {"name": "images" if payload == "pixels" else "encoded", "datatype": datatype, "shape": shape}
    entry["parameters"] = {"binary_data_size": len(tensor)}
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    text = json.dumps({"inputs": [entry], "outputs": outputs}).encode()
    head = b"POST /v2/models/tanuki/infer HTTP/1.1\r\nhost: x\r\ninference-header-content-length: %d\r\n" % len(text)
    return head + b"content-length: %d\r\n\r\n" % (len(text) + len(tensor)) + text + tensor


@contextmanager
def serving(root: Path, folder: Path, *options: str) -> Iterator[tuple[int, psutil.Process]]:
    """The server in a process of its own; gives its port."""
    command = [sys.executable, "-m", "deploy.serving", "--registry", str(root), "--port", "0", *options]
    log = folder / "server.log"
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        while '"port"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        print(f"ready after {time.perf_counter() - start:.2f} s\n")
        line = next(line for line in log.read_text().splitlines() if '"port"' in line)
        yield json.loads(line)["port"], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def make_registry(folder: Path, architecture: str, size_px: int) -> Path:
    """A registry whose champion is a network of random weights."""
    from tasks.export.compose import compose, cut_at_seam
    from tasks.export.graph import to_bytes
    from tasks.export.network import export_network
    from tasks.export.preprocessing import preprocessing_graph
    from tasks.models.architectures import build_network

    network = build_network(architecture, depths=1).eval()
    graph = export_network(network, size_px=size_px, opset=20)
    width = graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    weight = np.random.default_rng(0).normal(0, 0.01, (10, width)).astype(np.float32)
    front = preprocessing_graph(size_px=size_px, crop_fraction=1.0, mean=MEAN, std=STD, opset=20)
    whole = compose(front, graph, weight, np.zeros(10, np.float32))
    model, *halves = (to_bytes(each) for each in (whole, *cut_at_seam(whole)))
    labels = tuple(f"class {number}" for number in range(10))
    facts = BundleFacts(labels, size_px, 1.0, MEAN, STD, {})
    golden = [draw(300, 200), draw(224, 224)]
    write_bundle(folder / "bundle", model=model, front=halves[0], back=halves[1], facts=facts, golden=golden)
    registry = Registry(folder / "registry")
    registry.promote(registry.register(folder / "bundle", {}).id, reason="to be measured", expected=None, forced=True)
    return folder / "registry"


def draw(width: int, height: int) -> bytes:
    """A JPEG with as much detail as a photo of its size, about."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
    noise = rng.normal(0, 6, (height, width, 3))
    pixels = np.clip(np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)) + noise, 0, 255)
    data = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(data, "JPEG", quality=85)
    return data.getvalue()


if __name__ == "__main__":
    main()
