"""The repository for Triton: its configuration is one, and its graph answers as the predictor does."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from deploy.bundle import Bundle
from deploy.errors import BundleError
from deploy.predictor import Predictor
from deploy.triton_repository import write_triton_repository
from tests.deploy.tiny_bundle import LABELS, colour_image, write_colour_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_colour_bundle(tmp_path_factory.mktemp("triton") / "bundle")


def test_the_configuration_is_one_and_fits_the_graph(bundle: Bundle, tmp_path: Path) -> None:
    text_format = pytest.importorskip("google.protobuf.text_format")
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    model = write_triton_repository(tmp_path, bundle, name="colours", version=3)
    config = text_format.Parse((model / "config.pbtxt").read_text(), model_config.ModelConfig())
    session = ort.InferenceSession(str(model / "3" / "model.onnx"), providers=["CPUExecutionProvider"])
    assert (config.name, config.backend) == ("colours", "onnxruntime")
    ports = [(port.name, len(port.dims) + 1) for port in (*config.input, *config.output)]
    assert ports == [(port.name, len(port.shape)) for port in (*session.get_inputs(), *session.get_outputs())]
    assert [list(port.dims) for port in config.output] == [port.shape[1:] for port in session.get_outputs()]
    assert (model / config.output[0].label_filename).read_text().splitlines() == list(LABELS)


def test_its_graph_answers_as_the_predictor_does(bundle: Bundle, tmp_path: Path) -> None:
    model = write_triton_repository(tmp_path, bundle, name="colours", version=3)
    session = ort.InferenceSession(str(model / "3" / "model.onnx"), providers=["CPUExecutionProvider"])
    images = np.stack([colour_image(label) for label in LABELS])
    with Predictor(bundle, threads=1) as predictor:
        expected = predictor.predict(list(images)).probabilities
    np.testing.assert_allclose(session.run(["probabilities"], {"images": images})[0], expected, atol=1e-6)


def test_versions_lie_side_by_side_and_kserve_gets_its_manifest(bundle: Bundle, tmp_path: Path) -> None:
    for version in (3, 4):
        write_triton_repository(tmp_path, bundle, name="colours", version=version, storage_uri="s3://models/here")
    assert sorted(path.name for path in (tmp_path / "colours").iterdir()) == ["3", "4", "config.pbtxt", "labels.txt"]
    manifest = json.loads((tmp_path / "inference_service.json").read_text())
    assert manifest["kind"] == "InferenceService"
    assert manifest["spec"]["predictor"]["model"]["storageUri"] == "s3://models/here"


def test_what_triton_cannot_read_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    odd = dataclasses.replace(bundle, labels=("a\nb", "c", "d"))
    with pytest.raises(BundleError, match="span lines"):
        write_triton_repository(tmp_path, odd, name="colours", version=1)
    with pytest.raises(BundleError, match="takes it for a folder"):
        write_triton_repository(tmp_path, bundle, name="../colours", version=1)
    assert list(tmp_path.iterdir()) == []
