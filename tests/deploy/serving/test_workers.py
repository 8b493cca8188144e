"""Several processes on one port are one server: counted together, following together, ending together."""

import os
import signal
import socket
from pathlib import Path

import httpx
import pytest

from deploy.registry import Registry
from deploy.serving.listening import reserve
from deploy.serving.settings import parse_settings
from deploy.serving.worker import share_of
from tests.deploy.serving.running import Running, add_version, eventually, make_champion, serving
from tests.deploy.serving.test_comparison import WHITE, make_fragile
from tests.deploy.tiny_bundle import colour_image, encoded, write_colour_bundle

PICTURE = encoded(colour_image("blau"), "JPEG")
REQUESTS = 40


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A registry of two versions, the first of which is the champion."""
    root = tmp_path / "registry"
    add_version(root, tmp_path)
    add_version(root, tmp_path, sharpness=4.0, promote=False)
    return root


def ask(running: Running) -> httpx.Response:
    """On a connection of its own, which any worker may get."""
    return httpx.post(f"{running.url}/predict", content=PICTURE, timeout=30)


def answers(running: Running) -> bool:
    """What waited for a worker that was killed is reset, so a client tries again."""
    try:
        return ask(running).status_code == 200
    except httpx.TransportError:
        return False


def pids(running: Running) -> set[int]:
    """The workers' processes."""
    children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text()
    return {int(pid) for pid in children.split()}


def num_answering(running: Running) -> int:
    return sum(line.startswith("tanuki_model_version{") for line in running.client.get("/metrics").text.splitlines())


@pytest.mark.slow
def test_they_share_the_port_and_are_counted_together(root: Path, tmp_path: Path) -> None:
    tritonclient = pytest.importorskip("tritonclient.grpc")
    options = ("--workers", "2", "--grpc-port", "0", "--watch-s", "1000")
    with serving(root, tmp_path, *options) as running:
        eventually(lambda: num_answering(running) == 2)
        assert [ask(running).json()["version"] for _ in range(REQUESTS)] == ["1"] * REQUESTS
        counts = [running.metric(f'tanuki_pictures_total{{version="1",worker="{number}"}}') for number in (0, 1)]
        assert min(counts) > 0
        assert sum(counts) == REQUESTS
        (statistics,) = running.client.get("/v2/models/tanuki/stats").json()["model_stats"]
        assert statistics["inference_count"] == REQUESTS
        assert statistics["inference_stats"]["success"]["count"] == REQUESTS
        with tritonclient.InferenceServerClient(f"127.0.0.1:{running.grpc_port}") as client:
            told = client.get_inference_statistics("tanuki", as_json=True)
            assert told["model_stats"][0]["inference_count"] == str(REQUESTS)

        make_champion(root, 2)
        assert running.client.post("/v2/repository/models/tanuki/load").status_code == 200
        assert {ask(running).json()["version"] for _ in range(REQUESTS)} == {"2"}
        assert running.stop() == 0
    assert running.lines()[-1]["message"] == "all workers have stopped"


@pytest.mark.slow
def test_one_that_dies_is_replaced_and_none_outlives_the_server(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, "--workers", "2", "--watch-s", "0.05") as running:
        eventually(lambda: num_answering(running) == 2)
        before = pids(running)
        os.kill(min(before), signal.SIGKILL)
        eventually(lambda: answers(running))
        eventually(lambda: len(pids(running) - before) == 1 and num_answering(running) == 2)
        make_champion(root, 2)
        eventually(lambda: {ask(running).json()["version"] for _ in range(REQUESTS)} == {"2"})
        workers = pids(running)
        running.process.kill()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
        with socket.create_server(("127.0.0.1", running.port)):  # the port is free again
            pass
    assert any("worker 0 ended with code -9" in line["message"] for line in running.lines())


@pytest.mark.slow
def test_a_second_version_that_one_of_them_stops_is_stopped_in_all(root: Path, tmp_path: Path) -> None:
    fragile = write_colour_bundle(tmp_path / "fragile", sharpness=2.0)
    make_fragile(fragile.directory)
    Registry(root).register(fragile.directory, {})

    def versions(running: Running) -> set[str]:
        return {ask(running).json()["version"] for _ in range(REQUESTS)}

    with serving(root, tmp_path, "--workers", "2", "--canary", "3=1") as running:
        while running.client.post("/predict", content=WHITE).status_code == 500:  # a connection is one worker's
            pass
        eventually(lambda: num_answering(running) == 2)
        eventually(lambda: versions(running) == {"1"})
        assert running.metric("tanuki_second_stopped_total") == 1
        before = pids(running)
        os.kill(min(before), signal.SIGKILL)
        eventually(lambda: answers(running))
        eventually(lambda: len(pids(running) - before) == 1 and num_answering(running) == 2)
        assert versions(running) == {"1"}


@pytest.mark.slow
def test_what_keeps_them_from_starting_is_told_once(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, "--workers", "2") as running:
        arguments = {
            "in use": ("--registry", str(root), "--port", str(running.port)),
            "no such folder": ("--registry", str(tmp_path / "none"), "--port", "0"),
        }
        for message, options in arguments.items():
            with (
                pytest.raises(AssertionError, match=message) as failed,
                serving(root, tmp_path, *options, "--workers", "2"),
            ):
                pass
            assert str(failed.value).count(message) == 1
        assert ask(running).status_code == 200


def test_they_have_the_port_of_a_server_that_has_just_ended() -> None:
    with socket.create_server(("127.0.0.1", 0)) as before:
        port = before.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            before.accept()[0].close()
            assert client.recv(1) == b""
    with reserve(parse_settings(["--registry", "r"]), port, "--port"):
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port))
        with socket.create_server(("127.0.0.1", port), reuse_port=True):
            pass


def test_they_share_what_the_server_may_use() -> None:
    options = ["--registry", "r", "--workers", "3", "--threads", "8", "--max-waiting", "100", "--max-connections", "31"]
    shares = [share_of(parse_settings(options), number) for number in range(3)]
    assert [each.threads for each in shares] == [3, 3, 2]
    assert {each.max_waiting for each in shares} == {64}  # a whole request must find room
    assert {each.max_connections for each in shares} == {11}
    assert sum(each.max_bodies_mb for each in shares) == 256
    few = [share_of(parse_settings([*options, "--threads", "2"]), number) for number in range(3)]
    assert [each.threads for each in few] == [1, 1, 1]
