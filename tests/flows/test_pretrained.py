"""`tanuki pretrained export`, and a bundle's folder served like a registry."""

import json
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from deploy.errors import BundleError
from deploy.registry import Registry
from flows.pretrained import registry_of_one
from tests.conftest import Workspace
from tests.deploy.tiny_bundle import colour_image, encoded, write_colour_bundle


def test_a_bundles_folder_is_the_champion_of_a_registry_for_as_long_as_it_is_served(tmp_path: Path) -> None:
    made = write_colour_bundle(tmp_path / "made")
    with registry_of_one(made.directory) as root:
        champion = Registry(root).require_champion()
        assert champion.digest == made.digest
    assert not root.exists()
    (made.directory / "back.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"back\.onnx was changed"), registry_of_one(made.directory):
        pass


@pytest.mark.slow
def test_a_pretrained_classifier_is_exported_verified_and_asked(workspace: Workspace) -> None:
    told = workspace.tanuki("pretrained", "export", check=False)
    assert told.returncode == 1
    assert "ends before its classifier" in told.stderr
    torch.manual_seed(0)
    model = torchvision.models.get_model("squeezenet1_1", weights=None, num_classes=3)
    save_file(model.state_dict(), workspace.root / "weights.safetensors")
    (workspace.root / "labels.txt").write_text("kite\nowl\nwren\n")
    for key, value in (
        ("source", "file:weights.safetensors"),
        ("architecture", "squeezenet1_1"),
        ("size_px", 64),
        ("labels", "labels.txt"),
    ):
        workspace.set_param(f"backbone.{key}", value)
    made = json.loads(workspace.tanuki("pretrained", "export", "--json").stdout)
    assert (made["architecture"], made["num_classes"]) == ("squeezenet1_1", 3)
    verified = json.loads(workspace.tanuki("verify", made["bundle"], "--json").stdout)
    assert verified["digest"] == made["bundle_digest"]
    picture = workspace.root / "picture.png"
    picture.write_bytes(encoded(colour_image("grün")))
    (answer,) = json.loads(workspace.tanuki("predict", "--bundle", made["bundle"], picture, "--json").stdout)
    assert {label for label, _ in answer["top"]} == {"kite", "owl", "wren"}
    again = json.loads(workspace.tanuki("pretrained", "export", "--json").stdout)
    assert again == made, "the same weights make the same bundle"
