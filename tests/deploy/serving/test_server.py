"""The server as its clients and its operators meet it: a real process on loopback."""

import gzip
import io
import json
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from deploy.registry import Registry
from deploy.serving.settings import parse_settings
from tests.conftest import REPOSITORY
from tests.deploy.serving.running import Running, add_version, eventually, make_certificate, make_champion, serving
from tests.deploy.test_images import DIRT
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded

BLUE = encoded(colour_image("blau"))
INFER = "/v2/models/m/infer"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    add_version(folder / "registry", folder)
    return folder / "registry"


def talk(port: int, *pieces: bytes, pause_s: float = 0.0, timeout_s: float = 5) -> bytes:
    """Sends raw bytes and reads until the server closes, or says no more for a while."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as line:
        answer = b""
        try:
            for piece in pieces:
                line.sendall(piece)
                time.sleep(pause_s)
            while piece := line.recv(65536):
                answer += piece
        except (TimeoutError, ConnectionError):
            pass
        return answer


def test_one_picture_as_the_body(running: Running) -> None:
    answer = running.client.post("/predict?top=2", content=BLUE, headers={"X-Request-Id": "mine-1"})
    assert answer.status_code == 200
    said = answer.json()
    assert said["request_id"] == answer.headers["x-request-id"] == "mine-1"
    assert (said["model"], said["version"]) == ("m", "1")
    (prediction,) = said["predictions"]
    assert prediction["label"] == "blau" == prediction["top"][0]["label"]
    assert prediction["probability"] > prediction["top"][1]["probability"]
    assert len(prediction["top"]) == 2


def test_several_pictures_as_a_form(running: Running) -> None:
    files = [("files", (f"{label}.png", encoded(colour_image(label)))) for label in LABELS]
    answer = running.client.post("/predict", files=[*files, ("files", ("bad.png", b"no picture"))])
    assert answer.status_code == 200
    *good, bad = answer.json()["predictions"]
    assert [(each["name"], each["label"]) for each in good] == [(f"{label}.png", label) for label in LABELS]
    assert bad["name"] == "bad.png"
    assert "no picture" in bad["error"]
    assert "label" not in bad


def test_curl_gets_an_answer_either_way(running: Running, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BLUE)
    for option in (["--data-binary", "@a.png"], ["-F", "file=@a.png"], ["-T", "a.png", "-X", "POST"]):
        command = ["curl", "--silent", "--fail", *option, f"{running.url}/predict"]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
        assert json.loads(run.stdout)["predictions"][0]["label"] == "blau"


def test_the_readmes_commands_are_answered(running: Running, repository: Path, tmp_path: Path) -> None:
    for name in ("some.jpg", "one.jpg", "two.jpg"):
        (tmp_path / name).write_bytes(encoded(colour_image("blau"), "JPEG"))
    readme = (repository / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^curl .*?(?=  #|$)", readme, re.M)
    assert len(commands) == 3
    for command in commands:
        command = command.replace("localhost:8000", f"127.0.0.1:{running.port}")
        run = subprocess.run(
            ["bash", "-c", f"{command} --silent --fail"], cwd=tmp_path, capture_output=True, check=True
        )
        assert b"blau" in run.stdout or b"tanuki_requests_total" in run.stdout


def test_awkward_files_get_their_stated_verdict(running: Running, material: Path) -> None:
    rows = [line.split("\t") for line in (material / "dirt_pack" / "MANIFEST.tsv").read_text().splitlines()[1:]]
    readable = {row[0] for row in rows if row[8].startswith("ok")}
    for name in sorted(row[0] for row in rows):
        answer = running.client.post("/predict", content=(material / "dirt_pack" / name).read_bytes())
        (prediction,) = answer.json()["predictions"]
        assert ("label" in prediction) == (answer.status_code == 200)
        assert "Traceback" not in answer.text
        verdict = DIRT.get(name.removeprefix("pillow_"))
        if isinstance(verdict, str):
            assert (answer.status_code, verdict in answer.text) == (400, True), name
        elif verdict is not None:
            assert answer.status_code == 200, name
        else:  # simplejpeg sees damage that Pillow paints over, or the other way round
            assert answer.status_code in ((200, 400) if name in readable else (400,)), name


def form(boundary: str = "") -> dict[str, str]:
    return {"content-type": f"multipart/form-data{boundary}"}


def packed(how: str) -> dict[str, str]:
    return {"content-encoding": how}


@pytest.mark.parametrize(
    ("url", "request_", "status", "message"),
    [
        ("/predict", {}, 400, "no picture"),
        ("/predict", {"content": b"abc"}, 400, "no picture"),
        ("/predict?top=0", {"content": BLUE}, 400, "top must be"),
        ("/predict?top=many", {"content": BLUE}, 400, "top must be"),
        ("/predict?top=", {"content": BLUE}, 400, "top must be"),
        ("/predict?version=", {"content": BLUE}, 400, "version must be"),
        ("/predict?version=7", {"content": BLUE}, 404, "version 7 is not found"),
        (f"/predict?version={'9' * 5000}", {"content": BLUE}, 404, "is not found"),
        ("/predict", {"files": [("f", (f"{i}", BLUE)) for i in range(9)]}, 400, "more than 8 pictures"),
        (
            "/predict",
            {"content": b"--b\r\nA:b\r\n\r\n\r\n" * 200_000, "headers": form("; boundary=b")},
            400,
            "more than 8",
        ),
        (
            "/predict",
            {"content": b"--b\r\n" + b"A:b\r\n" * 500_000, "headers": form("; boundary=b")},
            400,
            "too many headers",
        ),
        ("/predict", {"content": b"--x\r\nbroken", "headers": form()}, 400, "form"),
        ("/predict", {"content": b"broken", "headers": form("; boundary=x")}, 400, ""),
        ("/predict", {"content": b"--x", "headers": form(f"; boundary={'x' * 257}")}, 400, "form"),
        ("/predict", {"content": bytes(4_000_001)}, 413, "larger than 4000000 bytes"),
        ("/predict", {"content": zlib.compress(bytes(9_000_000)), "headers": packed("deflate")}, 413, "larger"),
        ("/predict", {"content": gzip.compress(BLUE)[:-9], "headers": packed("gzip")}, 400, "ends too early"),
        ("/predict", {"content": BLUE, "headers": packed("gzip")}, 400, "Content-Encoding"),
        ("/predict", {"content": BLUE, "headers": packed("br")}, 415, "may be gzip"),
        (INFER, {"content": b" " * 1_000_001}, 413, "bytes of JSON"),
        (INFER, {"content": b"[" * 100_000}, 400, "failed to parse"),
        ("/v2/repository/models/m/unload", {}, 400, "promote or roll back"),
        ("/v2/repository/index", {"content": b"[]"}, 400, "no object"),
    ],
)
def test_a_clients_mistake_is_told_and_never_a_5xx(
    running: Running, url: str, request_: dict, status: int, message: str
) -> None:
    answer = running.client.post(url, **request_)
    assert answer.status_code == status
    assert message in answer.text
    assert answer.json()["error"]
    assert "Traceback" not in running.log.read_text()


def test_a_picture_is_measured_before_it_is_decoded(running: Running) -> None:
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    before = running.metric("process_resident_memory_bytes")
    for _ in range(3):
        answer = running.client.post("/predict", content=bomb.getvalue())
        assert answer.status_code == 400
        assert "too large: 12000x12000" in answer.text
    jpeg = bytearray(encoded(colour_image("blau"), "JPEG"))
    sizes = jpeg.index(b"\xff\xc0") + 5  # in the frame's header: height, width
    jpeg[sizes : sizes + 4] = (30_000).to_bytes(2, "big") * 2
    answer = running.client.post("/predict", content=bytes(jpeg))
    assert (answer.status_code, "too large: 30000x30000" in answer.text) == (400, True)
    assert running.metric("process_resident_memory_bytes") - before < 40e6
    assert running.client.post("/predict", content=encoded(colour_image("blau", size=(1, 1)))).status_code == 200


def ask_unheard(port: int, times: int) -> None:
    """Asks for the page again and again and reads nothing."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(times):
            line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 50)
            time.sleep(0.1)


def test_a_client_that_does_not_read_is_let_go(running: Running) -> None:
    with pytest.raises(ConnectionError):  # once it is gone; as long as it is there, more may be asked
        ask_unheard(running.port, 200)


def test_a_slow_or_broken_client_is_let_go(running: Running) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n"
    assert b" 408 " in talk(running.port, head + b"half")
    assert talk(running.port, b"GET /v2 HTTP/1.1\r\nX: " + b"a" * 300_000).startswith(b"HTTP/1.1 400")
    said = talk(running.port, b"nonsense\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 400")
    assert json.loads(said.partition(b"\r\n\r\n")[2]) == {"error": "Invalid HTTP request received."}
    ask = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(BLUE), BLUE)
    assert talk(running.port, ask + b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert "without starting response" not in running.log.read_text()
    wrong = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: minus\r\n\r\n"
    assert talk(running.port, wrong).startswith(b"HTTP/1.1 400")
    noughts = wrong.replace(b"minus", b"0" * 5000 + b"3") + b"abc"  # more digits than Python makes a number of
    assert talk(running.port, noughts).startswith(b"HTTP/1.1 400")
    many = b"".join(b"X-%d: y\r\n" % number for number in range(10_000))
    assert talk(running.port, b"GET /v2 HTTP/1.1\r\n" + many + b"Connection: close\r\n\r\n")[9:12] in (b"200", b"400")
    chunked = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    piece = b"%x\r\n%s\r\n" % (len(BLUE), BLUE)
    assert b" 200 OK" in talk(running.port, chunked + piece + b"0\r\n\r\n")
    endless = talk(running.port, chunked, *[b"80000\r\n" + bytes(0x80000) + b"\r\n"] * 12)
    assert b" 413 " in endless or endless == b""  # answered, or cut off while it was still sending
    assert running.client.get("/v2/health/ready").status_code == 200


def test_a_client_that_does_not_read_is_waited_for_and_gets_every_answer(running: Running) -> None:
    """As many pages as no buffer between the two holds, all asked for at once."""
    page = running.client.get("/").content
    num, ask = 16_000_000 // len(page), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as line:
        last = ask.replace(b"Host", b"Connection: close\r\nHost")
        asking = threading.Thread(target=line.sendall, args=(ask * (num - 1) + last,))
        asking.start()
        time.sleep(0.5)  # until the server can write no more
        answered = b"".join(iter(lambda: line.recv(1_000_000), b""))
        asking.join()
    assert answered.count(page) == answered.count(b"HTTP/1.1 200 OK") == num


def test_requests_that_are_sent_ahead_wait_in_the_socket(running: Running) -> None:
    ask, num = b"GET /v2/health/live HTTP/1.1\r\n\r\n", 100_000
    before = running.metric("process_resident_memory_bytes")
    with socket.create_connection(("127.0.0.1", running.port), timeout=1) as line:
        with suppress(TimeoutError):
            line.sendall(ask * num)  # without reading a single answer
        time.sleep(1)
        assert running.metric("process_resident_memory_bytes") - before < 60e6


def test_a_head_has_its_time_from_when_it_is_read(registry: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import deploy.serving.connection as it\nit.HEAD_S = 0.5\n")
    large = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(large, "PNG")
    slow = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % large.tell() + large.getvalue()
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    last = live.replace(b"Host", b"Connection: close\r\nHost")
    with serving(registry, tmp_path, PYTHONPATH=f"{tmp_path}:{REPOSITORY}") as running:
        said = talk(running.port, 2 * slow + live + last[:10], last[10:], pause_s=0.1, timeout_s=120)
    assert said.count(b"HTTP/1.1 200 OK") == 4


@pytest.mark.parametrize("how", ["Connection: close", "half closed"])
def test_a_connection_that_is_over_does_not_wait_for_a_client_that_does_not_read(
    registry: Path, tmp_path: Path, how: str
) -> None:
    """Whose answer, with the name it gave its request, is more than any buffer between the two holds."""
    said = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}]}
    body = json.dumps({**said, "id": "a" * 7_900_000}).encode()
    header = how if ":" in how else "X: y"
    head = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n"
    with serving(registry, tmp_path, "--name", "m", "--body-timeout-s", "0.5") as running:
        num_files = running.metric("process_open_fds")
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.connect(("127.0.0.1", running.port))
            line.sendall(head.encode() + body)
            eventually(lambda: running.metric('tanuki_requests_total{code="200",route="infer"}') == 1)
            if how == "half closed":
                line.shutdown(socket.SHUT_WR)
            eventually(lambda: running.metric("process_open_fds") == num_files, timeout_s=5)


def test_metrics_tell_what_happened(running: Running) -> None:
    before = running.metric("tanuki_pictures_total")
    running.client.post("/predict", content=BLUE)
    running.client.post("/predict", content=b"bad")
    assert running.metric("tanuki_pictures_total") == before + 2
    assert running.metric("tanuki_model_version") == 1
    text = running.client.get("/metrics").text
    assert 'tanuki_requests_total{code="400",route="predict"}' in text
    for name in ("queue", "decode", "run", "request"):
        assert f"tanuki_{name}_seconds_bucket" in text


def test_failures_are_logged_with_their_request(running: Running) -> None:
    running.client.post("/predict", content=b"bad", headers={"X-Request-Id": "to-find"})
    running.client.get("/nope", headers={"X-Request-Id": "not\x7fprintable"})
    running.client.post("/predict?top=x", headers={"X-Request-Id": "found"})
    eventually(lambda: any(line.get("request_id") == "found" for line in running.lines()))
    line = next(line for line in running.lines() if line.get("request_id") == "found")
    assert line["status"] == 400
    assert "top must be" in line["message"]
    assert all("printable" not in str(line) for line in running.lines())


def test_it_drains_on_sigterm(registry: Path, tmp_path: Path) -> None:
    picture = encoded(colour_image("grün", size=(3000, 3000)))
    with serving(registry, tmp_path, "--notice-s", "5", "--threads", "1") as running, ThreadPoolExecutor(8) as pool:
        under_way = [pool.submit(httpx.post, f"{running.url}/predict", content=picture, timeout=60) for _ in range(8)]
        eventually(lambda: running.metric("tanuki_waiting_pictures") > 0)
        running.process.send_signal(signal.SIGTERM)
        eventually(lambda: running.client.get("/v2/health/ready").status_code == 400)
        late = running.client.post("/predict", content=BLUE)  # still answered, and told to leave
        assert late.status_code == 200
        assert late.headers["connection"] == "close"
        assert [each.result().status_code for each in under_way] == [200] * 8
        assert running.process.wait(60) == 0
    assert running.lines()[-1]["message"] == "stopped"


def test_who_is_still_sending_or_not_reading_at_its_end_is_told(registry: Path, tmp_path: Path) -> None:
    with serving(registry, tmp_path, "--grace-s", "1") as running, socket.socket() as unheard, socket.socket() as slow:
        for line in (unheard, slow):
            line.connect(("127.0.0.1", running.port))
        page = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        unheard.sendall(page * (16_000_000 // len(running.client.get("/").content)))
        slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        time.sleep(0.5)
        assert running.stop() == 0
        assert b" 503 " in slow.recv(1000)
    text = running.log.read_text()
    assert "the server is shutting down" in text
    assert "Traceback" not in text


def test_overload_is_told_and_the_rest_is_answered(registry: Path, tmp_path: Path) -> None:
    picture = encoded(colour_image("grün", size=(1200, 1200)), "BMP")
    options = ("--threads", "1", "--max-waiting", "4", "--max-pictures", "2")
    with serving(registry, tmp_path, *options) as running, ThreadPoolExecutor(16) as pool:
        asked = [pool.submit(httpx.post, f"{running.url}/predict", content=picture, timeout=30) for _ in range(16)]
        answers = [each.result() for each in asked]
        refused = [answer for answer in answers if answer.status_code == 429]
        assert refused
        assert {answer.status_code for answer in answers} == {200, 429}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert running.metric("tanuki_waiting_pictures") == 0


def test_trailers_say_nothing_and_are_limited(running: Running) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    body = b"%x\r\n%s\r\n0\r\n" % (len(BLUE), BLUE)
    said = talk(running.port, head + body + b"X-Request-Id: from-a-trailer\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 200")
    assert b"from-a-trailer" not in said
    assert talk(running.port, head + body, *[b"X-More: " + bytes([65]) * 30_000 + b"\r\n"] * 5) == b""
    flood = [bytes([65]) * 30_000] * 20  # more than one read takes, of which what is beside a body is not counted
    start = time.monotonic()
    assert talk(running.port, head + body + b"X-Endless: ", *flood) == b""
    assert talk(running.port, head + b"1;", *flood) == b""
    assert time.monotonic() - start < 5  # the server closed them, and nobody here gave up


def test_a_head_behind_a_body_is_counted_without_it(running: Running) -> None:
    body = encoded(colour_image("blau", size=(400, 400)), "BMP")
    ask = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    live = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    said = talk(running.port, ask[:100], ask[100:] + live[:10], live[10:], pause_s=0.2)
    assert said.count(b"HTTP/1.1 200 OK") == 2
    assert b"blau" in said


def test_a_body_behind_an_upgrade_is_refused_and_never_taken_for_a_request(running: Running) -> None:
    inner = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    said = talk(running.port, head + b"Content-Length: %d\r\n\r\n%s" % (len(inner), inner))
    assert said.startswith(b"HTTP/1.1 400")
    assert said.count(b"HTTP/1.1 ") == 1
    assert b"no Upgrade header" in said


def test_a_large_index_request_is_refused_unread(running: Running) -> None:
    answer = running.client.post("/v2/repository/index", content=b"[" + b"[]," * 100_000 + b"[]]")
    assert answer.status_code == 413


def test_a_request_without_any_answer_counts_as_failed(running: Running) -> None:
    before = running.client.get("/v2/models/m/stats").json()["model_stats"][0]["inference_stats"]
    assert running.client.post("/predict", content=b"no picture").status_code == 400
    after = running.client.get("/v2/models/m/stats").json()["model_stats"][0]["inference_stats"]
    assert after["success"]["count"] == before["success"]["count"]
    assert after["fail"]["count"] == before["fail"]["count"] + 1


def test_who_is_refused_is_told_before_the_body_and_may_go_on(registry: Path, tmp_path: Path) -> None:
    picture = encoded(colour_image("grün", size=(3000, 3000)))
    options = ("--threads", "1", "--max-waiting", "2", "--max-pictures", "2")
    with serving(registry, tmp_path, *options) as running, ThreadPoolExecutor(8) as pool:
        url = f"{running.url}/predict"
        asked = [pool.submit(httpx.post, url, content=picture, timeout=60) for _ in range(8)]
        eventually(lambda: running.metric("tanuki_waiting_pictures") == 2)
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as line:
            line.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n")
            said = line.makefile("rb")
            assert said.readline().startswith(b"HTTP/1.1 429")
            line.sendall(bytes(2_000_000) + b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"HTTP/1.1 200" in said.read()
        assert {each.result().status_code for each in asked} == {200, 429}


def test_the_bodies_of_all_requests_have_a_limit_together(registry: Path, tmp_path: Path) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n"
    packed, sizes = gzip.compress(bytes(3_000_000)), ("--max-body-mb", "3", "--max-bodies-mb", "4")
    with serving(registry, tmp_path, *sizes) as running, ExitStack() as stack:

        def sent(body: bytes) -> socket.socket:
            line = stack.enter_context(socket.create_connection(("127.0.0.1", running.port), timeout=30))
            line.sendall(head + body)
            return line

        def told(**more: Any) -> int:
            return running.client.post("/predict", **more).status_code

        slow = sent(bytes(2_900_000))
        eventually(lambda: told(content=bytes(2_900_000)) == 429)
        assert told(content=packed, headers={"Content-Encoding": "gzip"}) == 429
        refused = sent(bytes(2_900_000))
        assert refused.recv(100).startswith(b"HTTP/1.1 429")
        assert told(content=BLUE) == 200
        slow.sendall(bytes(100_000))
        assert b"HTTP/1.1 400" in slow.recv(1000)  # no picture
        assert told(content=bytes(2_900_000)) == 400
        assert told(content=packed, headers={"Content-Encoding": "gzip"}) == 400


def test_a_client_that_left_is_not_worked_for(registry: Path, tmp_path: Path) -> None:
    picture = encoded(colour_image("grün", size=(2000, 2000)), "BMP")
    with serving(registry, tmp_path, "--threads", "1") as running:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(8):
                pool.submit(_ask_and_leave, running.port, picture)
        eventually(lambda: running.metric("tanuki_waiting_pictures") == 0)
        assert running.metric('tanuki_requests_total{code="499",route="predict"}') > 0
        assert running.metric("tanuki_pictures_total") < 8


def _ask_and_leave(port: int, picture: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(picture) + picture)
        time.sleep(0.12)


def test_a_timeout_that_the_client_names_is_kept(registry: Path, tmp_path: Path) -> None:
    image = colour_image("blau", size=(1500, 1500))
    body = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1500, 1500, 3]}]}
    body["inputs"][0]["parameters"] = {"binary_data_size": image.size}
    text = json.dumps({**body, "parameters": {"timeout": 1000}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    with serving(registry, tmp_path, "--threads", "1", "--name", "m") as running:
        answer = running.client.post(INFER, content=text + image.tobytes(), headers=headers)
        assert answer.status_code == 504
        assert answer.json() == {"error": "no answer within 0.001 s"}


def test_tokens_keep_others_out(registry: Path, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_text("first-token\nsecond-token\n")
    with serving(registry, tmp_path, "--token-file", str(tmp_path / "tokens")) as running:
        assert running.client.get("/v2/health/ready").status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first-token"}):
            answer = running.client.post("/predict", content=BLUE, headers=header)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert running.client.get("/metrics", headers=header).status_code == 401
        for token in ("first-token", "second-token"):
            header = {"Authorization": f"Bearer {token}"}
            assert running.client.post("/predict", content=BLUE, headers=header).status_code == 200


def test_connections_beyond_the_limit_are_told_and_the_others_go_on(registry: Path, tmp_path: Path) -> None:
    with serving(registry, tmp_path, "--max-connections", "2") as running:
        assert running.client.post("/predict", content=BLUE).status_code == 200  # whose connection stays open
        with httpx.Client(base_url=running.url) as second, httpx.Client(base_url=running.url) as third:
            assert second.get("/v2/health/live").status_code == 200
            refused = third.post("/predict", content=BLUE)
            assert (refused.status_code, refused.headers["retry-after"], refused.headers["connection"]) == (
                503,
                "1",
                "close",
            )
            assert refused.json() == {"error": "more than 2 connections are open"}
            alive = third.get("/v2/health/live")
            assert (alive.status_code, alive.headers["connection"]) == (200, "close")
            for client in (running.client, second):
                assert client.post("/predict", content=BLUE).status_code == 200
            second.close()
            eventually(lambda: third.post("/predict", content=BLUE).status_code == 200)


def test_tls_by_setting(registry: Path, tmp_path: Path) -> None:
    trusted = ssl.create_default_context(cafile=str(make_certificate(tmp_path)))
    with serving(registry, tmp_path, "--tls-cert", "cert.pem", "--tls-key", "key.pem") as running:
        assert httpx.post(f"{running.url}/predict", content=BLUE, verify=trusted).status_code == 200


def start(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.serving", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_what_keeps_it_from_starting_is_one_paragraph(registry: Path, tmp_path: Path) -> None:
    empty, there = str(tmp_path / "empty"), ("--registry", str(registry))
    (tmp_path / "empty").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        runs = {
            "no such folder": start("--registry", str(tmp_path / "none"), "--port", "0"),
            "in use": start(*there, "--port", port),
            "holds no token": start(*there, "--port", "0", "--token-file", empty),
            "No such file": start(*there, "--port", "0", "--token-file", str(tmp_path / "gone")),
            "no certificate": start(*there, "--port", "0", "--tls-cert", empty, "--tls-key", empty),
        }
    for message, run in runs.items():
        assert run.returncode == 1, run.stderr
        told = [line for line in run.stderr.splitlines() if not line.startswith("{")]
        assert len(told) == 1, run.stderr
        assert message in told[0]


@pytest.mark.parametrize(
    "options",
    [[], ["--registry", "r", "--port", "http"], ["--registry", "r", "--tls-cert", "c"],
     ["--registry", "r", "--max-waiting", "3"], ["--registry", "r", "--timeout-s", "-1"]],
)  # fmt: skip
def test_wrong_usage_leaves_with_2(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_settings(options)
    assert left.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_it_starts_without_the_training_packages(registry: Path, tmp_path: Path) -> None:
    script = """
import sys
import deploy.serving.server
assert "fsspec" not in sys.modules
import deploy.shared_registry
heavy = {"torch", "onnx", "pandas", "pyarrow", "scipy", "prefect", "dvc", "typer", "pydantic", "tasks", "flows"}
print(sorted(heavy & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_clock_that_jumps_costs_nothing(registry: Path, tmp_path: Path) -> None:
    """Forth and back by a day at each look: what is timed is timed by a clock that only goes on."""
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "jumps, now = itertools.cycle((86400, -86400, 0)), time.time\n"
        "time.time = lambda: now() + next(jumps)\n"
    )
    options = ("--capture-dir", str(tmp_path / "captured"), "--capture-fraction", "1", "--watch-s", "0.02")
    with serving(registry, tmp_path, *options, PYTHONPATH=f"{tmp_path}:{REPOSITORY}") as running:
        for _ in range(20):
            assert running.client.post("/predict", content=BLUE).status_code == 200
        assert running.metric("tanuki_request_seconds_sum") < 60
        assert running.stop() == 0
    assert len(list((tmp_path / "captured").glob("*.parquet"))) == 1


def test_before_the_first_promotion_it_waits_and_says_that_it_is_not_ready(tmp_path: Path) -> None:
    root = tmp_path / "registry"
    version = add_version(root, tmp_path, promote=False)
    assert Registry(root).champion() is None
    with serving(root, tmp_path, "--watch-s", "0.05") as running:
        assert running.client.get("/v2/health/live").status_code == 200
        assert running.client.get("/v2/health/ready").status_code == 400
        refused = running.client.post("/predict", content=BLUE)
        assert refused.status_code == 503
        assert "no available versions" in refused.text
        make_champion(root, version)
        eventually(lambda: running.client.get("/v2/health/ready").status_code == 200)
        assert running.client.post("/predict", content=BLUE).status_code == 200


def test_no_thread_of_a_test_is_left() -> None:
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("answers", "watcher"))]
