"""The one preprocessing, as an ONNX graph: pixels of any size in, what the network sees out.

Crop first, then resize: the same picture as resize-then-centre-crop, cheaper, and of static size after the seam.
Training, caching, evaluation and serving all run this graph; only decoding lies outside it. No torch.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tasks.export.graph import PRODUCER


def preprocessing_graph(
    *, size_px: int, crop_fraction: float, mean: Sequence[float], std: Sequence[float], opset: int
) -> onnx.ModelProto:
    """The graph ``images`` uint8 (N, H, W, 3) → ``pixels`` float32 (N, 3, S, S).

    The central square of side ``round(min(H, W) * crop_fraction)``, at least 1 px, resized linearly with antialiasing
    (onnxruntime agrees with torch and Pillow to 0.003 of 255), divided by 255 and normalised per channel.

    Args:
        size_px: Side S of the result.
        crop_fraction: Share of the short side that is kept, in (0, 1].
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1, positive.
        opset: Of the ONNX operators, at least 18 (antialiasing).

    Returns:
        A checked model; equal arguments make equal bytes.
    """
    graph = helper.make_graph(
        [*_crop_nodes(), *_resize_nodes()],
        "preprocess",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", "height", "width", 3])],
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, size_px, size_px])],
        _constants(size_px, crop_fraction, mean, std),
    )
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(
        graph, opset_imports=opsets, producer_name=PRODUCER, ir_version=helper.find_min_ir_version_for(opsets)
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def _crop_nodes() -> list[onnx.NodeProto]:
    """Central square: ``images`` → ``square`` uint8 (N, side, side, 3)."""
    node = helper.make_node
    return [
        node("Shape", ["images"], ["extent"], start=1, end=3),  # H, W
        node("ReduceMin", ["extent"], ["short_side"], keepdims=1),
        node("Cast", ["short_side"], ["short_side_real"], to=TensorProto.DOUBLE),
        node("Mul", ["short_side_real", "crop_fraction"], ["side_real"]),
        node("Round", ["side_real"], ["side_rounded"]),
        node("Cast", ["side_rounded"], ["side_any"], to=TensorProto.INT64),
        node("Max", ["side_any", "one"], ["side"]),
        node("Sub", ["extent", "side"], ["margins"]),
        node("Div", ["margins", "two"], ["starts"]),
        node("Add", ["starts", "side"], ["ends"]),
        node("Slice", ["images", "starts", "ends", "height_and_width"], ["square"]),
    ]


def _resize_nodes() -> list[onnx.NodeProto]:
    """``square`` → ``pixels``."""
    node = helper.make_node
    return [
        node("Cast", ["square"], ["square_real"], to=TensorProto.FLOAT),
        node("Transpose", ["square_real"], ["planes"], perm=[0, 3, 1, 2]),
        node(
            "Resize",
            ["planes", "", "", "target"],
            ["resized"],
            mode="linear",
            antialias=1,
            exclude_outside=1,  # renormalised at the border, as torch and Pillow do (without: off by 0.16 std there)
            axes=[2, 3],
            coordinate_transformation_mode="half_pixel",
        ),
        node("Mul", ["resized", "scale"], ["scaled"]),
        node("Add", ["scaled", "shift"], ["pixels"]),
    ]


def _constants(
    size_px: int, crop_fraction: float, mean: Sequence[float], std: Sequence[float]
) -> list[onnx.TensorProto]:
    """Initialisers. ``(x / 255 - mean) / std`` is one multiplication and one addition per channel."""
    mean_64, std_64 = np.asarray(mean, np.float64), np.asarray(std, np.float64)
    values = {
        "crop_fraction": np.array([crop_fraction], np.float64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "height_and_width": np.array([1, 2], np.int64),
        "target": np.array([size_px, size_px], np.int64),
        "scale": (1 / (255 * std_64)).astype(np.float32).reshape(1, 3, 1, 1),
        "shift": (-mean_64 / std_64).astype(np.float32).reshape(1, 3, 1, 1),
    }
    return [numpy_helper.from_array(value, name) for name, value in values.items()]
