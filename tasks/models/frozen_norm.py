"""BatchNorm whose statistics stay as they are, folded into the convolution before it while it trains.

With frozen statistics the norm is one factor and one shift a channel. Taken into the convolution's kernel before each
pass they cost nothing, where the norm reads and writes whole maps, forward and backward; kernel, factor and shift get
the gradients that they would get (the chain rule runs through the product). Names, parameters and buffers stay where
they were, and outputs agree to float rounding. Called by ``tasks.training.device``.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn
from torchvision.models import resnet

NAMED_PAIRS = tuple((f"conv{number}", f"bn{number}") for number in (1, 2, 3))
"""Attributes of ResNet's modules, of which the second is applied to what the first returns."""
MODULES_OF_NAMED_PAIRS = (resnet.ResNet, resnet.BasicBlock, resnet.Bottleneck)


class FoldedConv2d(nn.Module):
    """A convolution that does its norm's work as well.

    Args:
        conv: Whose parameters it takes over.
        norm: That follows it, and belongs to another module.
    """

    def __init__(self, conv: nn.Conv2d, norm: "PassedNorm") -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self._inside = (conv, norm)  # in a tuple they are no submodules: names stay as they were

    def forward(self, maps: Tensor) -> Tensor:
        """Maps (B, C, H, W) to (B, C', H', W')."""
        conv, norm = self._inside
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None, "`fold_frozen_norms` takes none without statistics"
        assert variance is not None
        factor = norm.weight * torch.rsqrt(variance + norm.eps)  # (C',)
        start = mean if self.bias is None else mean - self.bias
        out: Tensor = conv._conv_forward(maps, self.weight * factor.view(-1, 1, 1, 1), norm.bias - start * factor)
        return out


class PassedNorm(nn.BatchNorm2d):
    """What is left of a norm that is folded: its parameters and buffers, and no work of its own."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__(norm.num_features, norm.eps)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name in nn.BatchNorm2d)
        """The maps as they are."""
        return input


def fold_frozen_norms(model: nn.Module) -> nn.Module:
    """Folds every norm of a model in eval that surely follows a convolution and nothing else, in place."""
    for parent in list(model.modules()):
        for first, second in list(_pairs(parent)):
            conv, norm = getattr(parent, first, None), getattr(parent, second, None)
            if (
                isinstance(conv, nn.Conv2d)
                and type(norm) is nn.BatchNorm2d
                and norm.affine
                and norm.track_running_stats
            ):
                passed = PassedNorm(norm).eval()
                setattr(parent, first, FoldedConv2d(conv, passed))
                setattr(parent, second, passed)
    return model


def _pairs(parent: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of children of which the second one takes what the first one returns."""
    if isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward:
        yield from pairwise(name for name, _ in parent.named_children())
    if isinstance(parent, MODULES_OF_NAMED_PAIRS):
        yield from NAMED_PAIRS
