"""The reference client, which imports nothing of ours, decodes and answers as the predictor does."""

import ast
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.errors import ImageError
from deploy.images import decode_image
from deploy.predictor import Predictor
from deploy.reference_client import upright_rgb
from tests.deploy.tiny_bundle import LABELS, colour_image, write_colour_bundle

SCENE = np.concatenate([colour_image("blau", size=(24, 12)), colour_image("rot no 1e-3", size=(24, 8))])


def test_it_is_forty_lines_that_import_nothing_of_ours(repository: Path) -> None:
    text = (repository / "deploy" / "reference_client.py").read_text()
    tree = ast.parse(text)
    names = {
        alias.name if isinstance(node, ast.Import) else node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names <= {"json", "os", "sys", "pathlib", "numpy", "onnxruntime", "PIL"}
    documentation = len((ast.get_docstring(tree) or "").splitlines()) + 1
    assert len([line for line in text.splitlines() if line]) - documentation <= 40


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["jpeg", "png", "tiff", "webp"])
def test_it_turns_pictures_upright_as_the_predictor_does(tmp_path: Path, orientation: int, file_format: str) -> None:
    path = tmp_path / f"picture.{file_format}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(SCENE).save(path, exif=exif)
    found = upright_rgb(path)
    np.testing.assert_array_equal(found, decode_image(path.read_bytes()))
    assert found.shape == ((24, 20, 3) if orientation >= 5 else (20, 24, 3))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"])
def test_it_reads_every_mode_as_the_predictor_does(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "picture.tiff"
    ramp = np.linspace(0, 60_000, 24 * 20).reshape(20, 24)
    raw = {"I": ramp.astype(np.int32), "I;16": ramp.astype(np.uint16), "F": (ramp / 60_000).astype(np.float32)}
    image = Image.fromarray(raw[mode]) if mode in raw else Image.fromarray(SCENE).convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    assert image.mode == mode
    image.save(path)
    np.testing.assert_array_equal(upright_rgb(path), decode_image(path.read_bytes()))


def test_it_reads_awkward_files_as_the_predictor_does(material: Path) -> None:
    """Of those that the predictor answers at all: it refuses damage that Pillow lets pass."""
    compared = 0
    for path in sorted((material / "dirt_pack").iterdir()):
        try:
            expected = decode_image(path.read_bytes())
        except ImageError:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(upright_rgb(path), expected, err_msg=path.name)
        compared += 1
    assert compared > 15


def test_copied_elsewhere_it_answers_as_the_predictor_does(tmp_path: Path, repository: Path) -> None:
    bundle = write_colour_bundle(tmp_path / "bundle")
    files = [tmp_path / f"{number}.png" for number in range(6)]
    for number, file in enumerate(files):
        Image.fromarray(colour_image(LABELS[number % 3], size=(30 + 5 * number, 41), seed=number)).save(file)
    client = shutil.copy(repository / "deploy" / "reference_client.py", tmp_path / "client.py")
    command = [sys.executable, "-I", client, bundle.directory, *files]
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    with Predictor(bundle) as predictor:
        answers = predictor.predict_files(files)
    for line, answer in zip(told.splitlines(), answers, strict=True):
        source, label, probability = line.split("\t")
        assert (source, label) == (answer.source, answer.label)
        assert float(probability) == pytest.approx(answer.probability, abs=1e-5)
