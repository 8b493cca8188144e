"""Workspaces with real picture files, a real manifest and a tiny real ONNX backbone: for caching and the probe."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploy.files import sha256_bytes, write_bytes
from tasks.data.manifest import Facts, Row, Split, rows_to_frame, write_manifest
from tasks.export.preprocessing import preprocessing_graph
from tasks.layout import Layout
from tasks.models.backbone_card import BackboneCard, write_card
from tasks.params import AugmentParams, FeaturesParams, TrainHeadParams, load_params

SIZE_PX = 16
GATE = load_params(Path(__file__).parents[2] / "params.yaml").gate
FEATURE_DIM = 24
AUGMENT = AugmentParams(hflip=False, min_area_fraction=0.5)
FEATURES = FeaturesParams(depths=1, views=2, engine="onnxruntime", batch_size=4, recheck=4)
TRAIN_HEAD = TrainHeadParams(
    method="probe",
    min_log10_c=-4,
    max_log10_c=2,
    num_c=7,
    folds=5,
    max_iterations=200,
    holdout_above=5000,
    logit_adjustment="auto",
)


def trunk_graph(*, scale: float = 1.0, seed: int = 0) -> onnx.ModelProto:
    """``pixels`` (N, 3, 16, 16) → averages over 4x4 cells → a random layer with ReLU → ``embedding`` (N, 24)."""
    weight = np.random.default_rng(seed).normal(size=(48, FEATURE_DIM)).astype(np.float32) * scale
    nodes = [
        helper.make_node("AveragePool", ["pixels"], ["cells"], kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["cells"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["sums"]),
        helper.make_node("Relu", ["sums"], ["embedding"]),
    ]
    graph = helper.make_graph(
        nodes,
        "trunk",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, SIZE_PX, SIZE_PX])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", FEATURE_DIM])],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def put_backbone(layout: Layout, trunk: onnx.ModelProto) -> BackboneCard:
    """Writes data/backbone as fetch_backbone would."""
    numbers = {"size_px": SIZE_PX, "crop_fraction": 0.875, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    preprocess = preprocessing_graph(**numbers, opset=20).SerializeToString()  # type: ignore[arg-type]
    write_bytes(layout.preprocess_onnx, preprocess)
    write_bytes(layout.trunk_onnx, trunk.SerializeToString())
    card = BackboneCard(
        source="test",
        architecture="tiny",
        weights_sha256="0" * 64,
        licence=None,
        **numbers,  # type: ignore[arg-type]
        depths=1,
        feature_dim=FEATURE_DIM,
        labels=None,
        preprocessing_sha256=sha256_bytes(preprocess),
        trunk_sha256=sha256_bytes(trunk.SerializeToString()),
        notes=(),
    )
    write_card(layout.backbone_card, card)
    return card


def draw(label: int, number: int) -> NDArray[np.uint8]:
    """A noisy picture whose bright quarter tells its class; its size varies."""
    random = np.random.default_rng([label, number])
    height, width = random.integers(18, 30, size=2)
    image = random.normal(90, 35, size=(height, width, 3))
    top, left = (label // 2) * (height // 2), (label % 2) * (width // 2)
    image[top : top + height // 2, left : left + width // 2, :] += 60
    return image.clip(0, 255).astype(np.uint8)


def put_images(layout: Layout, counts: Mapping[str, int], *, start: int = 0) -> None:
    """Writes PNG files ``raw/LABEL/NUMBER.png``, numbered from ``start``."""
    for label, name in enumerate(sorted(counts)):
        (layout.raw / name).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + counts[name]):
            Image.fromarray(draw(label, number)).save(layout.raw / name / f"{number:05d}.png")


def put_manifest(layout: Layout, *, labels: Mapping[str, str] | None = None) -> None:
    """Writes accepted.parquet of all files; every fifth number is val, the next one test.

    Args:
        layout: The workspace.
        labels: New labels of some paths, as if somebody had corrected them.
    """
    splits: dict[int, Split] = {3: "val", 4: "test"}
    rows = []
    for path in sorted(layout.raw.rglob("*.png")):
        name, data = path.relative_to(layout.raw).as_posix(), path.read_bytes()
        sha = sha256_bytes(data)
        facts = Facts(sha256=sha, size_bytes=len(data), group=sha)
        label = (labels or {}).get(name, path.parent.name)
        rows.append(Row(name, label, facts, splits.get(int(path.stem) % 5, "train"), official_split=False))
    write_manifest(layout.accepted, rows_to_frame(rows))


def make_workspace(root: Path, counts: Mapping[str, int]) -> Layout:
    """A workspace up to what cache_features reads."""
    layout = Layout(root)
    put_images(layout, counts)
    put_manifest(layout)
    put_backbone(layout, trunk_graph())
    return layout
