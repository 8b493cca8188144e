"""What runs the frozen trunk: onnxruntime, OpenVINO or torch, chosen by a rule and not by a stopwatch.

onnxruntime runs the very graph that serving runs, and is what everything else is held to. The two others are taken
where they are a multiple faster: torch on a CUDA device, OpenVINO on a CPU that computes in bfloat16 (without it they
are level, METHOD.md). Engine and precision are in the key of every stored feature. Called by tasks.cache_features;
torch and OpenVINO are imported only where they run.
"""

import ctypes
import importlib.util
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from deploy.files import sha256_file
from deploy.machine import available_cores
from deploy.runtime import open_session
from tasks.errors import BackboneError, ParamsError
from tasks.models.backbone_card import BackboneCard

EngineName = Literal["onnxruntime", "openvino", "torch"]

# pixels (B, 3, S, S) float32 → embedding (B, D) float32; safe to call from several threads
Forward = Callable[[NDArray[np.float32]], NDArray[np.float32]]

FLOAT32_TOLERANCE = 5e-3
"""Relative L2; float16 storage costs 2e-4, another CPU's kernels 1e-5, a wrong resize 1e-2 and more."""
HALF_TOLERANCE = 2e-2
"""The same of a trunk that computes in 16 bits, which is 3e-3 (resnet18) to 8e-2 (mobilenet_v2) from float32."""
CPU_BATCH_PX = 4 * 224 * 224
"""More at once leaves the caches between layers, fewer pay a call for too little. At 224 px eight pictures take 1.02 to
1.11 times the processor time an image of four (mobilenets, squeezenet1_1, efficientnet_b0, resnet50; resnet18
0.98; onnxruntime, two cores)."""
GPU_BATCH_SIZE = 128


@dataclass(frozen=True)
class Machine:
    """What the choice hangs on.

    Attributes:
        has_cuda: Whether a CUDA device can be used.
        openvino_bfloat16: Whether OpenVINO would compute in bfloat16 on this CPU; None where it is not installed.
    """

    has_cuda: bool
    openvino_bfloat16: bool | None


@dataclass(frozen=True)
class TrunkEngine:
    """A trunk that is ready to run.

    Attributes:
        name: Engine, device and precision, as they stand in the key of a feature.
        reason: Why this engine.
        tolerance: Relative L2 difference that two runs on one picture may have.
        batch_size: At which it is fast.
        forward: The trunk.
    """

    name: str
    reason: str
    tolerance: float
    batch_size: int
    forward: Forward


def this_machine() -> Machine:
    """Looks, without importing torch."""
    installed = importlib.util.find_spec("openvino") is not None
    return Machine(_has_cuda(), _openvino_bfloat16() if installed else None)


def choose_engine(wanted: EngineName | Literal["auto"], machine: Machine) -> tuple[EngineName, str]:
    """The engine and why.

    Raises:
        ParamsError: If the one that is asked for cannot run here.
    """
    if wanted == "torch" and not machine.has_cuda:
        raise ParamsError(
            "params.yaml: features.engine is torch, but there is no CUDA device, and on a CPU torch is the slowest. "
            "Set it to auto or onnxruntime."
        )
    if wanted == "openvino" and machine.openvino_bfloat16 is None:
        raise ParamsError(
            "params.yaml: features.engine is openvino, which is not installed. Install the extra "
            "(`pip install 'tanuki[openvino]'`), or set it to auto."
        )
    if wanted != "auto":
        return wanted, "features.engine names it"
    if machine.has_cuda:
        return "torch", "there is a CUDA device"
    if machine.openvino_bfloat16:
        return "openvino", "it is installed and this CPU computes in bfloat16"
    without = "OpenVINO is not installed" if machine.openvino_bfloat16 is None else "the CPU has no bfloat16"
    return "onnxruntime", f"no CUDA device, and {without}"


def open_engine(
    wanted: EngineName | Literal["auto"], *, trunk: Path, weights: Path, card: BackboneCard, place: int
) -> TrunkEngine:
    """Opens the trunk on the engine that the rule chooses.

    Args:
        wanted: ``features.engine``.
        trunk: trunk.onnx, what onnxruntime and OpenVINO run.
        weights: weights.safetensors, what torch runs.
        card: Of the backbone.
        place: Of this process among those that share the machine's GPUs, from 0.

    Raises:
        ParamsError: If the engine that is asked for cannot run here.
        BackboneError: If the weights do not fit the architecture.
    """
    machine = this_machine()
    name, reason = choose_engine(wanted, machine)
    if name == "torch":
        forward, precision = torch_forward(weights, card, device="cuda", place=place)
        return TrunkEngine(f"torch-cuda-{precision}", reason, HALF_TOLERANCE, GPU_BATCH_SIZE, forward)
    if name == "openvino":
        size = _pictures(CPU_BATCH_PX, card.size_px)
        if machine.openvino_bfloat16:
            forward = openvino_forward(trunk, "bfloat16")
            return TrunkEngine("openvino-cpu-bfloat16", reason, HALF_TOLERANCE, size, forward)
        return TrunkEngine("openvino-cpu-float32", reason, FLOAT32_TOLERANCE, size, openvino_forward(trunk, "float32"))
    size = _pictures(CPU_BATCH_PX, card.size_px)
    return TrunkEngine("onnxruntime-cpu-float32", reason, FLOAT32_TOLERANCE, size, onnxruntime_forward(trunk))


def _pictures(pixels: int, size_px: int) -> int:
    """How many pictures of ``size_px`` have so many pixels, at least 1."""
    return max(1, pixels // size_px**2)


def onnxruntime_forward(trunk: Path) -> Forward:
    """One thread a call and a caller a core: a feature then hangs on no number of cores."""
    session = open_session(trunk)

    def forward(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        features: NDArray[np.float32] = session.run(["embedding"], {"pixels": pixels})[0]
        return features

    return forward


def openvino_forward(trunk: Path, precision: Literal["float32", "bfloat16"]) -> Forward:
    """A stream a core, and a request for each thread that calls.

    Raises:
        BackboneError: If OpenVINO cannot compile the graph.
    """
    import openvino

    cores = available_cores()
    settings = {
        "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[precision],
        "NUM_STREAMS": cores,
        "INFERENCE_NUM_THREADS": cores,  # OpenVINO would count the host's
        "ENABLE_CPU_PINNING": False,  # others may have been pinned to the same
    }
    try:
        compiled = openvino.Core().compile_model(str(trunk), "CPU", settings)
    except RuntimeError as error:
        raise BackboneError(
            f"OpenVINO cannot run {trunk}: {' '.join(str(error).split())}. "
            "Set features.engine to onnxruntime (params.yaml)."
        ) from error
    mine = threading.local()

    def forward(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        if not hasattr(mine, "request"):
            mine.request = compiled.create_infer_request()
        features: NDArray[np.float32] = mine.request.infer([pixels])[0].copy()  # the request's own memory
        return features

    return forward


def torch_forward(
    weights: Path, card: BackboneCard, *, device: Literal["cuda", "cpu"], place: int
) -> tuple[Forward, str]:
    """Channels last; on CUDA in bfloat16, or in float16 where the device has none. Processes take the GPUs by turns.

    Returns:
        The trunk, and the name of its precision.

    Raises:
        BackboneError: If the weights are not those of the card, or do not fit the architecture.
    """
    import torch
    from safetensors.torch import load_file

    from tasks.models.architectures import build_network

    if sha256_file(weights) != card.weights_sha256:
        raise BackboneError(
            f"{weights} is not what the backbone's card speaks of. Run `dvc repro fetch_backbone`, or `dvc checkout`."
        )
    dtype = torch.float32
    if device == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    network = build_network(card.architecture, depths=card.depths)
    network.load_trunk(load_file(weights))
    where = torch.device("cuda", place % torch.cuda.device_count()) if device == "cuda" else torch.device("cpu")
    network.eval().to(device=where, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        images = torch.from_numpy(pixels).to(where).contiguous(memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            features: NDArray[np.float32] = network(images).float().cpu().numpy()  # (B, D)
        return features

    return forward, str(dtype).removeprefix("torch.")


def _has_cuda() -> bool:
    """Asks the driver itself: importing torch for the answer takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _openvino_bfloat16() -> bool:
    import openvino

    capabilities: Any = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in capabilities
