"""int8: the half of a graph after the seam, for processors with instructions for it (AVX-512 VNNI and its like).

Static, in QDQ form, activations uint8, weights int8 a channel: in onnxruntime the only choice of types that is fast.
Weights use seven of their eight bits: on a processor without VNNI the products of eight saturate, and the same graph
would answer otherwise there. What no convolution follows stays in float: the pooled features, which differ in size by
orders of magnitude between depths, and the head. For the first convolution that may help or make it slow, so both are
tried. Called by export_onnx. No torch.
"""

import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.predictor import BATCH_SIZE  # before onnxruntime, whose telemetry it turns off

# isort: split
import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from tasks.errors import ExportError
from tasks.evaluation import paired
from tasks.export.graph import canonical

DRAWS = 2000  # of the bootstrap behind the bound of a loss
ROUNDS = 15
RUNS = 3  # of a round: what takes less than a millisecond is timed together


@dataclass(frozen=True)
class Comparison:
    """Two graphs' answers for the same pictures, as shares of them.

    Args:
        accuracy_fp32: Right in fp32.
        accuracy_int8: Right in int8.
        agreement: Given the same class by both.
        lower_bound: One-sided, of the difference in accuracy, int8 less fp32: the gate's own, picture by picture.
    """

    accuracy_fp32: float
    accuracy_int8: float
    agreement: float
    lower_bound: float


class _Pixels(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Gives the calibration pictures one by one."""

    def __init__(self, pixels: Iterable[NDArray[np.float32]]) -> None:
        self._rest: Iterator[NDArray[np.float32]] = iter(pixels)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        picture = next(self._rest, None)
        return None if picture is None else {"pixels": picture}


def quantised(back: onnx.ModelProto, pixels: Iterable[NDArray[np.float32]], *, first_in_float: bool) -> onnx.ModelProto:
    """The graph ``pixels`` → ``probabilities``, ``embedding`` with its convolutions in int8.

    Args:
        back: The half after the seam.
        pixels: What the network sees of each calibration picture, (1, 3, S, S).
        first_in_float: Whether the first convolution stays as it is.

    Returns:
        A graph of standard operators; equal arguments make equal bytes on equal processors.

    Raises:
        ExportError: If onnxruntime's tools fail on it.
    """
    try:
        model = canonical(_quantised(back, pixels, first_in_float=first_in_float), keep="")
    except Exception as error:  # onnxruntime's tools raise whatever a graph makes them trip over
        raise ExportError(f"onnxruntime cannot quantise this graph: {error}") from error
    used = {node.domain for node in model.graph.node}
    if used != {""}:
        raise ExportError(f"onnxruntime quantised this graph into operators outside the standard, of {sorted(used)}")
    opsets = [entry for entry in model.opset_import if entry.domain in used]  # onnxruntime names all that it knows
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    return model


def _quantised(
    back: onnx.ModelProto, pixels: Iterable[NDArray[np.float32]], *, first_in_float: bool
) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, made = (Path(folder) / name for name in ("source.onnx", "prepared.onnx", "made.onnx"))
        onnx.save(back, source)
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared)
        quantize_static(
            graph,
            made,
            _Pixels(pixels),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=kept_in_float(graph.graph, first_in_float=first_in_float),
        )
        return onnx.load(made)


def kept_in_float(graph: onnx.GraphProto, *, first_in_float: bool) -> list[str]:
    """The nodes that no convolution follows and, where asked for, the first convolution."""
    kept = [node.name for node in graph.node if node.op_type == "Conv"][: int(first_in_float)]
    leads_to_one: set[str] = set()
    for node in reversed(graph.node):
        if node.op_type == "Conv" or leads_to_one.intersection(node.output):
            leads_to_one.update(node.input)
        else:
            kept.append(node.name)
    return kept


def compare(
    fp32: ort.InferenceSession,
    variants: Sequence[ort.InferenceSession],
    pixels: Iterable[NDArray[np.float32]],
    truth: NDArray[np.int64],
    *,
    confidence: float,
) -> list[Comparison]:
    """Compares quantised graphs with the one in fp32 on labelled pictures.

    Args:
        fp32: ``pixels`` → ``probabilities``.
        variants: The same, quantised.
        pixels: Of each picture, (1, 3, S, S).
        truth: Column of each picture's class, (N,).
        confidence: Of the bound, one-sided.

    Returns:
        One comparison a variant.
    """
    answers = np.array(
        [
            [session.run(["probabilities"], {"pixels": picture})[0].argmax() for session in (fp32, *variants)]
            for picture in pixels
        ]
    )  # (N, 1 + V)
    right, same = answers == truth[:, None], answers == answers[:, :1]

    def compared(variant: int) -> Comparison:
        found = paired.compare(
            right[:, variant],
            right[:, 0],
            truth.astype(np.str_),
            balanced=False,
            confidence=confidence,
            draws=DRAWS,
            seed=0,
        )
        accuracies = float(right[:, 0].mean()), float(right[:, variant].mean())
        return Comparison(*accuracies, float(same[:, variant].mean()), found.lower_bound)

    return [compared(variant) for variant in range(1, answers.shape[1])]


def speedup(slow: ort.InferenceSession, fast: ort.InferenceSession, pixels: NDArray[np.float32]) -> float:
    """How many times faster a session is than another, at a batch of 1 or at the predictor's, whichever is less.

    In processor time of this thread, in turns: what others do on this machine counts little. Sessions have one thread.

    Args:
        slow: The session to compare with.
        fast: The session that should be faster.
        pixels: At least BATCH_SIZE pictures, (N, 3, S, S).
    """
    ratios = []
    for batch in (pixels[:1], pixels[:BATCH_SIZE]):
        times_s = np.empty((ROUNDS, 2))
        for turn in range(-1, ROUNDS):
            for place, session in enumerate((slow, fast)):
                start = time.thread_time()
                for _ in range(RUNS):
                    session.run(None, {"pixels": batch})
                times_s[turn, place] = time.thread_time() - start
        before, after = np.median(times_s, axis=0)
        ratios.append(float(before / after))
    return min(ratios)
