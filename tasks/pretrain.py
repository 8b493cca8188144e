"""Pre-training: a backbone from a larger, related source task; the flow ``pretrain`` calls it.

The source is ``glyphs`` (generated, see ``tasks.pretraining.glyphs``) or a folder of images, a folder a
class. What comes out is a trunk in safetensors and, beside it, a JSON card that says all a user of the
weights has to know; both are what ``backbone.source: file:...`` reads. A run that is interrupted goes on
after its last epoch.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from deploy.files import sha256_bytes, write_bytes, write_json
from tasks.layout import Layout
from tasks.params import PretrainParams
from tasks.pretraining.folders import FolderSource, folder_source
from tasks.pretraining.glyphs import GlyphDistortion, GlyphSource, build_atlas
from tasks.pretraining.train import PIXEL_MEAN, PIXEL_STD, Pretrained, TrainingRecipe, train

logger = logging.getLogger(__name__)

GLYPHS = "glyphs"
CARD_FORMAT = 1
LICENCE = "Apache-2.0"
GLYPH_NOTES = (
    "Source task: letters of all scripts in the fonts that ship with matplotlib (DejaVu, STIX, Computer Modern), and "
    "invented characters of random strokes.",
    "No digit of any script is a class: neither the ASCII digits and their full-width, mathematical, superscript and "
    "circled forms, nor anything else that Unicode calls a number, nor a letter whose outline is that of an ASCII "
    "digit. Letters that only resemble one (Z, S, b, Ƽ) are classes.",
    "Source accuracy is on character-font pairs that were never trained on.",
)


@dataclass(frozen=True)
class PretrainReport:
    """What pre-training came to.

    Args:
        weights: Where the trunk is.
        sha256: Of the weights.
        architecture: A torchvision name.
        num_classes: Of the source task.
        source_accuracy: Top-1 share on the source's validation pictures; None if it has none.
        num_images: Pictures trained on, repetitions counted.
        wall_s: Seconds of training, over all runs if it was interrupted.
        size_bytes: Of the weights.
    """

    weights: str
    sha256: str
    architecture: str
    num_classes: int
    source_accuracy: float | None
    num_images: int
    wall_s: float
    size_bytes: int


def run(layout: Layout, *, seed: int, pretrain: PretrainParams) -> PretrainReport:
    """Trains and writes weights and card.

    Raises:
        DataError: If the source folder is missing or has fewer than two classes.
    """
    weights_path = layout.root / pretrain.output
    source, source_facts, notes = _source(layout, seed, pretrain)
    recipe = TrainingRecipe(
        architecture=pretrain.architecture,
        epochs=pretrain.epochs,
        batch_size=min(pretrain.batch_size, source_facts["images_per_epoch"]),
        learning_rate=pretrain.learning_rate,
        weight_decay=pretrain.weight_decay,
        label_smoothing=pretrain.label_smoothing,
        warmup_fraction=pretrain.warmup_fraction,
        ema_decay=pretrain.ema_decay,
        seed=seed,
    )
    logger.info("%d classes, %d pictures an epoch", len(source.class_names), source_facts["images_per_epoch"])
    checkpoint_path = weights_path.with_suffix(".checkpoint.safetensors")
    result = train(source, recipe, checkpoint_path=checkpoint_path)
    data = save(result.trunk)
    num_images = recipe.epochs * source.num_training_batches(recipe.batch_size) * recipe.batch_size
    accuracy = None if result.source_accuracy != result.source_accuracy else round(result.source_accuracy, 4)
    card = _card(data, recipe, source_facts, notes, result, num_images, accuracy, pretrain.size_px)
    write_bytes(weights_path, data)
    write_json(weights_path.with_suffix(".json"), card)  # last: where the card is, the weights are
    checkpoint_path.unlink(missing_ok=True)
    logger.info("%s: source accuracy %s, %.0f s", weights_path.name, accuracy, result.wall_s)
    return PretrainReport(
        weights=pretrain.output,
        sha256=card["sha256"],
        architecture=recipe.architecture,
        num_classes=len(source.class_names),
        source_accuracy=accuracy,
        num_images=num_images,
        wall_s=round(result.wall_s, 1),
        size_bytes=len(data),
    )


def _source(
    layout: Layout, seed: int, pretrain: PretrainParams
) -> tuple[GlyphSource | FolderSource, dict[str, Any], tuple[str, ...]]:
    """The source task, what the card says of it, and notes."""
    if pretrain.source != GLYPHS:
        folder = folder_source(
            layout.root / pretrain.source,
            image_px=pretrain.size_px,
            val_fraction=pretrain.val_fraction,
            hflip=pretrain.hflip,
            min_area_fraction=pretrain.min_area_fraction,
            seed=seed,
        )
        num_images = len(folder.training)
        facts = {"name": Path(pretrain.source).name, "images": num_images, "held_out": len(folder.validation)}
        return folder, facts | {"images_per_epoch": num_images, "classes": list(folder.class_names)}, ()
    atlas = build_atlas(
        seed=seed,
        max_characters=pretrain.max_characters,
        num_invented=pretrain.num_invented,
        hands_per_invented=pretrain.hands_per_invented,
        max_similarity=pretrain.max_similarity,
    )
    distortion = GlyphDistortion()
    glyphs = GlyphSource(atlas, distortion, pretrain.size_px, pretrain.images_per_epoch, seed)
    characters = [name for name in atlas.class_names if not name.startswith("invented-")]
    facts = {
        "name": GLYPHS,
        "glyphs": int((~atlas.is_validation).sum()),
        "held_out": int(atlas.is_validation.sum()),
        "images_per_epoch": pretrain.images_per_epoch,
        "characters": "".join(characters),
        "num_characters": len(characters),
        "num_invented": pretrain.num_invented,
        "distortion": asdict(distortion),
    }
    return glyphs, facts, GLYPH_NOTES


def _card(
    data: bytes,
    recipe: TrainingRecipe,
    source_facts: dict[str, Any],
    notes: tuple[str, ...],
    result: Pretrained,
    num_images: int,
    accuracy: float | None,
    size_px: int,
) -> dict[str, Any]:
    """All that a user of the weights has to know."""
    return {
        "format": CARD_FORMAT,
        "architecture": recipe.architecture,
        "sha256": sha256_bytes(data),
        "licence": LICENCE if source_facts["name"] == GLYPHS else None,
        "size_px": size_px,
        "crop_fraction": 1.0,
        "mean": [PIXEL_MEAN] * 3,
        "std": [PIXEL_STD] * 3,
        "labels": None,
        "recipe": asdict(recipe),
        "source": source_facts,
        "source_accuracy": accuracy,
        "num_images": num_images,
        "wall_s": round(result.wall_s, 1),
        "torch": torch.__version__.split("+")[0],
        "notes": list(notes),
    }
