"""What an ONNX file says of itself, and what it would need besides itself, read before anything loads it.

onnxruntime opens whatever files a graph names as external data; for a graph given as bytes it looks in the working
folder. So a bundle's graphs are looked through before a session sees them. This walks protobuf's wire format, because
serving has no onnx package; the names and numbers are those of onnx.proto3, and a test holds them to it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from deploy.errors import BundleError

Value = int | memoryview

# Of each message that can hold tensors or operators somewhere below: field number → message in it.
CHILDREN: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 14: "StringStringEntryProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
# The fields that are read, by message and name.
FIELDS: Mapping[str, Mapping[str, int]] = {
    "StringStringEntryProto": {"key": 1, "value": 2},
    "NodeProto": {"op_type": 4, "domain": 7},
    "TensorProto": {"name": 8, "external_data": 13, "data_location": 14},
}
EXTERNAL = 1  # of TensorProto.DataLocation
STANDARD_DOMAINS = ("", "ai.onnx")

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5  # protobuf's wire types; groups are not in use


@dataclass(frozen=True)
class OnnxFacts:
    """What an ONNX file says of itself.

    Args:
        metadata: Its ``metadata_props``.
        external: Names of the tensors whose values lie in other files.
        foreign: Operators outside the ONNX standard, as ``domain:type``.
    """

    metadata: Mapping[str, str]
    external: tuple[str, ...]
    foreign: tuple[str, ...]


def read_onnx_facts(data: bytes) -> OnnxFacts:
    """Looks a file through, without recursion and without copying a weight.

    Raises:
        BundleError: If it is no protobuf message. That it is a graph which runs, only onnxruntime can say.
    """
    metadata: dict[str, str] = {}
    external: list[str] = []
    foreign: set[str] = set()
    for kind, message in _messages(memoryview(data)):
        read = {name: message.get(number) for name, number in FIELDS.get(kind, {}).items()}
        if kind == "StringStringEntryProto":
            metadata[_text(read["key"])] = _text(read["value"])
        elif kind == "NodeProto" and _text(read["domain"]) not in STANDARD_DOMAINS:
            foreign.add(f"{_text(read['domain'])}:{_text(read['op_type'])}")
        elif kind == "TensorProto" and (read["data_location"] == EXTERNAL or read["external_data"] is not None):
            external.append(_text(read["name"]))
    return OnnxFacts(metadata, tuple(external), tuple(sorted(foreign)))


def _messages(model: memoryview) -> Iterator[tuple[str, dict[int, Value]]]:
    """Every message below and including the model: its kind and the last value of each of its fields."""
    waiting = [("ModelProto", model)]
    while waiting:
        kind, data = waiting.pop()
        children, values = CHILDREN.get(kind, {}), {}
        for number, value in _fields(data):
            values[number] = value
            if number in children and isinstance(value, memoryview):
                waiting.append((children[number], value))
        yield kind, values


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == BYTES:
            size, position = _varint(message, position)
        elif wire_type in (FIXED_64, FIXED_32):
            size = 8 if wire_type == FIXED_64 else 4
        else:
            raise BundleError(f"it is no ONNX file: wire type {wire_type} at byte {position}")
        if position + size > len(message):
            raise BundleError("it is no whole ONNX file: a field ends after its message")
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A number of 1 to 10 bytes, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise BundleError(f"it is no whole ONNX file: a number at byte {position} has no end")


def _text(value: Value | None) -> str:
    return bytes(value).decode("utf-8", "replace") if isinstance(value, memoryview) else ""
