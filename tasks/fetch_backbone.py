"""Stage fetch_backbone: pretrained weights from anywhere become one folder that later stages use without torch.

data/backbone/ then holds weights.safetensors (torchvision's names, classifier kept if there is one), preprocess.onnx,
trunk.onnx (frozen, the weights inside) and backbone.json, the card that keys every cache.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deploy.files import sha256_bytes, write_bytes
from tasks.errors import BackboneError
from tasks.models.backbone_card import BackboneCard, write_card

if TYPE_CHECKING:
    from pathlib import Path

    from tasks.layout import Layout
    from tasks.models.architectures import Network
    from tasks.models.weights import PretrainedWeights
    from tasks.params import BackboneParams, ExportOnnxParams, FeaturesParams

logger = logging.getLogger(__name__)

OVERRIDES = ("licence", "size_px", "crop_fraction", "mean", "std")


@dataclass(frozen=True)
class FetchBackboneReport:
    """What was fetched.

    Args:
        source: ``backbone.source``.
        architecture: A torchvision name or ``timm:NAME``.
        licence: Of the weights.
        num_parameters: Of the trunk, without a classifier.
        size_px: Side of the picture that the network sees.
        depths: Layer groups that the embedding pools.
        feature_dim: Width of the embedding.
        exporter: Whose graph verified: ``dynamo`` or ``legacy``.
        largest_difference: Of an embedding's value between torch and onnxruntime, over batches of 1, 2 and 7.
        weights_sha256: Of weights.safetensors.
        trunk_sha256: Of trunk.onnx.
    """

    source: str
    architecture: str
    licence: str | None
    num_parameters: int
    size_px: int
    depths: int
    feature_dim: int
    exporter: str
    largest_difference: float
    weights_sha256: str
    trunk_sha256: str


def run(
    layout: Layout, *, backbone: BackboneParams, features: FeaturesParams, export_onnx: ExportOnnxParams
) -> FetchBackboneReport:
    """Writes data/backbone/.

    Raises:
        BackboneError: If the weights cannot be had, are not the ones asked for, or do not fit their architecture.
        ExportError: If no ONNX graph computes what the network computes.
    """
    from safetensors.torch import save

    from tasks.export.graph import exporter_of, to_bytes
    from tasks.export.network import export_network, verify_network
    from tasks.export.preprocessing import preprocessing_graph

    weights = chosen_weights(backbone, layout.root)
    network = _network(weights, features.depths)
    facts = {key: getattr(weights, key) for key in ("size_px", "crop_fraction", "mean", "std")}
    preprocess = to_bytes(preprocessing_graph(**facts, opset=export_onnx.opset))
    trunk_model = export_network(network, size_px=weights.size_px, opset=export_onnx.opset)
    trunk, saved = to_bytes(trunk_model), save(weights.state)
    card = _card(backbone.source, weights, network, sha256s=[sha256_bytes(data) for data in (saved, preprocess, trunk)])
    shutil.rmtree(layout.backbone_dir, ignore_errors=True)
    write_bytes(layout.backbone_weights, saved)
    write_bytes(layout.preprocess_onnx, preprocess)
    write_bytes(layout.trunk_onnx, trunk)
    write_card(layout.backbone_card, card)  # last: where the card is, the rest is
    logger.info("%s: %s, %d features of %d depths", card.source, card.architecture, card.feature_dim, card.depths)
    for note in card.notes:
        logger.info("%s", note)
    return FetchBackboneReport(
        source=card.source,
        architecture=card.architecture,
        licence=card.licence,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        size_px=card.size_px,
        depths=card.depths,
        feature_dim=card.feature_dim,
        exporter=exporter_of(trunk_model),
        largest_difference=float(f"{verify_network(trunk_model, network, size_px=card.size_px):.2g}"),
        weights_sha256=card.weights_sha256,
        trunk_sha256=card.trunk_sha256,
    )


def chosen_weights(backbone: BackboneParams, root: Path) -> PretrainedWeights:
    """The weights that params.yaml names, with their own facts except where it says otherwise.

    Raises:
        BackboneError: If they cannot be had, or what is said of them cannot be.
    """
    from tasks.models.weights import read_labels, read_weights

    weights = _overridden(read_weights(backbone.source, root=root, sha256=backbone.sha256), backbone)
    if backbone.labels is None:
        return weights
    return dataclasses.replace(weights, labels=read_labels(backbone.labels, root=root))


def _overridden(weights: PretrainedWeights, backbone: BackboneParams) -> PretrainedWeights:
    """The weights' own facts, except where params.yaml says otherwise.

    Raises:
        BackboneError: If nobody names the architecture, two sources disagree on it, or a number cannot be.
    """
    given, known = backbone.architecture, weights.architecture
    if given is None and known is None:
        raise BackboneError(
            f"backbone.architecture is missing: {backbone.source} does not say what it is the weights of. "
            "Name a torchvision architecture, such as mobilenet_v2 (params.yaml)."
        )
    if given is not None and known is not None and given != known:
        raise BackboneError(
            f"backbone.architecture is {given}, but {backbone.source} is {known}. Set backbone.architecture to null."
        )
    values: dict[str, Any] = {
        name: getattr(backbone, name) for name in OVERRIDES if getattr(backbone, name) is not None
    }
    result = dataclasses.replace(weights, architecture=known or given, **values)
    mistakes = [f"backbone.std holds {value}, which is not above 0" for value in result.std if not value > 0]
    mistakes += [f"backbone.mean holds {value}, which is not in 0..1" for value in result.mean if not 0 <= value <= 1]
    if mistakes:
        raise BackboneError(f"{'; '.join(mistakes)}. They are of values in 0..1.")
    return result


def _network(weights: PretrainedWeights, depths: int) -> Network:
    """The architecture with the weights in it.

    Raises:
        BackboneError: If they do not fit, or the architecture takes pictures of another size.
    """
    from tasks.models.architectures import build_network

    network = build_network(weights.architecture or "", depths=depths)
    network.load_trunk(weights.state)
    if network.image_size not in (None, weights.size_px):
        raise BackboneError(
            f"{weights.architecture} with these weights takes pictures of {network.image_size} px only; "
            f"backbone.size_px is {weights.size_px}. Set it to {network.image_size} or null."
        )
    if network.depths < depths:
        logger.warning("features.depths is %d; %s has %d to pool", depths, weights.architecture, network.depths)
    return network


def _card(source: str, weights: PretrainedWeights, network: Network, *, sha256s: list[str]) -> BackboneCard:
    """The card; ``sha256s`` are of weights, preprocessing and trunk."""
    weights_sha256, preprocessing_sha256, trunk_sha256 = sha256s
    return BackboneCard(
        source=source,
        architecture=weights.architecture or "",
        weights_sha256=weights_sha256,
        licence=weights.licence,
        size_px=weights.size_px,
        crop_fraction=weights.crop_fraction,
        mean=weights.mean,
        std=weights.std,
        depths=network.depths,
        feature_dim=network.feature_dim,
        labels=weights.labels,
        preprocessing_sha256=preprocessing_sha256,
        trunk_sha256=trunk_sha256,
        notes=(*weights.notes, *network.notes),
    )
