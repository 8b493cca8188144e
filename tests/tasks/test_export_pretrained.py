"""A pretrained model as it is: its own classifier and labels, as a bundle that answers as torchvision's model does."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from deploy.bundle import verify_bundle
from deploy.predictor import Predictor
from tasks import export_pretrained
from tasks.errors import BackboneError
from tasks.layout import Layout
from tasks.models.own_classifier import own_classifier
from tasks.params import Params, load_params

SIZE_PX = 64
LABELS = ("kite", "owl", "wren", "1e-3", "no")


@pytest.fixture(scope="module")
def params(repository: Path) -> Params:
    return load_params(repository / "params.yaml")


def model_of(architecture: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(architecture, weights=None, num_classes=len(LABELS)).eval()


def export(layout: Layout, params: Params, **backbone: object) -> export_pretrained.ExportPretrainedReport:
    given = {"source": "file:w.safetensors", "size_px": SIZE_PX, "labels": "labels.txt", **backbone}
    (layout.root / "labels.txt").write_text("\n".join(LABELS) + "\n")
    return export_pretrained.run(
        layout, backbone=params.backbone.model_copy(update=given), export_onnx=params.export_onnx
    )


@pytest.mark.slow
def test_the_bundle_answers_as_the_model_does(tmp_path: Path, params: Params) -> None:
    layout, model = Layout(tmp_path), model_of("squeezenet1_1")
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    report = export(layout, params, architecture="squeezenet1_1")
    bundle = verify_bundle(layout.pretrained_bundle_dir)
    assert bundle.labels == LABELS
    assert bundle.digest == report.bundle_digest
    assert bundle.lineage["own_classifier"]
    mean, std = (np.array(each, np.float32) for each in (bundle.preprocessing["mean"], bundle.preprocessing["std"]))
    picture = np.random.default_rng(0).integers(0, 256, (SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    with Predictor(bundle) as predictor:
        answers = predictor.predict([picture])
    assert answers.embeddings.shape == (1, 512)
    pixels = (picture[4:-4, 4:-4].astype(np.float32) / 255 - mean) / std
    whole = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None], size=(SIZE_PX,) * 2, mode="bilinear", antialias=True
    )
    with torch.inference_mode():
        expected = model(whole).softmax(dim=1)[0].numpy()
    np.testing.assert_allclose(answers.probabilities[-1], expected, atol=1e-5)


@pytest.mark.parametrize(
    "architecture",
    ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "resnet18",
            "mobilenet_v2",
            "efficientnet_b0",
            "convnext_tiny",
            "regnet_y_400mf",
            "densenet121",
            "swin_t",
        )
    ],
)
def test_every_familys_classifier_follows_its_trunk(architecture: str) -> None:
    model = model_of(architecture)
    made = own_classifier(architecture, model.state_dict(), size_px=SIZE_PX)  # raises where it differs from torchvision
    pixels = torch.randn(1, 3, SIZE_PX, SIZE_PX)
    with torch.inference_mode():
        embedding, logits = made(pixels)
        torch.testing.assert_close(logits, model(pixels), rtol=1e-4, atol=1e-4)
    assert embedding.shape == (1, made.network.feature_dim)


def test_weights_without_a_classifier_are_told(tmp_path: Path, params: Params) -> None:
    layout, model = Layout(tmp_path), model_of("squeezenet1_1")
    state = model.state_dict()
    trunk = {name: tensor for name, tensor in state.items() if not name.startswith("classifier")}
    save_file(trunk, tmp_path / "w.safetensors")
    with pytest.raises(BackboneError, match=r"hold no classifier: classifier\.1\.bias is not among them"):
        export(layout, params, architecture="squeezenet1_1")
    with pytest.raises(BackboneError, match="ends before its classifier"):
        export(layout, params, source=params.backbone.source, size_px=None)
    with pytest.raises(BackboneError, match="is not known, so it cannot answer as it is"):
        own_classifier("vgg11", state, size_px=SIZE_PX)


def test_labels_must_be_known_be_as_many_as_the_classes_and_differ(tmp_path: Path, params: Params) -> None:
    layout = Layout(tmp_path)
    save_file(model_of("squeezenet1_1").state_dict(), tmp_path / "w.safetensors")
    for labels, told in (
        (None, r"classifier of 5 classes and do not say what these are called. Set backbone\.labels"),
        ("imagenet1k", "names 1000 classes, the classifier in the weights has 5"),
        ("nowhere.txt", r"nowhere\.txt cannot be read"),
        ("twice.txt", r"twice\.txt names owl more than once"),
    ):
        (tmp_path / "twice.txt").write_text("owl\nkite\nowl\n")
        with pytest.raises(BackboneError, match=told):
            export(layout, params, architecture="squeezenet1_1", labels=labels)
    assert not layout.pretrained_bundle_dir.exists()


@pytest.mark.slow
def test_imagenets_classifier_names_what_is_on_real_photos(material: Path, tmp_path: Path, params: Params) -> None:
    layout = Layout(tmp_path)
    weights = material / "weights" / "mobilenet_v2_imagenet1k.safetensors"
    export(
        layout,
        params,
        source=f"file:{weights}",
        architecture="mobilenet_v2",
        size_px=None,
        labels="imagenet1k",
    )
    photos = material / "datasets" / "grocery8" / "test"
    with Predictor(verify_bundle(layout.pretrained_bundle_dir)) as predictor:
        for label, name in (("Lemon", "lemon"), ("Orange", "orange")):
            answers = predictor.predict_files(sorted((photos / label).glob("*.jpg")), top_k=5)
            assert np.mean([name in dict(answer.top) for answer in answers]) > 0.6
