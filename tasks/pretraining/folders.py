"""A folder of labelled images, a folder a class, as a source task: a large related set first, your small set after.

Pictures are decoded by the same function as everywhere (``deploy.images``) and cropped, mirrored and shaded
at random, a batch at a time. What is held out follows from an image's content, so it does not move when
others are added. Called by ``tasks.pretrain``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from deploy.errors import ImageError
from deploy.files import Readable
from deploy.images import decode_image
from tasks.data.image_store import ImageStore, open_images
from tasks.errors import DataError

NUM_DECODERS = 2
NAMED_IN_ERRORS = 5


@dataclass(frozen=True)
class FolderSource:
    """An image folder as ``tasks.pretraining.train`` wants it.

    Attributes:
        images: The folder's images, files or shards.
        class_names: One a class, sorted.
        training: (path below root, label) of the images trained on.
        validation: The same of those held out.
        image_px: Side of the pictures.
        hflip: Whether a picture may be mirrored.
        min_area_fraction: Smallest share of a picture that a random crop keeps.
        seed: Of order, crops and shades.
    """

    images: ImageStore
    class_names: tuple[str, ...]
    training: tuple[tuple[str, int], ...]
    validation: tuple[tuple[str, int], ...]
    image_px: int
    hflip: bool
    min_area_fraction: float
    seed: int

    @property
    def identity(self) -> str:
        """What decides the pictures."""
        paths = "\n".join(f"{path} {label}" for path, label in (*self.training, *self.validation))
        content = hashlib.sha256(paths.encode()).hexdigest()
        return f"{content} {self.image_px} px, hflip {self.hflip}, area {self.min_area_fraction}, seed {self.seed}"

    def num_training_batches(self, batch_size: int) -> int:
        """Full batches an epoch; a set smaller than a batch makes one smaller batch."""
        return max(1, len(self.training) // batch_size)

    def training_batches(self, epoch: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every image once an epoch (less the last part of a batch), newly cropped: (B, 3, S, S) in 0..1 and (B,)."""
        rng = np.random.default_rng((self.seed, epoch + 1))
        order = rng.permutation(len(self.training))
        for index in range(self.num_training_batches(batch_size)):
            rows = [self.training[row] for row in order[index * batch_size : (index + 1) * batch_size]]
            yield self._pictures(rows, rng)

    def validation_batches(self, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The images held out, their whole central square."""
        for start in range(0, len(self.validation), batch_size):
            yield self._pictures(self.validation[start : start + batch_size], None)

    def _pictures(
        self, rows: Sequence[tuple[str, int]], rng: np.random.Generator | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        draws = [None if rng is None else rng.uniform(size=5) for _ in rows]
        with ThreadPoolExecutor(NUM_DECODERS) as pool:
            pictures = list(pool.map(self._picture, [path for path, _ in rows], draws))
        batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255  # (B, 3, S, S)
        return batch, torch.tensor([label for _, label in rows])

    def _picture(self, path: str, draws: np.ndarray | None) -> np.ndarray:
        """One picture (S, S, 3) uint8; ``draws`` are five numbers in 0..1, or None for the central square."""
        file = self.images.file(path)
        try:
            image = Image.fromarray(decode_image(file.read_bytes()))
        except ImageError as error:
            raise DataError(f"{file}: {error}. Remove or mend it.") from error
        area, across, down, mirror, shade = (1.0, 0.5, 0.5, 1.0, 0.5) if draws is None else draws.tolist()
        side = min(image.size) * (self.min_area_fraction + (1 - self.min_area_fraction) * area) ** 0.5
        left, top = (image.width - side) * across, (image.height - side) * down
        small = image.resize((self.image_px,) * 2, Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
        pixels = np.asarray(small)[:, ::-1] if self.hflip and mirror < 0.5 else np.asarray(small)
        if draws is None:
            return np.ascontiguousarray(pixels)
        return np.clip(pixels * (0.8 + 0.4 * shade), 0, 255).astype(np.uint8)


def folder_source(
    root: Path, *, image_px: int, val_fraction: float, hflip: bool, min_area_fraction: float, seed: int
) -> FolderSource:
    """Looks through a folder of labelled images.

    Raises:
        DataError: If it is missing, or has fewer than two classes with images.
    """
    if not root.is_dir():
        raise DataError(f"pretrain.source is {root}, which is no folder. Name one with a folder a class, or `glyphs`.")
    store = open_images(root)
    images = store.listing().images
    names = tuple(sorted({image.label for image in images}))
    if len(names) < 2:
        found = ", ".join(names[:NAMED_IN_ERRORS]) or "none"
        raise DataError(f"{root} has {len(names)} class(es) with images ({found}); pre-training needs at least two.")
    number = {name: index for index, name in enumerate(names)}
    held_out = [
        image.split in ("val", "test") or (image.split is None and _share(store.file(image.path)) < val_fraction)
        for image in images
    ]
    rows = [(image.path, number[image.label]) for image in images]
    training = tuple(row for row, out in zip(rows, held_out, strict=True) if not out)
    validation = tuple(row for row, out in zip(rows, held_out, strict=True) if out)
    if not training:
        raise DataError(f"{root}: all {len(images)} images are held out. Lower pretrain.val_fraction or add images.")
    return FolderSource(store, names, training, validation, image_px, hflip, min_area_fraction, seed)


def _share(file: Readable) -> float:
    """Where an image's content falls in 0..1."""
    return int.from_bytes(hashlib.sha256(file.read_bytes()).digest()[:7], "big") / (1 << 56)
