"""Where fine-tuning computes and in which precision: a rule on what is there, not a stopwatch.

In bfloat16 run the layers of the network, in the steps of training and for the frozen activations that these start
from (autocast). Weights, head, loss, average and optimiser stay in float32, and whatever is judged is judged in
float32, as it ships. Random draws are made on the CPU, so that they are the same on every device. Called by
``tasks.finetune`` and the modules beside this one.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tasks.errors import ParamsError
from tasks.models.architectures import Network
from tasks.models.depthwise import use_fast_depthwise
from tasks.models.frozen_norm import fold_frozen_norms

DeviceName = Literal["cpu", "cuda", "mps"]
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Machine:
    """What the choice hangs on.

    Attributes:
        num_cuda: CUDA devices.
        cuda_bfloat16: Whether they compute in bfloat16 themselves.
        has_mps: Whether there is Apple's GPU.
        cpu_bfloat16: Whether the CPU computes in bfloat16 itself.
    """

    num_cuda: int
    cuda_bfloat16: bool
    has_mps: bool
    cpu_bfloat16: bool


@dataclass(frozen=True)
class Compute:
    """Where and how the network runs.

    Attributes:
        device: Where.
        precision: Of its layers in training.
        reason: Why these.
    """

    device: DeviceName
    precision: Precision
    reason: str


def this_machine() -> Machine:
    """What torch finds here."""
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    cpu = torch.cpu.get_capabilities()
    return Machine(
        num_cuda=num_cuda,
        cuda_bfloat16=num_cuda > 0 and torch.cuda.is_bf16_supported(including_emulation=False),
        has_mps=torch.backends.mps.is_available(),
        cpu_bfloat16=bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16")),
    )


def choose_compute(
    device: DeviceName | Literal["auto"],
    precision: Precision | Literal["auto"],
    machine: Machine,
    *,
    num_processes: int = 1,
) -> Compute:
    """The device and precision, and why.

    Args:
        device: ``finetune.device``.
        precision: ``finetune.precision``.
        machine: What is there.
        num_processes: That train together.

    Raises:
        ParamsError: If the device that is asked for is not there, or not for so many processes.
    """
    found, why = _device(device, machine, num_processes)
    if found == "cuda" and machine.num_cuda < num_processes:
        raise ParamsError(
            f"params.yaml: finetune.num_processes is {num_processes}, of which each needs a CUDA device of its own; "
            f"torch finds {machine.num_cuda}. Lower it to that, or set finetune.device to cpu."
        )
    native = {"cuda": machine.cuda_bfloat16, "cpu": machine.cpu_bfloat16, "mps": False}[found]
    has = {
        "cuda": f"the CUDA device has {'' if native else 'no '}bfloat16",
        "cpu": f"the CPU has {'' if native else 'no '}bfloat16",
        "mps": "MPS has no bfloat16 that was tried",
    }[found]
    if precision != "auto":
        though = f", though {has}" if precision == "bfloat16" and not native else ""
        return Compute(found, precision, f"{why}; finetune.precision names it{though}")
    return Compute(found, "bfloat16" if native else "float32", f"{why}; {has}")


def _device(wanted: DeviceName | Literal["auto"], machine: Machine, num_processes: int) -> tuple[DeviceName, str]:
    """The device, and why."""
    if wanted == "cuda" and not machine.num_cuda:
        raise ParamsError(
            "params.yaml: finetune.device is cuda, and torch finds no CUDA device here. Set it to auto or cpu, or see "
            "whether `nvidia-smi` lists one and this torch was built for CUDA (torch.version.cuda)."
        )
    if wanted == "mps" and not (machine.has_mps and num_processes == 1):
        lacks = f"it serves one process, not {num_processes}" if machine.has_mps else "torch finds no Apple GPU here"
        remedy = "Set it to auto or cpu" + (", or finetune.num_processes to 1" if machine.has_mps else "")
        raise ParamsError(f"params.yaml: finetune.device is mps, and {lacks}. {remedy}.")
    if wanted != "auto":
        return wanted, "finetune.device names it"
    if machine.num_cuda:
        return "cuda", "there is a CUDA device"
    if machine.has_mps and num_processes == 1:
        return "mps", "there is MPS and no CUDA device"
    return "cpu", "no CUDA device" + ("; MPS serves one process" if machine.has_mps else " and no MPS")


def place(network: Network, compute: Compute, *, norms_are_frozen: bool = True) -> None:
    """Brings the network's weights to the device; its layers compute in the precision from now on.

    Args:
        network: In eval.
        compute: Where and how.
        norms_are_frozen: Whether BatchNorm keeps its statistics, as in all stages but that from random weights.
    """
    if compute.device == "cpu":
        use_fast_depthwise(network.trunk)
        if norms_are_frozen:
            fold_frozen_norms(network.trunk)
    network.to(compute.device)
    network.precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[compute.precision]


def memory_format(device: torch.device) -> torch.memory_format:
    """Of maps and of convolutions' weights: channels last, which is the fastest on CPUs and on CUDA.

    Not on MPS, whose backward pass returned garbage for it in some versions (pytorch/pytorch#141009).
    """
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def on_device(maps: Tensor, device: torch.device) -> Tensor:
    """Maps (B, C, H, W) where and as convolutions want them; other shapes are moved alone."""
    maps = maps.to(device)
    return maps.contiguous(memory_format=memory_format(device)) if maps.ndim == 4 else maps


def wait_for(device: torch.device) -> None:
    """Until a device has done what it was given: GPUs work while Python goes on, which would be read as speed."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
