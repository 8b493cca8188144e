"""What the server costs over onnxruntime itself: both in turns, window by window, so that others fall on both alike.

    python -m benchmarks.serving                          # all sections but the long ones, and Triton
    python -m benchmarks.serving --only shares overload   # some
    python -m benchmarks.serving --only soak --soak 600   # ten minutes at saturation
    python -m benchmarks.serving --only triton --triton-python ENV/bin/python   # see benchmarks/triton_server.py

A network of random weights at 224 px, which needs torch to be made; wrk and h2load (Debian: wrk, nghttp2-client) ask.
"share" is the server's answers a second over those of onnxruntime in the window before, on as many threads; where the
client is another process on the same cores, both cannot reach 1. "CPU" is the processor time of an answer, which stays
comparable on a busy machine; compare that between two days, never the rates. All numbers are medians over the rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from benchmarks.serving_clients import Request, Window, ask, h2load, wrk
from deploy.bundle import Bundle, BundleFacts, write_bundle
from deploy.images import decode_image
from deploy.machine import available_cores
from deploy.predictor import Predictor
from deploy.registry import Registry
from deploy.serving.batcher import MAX_BATCH
from deploy.serving.grpc_messages import INFERENCE, message_classes
from deploy.serving.inference_protocol import pack_bytes

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIENTS = 32
PICTURE, PHOTO = (224, 224), (500, 375)
LENGTH = "inference-header-content-length"
FUZZ_REQUESTS = 100_000
REGISTRY_WAIT_S = 30


@dataclass(frozen=True)
class Bench:
    """What the sections share.

    Args:
        folder: For files.
        rounds: Windows of each kind.
        seconds: Length of a window.
        arguments: Of the command line.
    """

    folder: Path
    rounds: int
    seconds: float
    arguments: argparse.Namespace

    @property
    def root(self) -> Path:
        """A registry with two versions of mobilenet_v3_small, the first of them champion; made when first needed."""
        root = self.arguments.registry or self.folder / "registry"
        return root if root.is_dir() else make_registry(self.folder, "mobilenet_v3_small", versions=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=QUICK)
    parser.add_argument("--registry", type=Path, help="measure its champion instead; for reload it needs two versions")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--soak", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--moves", type=int, default=100, help="promotions and rollbacks")
    parser.add_argument("--triton-python", type=Path, help="of an environment with nvidia-pytriton and onnxruntime")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch), arguments.rounds, arguments.seconds, arguments)
        for section in arguments.only:
            print(f"\n## {section}\n", flush=True)
            print(SECTIONS[section](bench), flush=True)
    print(f"\n{available_cores()} cores")


def shares(bench: Bench) -> str:
    """The binary extension, uint8 pixels."""
    with serving(bench.root, bench.folder) as (ports, server):
        client = partial(wrk, pixels_request(draw(*PICTURE)), ports[0], server)
        return compared(bench, client, (1, 8, CLIENTS), decodes=None)


def jpeg(bench: Bench) -> str:
    """Encoded pictures, small and of a photo's size."""
    tables = []
    with serving(bench.root, bench.folder) as (ports, server):
        for size in (PICTURE, PHOTO):
            picture = draw(*size)
            client = partial(wrk, encoded_request(picture), ports[0], server)
            tables.append(f"{size[0]} x {size[1]}, {len(picture)} bytes\n")
            tables.append(compared(bench, client, (CLIENTS,), decodes=picture))
    return "\n".join(tables)


def resnet18(bench: Bench) -> str:
    """A network that takes 15 times as long."""
    root = make_registry(bench.folder / "resnet18", "resnet18")
    with serving(root, bench.folder) as (ports, server):
        client = partial(wrk, pixels_request(draw(*PICTURE)), ports[0], server)
        return compared(bench, client, (8, CLIENTS), decodes=None, root=root)


def grpc(bench: Bench) -> str:
    """The same pixels over gRPC."""
    message = grpc_message(draw(*PICTURE))
    with serving(bench.root, bench.folder, "--grpc-port", "0") as (ports, server):
        check_grpc(message, ports[1])
        return compared(bench, partial(h2load, message, ports[1], server), (1, 8, CLIENTS), decodes=None)


def triton(bench: Bench) -> str:
    """Triton itself, and this server, both in turns."""
    if bench.arguments.triton_python is None:
        return "left out: --triton-python names no environment"
    request = pixels_request(draw(*PICTURE))
    bundle = champion(bench.root).directory
    with serving(bench.root, bench.folder) as (ports, server), tritonserver(bench, bundle) as (port, other):
        ours = compared(bench, partial(wrk, request, ports[0], server), (1, 8, CLIENTS), decodes=None)
        rows = [f"This server:\n\n{ours}\n\nBoth, in turns:\n"]
        rows += [
            "| clients | this /s | Triton /s | this / Triton | this p99 ms | Triton p99 ms |",
            "|---|---|---|---|---|---|",
        ]
        for clients in (1, 8, CLIENTS):
            found = [
                (
                    wrk(request, ports[0], server, clients, bench.seconds),
                    wrk(request, port, other, clients, bench.seconds),
                )
                for _ in range(bench.rounds)
            ]
            rows.append(
                f"| {clients} | {of(found, lambda w: w[0].rate):.0f} | {of(found, lambda w: w[1].rate):.0f} "
                f"| {of(found, lambda w: w[0].rate / w[1].rate):.2f} | {of(found, lambda w: w[0].p99_ms):.0f} "
                f"| {of(found, lambda w: w[1].p99_ms):.0f} |"
            )
    return "\n".join(rows)


def reload(bench: Bench) -> str:
    """Promotions and rollbacks under load, between calm windows; every answer fits the version that it names."""
    registry, picture = Registry(bench.root), draw(*PICTURE)
    expected = {str(version.id): probabilities(registry, version.id, picture) for version in registry.versions()[:2]}
    calm: list[Window] = []
    moving: list[Window] = []
    memory: list[float] = []
    moves = 0
    with serving(bench.root, bench.folder, "--watch-s", "0.05") as (ports, server):
        client = partial(ask, pixels_request(picture), ports[0], server, CLIENTS, expected=expected)
        client(bench.seconds)
        while moves < bench.arguments.moves and len(moving) < bench.arguments.moves:
            calm.append(client(bench.seconds))
            with moved_about(registry, ports[0]) as moved:
                moving.append(client(bench.seconds))
            moves += len(moved)
            memory.append(server.memory_info().rss / 2**20)
    answers = Counter[str]()
    for window in moving:
        answers.update(dict(window.versions))
    ratio = of(list(zip(calm, moving, strict=True)), lambda pair: pair[1].p99_ms / pair[0].p99_ms)
    third = max(1, len(memory) // 3)
    before, after = statistics.median(memory[:third]), statistics.median(memory[-third:])
    return (
        f"{moves} promotions and rollbacks under load, {answers.total()} answers meanwhile, none failed, none of "
        f"another version than it named {dict(answers)}; p99 {of(calm, lambda w: w.p99_ms):.0f} ms calm, "
        f"{of(moving, lambda w: w.p99_ms):.0f} ms moving, {ratio:.2f} times; memory {before:.1f} MiB in the first "
        f"third, {after:.1f} in the last"
    )


def soak(bench: Bench) -> str:
    """Saturation for a while: what memory and latencies did."""
    memory: list[float] = []
    windows: list[Window] = []
    with serving(bench.root, bench.folder) as (ports, server):
        client = partial(wrk, pixels_request(draw(*PICTURE)), ports[0], server, CLIENTS)
        client(bench.seconds)
        until = time.monotonic() + bench.arguments.soak
        while time.monotonic() < until:
            windows.append(client(min(10, max(1, until - time.monotonic()))))
            memory.append(server.memory_info().rss / 2**20)
    third = max(1, len(memory) // 3)
    early, late = statistics.median(memory[:third]), statistics.median(memory[-third:])
    return (
        f"{sum(window.answers for window in windows)} answers in {bench.arguments.soak:.0f} s, "
        f"{of(windows, lambda w: w.rate):.0f} a second, CPU {of(windows, lambda w: w.cpu_ms):.2f} ms each, p99 "
        f"{of(windows[:third], lambda w: w.p99_ms):.0f} ms in the first third, "
        f"{of(windows[-third:], lambda w: w.p99_ms):.0f} in the last; memory {early:.1f} MiB in the first third, "
        f"{late:.1f} in the last, {max(memory):.1f} at most"
    )


def overload(bench: Bench) -> str:
    """Four times what the server can do.

    The overloaded server is asked by four times as many clients as it lets wait, each at its own pace: so often that
    all of them together ask four times as much as was answered at saturation. Then again with half of the waiting time
    at saturation as bound, because the clients, who ask more, leave the server less of the processor.
    """
    many, request = 4 * CLIENTS, pixels_request(draw(*PICTURE))
    options = (f"--max-waiting={CLIENTS}", f"--max-pictures={CLIENTS}")
    with serving(bench.root, bench.folder, *options) as (ports, server):
        client = partial(ask, request, ports[0], server)
        rate = client(CLIENTS, bench.seconds).rate
        period_s = many / (4 * rate)
        rounds = [
            (client(CLIENTS, bench.seconds), client(many, bench.seconds, period_s=period_s))
            for _ in range(bench.rounds)
        ]
    calm_ms, wait_s = of(rounds, lambda pair: pair[0].p99_ms), round(CLIENTS / rate / 2, 3)
    with serving(bench.root, bench.folder, *options, f"--max-wait-s={wait_s}") as (ports, server):
        client = partial(ask, request, ports[0], server)
        client(CLIENTS, bench.seconds)
        bounded = [client(many, bench.seconds, period_s=period_s) for _ in range(bench.rounds)]

    def told(windows: list[Window]) -> str:
        refused = of(windows, lambda each: each.refused / (each.refused + each.answers))
        p99_ms = of(windows, lambda each: each.p99_ms)
        return f"{p99_ms:.0f} ms of those answered ({p99_ms / calm_ms:.2f} times), {refused:.0%} told 429"

    return (
        f"p99 {calm_ms:.0f} ms with {CLIENTS} clients; asked four times as much, {told([pair[1] for pair in rounds])}; "
        f"with --max-wait-s={wait_s}, {told(bounded)}"
    )


def memory(bench: Bench) -> str:
    """How soon it is ready, and how large after load."""
    ready, sizes = [], []
    for _ in range(bench.rounds):
        start = time.perf_counter()
        with serving(bench.root, bench.folder) as (ports, server):
            used = sum(server.cpu_times()[:2])
            ready.append((time.perf_counter() - start, used))
            wrk(pixels_request(draw(*PICTURE)), ports[0], server, CLIENTS, bench.seconds)
            sizes.append(server.memory_info().rss / 2**20)
    return (
        f"ready after {of(ready, lambda each: each[0]):.2f} s ({min(each[0] for each in ready):.2f} at best), of which "
        f"{of(ready, lambda each: each[1]):.2f} s processor time; {of(sizes, float):.1f} MiB after {CLIENTS} clients"
    )


def fuzz(bench: Bench) -> str:  # noqa: ARG001
    """The mutated requests of tests/deploy/serving/test_fuzz.py: 100,000, or as many as nine minutes allow."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-rP", "-m", "slow", "tests/deploy/serving/test_fuzz.py"]
    environment = {**os.environ, "TANUKI_FUZZ_REQUESTS": str(FUZZ_REQUESTS)}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if run.returncode:
        raise RuntimeError(run.stdout)
    return next(line for line in run.stdout.splitlines() if " requests: " in line)


SECTIONS: dict[str, Callable[[Bench], str]] = {
    each.__name__: each for each in (shares, jpeg, resnet18, grpc, triton, reload, soak, overload, memory, fuzz)
}
QUICK = ("shares", "jpeg", "resnet18", "grpc", "overload", "memory")


def of(windows: list[Any], value: Callable[[Any], float]) -> float:
    """Median over windows."""
    return statistics.median(map(value, windows))


def champion(root: Path) -> Bundle:
    """The champion's bundle."""
    registry = Registry(root)
    return registry.bundle(registry.require_champion().id)


def compared(
    bench: Bench,
    client: Callable[[int, float], Window],
    clients: tuple[int, ...],
    *,
    decodes: bytes | None,
    root: Path | None = None,
) -> str:
    """A table's text: onnxruntime and a server in turns."""
    rows = {number: [] for number in clients}
    with Predictor(champion(root or bench.root), threads=1) as predictor:
        image = decode_image(draw(*PICTURE)) if decodes is None else decodes
        raw(predictor, image, seconds=1)
        client(CLIENTS, 1)
        for _ in range(bench.rounds):
            for number in clients:
                bare = raw(predictor, image, seconds=bench.seconds)
                alone = latency_ms(predictor, image, seconds=0.3)
                rows[number].append((bare, alone, client(number, bench.seconds)))
    lines = [
        "| clients | raw /s | server /s | share | raw alone p50 ms | p50 ms | p99 ms | CPU ms | above raw ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for number, found in rows.items():
        values = (
            f"{of(found, lambda w: w[0].rate):.0f}",
            f"{of(found, lambda w: w[2].rate):.0f}",
            f"{of(found, lambda w: w[2].rate / w[0].rate):.2f}",
            f"{of(found, lambda w: w[1]):.1f}",
            f"{of(found, lambda w: w[2].p50_ms):.1f}",
            f"{of(found, lambda w: w[2].p99_ms):.1f}",
            f"{of(found, lambda w: w[2].cpu_ms):.2f}",
            f"{of(found, lambda w: w[2].cpu_ms - w[0].cpu_ms):.2f}",
        )
        lines.append(f"| {number} | {' | '.join(values)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Bare:
    """A window of onnxruntime itself.

    Args:
        rate: Pictures a second.
        cpu_ms: Processor time of a picture.
    """

    rate: float
    cpu_ms: float


def raw(predictor: Predictor, picture: bytes | np.ndarray, *, seconds: float) -> Bare:
    """Onnxruntime with a thread a core in this process, batches as the server makes them; bytes are decoded first."""
    over, counts = threading.Event(), []

    def work() -> None:
        count = 0
        while not over.is_set():
            images = [decode_image(picture) if isinstance(picture, bytes) else picture for _ in range(MAX_BATCH)]
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
    return Bare(sum(counts) / elapsed, 1e3 * (time.process_time() - cpu) / sum(counts))


def latency_ms(predictor: Predictor, picture: bytes | np.ndarray, *, seconds: float) -> float:
    """Of a picture alone, one after the other."""
    found, until = [], time.perf_counter() + seconds
    while (start := time.perf_counter()) < until:
        predictor.answers(predictor.pixels(decode_image(picture) if isinstance(picture, bytes) else picture))
        found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def probabilities(registry: Registry, version: int, picture: bytes) -> list[float]:
    """What a version says of a picture."""
    with Predictor(registry.bundle(version), threads=1) as predictor:
        return predictor.predict([decode_image(picture)]).probabilities[0].tolist()


@contextmanager
def moved_about(registry: Registry, port: int) -> Iterator[list[int]]:
    """Promotes and rolls back in turns meanwhile, each once the server has followed; gives the versions."""
    over, moved, failures = threading.Event(), [], []

    def move() -> None:
        try:
            while not over.is_set():
                now = registry.require_champion().id
                if len(moved) % 2:
                    registry.rollback("measured")
                else:
                    registry.promote(3 - now, reason="measured", expected=now, forced=True)
                wanted = registry.require_champion().id
                until = time.monotonic() + REGISTRY_WAIT_S
                while answering(port) != wanted:
                    assert time.monotonic() < until, f"the server does not follow to version {wanted}"
                    time.sleep(0.05)
                moved.append(wanted)
        except BaseException as error:  # noqa: BLE001  told where it is waited for
            failures.append(error)

    thread = threading.Thread(target=move)
    thread.start()
    try:
        yield moved
    finally:
        over.set()
        thread.join()
    if failures:
        raise failures[0]


def answering(port: int) -> int:
    """The champion of a server."""
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(b"GET /model HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        said = b"".join(iter(partial(line.recv, 65_536), b""))
    return int(json.loads(said.partition(b"\r\n\r\n")[2])["version"])


def pixels_request(picture: bytes) -> Request:
    """A uint8 tensor, and probabilities as bytes."""
    image = decode_image(picture)
    return infer_request("images", "UINT8", [1, *image.shape], image.tobytes())


def encoded_request(picture: bytes) -> Request:
    """A picture's file, and probabilities as bytes."""
    return infer_request("encoded", "BYTES", [1], pack_bytes([picture]))


def infer_request(name: str, datatype: str, shape: list[int], tensor: bytes) -> Request:
    entry = {"name": name, "datatype": datatype, "shape": shape, "parameters": {"binary_data_size": len(tensor)}}
    outputs = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    text = json.dumps({"inputs": [entry], "outputs": outputs}).encode()
    return Request("/v2/models/tanuki/infer", ((LENGTH, str(len(text))),), text + tensor)


def grpc_message(picture: bytes) -> bytes:
    """The same as a message of ModelInfer."""
    image = decode_image(picture)
    message = message_classes("inference", INFERENCE)["ModelInferRequest"](
        model_name="tanuki",
        inputs=[{"name": "images", "datatype": "UINT8", "shape": [1, *image.shape]}],
        outputs=[{"name": "probabilities"}],
        raw_input_contents=[image.tobytes()],
    )
    return message.SerializeToString()


def check_grpc(message: bytes, port: int) -> None:
    """One answer by a client that looks at it: h2load sees no gRPC status."""
    from grpc import insecure_channel

    with insecure_channel(f"127.0.0.1:{port}") as channel:
        answer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(message)
    assert len(answer) > 40, answer


@contextmanager
def serving(root: Path, folder: Path, *options: str) -> Iterator[tuple[tuple[int, int | None], psutil.Process]]:
    """The server in a process of its own; gives its ports of HTTP and of gRPC."""
    command = [sys.executable, "-m", "deploy.serving", "--registry", str(root), "--port", "0", *options]
    log = folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file)
    try:
        while '"port"' not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        line = json.loads(next(line for line in log.read_text().splitlines() if '"port"' in line))
        yield (line["port"], line["grpc_port"]), psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def tritonserver(bench: Bench, bundle: Path) -> Iterator[tuple[int, psutil.Process]]:
    """Triton in processes of its own; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [bench.arguments.triton_python, Path(__file__).with_name("triton_server.py"), bundle, str(port)]
    log = bench.folder / "triton.log"
    # Its Python stub would take another libpython of the system, with the standard library of this one.
    libraries = {"LD_LIBRARY_PATH": str(Path(sys.base_prefix, "lib"))}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **libraries})
    try:
        until = time.monotonic() + 120
        while "READY" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield port, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def make_registry(folder: Path, architecture: str, *, versions: int = 1) -> Path:
    """A registry of networks of random weights, which differ in their heads; the first is champion."""
    from tasks.export.compose import compose, cut_at_seam
    from tasks.export.graph import to_bytes
    from tasks.export.network import export_network
    from tasks.export.preprocessing import preprocessing_graph
    from tasks.models.architectures import build_network

    network = build_network(architecture, depths=1).eval()
    graph = export_network(network, size_px=PICTURE[0], opset=20)
    width = graph.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    front = preprocessing_graph(size_px=PICTURE[0], crop_fraction=1.0, mean=MEAN, std=STD, opset=20)
    labels = tuple(f"class {number}" for number in range(10))
    facts = BundleFacts(labels, PICTURE[0], 1.0, MEAN, STD, {})
    golden = [draw(300, 200), draw(*PICTURE)]
    folder.mkdir(exist_ok=True)
    registry = Registry(folder / "registry")
    for seed in range(versions):
        weight = np.random.default_rng(seed).normal(0, 0.1, (10, width)).astype(np.float32)
        whole = compose(front, graph, weight, np.zeros(10, np.float32))
        model, *halves = (to_bytes(each) for each in (whole, *cut_at_seam(whole)))
        bundle = folder / f"bundle-{seed}"
        write_bundle(bundle, model=model, front=halves[0], back=halves[1], facts=facts, golden=golden)
        registry.register(bundle, {})
    registry.promote(1, reason="to be measured", expected=None, forced=True)
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
