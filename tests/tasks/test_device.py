"""Where fine-tuning computes and in which precision: the rule, what it refuses, and a layer with its own gradient."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from tasks.errors import ParamsError
from tasks.models import engines
from tasks.models.architectures import build_network
from tasks.models.depthwise import DepthwiseConv2d, use_fast_depthwise
from tasks.models.frozen_norm import PassedNorm
from tasks.training.device import Compute, Machine, choose_compute, on_device, place, this_machine
from tasks.training.tuner import frozen_digest

BARE = Machine(num_cuda=0, cuda_bfloat16=False, has_mps=False, cpu_bfloat16=False)
NEW_CPU = Machine(num_cuda=0, cuda_bfloat16=False, has_mps=False, cpu_bfloat16=True)
MAC = Machine(num_cuda=0, cuda_bfloat16=False, has_mps=True, cpu_bfloat16=False)
OLD_GPU = Machine(num_cuda=1, cuda_bfloat16=False, has_mps=False, cpu_bfloat16=True)
TWO_GPUS = Machine(num_cuda=2, cuda_bfloat16=True, has_mps=False, cpu_bfloat16=False)


@pytest.mark.parametrize(
    ("machine", "num_processes", "expected"),
    [
        (BARE, 1, Compute("cpu", "float32", "no CUDA device and no MPS; the CPU has no bfloat16")),
        (NEW_CPU, 2, Compute("cpu", "bfloat16", "no CUDA device and no MPS; the CPU has bfloat16")),
        (MAC, 1, Compute("mps", "float32", "there is MPS and no CUDA device; MPS has no bfloat16 that was tried")),
        (MAC, 2, Compute("cpu", "float32", "no CUDA device; MPS serves one process; the CPU has no bfloat16")),
        (OLD_GPU, 1, Compute("cuda", "float32", "there is a CUDA device; the CUDA device has no bfloat16")),
        (TWO_GPUS, 2, Compute("cuda", "bfloat16", "there is a CUDA device; the CUDA device has bfloat16")),
    ],
)
def test_auto_follows_the_machine_and_says_why(machine: Machine, num_processes: int, expected: Compute) -> None:
    assert choose_compute("auto", "auto", machine, num_processes=num_processes) == expected


def test_what_is_named_is_taken() -> None:
    assert choose_compute("cpu", "float32", TWO_GPUS) == Compute(
        "cpu", "float32", "finetune.device names it; finetune.precision names it"
    )
    found = choose_compute("auto", "bfloat16", BARE)
    assert (found.device, found.precision) == ("cpu", "bfloat16")
    assert found.reason.endswith("finetune.precision names it, though the CPU has no bfloat16")


def test_a_device_that_is_not_there_is_refused_with_what_to_do() -> None:
    with pytest.raises(ParamsError, match=r"finetune\.device is cuda, and torch finds no CUDA device.*to auto or cpu"):
        choose_compute("cuda", "auto", MAC)
    with pytest.raises(ParamsError, match=r"finetune\.device is mps, and torch finds no Apple GPU.*to auto or cpu\.$"):
        choose_compute("mps", "auto", TWO_GPUS)
    with pytest.raises(ParamsError, match=r"it serves one process, not 2\..*finetune\.num_processes to 1"):
        choose_compute("mps", "auto", MAC, num_processes=2)
    for device in ("auto", "cuda"):
        with pytest.raises(ParamsError, match=r"num_processes is 3, .*torch finds 2\. Lower it to that"):
            choose_compute(device, "auto", TWO_GPUS, num_processes=3)


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs Linux, which tells what the CPU can do")
def test_what_torch_finds_is_what_the_kernel_and_the_driver_tell() -> None:
    machine = this_machine()
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert machine.cpu_bfloat16 == bool(flags & {"avx512_bf16", "amx_bf16"})
    assert machine.num_cuda == 0 or engines.this_machine().has_cuda


def test_maps_go_to_the_cpu_channels_last_and_tokens_as_they_are() -> None:
    cpu = torch.device("cpu")
    maps, tokens = torch.randn(2, 3, 4, 4), torch.randn(2, 5, 3)
    assert on_device(maps, cpu).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(on_device(maps, cpu), maps)
    assert on_device(tokens, cpu) is tokens


@pytest.mark.parametrize(
    ("side", "kernel", "stride"),
    [(4, 3, 1), (20, 3, 1), (20, 3, 2), (21, 3, 2), (20, 5, 1), (21, 5, 2)],
    ids=["by-matrix-product", "by-the-library", "even-side", "odd-side", "large-kernel", "large-kernel-odd-side"],
)
def test_the_fast_depthwise_gradients_work_in_bfloat16(side: int, kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = partial(nn.Conv2d, 6, 6, kernel, stride, kernel // 2, groups=6, bias=False)
    plain, fast = nn.Sequential(layer()), use_fast_depthwise(nn.Sequential(layer()))
    fast.load_state_dict(plain.state_dict())
    assert isinstance(fast[0], DepthwiseConv2d)
    start, gradients = torch.randn(5, 6, side, side), []
    for model, precision in ((plain, torch.float32), (fast, torch.bfloat16)):
        maps = start.clone().requires_grad_()
        with torch.autocast("cpu", precision, enabled=precision == torch.bfloat16):
            out = model(maps)
        assert out.dtype == precision
        out.float().square().sum().backward()
        gradients.append((model[0].weight.grad, maps.grad))
    for found, right in zip(gradients[1], gradients[0], strict=True):
        assert found.dtype == torch.float32
        assert 0 < float((found - right).norm() / right.norm()) < 0.02


FOLDED = {
    "mobilenet_v2": 52,  # of norms
    "mobilenet_v3_small": 34,
    "efficientnet_b0": 49,
    "resnet18": 20,
    "resnet50": 53,
    "regnet_y_400mf": 53,
    "densenet121": 1,
    "googlenet": 0,
    "squeezenet1_1": 0,
    "convnext_tiny": 0,
}


@pytest.mark.parametrize("architecture", FOLDED)
def test_frozen_norms_are_folded_and_everything_else_stays(architecture: str) -> None:
    torch.manual_seed(0)
    network = build_network(architecture, depths=2)
    norms = [each for each in network.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:  # of a network that has seen something
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
    network.double()  # or rounding would turn a ReLU over here and there
    names, digest = list(network.trunk_state()), frozen_digest(network, network.num_groups)
    pictures, found = torch.rand(2, 3, 64, 64, dtype=torch.float64), []
    for _ in range(2):
        maps = pictures.clone().requires_grad_()
        embeddings = network(maps)
        network.zero_grad()
        embeddings.square().sum().backward()
        found.append((embeddings.detach(), maps.grad, *(each.grad.clone() for each in network.parameters())))
        place(network, Compute("cpu", "float32", "as the test wants it"))
    for plain, folded in zip(*found, strict=True):
        assert float((folded - plain).norm()) <= 1e-9 * float(plain.norm())
    assert list(network.trunk_state()) == names
    assert frozen_digest(network, network.num_groups) == digest
    assert sum(isinstance(each, PassedNorm) for each in network.modules()) == FOLDED[architecture], len(norms)
