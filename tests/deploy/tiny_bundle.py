"""A real bundle that takes milliseconds: it tells pictures apart by their mean colour."""

import functools
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from deploy.bundle import Bundle, BundleFacts, write_bundle
from deploy.files import sha256_file, write_json
from tasks.export.preprocessing import preprocessing_graph

LABELS = ("blau", "grün", "rot no 1e-3")
COLOURS = {"rot no 1e-3": (210, 40, 30), "grün": (30, 190, 60), "blau": (20, 50, 220)}
SIZE_PX = 16
NO_MEAN, UNIT_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


@functools.cache
def colour_graphs(*, sharpness: float = 8.0, labels: tuple[str, ...] = LABELS) -> tuple[bytes, bytes, bytes]:
    """The whole graph and its halves."""
    front = preprocessing_graph(size_px=SIZE_PX, crop_fraction=0.9, mean=NO_MEAN, std=UNIT_STD, opset=20)
    colours = [COLOURS.get(label, (128, 128, 128)) for label in labels]
    weight = sharpness * np.array(colours, dtype=np.float32) / 255  # (C, 3)
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes_of_maps"], ["embedding"], keepdims=0),
        helper.make_node("Gemm", ["embedding", "weight", "bias"], ["logits"], transB=1),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    constants = {
        "axes_of_maps": np.array([2, 3]),
        "weight": weight,
        "bias": -(weight**2).sum(axis=1) / sharpness / 2,
    }
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, SIZE_PX, SIZE_PX])],
        [
            helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", len(labels)]),
            helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", 3]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    back = helper.make_model(graph, opset_imports=front.opset_import, ir_version=front.ir_version)
    whole = onnx.compose.merge_models(front, back, io_map=[("pixels", "pixels")])
    return whole.SerializeToString(), front.SerializeToString(), back.SerializeToString()


def colour_image(label: str, *, size: tuple[int, int] = (40, 30), seed: int = 0) -> np.ndarray:
    """A noisy picture (H, W, 3) of a class's colour; size is (W, H)."""
    noise = np.random.default_rng(seed).integers(-20, 20, (size[1], size[0], 3))
    return np.clip(np.array(COLOURS[label]) + noise, 0, 255).astype(np.uint8)


def encoded(image: np.ndarray, file_format: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, file_format)
    return data.getvalue()


def colour_facts(labels: tuple[str, ...] = LABELS, **lineage: object) -> BundleFacts:
    return BundleFacts(labels=labels, size_px=SIZE_PX, crop_fraction=0.9, mean=NO_MEAN, std=UNIT_STD, lineage=lineage)


def write_colour_bundle(
    directory: Path,
    *,
    sharpness: float = 8.0,
    labels: tuple[str, ...] = LABELS,
    int8: float | None = None,
    **lineage: object,
) -> Bundle:
    """Writes the bundle; with ``int8`` of another second half that answers, of that sharpness."""
    model, front, back = colour_graphs(sharpness=sharpness, labels=labels)
    return write_bundle(
        directory,
        model=model,
        front=front,
        back=back,
        facts=colour_facts(labels, **lineage),
        golden=[encoded(colour_image(label), "PNG" if label == "blau" else "JPEG") for label in labels],
        int8=None if int8 is None else colour_graphs(sharpness=int8, labels=labels)[2],
    )


def seal(directory: Path, **changes: object) -> None:
    """Changes bundle.json and makes every digest fit what lies there, as somebody who forges a bundle would."""
    index = json.loads((directory / "bundle.json").read_text()) | changes
    if "digests" not in changes:
        index["digests"] = {name: sha256_file(directory / name) for name in index["digests"]}
    content = {key: value for key, value in index.items() if key != "digest"}
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    write_json(directory / "bundle.json", content | {"digest": hashlib.sha256(text.encode()).hexdigest()})
