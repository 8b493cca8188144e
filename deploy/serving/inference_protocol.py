"""The Open Inference Protocol, version 2: what its requests mean for a picture classifier, and what answers look like.

Pure functions, shared by HTTP and gRPC. The model has two inputs, of which a request gives one:

    images    UINT8 (N, H, W, 3): upright RGB pixels
    encoded   BYTES (N): N encoded pictures, as they lie on a disk; in JSON as base64

and two outputs: probabilities FP32 (N, C) and embedding FP32 (N, D). Messages are those of Triton,
where it has one; where Triton answers 500 or believes what it is told, this answers 400.

References:
    Open Inference Protocol, and its extensions for binary tensor data and classification as Triton documents them.
"""

import base64
import binascii
import itertools
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.errors import ImageError
from deploy.serving.batcher import Answer, Outcome, Picture
from deploy.serving.errors import BAD_REQUEST, RequestError, echo
from deploy.serving.live_model import LiveModel

IMAGES, ENCODED = "images", "encoded"
PROBABILITIES, EMBEDDING = "probabilities", "embedding"
INPUT_TYPES = {IMAGES: "UINT8", ENCODED: "BYTES"}
INPUT_SHAPES = {IMAGES: (-1, -1, -1, 3), ENCODED: (-1,)}
DATATYPES = frozenset(
    [
        "BOOL",
        "UINT8",
        "UINT16",
        "UINT32",
        "UINT64",
        "INT8",
        "INT16",
        "INT32",
        "INT64",
        "FP16",
        "FP32",
        "FP64",
        "BYTES",
        "BF16",
    ]
)
EXTENSIONS = ("classification", "model_repository", "model_configuration", "binary_tensor_data", "statistics")
LENGTH_BYTES = 4  # before each element of a BYTES tensor, little-endian


@dataclass(frozen=True, slots=True)
class InputTensor:
    """An input whose name, type and shape were found right.

    Args:
        name: images or encoded.
        shape: With N first, at least 1.
    """

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """An output that a request asks for.

    Args:
        name: probabilities or embedding.
        is_binary: As bytes after the JSON, over HTTP.
        num_classes: Above 0: this many of the highest values as "value:index:label", not the tensor.
    """

    name: str
    is_binary: bool = False
    num_classes: int = 0


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A request, understood.

    Args:
        id: What the client calls it; goes back with the answer. Empty where it has no name.
        pictures: At least one.
        outputs: In the order of the answer.
        timeout_s: What the client allows; None where it says nothing.
    """

    id: str
    pictures: Sequence[Picture]
    outputs: tuple[WantedOutput, ...]
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One output of an answer.

    Args:
        name: As asked for.
        values: float32 (N, C) or (N, D); for classes an array (N, K) of text.
    """

    name: str
    values: NDArray[Any]

    @property
    def datatype(self) -> str:
        return "FP32" if self.values.dtype == np.float32 else "BYTES"

    def raw(self) -> bytes:
        """As the protocol lays a tensor out in bytes."""
        return self.values.tobytes() if self.datatype == "FP32" else pack_bytes(self.values.ravel().tolist())


def bad(message: str, request_id: str | None = None) -> RequestError:
    """A client's mistake; with a request id, in the form that names the request."""
    prefix = "" if request_id is None else f"[request id: {echo(request_id) or '<id_unknown>'}] "
    return RequestError(BAD_REQUEST, prefix + message)


def check_input(
    name: str, datatype: str, shape: Sequence[int], *, model: str, request_id: str, max_n: int
) -> InputTensor:
    """An input, its name, type and shape found right; its data is another matter.

    Raises:
        RequestError: If the model has no such input, or expects something else there.
    """
    if name not in INPUT_TYPES:
        raise bad(f"unexpected inference input '{echo(name)}' for model '{model}'")
    if datatype != INPUT_TYPES[name]:
        told = datatype if datatype in DATATYPES else "<invalid>"
        raise bad(
            f"inference input '{name}' data-type is '{told}', but model '{model}' expects '{INPUT_TYPES[name]}'",
            request_id,
        )
    expected = INPUT_SHAPES[name]
    is_column = name == ENCODED and len(shape) == 2 and shape[1] == 1
    fits = len(shape) == len(expected) and all(
        wanted in (-1, size) for wanted, size in zip(expected, shape, strict=True)
    )
    if not (fits or is_column) or min(shape) < 0 or 0 in shape[1:]:
        raise bad(
            f"unexpected shape for input '{name}' for model '{model}'. "
            f"Expected {_listed(expected)}, got {_listed(shape[:16])}.",
            request_id,
        )
    if shape[0] < 1:
        raise bad(f"inference request batch-size must be >= 1 for '{model}'", request_id)
    if shape[0] > max_n:
        raise bad(f"inference request batch-size must be <= {max_n} for '{model}'", request_id)
    return InputTensor(name, tuple(shape))


def check_one_input(names: Sequence[str], *, model: str, request_id: str) -> None:
    """Holds a request to exactly one of the inputs.

    Raises:
        RequestError: If it gives none or several.
    """
    if len(names) != 1:
        raise bad(
            f"expected 1 inputs but got {len(names)} inputs for model '{model}'. "
            f"Got input(s) [{', '.join(repr(echo(name)) for name in names[:4])}], "
            f"please provide either '{IMAGES}' or '{ENCODED}'.",
            request_id,
        )


def check_output(name: str, before: Sequence[WantedOutput], *, model: str) -> None:
    """Holds a request to the model's outputs, each once.

    Raises:
        RequestError: If it has no such output, or it is among those before.
    """
    if name not in (PROBABILITIES, EMBEDDING):
        raise bad(f"unexpected inference output '{echo(name)}' for model '{model}'")
    if any(each.name == name for each in before):
        raise bad(f"inference output '{name}' is asked for twice for model '{model}'")


def pictures_of_raw(tensor: InputTensor, raw: memoryview, *, model: str, request_id: str) -> list[Picture]:
    """The pictures of a tensor in the protocol's binary form.

    Raises:
        RequestError: If there are more or fewer bytes than the shape has room for.
    """
    if tensor.name == ENCODED:
        return list(_unpack_bytes(raw, tensor.shape[0], model=model, request_id=request_id))
    expected = math.prod(tensor.shape)
    if len(raw) != expected:
        raise _wrong_size(IMAGES, model, expected, len(raw), request_id)
    return list(np.frombuffer(raw, np.uint8).reshape(tensor.shape))


def pictures_of_json(tensor: InputTensor, data: Any) -> list[Picture]:
    """The pictures of a tensor that was given as JSON, flat or nested.

    Raises:
        RequestError: If they are not whole numbers of 0 to 255 (images) or base64 (encoded), as many as the shape says.
    """
    if not isinstance(data, list):
        raise bad("Unable to parse 'data': attempt to access JSON non-array as array")
    if tensor.name == ENCODED:
        texts = [each[0] if isinstance(each, list) and len(each) == 1 else each for each in data]
        if len(texts) != tensor.shape[0]:
            raise bad("Unable to parse 'data': Shape does not match true shape of 'data' field")
        return [_from_base64(text) for text in texts]
    try:
        flat = np.frombuffer(bytes(_flat(data)), np.uint8)
    except (TypeError, ValueError, OverflowError) as error:
        raise bad(
            "Unable to parse 'data': UINT8 wants whole numbers of 0 to 255, nested evenly or not at all"
        ) from error
    if flat.size != math.prod(tensor.shape):
        raise bad("Unable to parse 'data': Shape does not match true shape of 'data' field")
    return list(flat.reshape(tensor.shape))


def outputs_of(wanted: Sequence[WantedOutput], outcomes: Sequence[Outcome], model: LiveModel) -> list[OutputTensor]:
    """The outputs of an answer.

    Raises:
        RequestError: Naming every picture that cannot be read.
    """
    answers = answers_of(outcomes)
    outputs = []
    for each in wanted:
        rows = [answer.probabilities if each.name == PROBABILITIES else answer.embedding for answer in answers]
        values = np.stack(rows) if len(rows) > 1 else rows[0][None]  # stacking one costs more than all the rest here
        outputs.append(OutputTensor(each.name, _classes(values, each, model) if each.num_classes else values))
    return outputs


def answers_of(outcomes: Sequence[Outcome]) -> list[Answer]:
    """The answers, if all pictures have one.

    Raises:
        RequestError: Otherwise.
    """
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    if len(answers) == len(outcomes):
        return answers
    unreadable = [f"picture {i}: {each}" for i, each in enumerate(outcomes) if isinstance(each, ImageError)]
    if unreadable:
        raise bad("; ".join(unreadable[:8]))
    raise next(outcome for outcome in outcomes if isinstance(outcome, RequestError))


def all_outputs(*, is_binary: bool = False) -> tuple[WantedOutput, ...]:
    """What a request gets that names no outputs."""
    return WantedOutput(PROBABILITIES, is_binary), WantedOutput(EMBEDDING, is_binary)


def model_metadata(model: LiveModel, name: str, versions: Sequence[int]) -> dict[str, Any]:
    """The protocol's description of the model."""
    widths = {PROBABILITIES: len(model.labels), EMBEDDING: model.embedding_width}
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": "onnxruntime_onnx",
        "inputs": [
            {"name": each, "datatype": INPUT_TYPES[each], "shape": list(INPUT_SHAPES[each])} for each in INPUT_TYPES
        ],
        "outputs": [{"name": each, "datatype": "FP32", "shape": [-1, width]} for each, width in widths.items()],
    }


def model_config(model: LiveModel, name: str, *, max_pictures: int) -> dict[str, Any]:
    """The model's configuration, in the terms of Triton's extension."""
    metadata = model_metadata(model, name, [model.version])
    return {
        "name": name,
        "platform": "onnxruntime_onnx",
        "backend": "onnxruntime",
        "max_batch_size": max_pictures,
        "input": [
            {
                "name": each["name"],
                "data_type": {"UINT8": "TYPE_UINT8", "BYTES": "TYPE_STRING"}[each["datatype"]],
                "dims": each["shape"][1:] or [1],
                "optional": True,
            }
            for each in metadata["inputs"]
        ],
        "output": [
            {"name": each["name"], "data_type": "TYPE_FP32", "dims": each["shape"][1:]} for each in metadata["outputs"]
        ],
    }


def model_statistics(model: LiveModel, name: str) -> dict[str, Any]:
    """What a version did, in the terms of Triton's extension."""
    done = model.statistics
    return {
        "name": name,
        "version": str(model.version),
        "last_inference": done.last_ms,
        "inference_count": done.pictures,
        "execution_count": done.batches,
        "inference_stats": {
            "success": {"count": done.success, "ns": done.success_ns},
            "fail": {"count": done.failed, "ns": done.failed_ns},
            "queue": {"count": done.pictures, "ns": done.queue_ns},
            "compute_input": {"count": done.batches, "ns": done.decode_ns},
            "compute_infer": {"count": done.batches, "ns": done.run_ns},
            "compute_output": {"count": done.batches, "ns": 0},
            "cache_hit": {"count": 0, "ns": 0},
            "cache_miss": {"count": 0, "ns": 0},
        },
        "batch_stats": [],
    }


def summed_statistics(processes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Statistics of the same versions in several processes, added up; in the order of the versions."""
    summed: dict[int, dict[str, Any]] = {}
    for each in processes:
        known = summed.setdefault(int(each["version"]), each)
        if known is each:
            continue
        known["last_inference"] = max(known["last_inference"], each["last_inference"])
        for key in ("inference_count", "execution_count"):
            known[key] += each[key]
        for key, done in each["inference_stats"].items():
            known["inference_stats"][key] = {unit: known["inference_stats"][key][unit] + n for unit, n in done.items()}
    return [done for _, done in sorted(summed.items())]


def refuse_shared_memory(parameters: Container[str], what: str, *, model: str) -> None:
    """Of an input or output, which may lie in memory that client and server share where Triton serves.

    Raises:
        RequestError: If it does.
    """
    if "shared_memory_region" in parameters:
        raise bad(f"shared memory is not offered: {what} for model '{model}'")


def timeout_of(parameters: Mapping[str, Any]) -> float | None:
    """What a client allows, in seconds, from the parameter ``timeout`` in microseconds; 0 means that it does not care.

    Raises:
        RequestError: If it is no whole number.
    """
    value = parameters.get("timeout", 0)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise bad("Unable to parse 'timeout': it wants a whole number of microseconds")
    return value / 1e6 if value else None


def pack_bytes(elements: Sequence[str | bytes]) -> bytes:
    """A BYTES tensor's elements in the protocol's binary form."""
    encoded = [each.encode() if isinstance(each, str) else each for each in elements]
    return b"".join(len(each).to_bytes(LENGTH_BYTES, "little") + each for each in encoded)


def _unpack_bytes(raw: memoryview, count: int, *, model: str, request_id: str) -> list[bytes]:
    elements = []
    at = 0
    for _ in range(count):
        length = int.from_bytes(raw[at : at + LENGTH_BYTES], "little")
        at += LENGTH_BYTES + length
        if at > len(raw):
            raise _wrong_size(ENCODED, model, at, len(raw), request_id)
        elements.append(bytes(raw[at - length : at]))
    if at != len(raw):
        raise _wrong_size(ENCODED, model, at, len(raw), request_id)
    return elements


def _from_base64(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise bad(f"Unable to parse 'data': '{ENCODED}' wants pictures in base64") from error


def _flat(data: list[Any]) -> list[Any]:
    """What is in nested lists; raises ValueError where they are uneven. NumPy would first make room for any text."""
    while data and isinstance(data[0], list):
        if len({len(each) for each in data}) > 1:
            raise ValueError
        data = list(itertools.chain.from_iterable(data))
    return data


def _classes(values: NDArray[np.float32], wanted: WantedOutput, model: LiveModel) -> NDArray[Any]:
    """The highest values of each row (N, K) as "value:index:label"; an embedding's numbers have no label."""
    labels = [f":{label}" for label in model.labels] if wanted.name == PROBABILITIES else [""] * values.shape[1]
    order = np.argsort(-values, axis=1, kind="stable")[:, : wanted.num_classes]
    return np.array(
        [[f"{row[i]:f}:{i}{labels[i]}" for i in ranks] for row, ranks in zip(values, order, strict=True)], dtype=object
    )


def _wrong_size(name: str, model: str, expected: int, actual: int, request_id: str) -> RequestError:
    return bad(
        f"input byte size mismatch for input '{name}' for model '{model}'. Expected {expected}, got {actual}",
        request_id,
    )


def _listed(shape: Sequence[int]) -> str:
    return f"[{','.join(str(size) for size in shape)}]"
