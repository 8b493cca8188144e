"""Depthwise convolutions that train fast on a CPU: small maps, and bfloat16.

The library's weight gradient of a 5x5 depthwise convolution takes more than half of a MobileNetV3's training
time at 64 px (one core: 68 of 72 ms for 576 channels of 2x2, batch 128). On small maps the same sums are one
small matrix product a channel: all correlations of input positions with output positions, each then added to
the one tap of the kernel that joins the two. Training as a whole becomes twice as fast (633 and 303 ms a batch
on one core of a busy machine); results agree to float rounding.

In bfloat16 the library has no kernels for the gradient by the maps where the stride is 2, nor for that by a kernel
larger than 3x3, and takes up to thirty times as long (32 pictures, one core with AMX: 73 ms instead of 4 for 192
channels of 28x28; 74 instead of 18 for 5x5 on 960 channels of 7x7). Every output of a convolution of stride 2 is one of
that of stride 1, so its gradient is that one's with zeros between; the other one is computed in float32. Called by
finetune and pretrain.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

MAX_CORRELATIONS = 256
"""Input positions times output positions up to which the matrix product is the faster way."""


class DepthwiseConv2d(nn.Conv2d):
    """``nn.Conv2d`` for one filter a channel, same parameters and results, with faster gradients."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: A002 (nn.Conv2d's)
        """Maps (B, C, H, W) to (B, C, H', W')."""
        device = input.device.type
        if torch.is_autocast_enabled(device):  # which sees the convolution inside, but not its gradient
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)  # noqa: A001
            bias = None if bias is None else bias.to(dtype)
        out: Tensor = _Depthwise.apply(input, weight, bias, self.stride[0], self.padding[0])
        return out


def use_fast_depthwise(model: nn.Module) -> nn.Module:
    """Swap every plain depthwise convolution of a model, in place; parameters, names and buffers stay the same."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and _is_plain_depthwise(child):
                setattr(parent, name, _swapped(child))
    return model


def _is_plain_depthwise(conv: nn.Conv2d) -> bool:
    square = conv.stride[0] == conv.stride[1] and conv.padding == (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
    one_each = 1 < conv.groups == conv.in_channels == conv.out_channels
    return one_each and square and conv.dilation == (1, 1) and conv.bias is None and conv.padding_mode == "zeros"


def _swapped(conv: nn.Conv2d) -> DepthwiseConv2d:
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    fast = DepthwiseConv2d(
        conv.in_channels, conv.out_channels, kernel, stride, kernel // 2, groups=conv.groups, bias=False
    )
    fast.weight = conv.weight
    return fast


@cache
def _taps(side: tuple[int, int], out_side: tuple[int, int], kernel: int, stride: int, padding: int) -> Tensor:
    """Which tap of the kernel joins each pair of positions: (H * W * H' * W', kernel * kernel), 0 or 1."""

    def one_axis(size: int, out_size: int) -> Tensor:
        tap = torch.arange(size).view(-1, 1) - stride * torch.arange(out_size) + padding  # (size, out_size)
        return torch.stack([tap == k for k in range(kernel)], -1).float()  # (size, out_size, kernel)

    rows, columns = one_axis(side[0], out_side[0]), one_axis(side[1], out_side[1])
    joined = torch.einsum("hik,wjl->hwijkl", rows, columns)
    return joined.reshape(side[0] * side[1] * out_side[0] * out_side[1], kernel * kernel)


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        ctx.stride, ctx.padding = stride, padding
        return nn.functional.conv2d(maps, weight, bias, stride, padding, 1, maps.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        (grad,), stride, padding = grads, ctx.stride, ctx.padding
        positions = maps.shape[2] * maps.shape[3] * grad.shape[2] * grad.shape[3]
        by_maps, by_weight, by_bias = ctx.needs_input_grad[:3]
        bfloat16 = maps.dtype == torch.bfloat16 and not maps.is_cuda
        grad_maps = grad_weight = None
        if by_maps and bfloat16 and stride > 1:
            grad_maps, _ = _gradients(_spread(grad, maps, stride), maps, weight, 1, padding, [True, False])
            by_maps = False
        if by_weight and positions <= MAX_CORRELATIONS:
            grad_weight = _weight_gradient(maps, grad, weight.shape[-1], stride, padding)
            by_weight = False
        elif by_weight and bfloat16 and weight.shape[-1] > 3:
            exact = grad.float(), maps.float(), weight.float()
            grad_weight = _gradients(*exact, stride, padding, [False, True])[1]
            by_weight = False
        if by_maps or by_weight:
            rest = _gradients(grad, maps, weight, stride, padding, [by_maps, by_weight])
            grad_maps, grad_weight = rest[0] if by_maps else grad_maps, rest[1] if by_weight else grad_weight
        grad_bias = grad.sum((0, 2, 3)) if by_bias else None
        return grad_maps, None if grad_weight is None else grad_weight.to(weight.dtype), grad_bias, None, None


def _gradients(
    grad: Tensor, maps: Tensor, weight: Tensor, stride: int, padding: int, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """The library's, by maps and weight; what is not wanted is None."""
    geometry = ([stride] * 2, [padding] * 2, [1, 1], False, [0, 0], maps.shape[1])
    by_maps, by_weight, _ = torch.ops.aten.convolution_backward(grad, maps, weight, None, *geometry, [*wanted, False])
    return by_maps, by_weight


def _spread(grad: Tensor, maps: Tensor, stride: int) -> Tensor:
    """The same convolution's gradient with stride 1, (B, C, H, W) of (B, C, H', W'): 0 where this one does not look."""
    whole = torch.zeros_like(maps)
    whole[:, :, ::stride, ::stride] = grad
    return whole


def _weight_gradient(maps: Tensor, grad: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    maps, grad = maps.contiguous(), grad.contiguous()  # channels last, the product below would go one channel at a time
    channels = maps.shape[1]
    inputs = maps.permute(1, 2, 3, 0).reshape(channels, -1, len(maps))  # (C, HW, B)
    outputs = grad.permute(1, 0, 2, 3).reshape(channels, len(grad), -1)  # (C, B, H'W')
    correlations = torch.bmm(inputs, outputs).view(channels, -1)  # (C, HW * H'W')
    taps = _taps((maps.shape[2], maps.shape[3]), (grad.shape[2], grad.shape[3]), kernel, stride, padding)
    return (correlations @ taps.to(correlations.dtype)).view(channels, 1, kernel, kernel)
