"""A torch network as an ONNX graph that was seen to compute the same.

The dynamo exporter first; where its graph does not verify, the legacy one (METHOD and FACTS: some architectures fail or
silently stay at batch 1). What verifies is recorded in the graph's metadata. Called by fetch_backbone and export_onnx.
"""

import io
import logging
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import onnx
import torch

from deploy.errors import TanukiError
from deploy.runtime import open_session
from tasks.errors import ExportError
from tasks.export.graph import canonical, set_metadata, to_bytes
from tasks.models.architectures import Network

Exporter = Callable[[Network, torch.Tensor, int], onnx.ModelProto]

logger = logging.getLogger(__name__)

BATCHES = (1, 2, 7)
RELATIVE_TOLERANCE = 1e-3  # of a feature's size over the pictures
FLOOR = 1e-5  # of the largest feature's size: rounding of sums that cancel out
EXAMPLE_BATCH = 2  # an example of one picture makes some exporters fix the batch at 1


def export_network(
    network: Network, *, size_px: int, opset: int, exporters: Sequence[str] = ("dynamo", "legacy")
) -> onnx.ModelProto:
    """The graph ``pixels`` float32 (N, 3, S, S) → ``embedding`` float32 (N, D), N symbolic.

    Args:
        network: With its weights.
        size_px: Side S.
        opset: Of the ONNX operators.
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
            model = canonical(_quietly(EXPORTERS[name], network, example, opset), keep="trunk.")
            set_metadata(model, {"exporter": name})
            verify_network(model, network, size_px=size_px)
        except Exception as error:  # noqa: BLE001  exporters raise whatever their compiler raises; the other one is tried
            reasons.append(f"{name}: {str(error).strip().splitlines()[0] if str(error).strip() else repr(error)}")
            logger.warning("the %s exporter gave no graph that verifies (%s)", *reasons[-1].split(": ", 1))
        else:
            return model
    raise ExportError(f"No exporter gave a graph that computes what the network computes. {'; '.join(reasons)}")


def verify_network(model: onnx.ModelProto, network: Network, *, size_px: int) -> float:
    """Compares onnxruntime with torch at several batches.

    Returns:
        The largest difference of an embedding's value.

    Raises:
        ExportError: If shapes are not symbolic in the batch, or values differ.
    """
    _check_signature(model, network.feature_dim, size_px)
    try:
        session = open_session(to_bytes(model))
    except TanukiError as error:
        raise ExportError(str(error)) from error
    pixels = np.random.default_rng(0).standard_normal((max(BATCHES), 3, size_px, size_px), dtype=np.float32)
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels)).numpy()  # (7, D)
    scale = np.sqrt((expected**2).mean(axis=0))  # (D,): depths differ in size by orders of magnitude
    limit = RELATIVE_TOLERANCE * scale + FLOOR * scale.max()  # (D,)
    largest = 0.0
    for batch in BATCHES:
        found = session.run(["embedding"], {"pixels": pixels[:batch]})[0]
        if found.shape != expected[:batch].shape:
            raise ExportError(f"a batch of {batch} gives {found.shape}, expected {expected[:batch].shape}")
        difference = np.abs(found - expected[:batch])
        if not (difference <= limit).all():  # also where it is not a number
            raise ExportError(
                f"onnxruntime and torch differ by {difference.max():.2g} in features of size {scale.max():.2g} "
                f"at a batch of {batch}"
            )
        largest = max(largest, float(difference.max()))
    return largest


def _check_signature(model: onnx.ModelProto, feature_dim: int, size_px: int) -> None:
    """The batch is symbolic at both ends, all else is fixed."""
    ends = {value.name: _dimensions(value) for value in (*model.graph.input, *model.graph.output)}
    expected = {"pixels": ["batch", 3, size_px, size_px], "embedding": ["batch", feature_dim]}
    for name, dimensions in expected.items():
        found = ends.get(name)
        if found is None or not isinstance(found[0], str) or found[1:] != dimensions[1:]:
            raise ExportError(f"{name} is {found}, expected {dimensions}")


def _dimensions(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]


def _quietly(exporter: Exporter, network: Network, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    """Runs an exporter without what it tells about itself; what matters is verified afterwards."""
    talkers = [logging.getLogger(name) for name in ("onnx_ir", "onnxscript", "torch.onnx")]
    levels = [talker.level for talker in talkers]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for talker in talkers:
            talker.setLevel(logging.ERROR)
        try:
            return exporter(network, example, opset)
        finally:
            for talker, level in zip(talkers, levels, strict=True):
                talker.setLevel(level)


def _dynamo(network: Network, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        opset_version=opset,
        external_data=False,
        input_names=["pixels"],
        output_names=["embedding"],
        dynamic_shapes={"pixels": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
    if program is None:
        raise ExportError("no program came back")
    return program.model_proto


def _legacy(network: Network, example: torch.Tensor, opset: int) -> onnx.ModelProto:
    buffer = io.BytesIO()
    torch.onnx.export(
        network,
        (example,),
        buffer,  # type: ignore[arg-type]  # a stream does; only its annotation says otherwise
        dynamo=False,
        opset_version=opset,
        input_names=["pixels"],
        output_names=["embedding"],
        dynamic_axes={"pixels": {0: "batch"}, "embedding": {0: "batch"}},
    )
    return onnx.load_model_from_string(buffer.getvalue())


EXPORTERS: dict[str, Exporter] = {"dynamo": _dynamo, "legacy": _legacy}
