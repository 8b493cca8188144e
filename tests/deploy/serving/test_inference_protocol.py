"""The protocol over HTTP, held to what Triton answered, and to being stricter where Triton believes anything."""

import base64
import gzip
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.serving.errors import RequestError
from deploy.serving.infer_codec import parse_infer
from tests.deploy.serving.running import Running
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded

SIZE = 224 * 224 * 3
PIXELS = bytes(SIZE)
CUT = 400  # longer answers were recorded up to here
INFER = "/v2/models/m/infer"
LENGTH = "Inference-Header-Content-Length"


def asked(*inputs: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"inputs": list(inputs), **more}


def tensor(shape: Any = (1, 224, 224, 3), *, name: str = "images", datatype: str = "UINT8", **more: Any) -> dict:
    return {"name": name, "shape": list(shape), "datatype": datatype, **more}


def binary(shape: Any = (1, 224, 224, 3), size: int = SIZE, **more: Any) -> dict[str, Any]:
    return tensor(shape, parameters={"binary_data_size": size}, **more)


Request = Callable[[httpx.Client], httpx.Response]


def json_infer(body: dict[str, Any] | bytes, path: str = INFER) -> Request:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda client: client.post(path, content=content)


def binary_infer(body: dict[str, Any], pixels: bytes = PIXELS, *, header: str | None = None) -> Request:
    text = json.dumps(body).encode()
    headers = {LENGTH: header or str(len(text))}
    return lambda client: client.post(INFER, content=text + pixels, headers=headers)


def get(path: str) -> Request:
    return lambda client: client.get(path)


def post(path: str) -> Request:
    return lambda client: client.post(path)


# How each recorded request is put to this model, whose tensors have other names and shapes.
REQUESTS: dict[str, Request] = {
    **{f"GET {path}": get(path) for path in (
        "/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/m", "/v2/models/m/ready", "/v2/models/m/versions/1",
        "/v2/models/m/versions/1/ready", "/v2/models/m/versions/9/ready", "/v2/models/zz", "/v2/models/zz/ready",
        "/v2/models/m/config", "/v2/models/m/stats", "/v2/nope",
    )},
    "repo index": post("/v2/repository/index"),
    "repo index ready only": json_infer({"ready": True}, "/v2/repository/index"),
    "ok bin->default out": binary_infer(asked(binary())),
    "ok bin->bin all": binary_infer(asked(binary(), parameters={"binary_data_output": True})),
    "ok id echo": binary_infer(asked(binary(), id="abc")),
    "unknown output": binary_infer(asked(binary(), outputs=[{"name": "zzz"}])),
    "wrong input name": binary_infer(asked(binary(name="x"))),
    "wrong dtype": binary_infer(asked(binary(datatype="FP32"))),
    "unknown dtype": binary_infer(asked(binary(datatype="WHAT"))),
    "wrong shape": binary_infer(asked(binary((1, 3, 10, 10)))),
    "neg shape": binary_infer(asked(binary((-1, 224, 224, 3)))),
    "batch too large": binary_infer(asked(binary((9, 224, 224, 3)))),
    "zero batch": binary_infer(asked(binary((0, 224, 224, 3), 0)), b""),
    "binary size short": binary_infer(asked(binary(size=SIZE - 1))),
    "binary size long": binary_infer(asked(binary(size=SIZE + 1))),
    "truncated body": binary_infer(asked(binary()), PIXELS[:100]),
    "header len too long": binary_infer(asked(binary()), header="1000000000"),
    "header len garbage": binary_infer(asked(binary()), header="abc"),
    "header len negative": binary_infer(asked(binary()), header="-5"),
    "not json": json_infer(b"{nope"),
    "empty body": json_infer(b""),
    "no inputs": json_infer({}),
    "json data too few": json_infer(asked(tensor((1, 2, 2, 3), data=[1, 2, 3]))),
    "json out of range": json_infer(asked(tensor((1, 1, 2, 3), data=[1, 2, 300, 4, 5, 6]))),
    "json nested ok": json_infer(asked(tensor((1, 1, 2, 3), data=[[[[1, 2, 3], [4, 5, 6]]]]))),
    "unknown model": binary_infer(asked(binary())),
    "unknown version": binary_infer(asked(binary())),
    "version 1": binary_infer(asked(binary())),
    "GET infer": get(INFER),
    "load unknown": post("/v2/repository/models/zz/load"),
    "load m": post("/v2/repository/models/m/load"),
    "index after": post("/v2/repository/index"),
}  # fmt: skip
# Triton lets a client unload a model; here the registry says what answers.
NOT_OFFERED = {"unload m", "infer after unload", "ready after unload", "server ready after unload"}
# Where this is stricter, or says it in other words: status, and a part of the message.
OTHERWISE = {
    "wrong shape": (400, "unexpected shape for input 'images' for model 'm'. Expected [-1,-1,-1,3], got [1,3,10,10]."),
    "neg shape": (400, "attempt to access JSON non-unsigned-integer as unsigned-integer"),
    "zero batch": (400, "[request id: <id_unknown>] inference request batch-size must be >= 1 for 'm'"),
    "header len garbage": (400, "Inference-Header-Content-Length must be a whole number, got: 'abc'"),
    "not json": (400, "failed to parse the request JSON buffer: "),
    "empty body": (400, "failed to parse the request JSON buffer: "),
    "no inputs": (400, "Unable to parse 'inputs': attempt to access non-existing object member 'inputs'"),
    "json data too few": (400, "Unable to parse 'data': Shape does not match true shape of 'data' field"),
    "json out of range": (400, "UINT8 wants whole numbers of 0 to 255"),
    "load unknown": (400, "failed to load 'zz', failed to poll from model repository"),
}


def shape_of(value: Any) -> Any:
    """JSON without its values."""
    if isinstance(value, dict):
        return {key: shape_of(each) for key, each in value.items()}
    return [shape_of(value[0])] if isinstance(value, list) and value else type(value).__name__


def test_every_recorded_request_has_its_counterpart(recorded: dict[str, dict[str, Any]]) -> None:
    assert set(recorded) == set(REQUESTS) | NOT_OFFERED


@pytest.mark.parametrize("case", REQUESTS)
def test_it_answers_as_triton_does(running: Running, recorded: dict[str, dict[str, Any]], case: str) -> None:
    triton = recorded[case]
    with httpx.Client(base_url=running.url) as client:
        hook = {"request": [lambda request: setattr(request, "url", request.url.copy_with(path=triton["path"]))]}
        client.event_hooks = hook
        answer = REQUESTS[case](client)
    status, message = OTHERWISE.get(case, (triton["status"], None))
    assert answer.status_code == status, answer.text
    if message is not None:
        assert message in answer.json()["error"]
    elif status >= 400:
        said = json.loads(triton["body"])["error"].replace("'input'", "'images'")
        assert re.sub(r"\d+", "#", answer.json()["error"]) == re.sub(r"\d+", "#", said)
    elif case.startswith(("ok", "json", "version")):
        check_answer(answer, triton)
    elif len(triton["body"]) == CUT:
        assert next(iter(answer.json())) in triton["body"][:20]
    elif triton["body"]:
        assert shape_of(answer.json()) == shape_of(json.loads(triton["body"]))


def check_answer(answer: httpx.Response, triton: dict[str, Any]) -> None:
    """The same form: keys in their order, and bytes where Triton sends bytes."""
    length = int(answer.headers.get(LENGTH, len(answer.content)))
    assert (LENGTH in answer.headers) == (LENGTH.lower() in triton["resp_headers"])
    assert answer.headers["content-type"] == triton["resp_headers"]["content-type"]
    ours, theirs = json.loads(answer.content[:length]), json.JSONDecoder().raw_decode(triton["body"])[0]
    assert list(ours) == list(theirs)
    assert list(ours["outputs"][0]) == list(theirs["outputs"][0])
    sizes = [each["parameters"]["binary_data_size"] for each in ours["outputs"] if "parameters" in each]
    assert len(answer.content) == length + sum(sizes)


def output(answer: httpx.Response, name: str) -> Any:
    assert answer.status_code == 200, answer.text
    return next(each for each in answer.json()["outputs"] if each["name"] == name)


def test_pixels_and_their_picture_get_the_same_answer(running: Running) -> None:
    image = colour_image("grün")
    picture = encoded(image)
    base = base64.b64encode(picture).decode()
    sent = [
        json_infer(asked(tensor(image[None].shape, data=image.ravel().tolist()))),
        json_infer(asked(tensor(image[None].shape, data=image[None].tolist()))),
        binary_infer(asked(binary(image[None].shape, image.size)), image.tobytes()),
        json_infer(asked(tensor([1], name="encoded", datatype="BYTES", data=[base]))),
        json_infer(asked(tensor([1, 1], name="encoded", datatype="BYTES", data=[[base]]))),
        binary_infer(
            asked(binary([1], len(picture) + 4, name="encoded", datatype="BYTES")),
            len(picture).to_bytes(4, "little") + picture,
        ),
    ]
    rows = [output(each(running.client), "probabilities")["data"] for each in sent]
    np.testing.assert_allclose(rows, [rows[0]] * len(rows), atol=1e-6)
    assert LABELS[int(np.argmax(rows[0]))] == "grün"


def test_several_pictures_lie_in_their_order(running: Running) -> None:
    images = np.stack([colour_image(label) for label in (*LABELS, *LABELS)])
    answer = binary_infer(asked(binary(images.shape, images.size)), images.tobytes())(running.client)
    probabilities = output(answer, "probabilities")
    assert probabilities["shape"] == [6, 3]
    assert np.reshape(probabilities["data"], (6, 3)).argmax(axis=1).tolist() == [0, 1, 2, 0, 1, 2]
    assert output(answer, "embedding")["shape"] == [6, 3]


def test_classes_come_with_their_labels(running: Running) -> None:
    image = colour_image("rot no 1e-3")
    outputs = [{"name": "probabilities", "parameters": {"classification": 2}}]
    body = asked(tensor(image[None].shape, data=image.ravel().tolist()), outputs=outputs)
    classes = output(json_infer(body)(running.client), "probabilities")
    assert (classes["datatype"], classes["shape"]) == ("BYTES", [1, 2])
    value, index, label = classes["data"][0].split(":")
    assert float(value) > 0.5
    assert LABELS[int(index)] == label == "rot no 1e-3"


def test_compressed_bodies_are_unpacked(running: Running) -> None:
    image = colour_image("blau")
    text = json.dumps(asked(tensor(image[None].shape, data=image.ravel().tolist()))).encode()
    answer = running.client.post(INFER, content=gzip.compress(text), headers={"Content-Encoding": "gzip"})
    assert output(answer, "probabilities")["shape"] == [1, 3]


def test_a_picture_that_cannot_be_read_is_named(running: Running) -> None:
    good = base64.b64encode(encoded(colour_image("blau"))).decode()
    bad = base64.b64encode(b"no picture").decode()
    answer = json_infer(asked(tensor([2], name="encoded", datatype="BYTES", data=[good, bad])))(running.client)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("picture 1: no picture in a format that is read")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "it holds no object"),
        ({"inputs": {}}, "non-array"),
        ({"inputs": [1]}, "non-array"),
        ({"inputs": []}, "expected 1 inputs but got 0"),
        (asked(tensor((1, 1, 1, 3), data=[1, 2, 3]), tensor((1, 1, 1, 3), data=[1, 2, 3])), "but got 2"),
        (asked({"shape": [1], "datatype": "UINT8"}), "'name'"),
        (asked({"name": "images", "shape": [1, 1, 1, 3]}), "'datatype'"),
        (asked({"name": "images", "datatype": "UINT8"}), "'shape'"),
        (asked({"name": "images", "datatype": "UINT8", "shape": 3}), "'shape'"),
        (asked(tensor((1, 1, 1, 3))), "'data'"),
        (asked(tensor((1, 1, 1, 3), data="abc")), "'data'"),
        (asked(tensor((1, 1, 1, 3), data=[1, 2, 2.5])), "whole numbers"),
        (asked(tensor((1, 1, 1, 3), data=[[[[1, 2], [3]]]])), "whole numbers"),
        (asked(tensor((1, 1, 1, 3), data=[1, -2, 3])), "whole numbers"),
        (asked(tensor((1, 1, 1, 3), data=[[1, 2, 3], "abc"])), "whole numbers"),
        (asked(tensor((1, 1, 1, 3), data=[["a" * 400_000], *[["b"]] * 60_000])), "whole numbers"),
        (asked(tensor((1, 0, 1, 3), data=[])), "unexpected shape"),
        (asked(tensor((2**62, 2**62, 1, 3), data=[1])), "batch-size must be <= 8"),
        (asked(tensor((1, 2**62, 1, 3), data=[1])), "Shape does not match"),
        (asked(tensor((1, 1, 1, 3), data=[1, 2, 3]), id=7), "'id'"),
        (asked(tensor((1, 1, 1, 3), data=[1, 2, 3]), parameters=7), "'parameters'"),
        (asked(tensor((1, 1, 1, 3), data=[1, 2, 3]), parameters={"timeout": "soon"}), "'timeout'"),
        (asked(tensor((1, 1, 1, 3), parameters={"binary_data_size": -1})), "'binary_data_size'"),
        (asked(tensor((1, 1, 1, 3), parameters={"shared_memory_region": "a"})), "shared memory"),
        (asked(tensor((1, 1, 1, 3), data=[1, 2, 3]), outputs=[{"name": "embedding"}] * 2), "twice"),
        (asked(tensor([1], name="encoded", datatype="BYTES", data=["%%%"])), "base64"),
        (asked(tensor([2], name="encoded", datatype="BYTES", data=["AAAA"])), "Shape does not match"),
    ],
)  # fmt: skip
def test_a_malformed_request_is_the_clients_mistake(running: Running, body: Any, message: str) -> None:
    answer = json_infer(json.dumps(body).encode())(running.client)
    assert answer.status_code == 400
    assert message in answer.json()["error"]


VALID = json.dumps(asked(binary((2, 2, 2, 3), 24), id="a", outputs=[{"name": "embedding"}])).encode()
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
    | st.sampled_from(["images", "encoded", "UINT8", "BYTES", "probabilities", 1, 3, [1, 1, 1, 3], [1, 2, 3]]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from([
        "inputs", "outputs", "name", "datatype", "shape", "data", "parameters", "binary_data_size", "id",
    ]), inner, max_size=6),
    max_leaves=12,
)  # fmt: skip


def parse(body: bytes, header: bytes | None) -> None:
    """Understood, or a mistake of the client's: anything else fails the test."""
    try:
        request = parse_infer(body, header, model="m", max_pictures=4, max_json_bytes=10_000)
        assert 1 <= len(request.pictures) <= 4
    except RequestError as error:
        assert error.status in (400, 413)  # noqa: PT017  either way is right, as long as it is one of them


@settings(max_examples=100, deadline=None)
@given(said=values)
def test_no_json_is_too_much_for_it(said: Any) -> None:
    parse(json.dumps(said).encode(), None)
    parse(json.dumps({"inputs": [said], "outputs": [said]}).encode(), None)


def test_no_nesting_is_too_much_for_it() -> None:
    nested = b"[" * 1000 + b"]" * 1000
    for place in (
        b'"inputs": %s',
        b'"inputs": [{"name": %s}]',
        b'"id": %s',
        b'"inputs": [{"name": "images", "shape": %s}]',
    ):
        parse(b"{" + place % nested + b"}", None)
    data = b'"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": %s}]'
    parse(b"{" + data % nested + b"}", None)


@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_no_bytes_are_too_much_for_it(data: st.DataObject) -> None:
    body = bytearray(VALID + bytes(24))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(body)))
        kind = data.draw(st.sampled_from(["set", "cut", "double"]))
        if kind == "set" and at < len(body):
            body[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del body[at : at + data.draw(st.integers(1, 20))]
        else:
            body[at:at] = body[at : at + data.draw(st.integers(1, 20))]
    header = data.draw(st.sampled_from([None, str(len(VALID)).encode()]) | st.binary(max_size=6))
    parse(bytes(body), header)
