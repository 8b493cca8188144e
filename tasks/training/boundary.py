"""Activations at the frozen boundary: what the frozen layer groups make of each picture, once or again in every epoch.

The frozen part of a network gives the same answer in every epoch, so its output is kept: float16 maps in an unnamed
temporary file, which vanishes with the process however that ends, and what was pooled on the way in memory. Where the
file would grow over a limit, or training passes over the pictures fewer times than they have views, the frozen part
runs again for every batch; training then sees the same views in the same order. The rule counts passes, not seconds:
a stopwatch would let the load of the machine decide what comes out. Why torch runs it, and what that costs, is
decision 94 in CONTRIBUTING.md.
Called by ``tasks.training.staged``.
"""

import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.models.architectures import Boundary, Network
from tasks.progress import progress
from tasks.training.augmented import Item, PixelSource
from tasks.training.device import on_device
from tasks.training.memory import in_parts

logger = logging.getLogger(__name__)

FLOAT16_MAX = 65_504.0
CHANNELS_TO_BACK = {4: (0, 2, 3, 1), 3: (0, 1, 2), 2: (0, 1)}
CHANNELS_TO_FRONT = {4: (0, 3, 1, 2), 3: (0, 1, 2), 2: (0, 1)}


class BoundarySource(Protocol):
    """Gives the activations of pictures at the frozen boundary."""

    @property
    def kind(self) -> Literal["cached", "recomputed"]:
        """Whether they were kept."""
        ...

    @property
    def num_images(self) -> int:
        """Pictures, N."""
        ...

    @property
    def num_views(self) -> int:
        """Views of each, K."""
        ...

    def batches(self, batches: Iterable[Sequence[Item]]) -> Iterator[Boundary]:
        """Activations of batch after batch of (picture, view), in order."""
        ...


@dataclass(frozen=True)
class RecomputedBoundary:
    """Runs the frozen groups for every batch.

    Attributes:
        network: Its groups below ``group`` must not change while this is in use.
        group: The first group that is not frozen.
        pixels: Where network input comes from.
    """

    network: Network
    group: int
    pixels: PixelSource
    kind: Literal["cached", "recomputed"] = "recomputed"

    @property
    def num_images(self) -> int:
        return len(self.pixels.files)

    @property
    def num_views(self) -> int:
        return len(self.pixels.views)

    def _frozen(self, images: Tensor) -> Boundary:
        return self.network.forward_until(images, self.group)

    def batches(self, batches: Iterable[Sequence[Item]]) -> Iterator[Boundary]:
        for pixels in self.pixels.batches(batches):
            with torch.no_grad():
                images = on_device(torch.from_numpy(pixels), self.network.device)
                parts = in_parts(self._frozen, images)
            yield Boundary.joined(parts)


@dataclass(frozen=True)
class CachedBoundary:
    """Kept activations.

    Attributes:
        maps: (N * V, ...) float16, channels last; row ``picture * V + view``.
        pooled: (N * V, P) float32.
        num_images: N.
        num_views: V.
        device: Where they are handed out.
    """

    maps: NDArray[np.float16]
    pooled: NDArray[np.float32]
    num_images: int
    num_views: int
    device: torch.device
    kind: Literal["cached", "recomputed"] = "cached"

    def batches(self, batches: Iterable[Sequence[Item]]) -> Iterator[Boundary]:
        for batch in batches:
            rows = [index * self.num_views + view for index, view in batch]
            maps = torch.from_numpy(self.maps[rows]).to(self.device).float()  # (B, H, W, C), or tokens (B, T, C)
            maps = on_device(maps.permute(CHANNELS_TO_FRONT[maps.ndim]), self.device)
            yield Boundary(maps, torch.from_numpy(self.pooled[rows]).to(self.device))


def open_boundary(
    network: Network,
    group: int,
    pixels: PixelSource,
    *,
    passes: float,
    max_bytes: int,
    directory: Path,
    batch_size: int,
    what: str,
) -> tuple[BoundarySource, int]:
    """Activations of every picture in every view, kept where they fit.

    Args:
        network: The network; its groups below ``group`` stay as they are.
        group: The first group that is not frozen.
        pixels: Where network input comes from.
        passes: How often each picture is asked for; fewer than it has views, and keeping costs more than it saves.
        max_bytes: Limit of the temporary file.
        directory: Where the temporary file goes.
        batch_size: Pictures of a batch; the frozen part sees it as `in_parts` says.
        what: Name of the work, for its progress.

    Returns:
        The source, and the bytes that its file takes (0 where it is recomputed).

    Raises:
        OSError: If the disk has no room for the file.
    """
    recomputed = RecomputedBoundary(network, group, pixels)
    if passes < recomputed.num_views:
        logger.info("%s: %.3g passes over %d views: computed in each epoch", what, passes, recomputed.num_views)
        return recomputed, 0
    first = next(recomputed.batches([[(0, 0)]]))
    rows = recomputed.num_images * recomputed.num_views
    num_bytes = rows * first.maps[0].numel() * np.dtype(np.float16).itemsize
    if num_bytes > max_bytes:
        told = "%s: activations would take %.2f GB, more than finetune.boundary_cache_gb leaves: computed in each epoch"
        logger.info(told, what, num_bytes / 1e9)
        return recomputed, 0
    cached = _fill(recomputed, first, directory, batch_size, what)
    return (cached, num_bytes) if cached else (recomputed, 0)


def _fill(
    source: RecomputedBoundary, first: Boundary, directory: Path, batch_size: int, what: str
) -> CachedBoundary | None:
    """Runs every (picture, view) through the frozen groups; None if an activation does not fit into float16."""
    items = [(index, view) for index in range(source.num_images) for view in range(source.num_views)]
    batches = [items[start : start + batch_size] for start in range(0, len(items), batch_size)]
    back = CHANNELS_TO_BACK[first.maps.ndim]
    shape = (len(items), *first.maps.permute(back).shape[1:])
    maps = _temporary_array(directory, shape)
    pooled = np.zeros((len(items), first.pooled.shape[1]), np.float32)
    start = 0
    for boundary in progress(source.batches(batches), total=len(batches), what=what, unit="batch"):
        if float(boundary.maps.abs().amax()) > FLOAT16_MAX:
            logger.warning("%s: an activation is beyond float16: computed in each epoch", what)
            return None
        stop = start + len(boundary.maps)
        maps[start:stop] = boundary.maps.permute(back).float().cpu().numpy()
        pooled[start:stop] = boundary.pooled.cpu().numpy()
        start = stop
    return CachedBoundary(maps, pooled, source.num_images, source.num_views, source.network.device)


def _temporary_array(directory: Path, shape: tuple[int, ...]) -> NDArray[np.float16]:
    """An array in a file without a name. Its room is taken at once: a full disk is an error, not a crash later."""
    directory.mkdir(parents=True, exist_ok=True)
    num_bytes = math.prod(shape) * np.dtype(np.float16).itemsize
    with tempfile.TemporaryFile(dir=directory) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:
            file.truncate(num_bytes)
        memory: np.memmap[Any, np.dtype[np.float16]] = np.memmap(file, np.float16, "r+", shape=shape)
        return memory
