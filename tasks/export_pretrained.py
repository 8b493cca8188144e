"""Recipe export_pretrained: a backbone with its own classifier and its own labels becomes a bundle, as it is.

No stage: nothing depends on it. What comes out answers, serves and verifies like any other bundle, without a step of
training. Its golden pictures are drawn, so that the same weights make the same bundle whatever lies in data/raw.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save

from deploy.bundle import BundleFacts, graph_metadata, write_bundle
from deploy.files import sha256_bytes
from deploy.images import decode_image
from deploy.runtime import open_session
from tasks.errors import BackboneError, ExportError
from tasks.export.compose import compose_with_own_classifier, cut_at_seam
from tasks.export.graph import exporter_of, set_metadata, to_bytes
from tasks.export.network import export_network
from tasks.export.parity import measure_parity
from tasks.export.preprocessing import preprocessing_graph
from tasks.fetch_backbone import chosen_weights
from tasks.models.own_classifier import own_classifier
from tasks.models.own_head import wrong_labels

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tasks.layout import Layout
    from tasks.models.weights import PretrainedWeights
    from tasks.params import BackboneParams, ExportOnnxParams

PICTURE_SIZES = ((320, 240), (240, 320), (224, 224), (500, 375))  # (W, H) of the drawn pictures, in turns
PATCH_PX = 40  # of one colour, before they are blended

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportPretrainedReport:
    """What was exported.

    Args:
        bundle: Its folder.
        bundle_digest: Of the bundle.
        architecture: A torchvision name.
        num_classes: Of the classifier.
        licence: Of the weights.
        exporter: Whose graph verified: ``dynamo`` or ``legacy``.
        max_probability_difference: From torch, the largest on the drawn pictures, whole and in halves.
        size_bytes: Of the whole graph.
    """

    bundle: str
    bundle_digest: str
    architecture: str
    num_classes: int
    licence: str | None
    exporter: str
    max_probability_difference: float
    size_bytes: int


def run(layout: Layout, *, backbone: BackboneParams, export_onnx: ExportOnnxParams) -> ExportPretrainedReport:
    """Writes data/pretrained/bundle.

    Raises:
        BackboneError: If the weights cannot be had, hold no classifier, or nobody says what its classes are called.
        ExportError: If no ONNX graph computes what the model computes.
    """
    weights = chosen_weights(backbone, layout.root)
    architecture = weights.architecture or ""
    model = own_classifier(architecture, weights.state, size_px=weights.size_px)
    labels = _labels(weights, model.num_classes)
    network = export_network(model, size_px=weights.size_px, opset=export_onnx.opset, outputs=("embedding", "logits"))
    preprocess = preprocessing_graph(
        size_px=weights.size_px,
        crop_fraction=weights.crop_fraction,
        mean=weights.mean,
        std=weights.std,
        opset=export_onnx.opset,
    )
    whole = compose_with_own_classifier(preprocess, network)
    facts = BundleFacts(
        labels,
        weights.size_px,
        weights.crop_fraction,
        weights.mean,
        weights.std,
        _lineage(backbone.source, weights, exporter_of(network)),
    )
    graphs = (whole, *cut_at_seam(whole))
    for graph in graphs:
        set_metadata(graph, graph_metadata(facts))
    whole_bytes, front, back = map(to_bytes, graphs)
    golden = [_drawn(number) for number in range(export_onnx.golden_images)]
    difference = _checked_parity(model, (whole_bytes, front, back), golden, export_onnx.max_probability_difference)
    bundle = write_bundle(
        layout.pretrained_bundle_dir, model=whole_bytes, front=front, back=back, facts=facts, golden=golden
    )
    return ExportPretrainedReport(
        bundle=layout.pretrained_bundle_dir.relative_to(layout.root).as_posix(),
        bundle_digest=bundle.digest,
        architecture=architecture,
        num_classes=len(labels),
        licence=weights.licence,
        exporter=exporter_of(network),
        max_probability_difference=float(f"{difference:.2g}"),
        size_bytes=bundle.size_bytes,
    )


def _labels(weights: PretrainedWeights, num_classes: int) -> tuple[str, ...]:
    """What the classes are called.

    Raises:
        BackboneError: If nobody says so, or of another number of classes.
    """
    if weights.labels is None:
        raise BackboneError(
            f"The weights have a classifier of {num_classes} classes and do not say what these are called. Set "
            "backbone.labels in params.yaml: imagenet1k for the usual thousand, or a text file with one label a line."
        )
    if len(weights.labels) != num_classes:
        raise wrong_labels(len(weights.labels), num_classes)
    return weights.labels


def _lineage(source: str, weights: PretrainedWeights, exporter: str) -> dict[str, object]:
    """Where the model comes from, as export_onnx tells it; no paths of a machine."""
    name = f"file:{source.rsplit('/', 1)[-1].removeprefix('file:')}" if source.startswith("file:") else source
    digest = sha256_bytes(save(weights.state))
    return {
        "architecture": weights.architecture,
        "backbone_sha256": digest,
        "backbone_source": name,
        "exporter": exporter,
        "kept_stages": [],
        "licence": weights.licence,
        "own_classifier": True,
        "weights_sha256": digest,
    }


def _checked_parity(
    model: torch.nn.Module, graphs: tuple[bytes, bytes, bytes], golden: list[bytes], limit: float
) -> float:
    """The largest difference of a probability from torch, over whole graph and halves.

    Raises:
        ExportError: If it is above the limit.
    """
    whole, front, back = (open_session(graph) for graph in graphs)

    def reference(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = front.run(["pixels"], {"images": np.ascontiguousarray(images)})[0]
        with torch.inference_mode():
            answers: NDArray[np.float32] = model(torch.from_numpy(pixels))[1].softmax(dim=1).numpy()
        return answers

    pictures = [decode_image(data) for data in golden]
    difference = measure_parity(pictures, reference, whole=whole, front=front, back=back).max_probability_difference
    logger.info("parity on %d drawn pictures: %.2g", len(pictures), difference)
    if difference > limit:
        raise ExportError(
            f"The exported graph is not the model: a probability differs by {difference:.2g} (at most {limit:.2g} is "
            "allowed: export_onnx.max_probability_difference). Try another opset; raise the limit only if you know why."
        )
    return difference


def _drawn(number: int) -> bytes:
    """A picture of blended patches of colour, PNG; the same one for the same number."""
    width, height = PICTURE_SIZES[number % len(PICTURE_SIZES)]
    patches = np.random.default_rng(number).integers(0, 256, (height // PATCH_PX, width // PATCH_PX, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC).save(data, "PNG")
    return data.getvalue()
