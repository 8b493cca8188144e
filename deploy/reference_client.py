"""Classifies pictures with a bundle, in numpy, Pillow and onnxruntime alone: to be copied where there is no tanuki.

    python reference_client.py BUNDLE FILE...

The whole graph, in fp32, crops, resizes and normalises; outside it there is only this decoding. A test holds both to
deploy's predictor.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # works only before the import
import numpy as np
import onnxruntime as ort
from PIL import Image, ImageOps


def upright_rgb(path: Path) -> np.ndarray:
    """The first frame, turned by its EXIF orientation, on white where it is transparent: uint8 (H, W, 3)."""
    with Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits a sample, or floats: scaled to 8
            grey = np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0)
            steps = [65535.0] if "16" in image.mode else [1.0] * (image.mode == "F") + [255.0, 65535.0, grey.max()]
            scale = next(step for step in steps if grey.max() <= step)
            return np.repeat(np.rint(np.clip(grey / scale, 0, 1) * 255).astype(np.uint8)[:, :, None], 3, axis=2)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(image.convert("RGB"))


def main(bundle: Path, files: list[Path]) -> None:
    """Prints the label and the probability of each file."""
    labels = json.loads((bundle / "bundle.json").read_bytes())["labels"]
    session = ort.InferenceSession(bundle / "model.onnx", providers=["CPUExecutionProvider"])
    for file in files:
        (probabilities,) = session.run(["probabilities"], {"images": upright_rgb(file)[None]})[0]
        print(f"{file}\t{labels[probabilities.argmax()]}\t{probabilities.max():.6f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
