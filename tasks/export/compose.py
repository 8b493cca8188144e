"""The whole classifier as one graph, and its halves cut from it at the seam ``pixels``.

``images`` → (preprocessing) → ``pixels`` → (network) → ``embedding`` → (linear head, softmax) → ``probabilities``.
Pictures of different sizes cannot share a batch: whoever batches runs the front half per picture and the back half per
batch. The halves are cut here and never exported apart. No torch.
"""

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tasks.errors import ExportError
from tasks.export.graph import PRODUCER

SEAM = "pixels"


def compose(
    preprocess: onnx.ModelProto, network: onnx.ModelProto, weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> onnx.ModelProto:
    """Joins preprocessing, network and head.

    Args:
        preprocess: ``images`` uint8 (N, H, W, 3) → ``pixels`` float32 (N, 3, S, S).
        network: ``pixels`` → ``embedding`` float32 (N, D).
        weight: Of the head, (C, D), standardisation and temperature folded in.
        bias: Of the head, (C,).

    Returns:
        ``images`` → ``probabilities`` float32 (N, C), ``embedding`` float32 (N, D).

    Raises:
        ExportError: If the parts do not fit each other.
    """
    seam, embedding = network.graph.input[0], network.graph.output[0]
    feature_dim = embedding.type.tensor_type.shape.dim[1].dim_value
    if weight.shape != (len(bias), feature_dim):
        raise ExportError(
            f"The head takes features of {weight.shape[1]} values for {len(bias)} classes, the network gives "
            f"{feature_dim}. They come from different runs: run `dvc repro`."
        )
    if _shape(seam)[1:] != _shape(preprocess.graph.output[0])[1:]:
        raise ExportError(
            f"The network takes {_shape(seam)}, preprocessing gives {_shape(preprocess.graph.output[0])}."
        )
    first, second = _prefixed(preprocess.graph, "preprocess/"), _prefixed(network.graph, "network/")
    graph = helper.make_graph(
        [*first.node, *second.node, *_head_nodes()],
        "classifier",
        [preprocess.graph.input[0]],
        [_value("probabilities", ["batch", len(bias)]), embedding],
        [*first.initializer, *second.initializer, *_head_weights(weight, bias)],
        value_info=[preprocess.graph.output[0]],
    )
    return _model(graph, network)


def compose_with_own_classifier(preprocess: onnx.ModelProto, network: onnx.ModelProto) -> onnx.ModelProto:
    """Joins preprocessing and a network that has its own classifier.

    Args:
        preprocess: ``images`` uint8 (N, H, W, 3) → ``pixels`` float32 (N, 3, S, S).
        network: ``pixels`` → ``embedding`` float32 (N, D), ``logits`` float32 (N, C).

    Returns:
        ``images`` → ``probabilities`` float32 (N, C), ``embedding`` float32 (N, D).
    """
    embedding, logits = network.graph.output
    first, second = _prefixed(preprocess.graph, "preprocess/"), _prefixed(network.graph, "network/")
    softmax = helper.make_node("Softmax", ["logits"], ["probabilities"], "head/Softmax", axis=1)
    graph = helper.make_graph(
        [*first.node, *second.node, softmax],
        "classifier",
        [preprocess.graph.input[0]],
        [_value("probabilities", ["batch", _shape(logits)[1]]), embedding],
        [*first.initializer, *second.initializer],
        value_info=[preprocess.graph.output[0]],
    )
    return _model(graph, network)


def cut_at_seam(whole: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The halves of a composed graph: ``images`` → ``pixels``, and ``pixels`` → ``probabilities``, ``embedding``."""
    graph = whole.graph
    seam = next(value for value in graph.value_info if value.name == SEAM)
    position = next(index for index, node in enumerate(graph.node) if SEAM in node.output) + 1
    front = _part(graph, graph.node[:position], "front", [graph.input[0]], [seam])
    back = _part(graph, graph.node[position:], "back", [seam], list(graph.output))
    return _model(front, whole), _model(back, whole)


def _part(
    graph: onnx.GraphProto,
    nodes: list[onnx.NodeProto],
    name: str,
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
) -> onnx.GraphProto:
    """Some nodes of a graph with the initialisers that they use."""
    used = {each for node in nodes for each in node.input}
    return helper.make_graph(nodes, name, inputs, outputs, [item for item in graph.initializer if item.name in used])


def _model(graph: onnx.GraphProto, like: onnx.ModelProto) -> onnx.ModelProto:
    """A checked model with the operators' version of another."""
    model = helper.make_model(
        graph, opset_imports=like.opset_import, producer_name=PRODUCER, ir_version=like.ir_version
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _prefixed(graph: onnx.GraphProto, prefix: str) -> onnx.GraphProto:
    """A copy whose inner names start with a prefix; inputs and outputs keep theirs."""
    result = onnx.GraphProto()
    result.CopyFrom(graph)
    ends = {value.name for value in (*graph.input, *graph.output)} | {""}
    for position, node in enumerate(result.node):
        node.name = f"{prefix}{node.op_type}_{position}"
        for names in (node.input, node.output):
            renamed = [name if name in ends else f"{prefix}{name}" for name in names]
            del names[:]
            names.extend(renamed)
    for item in result.initializer:
        item.name = f"{prefix}{item.name}"
    return result


def _head_nodes() -> list[onnx.NodeProto]:
    return [
        helper.make_node("Gemm", ["embedding", "head/weight", "head/bias"], ["head/logits"], "head/Gemm", transB=1),
        helper.make_node("Softmax", ["head/logits"], ["probabilities"], "head/Softmax", axis=1),
    ]


def _head_weights(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> list[onnx.TensorProto]:
    return [
        numpy_helper.from_array(np.ascontiguousarray(weight, np.float32), "head/weight"),
        numpy_helper.from_array(np.ascontiguousarray(bias, np.float32), "head/bias"),
    ]


def _value(name: str, shape: list[str | int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _shape(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
