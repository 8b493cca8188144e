"""The exponential moving average of the weights: what a stage of fine-tuning hands on, with no step to be picked.

References:
    Morales-Brotons, Vogels and Hendrikx 2024, arXiv:2411.18704.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


class Ema:
    """A moving average of named tensors.

    The average starts from the weights it is given. Its decay grows as (1 + t) / (10 + t) up to ``decay``, so that
    a short run is not dominated by where it started.

    Args:
        tensors: The weights to follow, float32.
        decay: Weight of the past in each step, in [0, 1).
    """

    def __init__(self, tensors: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.average = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor]) -> None:
        """Moves the average towards the weights of this step."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        now = [tensors[name].detach() for name in self.average]
        torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

    def restore(self, average: Mapping[str, Tensor], num_updates: int) -> None:
        """Goes on from a checkpoint."""
        self.num_updates = num_updates
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
