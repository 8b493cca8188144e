"""A small real workspace up to evaluate: digits on disk, stored features, a fitted probe, a bundle. No torch."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from sklearn.datasets import load_digits

from deploy.bundle import Bundle, BundleFacts, write_bundle
from deploy.files import sha256_bytes, sha256_file, write_bytes, write_json
from tasks import cache_features, train_head
from tasks.data.manifest import Facts, Row, read_manifest, rows_to_frame, write_manifest
from tasks.data.splits import Split
from tasks.export.preprocessing import preprocessing_graph
from tasks.layout import Layout
from tasks.models.backbone_card import BackboneCard, write_card
from tasks.models.head import Head, read_head
from tasks.params import Params

SIZE_PX = 16
FEATURE_DIM = 3 * 8 * 8
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
NAMES = ("null", "1e-3", "zwei 2", "Drei|3", "no", "fünf", "$six$", "七", '<b>&"8"', "neun")  # of the digits 0 to 9


def build_workspace(layout: Layout, params: Params, *, num_images: int = 500) -> Bundle:
    write_digits(layout, num_images)
    write_backbone(layout)
    cache_features.run(layout, features=params.features, augment=params.augment)
    train_head.run(
        layout,
        seed=params.seed,
        augment=params.augment,
        features=params.features,
        train_head=params.train_head,
        gate=params.gate,
    )
    write_json(layout.finetuned_dir / "finetuned.json", {"kept": [], "reason": "only 60 val images", "stages": []})
    return write_head_bundle(layout, read_head(layout.head_dir))


def write_digits(layout: Layout, num_images: int) -> None:
    """Real handwritten digits under odd names; a fifth for val, a third for test."""
    digits = load_digits()
    rows = []
    for number, (grey, digit) in enumerate(zip(digits.images[:num_images], digits.target, strict=False)):
        path = layout.raw / NAMES[digit] / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((grey / 16 * 255).round().astype(np.uint8)).save(path)
        data = path.read_bytes()
        split: Split = "val" if number % 5 == 0 else "test" if number % 3 == 0 else "train"
        brightness = float(grey.mean() / 16 * 255)
        facts = Facts(sha256_bytes(data), len(data), 8, 8, "L", "PNG", 1, 1, brightness=brightness, group=f"{number}")
        rows.append(Row(path.relative_to(layout.raw).as_posix(), NAMES[digit], facts, split, False))
    write_manifest(layout.accepted, rows_to_frame(rows))


def write_backbone(layout: Layout) -> None:
    """A backbone that only pools: pixels (N, 3, 16, 16) → embedding (N, 192)."""
    front = preprocessing_graph(size_px=SIZE_PX, crop_fraction=1.0, mean=MEAN, std=STD, opset=20)
    write_bytes(layout.preprocess_onnx, front.SerializeToString())
    write_bytes(layout.trunk_onnx, _model([], [("embedding", FEATURE_DIM)], {}).SerializeToString())
    card = BackboneCard(
        source="file:pool",
        architecture="pool",
        weights_sha256="0" * 64,
        licence=None,
        size_px=SIZE_PX,
        crop_fraction=1.0,
        mean=MEAN,
        std=STD,
        depths=1,
        feature_dim=FEATURE_DIM,
        labels=None,
        preprocessing_sha256=sha256_file(layout.preprocess_onnx),
        trunk_sha256=sha256_file(layout.trunk_onnx),
        notes=("it is cut by the generic rule",),
    )
    write_card(layout.backbone_card, card)


def write_head_bundle(layout: Layout, head: Head) -> Bundle:
    front = onnx.load(layout.preprocess_onnx)
    nodes = [
        helper.make_node("Gemm", ["embedding", "weight", "bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    outputs = [("probabilities", len(head.labels)), ("embedding", FEATURE_DIM)]
    back = _model(nodes, outputs, {"weight": head.weight, "bias": head.bias})
    whole = onnx.compose.merge_models(front, back, io_map=[("pixels", "pixels")])
    images = read_manifest(layout.accepted)
    golden = [(layout.raw / path).read_bytes() for path in images.loc[images["split"] == "test", "path"][:4]]
    facts = BundleFacts(head.labels, SIZE_PX, 1.0, MEAN, STD, {"data": sha256_file(layout.accepted)})
    graphs = [model.SerializeToString() for model in (whole, front, back)]
    return write_bundle(layout.bundle_dir, model=graphs[0], front=graphs[1], back=graphs[2], facts=facts, golden=golden)


def _model(
    nodes: list[onnx.NodeProto], outputs: list[tuple[str, int]], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    trunk = [
        helper.make_node("AveragePool", ["pixels"], ["pooled"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node("Flatten", ["pooled"], ["embedding"]),
    ]
    graph = helper.make_graph(
        [*trunk, *nodes],
        "pool",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, SIZE_PX, SIZE_PX])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 20)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
