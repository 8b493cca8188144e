"""Several processes that fine-tune one network: each takes its share of a batch, and the gradients are added up.

Data-parallel training as DistributedDataParallel does it, without its wrapper, which wants a whole forward pass where
ours begins at the frozen boundary. All processes start from the same weights, take the same steps and judge on all
validation pictures, so that none has to be told what another decided; the first one writes. `torchrun` starts them:
see tasks/__main__.py. With one process nothing here does anything. Called by tasks.training and tasks.finetune.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, distributed

Item = TypeVar("Item")


@contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that torchrun started; does nothing where it did not."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    distributed.init_process_group("gloo")
    try:
        yield
    finally:
        distributed.destroy_process_group()


def count() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def share_of(batch: Sequence[Item]) -> Sequence[Item]:
    """This process's pictures of a batch; all of them where there are not enough to share."""
    if count() == 1 or len(batch) < count():
        return batch
    return batch[distributed.get_rank() :: count()]


def weight_of(batch: Sequence[object]) -> float:
    """What this process's mean loss counts in that of the whole batch; the weights of all processes add up to 1."""
    return len(share_of(batch)) / len(batch) if len(batch) >= count() else 1 / count()


def total(value: float) -> float:
    """The sum of a number over all processes."""
    if count() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64)
    distributed.all_reduce(shared)
    return float(shared)


def add_up_gradients(tensors: Iterable[Tensor]) -> None:
    """Makes the gradient of each tensor the sum over all processes, in one go."""
    if count() == 1:
        return
    gradients = [each.grad for each in tensors if each.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view(gradient.shape))
        start += gradient.numel()


def wait_for_all() -> None:
    """Until all processes have come here."""
    if count() > 1:
        distributed.barrier()
