"""Bundles of past format versions, written as the code of their day wrote them: never changed again.

A writer spells its bundle.json out and calls nothing of deploy/, so that a change there cannot change what it writes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from tests.deploy.tiny_bundle import LABELS, SIZE_PX, colour_graphs, colour_image, encoded

# What the colour bundle answers for its picture of "blau", as version 1 wrote it down.
PROBABILITIES = [0.9308584928512573, 0.05817961320281029, 0.010961855761706829]
EMBEDDING = [0.07813967764377594, 0.1977454125881195, 0.8613867163658142]


def write_version_1(directory: Path) -> None:
    """November 2026: three graphs, golden answers, labels, signature, preprocessing, lineage and digests."""
    golden = [{"file": "image-00.png", "probabilities": PROBABILITIES, "embedding": EMBEDDING}]
    files = {
        **dict(zip(("model.onnx", "front.onnx", "back.onnx"), colour_graphs(), strict=True)),
        "golden/image-00.png": encoded(colour_image("blau")),
        "golden/golden.json": (json.dumps(golden, indent=2) + "\n").encode(),
    }
    index = {
        "format_version": 1,
        "labels": list(LABELS),
        "signature": {
            "inputs": [{"name": "images", "dtype": "uint8", "shape": ["batch", "height", "width", 3]}],
            "seam": {"name": "pixels", "dtype": "float32", "shape": ["batch", 3, SIZE_PX, SIZE_PX]},
            "outputs": [
                {"name": "probabilities", "dtype": "float32", "shape": ["batch", 3]},
                {"name": "embedding", "dtype": "float32", "shape": ["batch", 3]},
            ],
        },
        "preprocessing": {
            "size_px": SIZE_PX,
            "crop_fraction": 0.9,
            "mean": [0.0, 0.0, 0.0],
            "std": [1.0, 1.0, 1.0],
            "words": "The picture, decoded to RGB and turned upright by its EXIF orientation, enters as uint8.",
        },
        "lineage": {"architecture": "colours", "licence": None},
        "digests": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    seal = hashlib.sha256(json.dumps(index, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
    files["bundle.json"] = json.dumps({**index, "digest": seal}, indent=2, sort_keys=True, ensure_ascii=False).encode()
    for name, data in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


WRITERS: Mapping[int, Callable[[Path], None]] = {1: write_version_1}
