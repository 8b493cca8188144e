"""The protocol's infer call over HTTP: bytes to a request, an answer to bytes, with the binary tensor extension.

A body is JSON, or JSON of a length that a header names, followed by the tensors' bytes in the order of the inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import orjson

from deploy.serving.batcher import Picture
from deploy.serving.errors import TOO_LARGE, RequestError, echo
from deploy.serving.inference_protocol import (
    InferRequest,
    InputTensor,
    OutputTensor,
    WantedOutput,
    all_outputs,
    bad,
    check_input,
    check_one_input,
    check_output,
    pictures_of_json,
    pictures_of_raw,
    refuse_shared_memory,
    timeout_of,
)
from deploy.serving.live_model import LiveModel

KNOWN_BYTES = 1024  # of JSON that is kept, to be understood once
NO_NATURAL = "attempt to access JSON non-unsigned-integer as unsigned-integer"


def json_length(header: bytes | None, body_length: int) -> int:
    """Length of a body's JSON from the header Inference-Header-Content-Length; the whole body where there is none.

    Raises:
        RequestError: If it is no number, or none that fits the body.
    """
    if header is None:
        return body_length
    text = header.decode("latin-1").strip()
    digits = text.removeprefix("-")
    if not (digits.isascii() and digits.isdecimal()) or len(digits) > 18:
        raise bad(f"Inference-Header-Content-Length must be a whole number, got: '{echo(text)}'")
    if not 0 < int(text) <= body_length:
        raise bad(f"inference header size should be in range (0, {body_length}), got: {int(text)}")
    return int(text)


def parse_infer(
    body: bytes, header: bytes | None, *, model: str, max_pictures: int, max_json_bytes: int
) -> InferRequest:
    """Understands an infer request.

    Args:
        body: As sent, uncompressed.
        header: Inference-Header-Content-Length, if sent.
        model: The model's name, for messages.
        max_pictures: In one request.
        max_json_bytes: Of its JSON: reading a tensor from JSON costs more than the model does.

    Raises:
        RequestError: If there is any mistake in it.
    """
    length = json_length(header, len(body))
    if length > max_json_bytes:
        raise RequestError(
            TOO_LARGE,
            f"{length} bytes of JSON are more than {max_json_bytes}: send tensors as binary data, or encoded pictures",
        )
    understand = _known if length < len(body) and length <= KNOWN_BYTES else _understood
    asked = understand(body[:length], model=model, max_pictures=max_pictures)
    pictures = _pictures(asked, memoryview(body)[length:], model=model)
    return InferRequest(asked.id, pictures, asked.outputs, asked.timeout_s)


def render_infer(
    request: InferRequest, outputs: Sequence[OutputTensor], model: LiveModel, name: str
) -> tuple[bytes, int | None]:
    """An answer's body, and the length of its JSON where tensors follow it."""
    described, blobs = [], []
    for wanted, tensor in zip(request.outputs, outputs, strict=True):
        entry: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.values.shape}
        if wanted.is_binary:
            blobs.append(tensor.raw())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            flat = tensor.values.ravel()
            entry["data"] = flat if flat.dtype == np.float32 else flat.tolist()
        described.append(entry)
    answer: dict[str, Any] = {"model_name": name, "model_version": str(model.version), "outputs": described}
    if request.id:
        answer = {"id": request.id, **answer}
    text = orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join([text, *blobs]), len(text)) if blobs else (text, None)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What the JSON of a request says.

    Args:
        id: The client's name for it, or nothing.
        tensor: The input.
        size: How many of the bytes after the JSON it takes; None where its data is in the JSON.
        data: That data.
        outputs: In the order of the answer.
        timeout_s: What the client allows; None where it says nothing.
    """

    id: str
    tensor: InputTensor
    size: int | None
    data: Any
    outputs: tuple[WantedOutput, ...]
    timeout_s: float | None


def _understood(text: bytes, *, model: str, max_pictures: int) -> _Asked:
    said = _json(text)
    request_id = said.get("id", "")
    if not isinstance(request_id, str):
        raise bad("Unable to parse 'id': attempt to access JSON non-string as string")
    parameters = _object(said, "parameters")
    outputs = _outputs(said, model=model, is_binary=parameters.get("binary_data_output") is True)
    inputs = _list(said, "inputs")
    if inputs is None:
        raise bad("Unable to parse 'inputs': attempt to access non-existing object member 'inputs'")
    check_one_input([_name(each) for each in inputs], model=model, request_id=request_id)
    (entry,) = inputs
    name, datatype, shape = _text(entry, "name"), _text(entry, "datatype"), _shape(entry)
    tensor = check_input(name, datatype, shape, model=model, request_id=request_id, max_n=max_pictures)
    size = _binary_size(entry, name, model=model)
    return _Asked(request_id, tensor, size, entry.get("data"), outputs, timeout_of(parameters))


# Clients say the same of every picture, before other bytes; what was said is never changed.
_known = lru_cache(maxsize=256)(_understood)


def _json(text: bytes) -> dict[str, Any]:
    try:
        said = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise bad(f"failed to parse the request JSON buffer: {echo(str(error))}") from error
    if not isinstance(said, dict):
        raise bad("failed to parse the request JSON buffer: it holds no object")
    return said


def _pictures(asked: _Asked, binary: memoryview, *, model: str) -> Sequence[Picture]:
    size = asked.size or 0
    if size > len(binary):
        more = size - len(binary)
        raise bad(
            f"unexpected size for input '{asked.tensor.name}', expecting {more} additional bytes for model '{model}'"
        )
    if size < len(binary):
        raise bad(f"unexpected additional input data for model '{model}'")
    if asked.size is None:
        return pictures_of_json(asked.tensor, asked.data)
    return pictures_of_raw(asked.tensor, binary, model=model, request_id=asked.id)


def _binary_size(entry: dict[str, Any], name: str, *, model: str) -> int | None:
    """How many of the bytes after the JSON an input takes; None where its data is in the JSON."""
    parameters = _object(entry, "parameters")
    refuse_shared_memory(parameters, f"input '{name}'", model=model)
    size = parameters.get("binary_data_size")
    if size is None:
        if "data" not in entry:
            raise bad("Unable to parse 'data': attempt to access non-existing object member 'data'")
        return None
    if not _is_natural(size):
        raise bad(f"Unable to parse 'binary_data_size': {NO_NATURAL}")
    return int(size)


def _outputs(said: dict[str, Any], *, model: str, is_binary: bool) -> tuple[WantedOutput, ...]:
    outputs = _list(said, "outputs")
    if not outputs:
        return all_outputs(is_binary=is_binary)
    wanted: list[WantedOutput] = []
    for each in outputs:
        name = _text(each, "name")
        check_output(name, wanted, model=model)
        parameters = _object(each, "parameters")
        refuse_shared_memory(parameters, f"output '{name}'", model=model)
        classes = parameters.get("classification", 0)
        if not _is_natural(classes):
            raise bad(f"Unable to parse 'classification': {NO_NATURAL}")
        wanted.append(WantedOutput(name, parameters.get("binary_data", is_binary) is True, classes))
    return tuple(wanted)


def _list(said: dict[str, Any], key: str) -> list[dict[str, Any]] | None:
    """A list of objects, or None where there is none."""
    value = said.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise bad(f"Unable to parse '{key}': attempt to access JSON non-array as array")
    return value


def _object(said: dict[str, Any], key: str) -> dict[str, Any]:
    value = said.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise bad(f"Unable to parse '{key}': attempt to access JSON non-object as object")
    return value


def _text(said: dict[str, Any], key: str) -> str:
    value = said.get(key)
    if value is None:
        raise bad(f"Unable to parse '{key}': attempt to access non-existing object member '{key}'")
    if not isinstance(value, str):
        raise bad(f"Unable to parse '{key}': attempt to access JSON non-string as string")
    return value


def _name(said: dict[str, Any]) -> str:
    """To be told; lists may be nested too deeply for text of them."""
    name = said.get("name")
    return name if isinstance(name, str) else "<invalid>"


def _shape(said: dict[str, Any]) -> list[int]:
    shape = said.get("shape")
    if shape is None:
        raise bad("Unable to parse 'shape': attempt to access non-existing object member 'shape'")
    if not isinstance(shape, list):
        raise bad("Unable to parse 'shape': attempt to access JSON non-array as array")
    if not all(_is_natural(size) for size in shape):
        raise bad(f"Unable to parse 'shape': {NO_NATURAL}")
    return shape


def _is_natural(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
