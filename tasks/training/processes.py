"""Several processes that fine-tune one network: each takes its share of a batch, and the gradients are added up.

Plain DistributedDataParallel around what moves, from the frozen boundary on. All processes start from the same weights,
take the same steps and judge on all validation pictures, so that none has to be told what another decided; the first
one writes. BatchNorm is frozen: no statistics to be told of. torchrun's launcher starts them: see tasks/together.py.
With one process nothing here does anything. Called by tasks.training and tasks.finetune.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

Item = TypeVar("Item")

logger = logging.getLogger(__name__)


def started() -> int:
    """Processes that torchrun started, this one among them; 1 where it did not."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(device: str = "cpu") -> Iterator[None]:
    """Joins the processes that torchrun started; does nothing where it did not.

    Args:
        device: Type of the device that they train on. On CUDA each takes one of its own.
    """
    if started() == 1:
        yield
        return
    if device == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
        distributed.init_process_group("nccl", device_id=own)
    else:
        distributed.init_process_group("gloo")
    yield
    distributed.destroy_process_group()  # not where one fails: the others would break, and it is to be told first


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
    shared = torch.tensor(value, dtype=torch.float64, device=_exchange_device())
    distributed.all_reduce(shared)
    return float(shared)


def spread(module: nn.Module) -> nn.Module:
    """The module, whose backward pass leaves the mean of all processes' gradients in each of them."""
    if count() == 1:
        return module
    logger.info("DistributedDataParallel over %d processes", count())
    return DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def alone(module: nn.Module) -> AbstractContextManager[None]:
    """While backward passes of what `spread` gave add to this process's own gradients."""
    return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()


def smallest(value: int) -> int:
    """The smallest of all processes' numbers."""
    if count() == 1:
        return value
    shared = torch.tensor(value, dtype=torch.int64, device=_exchange_device())
    distributed.all_reduce(shared, op=distributed.ReduceOp.MIN)
    return int(shared)


def _exchange_device() -> str:
    """Where numbers must lie to be exchanged."""
    return "cuda" if distributed.get_backend() == "nccl" else "cpu"


def wait_for_all() -> None:
    """Until all processes have come here."""
    if count() > 1:
        distributed.barrier()
