"""Stage export_onnx: what was trained becomes one self-contained ONNX graph, and a bundle that proves itself.

Where fine-tuning kept nothing, the frozen trunk of fetch_backbone is joined with the probe, and no torch is imported.
Where it kept a stage, the tuned network is exported anew. Either way the graph and its halves are compared with what
was trained, on real pictures, before anything is written.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from deploy.bundle import BundleFacts, graph_metadata, write_bundle
from deploy.files import sha256_bytes, sha256_file
from deploy.images import decode_image
from deploy.predictor import BATCH_SIZE
from deploy.runtime import open_session
from tasks.data.image_store import ImageStore, open_images
from tasks.data.manifest import read_manifest
from tasks.errors import BackboneError, DataError, ExportError
from tasks.evaluation.paired import images_by_rule_of_three
from tasks.export.compose import compose, cut_at_seam
from tasks.export.graph import exporter_of, read_graph, set_metadata, to_bytes
from tasks.export.parity import Parity, measure_parity
from tasks.models.backbone_card import BackboneCard, read_card
from tasks.models.head import Head, read_head

if TYPE_CHECKING:
    import onnx
    import pandas as pd
    from numpy.typing import NDArray

    from tasks.export.parity import Reference
    from tasks.export.quantisation import Comparison
    from tasks.layout import Layout
    from tasks.params import ExportOnnxParams

logger = logging.getLogger(__name__)

FINETUNED_FACTS = "finetuned.json"
FINETUNED_NETWORK = "network.safetensors"
LARGE_PICTURE_BYTES = 1 << 20  # golden pictures are copied into every version; smaller ones go first


@dataclass(frozen=True)
class ExportReport:
    """What was exported.

    Args:
        path: ``head`` (frozen trunk and probe) or ``finetuned``.
        kept: Stages of fine-tuning that are in it.
        opset: Of the ONNX operators.
        exporter: Whose graph of the network verified: ``dynamo`` or ``legacy``.
        num_classes: Width of the probabilities.
        num_parity_images: Pictures that were compared with what was trained, at batches of 1, 2 and 7.
        num_parity_sizes: Sizes that they had.
        max_probability_difference: The largest seen.
        top1_agreement: Share of the comparisons with the same class.
        size_bytes: Of the whole graph.
        model_sha256: Of the whole graph.
        bundle_digest: Of the bundle.
        int8: What became of an int8 variant; None where none was asked for.
    """

    path: str
    kept: tuple[str, ...]
    opset: int
    exporter: str
    num_classes: int
    num_parity_images: int
    num_parity_sizes: int
    max_probability_difference: float
    top1_agreement: float
    size_bytes: int
    model_sha256: str
    bundle_digest: str
    int8: Int8Report | None


@dataclass(frozen=True)
class Int8Report:
    """What became of the int8 variant. How much faster it is, is logged: a time, so no part of a report.

    Args:
        chosen: Whether the bundle answers in int8.
        reason: Why, or why not.
        num_val: Validation images that it was compared on.
        first_layer: In which precision the first convolution is; of two variants, that of the one told of here.
        accuracy_fp32: Share that fp32 gets right; None where nothing was compared.
        accuracy_int8: Share that int8 gets right.
        agreement: Share with the same class.
        lower_bound: One-sided, of int8's accuracy less that of fp32, picture by picture.
        calibration: sha256 of each training image that the ranges were taken from.
    """

    chosen: bool
    reason: str
    num_val: int
    first_layer: str | None = None
    accuracy_fp32: float | None = None
    accuracy_int8: float | None = None
    agreement: float | None = None
    lower_bound: float | None = None
    calibration: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Trained:
    """A trained classifier: its network as a graph, its head, and what it answers."""

    kept: tuple[str, ...]
    network: onnx.ModelProto
    head: Head
    reference: Reference
    weights_sha256: str


def run(layout: Layout, *, export_onnx: ExportOnnxParams) -> ExportReport:
    """Writes data/bundle/.

    Raises:
        ExportError: If the graph is further from what was trained than params.yaml allows, or parts do not fit.
        DataError: If a picture that is needed has gone or changed since it was indexed.
        BackboneError: If the backbone is missing or damaged.
        StoreError: If the head is missing or damaged.
    """
    card = read_card(layout.backbone_card)
    kept = _kept(layout)
    trained = _finetuned(layout, card, kept, export_onnx.opset) if kept else _head_only(layout, card)
    whole = compose(read_graph(layout.preprocess_onnx), trained.network, trained.head.weight, trained.head.bias)
    images = read_manifest(layout.accepted)
    lineage = _lineage(layout, card, trained, images)
    facts = BundleFacts(trained.head.labels, card.size_px, card.crop_fraction, card.mean, card.std, lineage)
    graphs = (whole, *cut_at_seam(whole))
    for graph in graphs:
        set_metadata(graph, graph_metadata(facts))
    model, front, back = map(to_bytes, graphs)
    parity = _checked_parity(layout, images, trained, (model, front, back), export_onnx)
    store = open_images(layout.raw)
    golden = [_read_image(store, row) for row in _golden_rows(images, export_onnx.golden_images)]
    int8, int8_report = None, None
    if export_onnx.int8 == "auto":
        int8, int8_report = _int8(store, images, facts, front, graphs[2], export_onnx)
    bundle = write_bundle(layout.bundle_dir, model=model, front=front, back=back, facts=facts, golden=golden, int8=int8)
    return ExportReport(
        path="finetuned" if kept else "head",
        kept=kept,
        opset=export_onnx.opset,
        exporter=exporter_of(trained.network),
        num_classes=len(trained.head.labels),
        num_parity_images=parity.num_images,
        num_parity_sizes=parity.num_sizes,
        max_probability_difference=float(f"{parity.max_probability_difference:.2g}"),
        top1_agreement=parity.top1_agreement,
        size_bytes=len(model),
        model_sha256=sha256_bytes(model),
        bundle_digest=bundle.digest,
        int8=int8_report,
    )


def _kept(layout: Layout) -> tuple[str, ...]:
    """The stages of fine-tuning that were kept."""
    path = layout.finetuned_dir / FINETUNED_FACTS
    try:
        return tuple(json.loads(path.read_text(encoding="utf-8"))["kept"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} cannot be read ({error}). Run the stage finetune (dvc repro finetune).") from error


def _head_only(layout: Layout, card: BackboneCard) -> _Trained:
    """The frozen trunk and the probe; the reference runs the files that cached the features, and numpy."""
    head = read_head(layout.head_dir)
    preprocess, trunk = open_session(layout.preprocess_onnx), open_session(layout.trunk_onnx)

    def reference(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = preprocess.run(["pixels"], {"images": np.ascontiguousarray(images)})[0]
        return head.probabilities(trunk.run(["embedding"], {"pixels": pixels})[0])

    return _Trained((), read_graph(layout.trunk_onnx), head, reference, card.weights_sha256)


def _finetuned(layout: Layout, card: BackboneCard, kept: tuple[str, ...], opset: int) -> _Trained:
    """The tuned network and its head; the reference is torch."""
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from tasks.export.network import export_network
    from tasks.models.architectures import build_network

    path = layout.finetuned_dir / FINETUNED_NETWORK
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"{path} cannot be read ({error}). Run the stage finetune (dvc repro finetune).") from error
    network = build_network(card.architecture, depths=card.depths)
    network.load_trunk(state)
    head = read_head(layout.finetuned_dir)
    preprocess = open_session(layout.preprocess_onnx)

    def reference(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = preprocess.run(["pixels"], {"images": np.ascontiguousarray(images)})[0]
        with torch.inference_mode():
            return head.probabilities(network(torch.from_numpy(pixels)).numpy())

    graph = export_network(network, size_px=card.size_px, opset=opset)
    return _Trained(kept, graph, head, reference, sha256_file(path))


def _lineage(layout: Layout, card: BackboneCard, trained: _Trained, images: pd.DataFrame) -> dict[str, Any]:
    """Where the model comes from; no times, no paths of a machine."""
    is_file = card.source.startswith("file:")
    return {
        "architecture": card.architecture,
        "backbone_source": f"file:{card.source.rsplit('/', 1)[-1].removeprefix('file:')}" if is_file else card.source,
        "backbone_sha256": card.weights_sha256,
        "class_map_version": _class_map_version(images),
        "depths": card.depths,
        "exporter": exporter_of(trained.network),
        "kept_stages": list(trained.kept),
        "licence": card.licence,
        "manifest_sha256": sha256_file(layout.accepted),
        "weights_sha256": trained.weights_sha256,
    }


def _class_map_version(images: pd.DataFrame) -> str:
    """Identity of the classes' numbers: models of one version give a label the same number."""
    numbered = images[["class_id", "label"]].drop_duplicates().sort_values("label")
    return sha256_bytes(numbered.to_csv(index=False).encode())


def _checked_parity(
    layout: Layout,
    images: pd.DataFrame,
    trained: _Trained,
    graphs: tuple[bytes, bytes, bytes],
    export_onnx: ExportOnnxParams,
) -> Parity:
    """Compares the graphs with what was trained.

    Raises:
        ExportError: If they are too far apart.
    """
    rows = _spread(images, export_onnx.parity_images)
    store = open_images(layout.raw)
    pictures = [decode_image(_read_image(store, row)) for row in rows]
    whole, front, back = (open_session(graph) for graph in graphs)
    parity = measure_parity(pictures, trained.reference, whole=whole, front=front, back=back)
    difference, agreement = parity.max_probability_difference, parity.top1_agreement
    logger.info("parity on %d images: %.2g, top-1 %.4f", parity.num_images, difference, agreement)
    limit, least = export_onnx.max_probability_difference, export_onnx.min_top1_agreement
    if difference > limit or agreement < least:
        raise ExportError(
            f"The exported graph is not what was trained: a probability differs by {difference:.2g} (at most "
            f"{limit:.2g} is allowed: export_onnx.max_probability_difference), {agreement:.2%} of the answers name the "
            f"same class (at least {least:.2%}: export_onnx.min_top1_agreement). The worst picture is "
            f"{rows[parity.worst_image]['path']}. Try another opset; raise a limit only if you know why."
        )
    return parity


def _int8(
    store: ImageStore,
    images: pd.DataFrame,
    facts: BundleFacts,
    front: bytes,
    back: onnx.ModelProto,
    export_onnx: ExportOnnxParams,
) -> tuple[bytes | None, Int8Report]:
    """The half after the seam in int8, or None where fp32 stays, and why."""
    val = images[(images["split"] == "val") & images["label"].isin(facts.labels)]
    max_loss, confidence = export_onnx.int8_max_accuracy_loss, export_onnx.int8_confidence
    needed = images_by_rule_of_three(max_loss, confidence)
    if len(val) < needed:
        why = f"{len(val)} validation images cannot exclude a loss of {max_loss} (int8_max_accuracy_loss); {needed} may"
        return None, Int8Report(False, why, len(val))
    from tasks.export.quantisation import compare, quantised, speedup

    session = open_session(front)

    def pixels(row: dict[str, Any]) -> NDArray[np.float32]:
        image = decode_image(_read_image(store, row))
        found: NDArray[np.float32] = session.run(["pixels"], {"images": image[None]})[0]
        return found

    calibration = _by_class_in_turns(images[images["split"] == "train"], export_onnx.int8_calibration_images)
    seen = [pixels(row) for row in calibration]
    try:
        graphs = [quantised(back, seen, first_in_float=first_in_float) for first_in_float in (False, True)]
    except ExportError as error:
        return None, Int8Report(False, str(error), len(val))
    for graph in graphs:
        set_metadata(graph, graph_metadata(facts))
    variants = [to_bytes(graph) for graph in graphs]
    fp32, *sessions = (open_session(each) for each in (to_bytes(back), *variants))
    truth = np.array([facts.labels.index(label) for label in val["label"]], np.int64)
    found = compare(fp32, sessions, map(pixels, _records(val)), truth, confidence=confidence)
    speedups = [speedup(fp32, session, np.concatenate(seen[:BATCH_SIZE])) for session in sessions]
    logger.info("int8 on %d validation images: %s; %s times as fast", len(val), found, np.round(speedups, 2).tolist())
    why_not = [_why_not_int8(each, ratio, export_onnx) for each, ratio in zip(found, speedups, strict=True)]
    # The first that passes; where none does, the more accurate one is told of.
    best = why_not.index(None) if None in why_not else int(np.argmax([each.lower_bound for each in found]))
    report = Int8Report(
        chosen=why_not[best] is None,
        reason=why_not[best] or "it keeps to the limits of accuracy and speed on this processor",
        num_val=len(val),
        first_layer=("int8", "fp32")[best],
        **asdict(found[best]),
        calibration=tuple(row["sha256"] for row in calibration),
    )
    return variants[best] if report.chosen else None, report


def _why_not_int8(found: Comparison, ratio: float, export_onnx: ExportOnnxParams) -> str | None:
    """Which limits an int8 variant breaks, None where it keeps to them; of accuracy as the gate's, with a margin."""
    max_loss, min_speedup = export_onnx.int8_max_accuracy_loss, export_onnx.int8_min_speedup
    mistakes = []
    if found.lower_bound <= -max_loss:
        mistakes.append(
            f"it may lose more than {max_loss} of accuracy (lower bound {found.lower_bound:+.3f} at confidence "
            f"{export_onnx.int8_confidence:.0%}; export_onnx.int8_max_accuracy_loss)"
        )
    if ratio < min_speedup:
        mistakes.append(f"it is not {min_speedup} times as fast on this processor (export_onnx.int8_min_speedup)")
    return " and ".join(mistakes) or None


def _spread(images: pd.DataFrame, count: int) -> list[dict[str, Any]]:
    """Pictures for the comparison: test pictures before others, each size by turns, then by content hash."""
    ordered = images.assign(is_other=images["split"] != "test").sort_values(["is_other", "sha256"], kind="stable")
    turn = ordered.groupby(["is_other", "height", "width"]).cumcount()
    rows = ordered.assign(turn=turn).sort_values(["is_other", "turn", "sha256"], kind="stable")
    return _records(rows.head(count))


def _golden_rows(images: pd.DataFrame, count: int) -> list[dict[str, Any]]:
    """Test pictures (others where there are none) from every class by turns, small files first, then by hash."""
    test = images[images["split"] == "test"]
    return _by_class_in_turns(test if len(test) else images, count)


def _by_class_in_turns(rows: pd.DataFrame, count: int) -> list[dict[str, Any]]:
    """Some pictures from every class by turns, small files first, then by hash: a draw fixed by content."""
    rows = rows.assign(is_large=rows["size_bytes"] > LARGE_PICTURE_BYTES).sort_values(
        ["is_large", "sha256"], kind="stable"
    )
    rows = rows.assign(turn=rows.groupby("label").cumcount()).sort_values(["turn", "label"], kind="stable")
    return _records(rows.head(count))


def _records(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in rows[["path", "sha256"]].to_dict("records")]


def _read_image(images: ImageStore, row: dict[str, Any]) -> bytes:
    """The bytes of a picture as they were indexed.

    Raises:
        DataError: If it has gone or changed.
    """
    path = images.file(row["path"])
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}). Run `dvc checkout`, or retrain.") from error
    if sha256_bytes(data) != row["sha256"]:
        raise DataError(f"{path} changed since it was indexed. Run `dvc checkout`, or `tanuki add` and retrain.")
    return data
