"""ONNX graphs as bytes that depend on what they compute and on nothing else.

Exporters write stack traces, absolute paths and counters of the process into a graph. ``canonical`` takes them out, so
that two clones make the same file and no file tells whose machine it came from. No torch.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from tasks.errors import ExportError

PRODUCER = "tanuki"


def canonical(model: onnx.ModelProto, *, keep: str) -> onnx.ModelProto:
    """The same graph with values named by order, initialisers in order of use, and no trace of how it was made.

    Args:
        model: A graph without functions; left as it is.
        keep: Initialisers whose names start with this keep the rest of their name (``trunk.`` for torchvision's names).
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    _strip(result)
    graph = result.graph
    names = {value.name: value.name for value in (*graph.input, *graph.output)} | {"": ""}
    if not any(_subgraphs(node) for node in graph.node):
        _name_initialisers(graph, names, keep)
        _name_nodes(graph, names)
    order = {name: position for position, name in enumerate(each for node in graph.node for each in node.input)}
    initialisers = sorted((item for item in graph.initializer if item.name in order), key=lambda item: order[item.name])
    kept = [onnx.TensorProto.FromString(item.SerializeToString(deterministic=True)) for item in initialisers]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return result


def metadata(model: onnx.ModelProto) -> dict[str, str]:
    """The ``metadata_props`` of a model."""
    return {entry.key: entry.value for entry in model.metadata_props}


def exporter_of(model: onnx.ModelProto) -> str:
    """The exporter whose graph of the network verified: ``dynamo`` or ``legacy``; ``unknown`` for a foreign graph."""
    return metadata(model).get("exporter", "unknown")


def set_metadata(model: onnx.ModelProto, facts: dict[str, str]) -> None:
    """Replaces the ``metadata_props`` of a model, sorted by key."""
    del model.metadata_props[:]
    for key in sorted(facts):
        model.metadata_props.add(key=key, value=facts[key])


def to_bytes(model: onnx.ModelProto) -> bytes:
    """One self-contained file; equal models make equal bytes.

    Raises:
        ExportError: If the model is larger than a protobuf can be (2 GiB).
    """
    try:
        data: bytes = model.SerializeToString(deterministic=True)
    except (ValueError, RuntimeError, DecodeError) as error:
        raise ExportError(
            f"The graph cannot be written as one file: {error}. ONNX files end at 2 GiB; use a smaller architecture."
        ) from error
    return data


def read_graph(path: Path) -> onnx.ModelProto:
    """Reads a graph that an earlier stage wrote.

    Raises:
        ExportError: If it is missing or no ONNX file.
    """
    try:
        return onnx.load_model_from_string(path.read_bytes())
    except FileNotFoundError as error:
        raise ExportError(f"{path} is missing. Run the stage fetch_backbone (dvc repro fetch_backbone).") from error
    except DecodeError as error:
        raise ExportError(f"{path} is no ONNX file: {error}. Run the stage fetch_backbone again.") from error


def _strip(model: onnx.ModelProto) -> None:
    """Takes out metadata, documentation, producer versions and inferred shapes."""
    for field in ("producer_version", "domain", "doc_string", "model_version"):
        model.ClearField(field)
    model.producer_name = PRODUCER
    del model.metadata_props[:]
    for graph in _graphs(model.graph):
        graph.ClearField("doc_string")
        del graph.metadata_props[:]
        del graph.value_info[:]
        for item in (*graph.input, *graph.output, *graph.initializer, *graph.node):
            item.ClearField("doc_string")
            del item.metadata_props[:]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for inner in _subgraphs(node):
            yield from _graphs(inner)


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]


def _name_initialisers(graph: onnx.GraphProto, names: dict[str, str], keep: str) -> None:
    """Names initialisers: torchvision's name, or ``constant_N`` in order of use."""
    items = {item.name: item for item in graph.initializer}
    for node in graph.node:
        for name in node.input:
            if name in items and name not in names:
                new = name.removeprefix(keep) if name.startswith(keep) else f"constant_{len(names)}"
                names[name] = new
                items[name].name = new


def _name_nodes(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Names nodes ``Conv_0`` and their values ``Conv_0:0``, by order."""
    for position, node in enumerate(graph.node):
        node.name = f"{node.op_type}_{position}"
        for index, name in enumerate(node.output):
            names.setdefault(name, f"{node.name}:{index}")
        for values in (node.input, node.output):
            renamed = [names[name] for name in values]
            del values[:]
            values.extend(renamed)
