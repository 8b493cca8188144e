"""backbone.json: what travels with pretrained weights. No torch, so that every stage may read it."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from deploy.files import write_json
from tasks.errors import BackboneError


@dataclass(frozen=True)
class BackboneCard:
    """Facts of a backbone, and the digests that later stages key their caches with.

    Args:
        source: ``backbone.source`` of params.yaml.
        architecture: A torchvision name, or ``timm:NAME``; with ``@MODULE`` where the trunk ends before its end.
        weights_sha256: Of weights.safetensors.
        licence: Of the weights; None where nobody said.
        size_px: Side of the square picture that the network sees.
        crop_fraction: Share of the short side that the central square keeps.
        mean: Per channel, of values in 0..1.
        std: Per channel, of values in 0..1.
        depths: Layer groups, from the last, whose pooled outputs make up the embedding.
        feature_dim: Width D of the embedding.
        labels: Classes of the classifier in weights.safetensors, in its order, where they are known.
        preprocessing_sha256: Of preprocess.onnx.
        trunk_sha256: Of trunk.onnx, which holds the weights; covers architecture, depths and size as well.
        notes: What a reader should know.
    """

    source: str
    architecture: str
    weights_sha256: str
    licence: str | None
    size_px: int
    crop_fraction: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    depths: int
    feature_dim: int
    labels: tuple[str, ...] | None
    preprocessing_sha256: str
    trunk_sha256: str
    notes: tuple[str, ...]


def write_card(path: Path, card: BackboneCard) -> None:
    """Writes backbone.json atomically; equal cards make equal bytes."""
    write_json(path, dataclasses.asdict(card))


def read_card(path: Path) -> BackboneCard:
    """Reads backbone.json.

    Raises:
        BackboneError: If it is missing, is no JSON, or lacks a fact.
    """
    remedy = "Run the stage fetch_backbone (dvc repro fetch_backbone)."
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BackboneError(f"{path} is missing: there is no backbone yet. {remedy}") from error
    except ValueError as error:
        raise BackboneError(f"{path} is no JSON: {error}. {remedy}") from error
    names = {field.name for field in dataclasses.fields(BackboneCard)}
    if not isinstance(facts, dict) or set(facts) != names:
        odd = sorted(names.symmetric_difference(facts if isinstance(facts, dict) else ()))
        raise BackboneError(
            f"{path} is no backbone card of this version: missing or unknown {', '.join(odd)}. {remedy}"
        )
    for name in ("mean", "std", "notes", "labels"):
        facts[name] = None if facts[name] is None else tuple(facts[name])
    return BackboneCard(**facts)
