"""A torch network as an ONNX graph that was seen to compute the same.

A network here is any module from ``pixels`` to one or several outputs of known names. The dynamo exporter first; where
its graph does not verify, the legacy one (METHOD and FACTS: some architectures fail or silently stay at batch 1). What
verifies is recorded in the graph's metadata. Called by fetch_backbone, export_onnx and export_pretrained.
"""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from deploy.errors import TanukiError
from deploy.runtime import open_session
from tasks.errors import ExportError
from tasks.export.graph import canonical, set_metadata, to_bytes

Exporter = Callable[[nn.Module, torch.Tensor, int, Sequence[str]], onnx.ModelProto]

logger = logging.getLogger(__name__)

BATCHES = (1, 2, 7)
RELATIVE_TOLERANCE = 1e-3  # of a feature's size over the pictures
FLOOR = 1e-5  # of the largest feature's size: rounding of sums that cancel out
EMBEDDING = ("embedding",)
EXAMPLE_BATCH = 2  # an example of one picture makes some exporters fix the batch at 1


def export_network(
    network: nn.Module,
    *,
    size_px: int,
    opset: int,
    outputs: Sequence[str] = EMBEDDING,
    exporters: Sequence[str] = ("dynamo", "legacy"),
) -> onnx.ModelProto:
    """The graph ``pixels`` float32 (N, 3, S, S) → ``embedding`` float32 (N, D), N symbolic.

    Args:
        network: With its weights.
        size_px: Side S.
        opset: Of the ONNX operators.
        outputs: Names of what it gives, each (N, D), in order.
        exporters: Names of those to try, in order.

    Returns:
        A model with the exporter's name in its metadata; the same weights make the same bytes.

    Raises:
        ExportError: If no exporter's graph computes what the network computes.
    """
    example = torch.zeros(EXAMPLE_BATCH, 3, size_px, size_px)
    reasons = []
    for name in exporters:
        try:
            model = canonical(_quietly(EXPORTERS[name], network, example, opset, outputs), keep="trunk.")
            set_metadata(model, {"exporter": name})
            verify_network(model, network, size_px=size_px, outputs=outputs)
        except Exception as error:  # noqa: BLE001  exporters raise whatever their compiler raises; the other one is tried
            reasons.append(f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}")
            logger.warning("the %s exporter gave no graph that verifies (%s)", *reasons[-1].split(": ", 1))
        else:
            return model
    raise ExportError(f"No exporter gave a graph that computes what the network computes. {'; '.join(reasons)}")


def verify_network(
    model: onnx.ModelProto, network: nn.Module, *, size_px: int, outputs: Sequence[str] = EMBEDDING
) -> float:
    """Compares onnxruntime with torch at several batches.

    Returns:
        The largest difference of a value.

    Raises:
        ExportError: If shapes are not symbolic in the batch, or values differ.
    """
    pixels = np.random.default_rng(0).standard_normal((max(BATCHES), 3, size_px, size_px), dtype=np.float32)
    with torch.inference_mode():
        given = network(torch.from_numpy(pixels))
    wanted = [each.numpy() for each in (given if isinstance(given, tuple) else (given,))]  # each (7, D)
    _check_signature(model, dict(zip(outputs, (each.shape[1] for each in wanted), strict=True)), size_px)
    try:
        session = open_session(to_bytes(model))
    except TanukiError as error:
        raise ExportError(str(error)) from error
    largest = 0.0
    for batch in BATCHES:
        answers = session.run(list(outputs), {"pixels": pixels[:batch]})
        for name, found, expected in zip(outputs, answers, wanted, strict=True):
            largest = max(largest, _difference(name, found, expected, batch))
    return largest


def _difference(name: str, found: NDArray[np.float32], expected: NDArray[np.float32], batch: int) -> float:
    """The largest difference between what a batch gave and the first of the expected rows (7, D).

    Raises:
        ExportError: If it is too large, or the shapes differ.
    """
    scale = np.sqrt((expected**2).mean(axis=0))  # (D,): depths differ in size by orders of magnitude
    limit = RELATIVE_TOLERANCE * scale + FLOOR * scale.max()  # (D,)
    if found.shape != expected[:batch].shape:
        raise ExportError(f"a batch of {batch} gives {name} {found.shape}, expected {expected[:batch].shape}")
    difference = np.abs(found - expected[:batch])
    if not (difference <= limit).all():  # also where it is not a number
        raise ExportError(
            f"onnxruntime and torch differ by {difference.max():.2g} in {name} of size {scale.max():.2g} "
            f"at a batch of {batch}"
        )
    return float(difference.max())


def _check_signature(model: onnx.ModelProto, widths: dict[str, int], size_px: int) -> None:
    """The batch is symbolic at both ends, all else is fixed."""
    ends = {value.name: _dimensions(value) for value in (*model.graph.input, *model.graph.output)}
    expected = {"pixels": ["batch", 3, size_px, size_px], **{name: ["batch", width] for name, width in widths.items()}}
    for name, dimensions in expected.items():
        found = ends.get(name)
        if found is None or not isinstance(found[0], str) or found[1:] != dimensions[1:]:
            raise ExportError(f"{name} is {found}, expected {dimensions}")


def _dimensions(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]


def _quietly(
    exporter: Exporter, network: nn.Module, example: torch.Tensor, opset: int, outputs: Sequence[str]
) -> onnx.ModelProto:
    """Runs an exporter without what it tells about itself; what matters is verified afterwards."""
    talkers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [talker.level for talker in talkers]
    with warnings.catch_warnings(), torch.no_grad(), _out_of_place(network):
        warnings.simplefilter("ignore")
        for talker in talkers:
            talker.setLevel(logging.ERROR)
        try:
            return exporter(network, example, opset, outputs)
        finally:
            for talker, level in zip(talkers, levels, strict=True):
                talker.setLevel(level)


@contextmanager
def _out_of_place(network: nn.Module) -> Iterator[None]:
    """Activations make new values meanwhile: the dynamo exporter gives the same graph and is a third faster."""
    inside: list[Any] = [module for module in network.modules() if getattr(module, "inplace", False)]
    for module in inside:
        module.inplace = False
    try:
        yield
    finally:
        for module in inside:
            module.inplace = True


def _dynamo(network: nn.Module, example: torch.Tensor, opset: int, outputs: Sequence[str]) -> onnx.ModelProto:
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        opset_version=opset,
        external_data=False,
        input_names=["pixels"],
        output_names=list(outputs),
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    if program is None:
        raise ExportError("no program came back")
    return program.model_proto


def _legacy(network: nn.Module, example: torch.Tensor, opset: int, outputs: Sequence[str]) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        network,
        (example,),
        buffer,  # type: ignore[arg-type]  # a stream does; only its annotation says otherwise
        dynamo=False,
        opset_version=opset,
        input_names=["pixels"],
        output_names=list(outputs),
        dynamic_axes={name: {0: "batch"} for name in ("pixels", *outputs)},
    )
    return onnx.load_model_from_string(buffer.getvalue())


EXPORTERS: dict[str, Exporter] = {"dynamo": _dynamo, "legacy": _legacy}
