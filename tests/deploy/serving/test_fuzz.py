"""Mutated requests, byte by byte, against the real server: answers and refusals only, and memory as it was."""

import json
import os
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.deploy.serving.running import Running
from tests.deploy.tiny_bundle import colour_image, encoded

IMAGE = colour_image("blau", size=(8, 6))
PICTURE = encoded(colour_image("blau"), "JPEG")
# A hundred thousand take some minutes: TANUKI_FUZZ_REQUESTS=100000 pytest -m slow tests/deploy/serving/test_fuzz.py
REQUESTS = int(os.environ.get("TANUKI_FUZZ_REQUESTS", "10000"))
SECONDS = 30 if REQUESTS <= 10_000 else 540
CLIENTS = 8


def infer(data: bytes, **entry: object) -> tuple[bytes, bytes]:
    entry["parameters"] = {"binary_data_size": len(data)}
    text = json.dumps({"id": "a", "inputs": [entry], "outputs": [{"name": "embedding"}]}).encode()
    head = b"POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nInference-Header-Content-Length: %d\r\n" % len(text)
    return head, text + data


def form() -> tuple[bytes, bytes]:
    body = b'--b\r\nContent-Disposition: form-data; name="f"; filename="a.jpg"\r\n\r\n' + PICTURE + b"\r\n--b--\r\n"
    return b"POST /predict?top=2 HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n", body


# Head and body; the length is added once they are mutated, or else the server would do nothing but wait.
SEEDS = [
    infer(IMAGE.tobytes(), name="images", datatype="UINT8", shape=[1, *IMAGE.shape]),
    infer(len(PICTURE).to_bytes(4, "little") + PICTURE, name="encoded", datatype="BYTES", shape=[1]),
    form(),
]
TOKENS = (b"-1", b"99999999999999999999", b"[[", b'"', b"null", b"1e400", b"\r\n", b"\x00")


def whole(head: bytes, body: bytes) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def mutated(draw: random.Random) -> bytes:
    """A request with a few bytes wrong: of its body or its head, seldom of its length."""
    head, body = draw.choice(SEEDS)
    where = draw.random()
    if where < 0.7:
        return whole(head, scrambled(body, draw))
    if where < 0.98:
        return whole(scrambled(head[:-2], draw) + b"\r\n", body)
    return scrambled(whole(head, body), draw)


def scrambled(data: bytes, draw: random.Random) -> bytes:
    """A few bytes set, cut, doubled or exchanged; most often at the beginning, where meaning is."""
    made = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(1 + min(len(made), draw.choice((300, len(made)))))
        kind = draw.randrange(4)
        if kind == 0:
            made[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del made[at : at + draw.randint(1, 30)]
        elif kind == 2:
            made[at:at] = made[at : at + draw.randint(1, 30)]
        else:
            made[at : at + 1] = draw.choice(TOKENS)
    return bytes(made)


def ask(port: int, request: bytes) -> str:
    """The status line's code, "closed", or "waits" where the server waits for what never comes."""
    with socket.create_connection(("127.0.0.1", port), timeout=0.3) as line:
        try:
            line.sendall(request)
            return line.recv(64)[9:12].decode() or "closed"
        except TimeoutError:
            return "waits"
        except ConnectionError:
            return "closed"


def ask_mutated(port: int, seed: int, number: int, until: float) -> Counter[str]:
    draw = random.Random(seed)
    answers: Counter[str] = Counter()
    for _ in range(number):
        answers[ask(port, mutated(draw))] += 1
        if time.monotonic() > until:
            break
    return answers


@pytest.mark.slow
def test_no_mutated_request_brings_it_down(running: Running) -> None:
    for seed in SEEDS:
        assert ask(running.port, whole(*seed)) == "200"
    ask_mutated(running.port, CLIENTS, 2000, time.monotonic() + SECONDS)  # what any load does to memory
    before = running.metric("process_resident_memory_bytes")
    until = time.monotonic() + SECONDS
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask_mutated, running.port, seed, REQUESTS // CLIENTS, until) for seed in range(CLIENTS)]
        answers = sum((each.result() for each in asked), Counter[str]())
    assert answers.total() > 2000
    assert {code for code in answers if code[0] == "5"} == set(), answers
    assert running.metric("process_resident_memory_bytes") - before < 10e6
    assert running.metric("tanuki_waiting_pictures") == 0
    assert not [line for line in running.lines() if "traceback" in line]
    print(f"{sum(answers.values())} requests: {dict(answers)}")
