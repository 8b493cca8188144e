"""Backbones as layer groups: the same features as torchvision's, cut anywhere, frozen statistics."""

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import convnext, densenet, resnet, swin_transformer, vision_transformer

from tasks.errors import BackboneError
from tasks.models.architectures import Network, build_network
from tasks.models.layer_groups import family_of

SIZE_PX = 64


def small_resnet() -> nn.Module:
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)


def small_convnext() -> nn.Module:
    widths = (8, 12, 16, 24, None)
    setting = [convnext.CNBlockConfig(width or 0, out, 1) for width, out in itertools.pairwise(widths)]
    return convnext.ConvNeXt(setting, num_classes=5)


def small_densenet() -> nn.Module:
    return densenet.DenseNet(4, (2, 2, 2, 2), 8, num_classes=5)


def small_vit() -> nn.Module:
    return vision_transformer.VisionTransformer(SIZE_PX, 16, 7, 2, 16, 32, num_classes=5)


def small_swin() -> nn.Module:
    return swin_transformer.SwinTransformer([4, 4], 8, [1, 1, 1, 1], [1, 1, 2, 2], [4, 4], num_classes=5)


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, num_classes=5)


# A small real instance of each family, and the module whose input is torchvision's penultimate feature.
INSTANCES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "resnet18": (small_resnet, "fc"),
    "convnext_tiny": (small_convnext, "classifier.2"),
    "densenet121": (small_densenet, "classifier"),
    "vit_b_16": (small_vit, "heads"),
    "swin_t": (small_swin, "head"),
    **{
        name: (torchvision_model(name), module)
        for name, module in {
            "mobilenet_v2": "classifier",
            "mobilenet_v3_small": "classifier",
            "mobilenet_v3_large": "classifier",
            "efficientnet_b0": "classifier",
            "regnet_y_400mf": "fc",
            "shufflenet_v2_x0_5": "fc",
            "mnasnet0_5": "classifier",
        }.items()
    },
}


def shaken(model: nn.Module) -> nn.Module:
    """BatchNorm statistics as after training, so that they matter."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def pixels(batch: int = 2, size_px: int = SIZE_PX) -> Tensor:
    return torch.randn(batch, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))


def cut(name: str, depths: int) -> Network:
    family = family_of(name)
    assert family is not None
    return Network(INSTANCES[name][0](), family, depths)


@pytest.fixture(autouse=True)
def seeded_and_single_threaded() -> Iterator[None]:
    """Tiny pictures: a second thread only waits for the first."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", INSTANCES)
def test_one_depth_is_the_input_of_torchvisions_classifier(name: str) -> None:
    make, classifier = INSTANCES[name]
    model = shaken(make())
    network = cut(name, 1)
    network.load_trunk(model.state_dict())
    seen: list[Tensor] = []
    model.get_submodule(classifier).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        model(pixels())
        embedding = network(pixels())
    assert embedding.shape == (2, network.feature_dim)
    torch.testing.assert_close(embedding, seen[0].flatten(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["squeezenet1_0", "squeezenet1_1", pytest.param("vgg11", marks=pytest.mark.slow)])
def test_a_fully_convolutional_trunk_is_pooled_globally(name: str) -> None:
    model = shaken(torchvision.models.get_model(name, weights=None, num_classes=5))
    network = build_network(name, depths=1)
    network.load_trunk(model.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(network(pixels()), model.features(pixels()).mean((2, 3)))  # type: ignore[operator]


@pytest.mark.parametrize("name", INSTANCES)
def test_a_network_can_be_cut_anywhere_and_owns_each_parameter_once(name: str) -> None:
    network = cut(name, 3)
    with torch.inference_mode():
        expected = network(pixels())
        for group in range(network.num_groups + 1):
            boundary = network.forward_until(pixels(), group)
            assert torch.equal(network.forward_from(boundary, group), expected)
    grouped = [parameter for group in range(network.num_groups) for parameter in network.group_parameters(group)]
    assert sorted(map(id, grouped)) == sorted(map(id, network.parameters()))
    assert all(network.group_parameters(group) for group in range(network.num_groups))


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "mobilenet_v3_small"])
def test_more_depths_put_earlier_features_before_the_usual_ones(name: str) -> None:
    state = shaken(INSTANCES[name][0]()).state_dict()
    one, all_of_them = cut(name, 1), cut(name, 8)
    for network in (one, all_of_them):
        network.load_trunk(state)
    assert all_of_them.depths == all_of_them.num_groups - 1  # never the stem
    with torch.inference_mode():
        assert torch.equal(all_of_them(pixels())[:, -one.feature_dim :], one(pixels()))


def test_groups_of_mobilenet_v3_small_are_its_resolutions() -> None:
    network = build_network("mobilenet_v3_small", depths=4)
    assert [len(steps) for steps in network.groups] == [1, 1, 2, 5, 4]
    assert (network.depths, network.feature_dim) == (4, 664)


def test_training_mode_moves_no_statistic_and_wakes_no_dropout() -> None:
    network = cut("efficientnet_b0", 2).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    first, second = network(pixels(4)), network(pixels(4))
    assert torch.equal(first, second)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(module.training for module in network.modules())


def test_state_has_torchvisions_names_without_the_classifier() -> None:
    network = build_network("mobilenet_v2", depths=1)
    full = torchvision.models.mobilenet_v2(weights=None).state_dict()
    assert list(network.trunk_state()) == [name for name in full if not name.startswith("classifier.")]


def test_building_leaves_the_random_state_alone() -> None:
    before = torch.get_rng_state()
    build_network("squeezenet1_1", depths=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_do_not_fit_are_told_all_at_once() -> None:
    network = build_network("squeezenet1_1", depths=1)
    state = network.trunk_state()
    state["features.0.weight"] = torch.zeros(64, 3, 7, 7)
    del state["features.3.squeeze.bias"]
    with pytest.raises(BackboneError, match=r"features\.3\.squeeze\.bias.*features\.0\.weight: \(64, 3, 7, 7\) where"):
        network.load_trunk(state)


def test_a_vision_transformer_takes_the_picture_size_of_its_weights() -> None:
    larger = vision_transformer.VisionTransformer(96, 16, 7, 2, 16, 32, num_classes=5).eval()
    network = cut("vit_b_16", 1)
    assert network.image_size == SIZE_PX
    network.load_trunk(larger.state_dict())
    assert network.image_size == 96
    with torch.inference_mode():
        larger.heads = nn.Identity()  # type: ignore[assignment]
        torch.testing.assert_close(network(pixels(2, 96)), larger(pixels(2, 96)))


def test_an_unknown_architecture_is_named_with_those_there_are() -> None:
    with pytest.raises(BackboneError, match=r"'resnet19'.*mobilenet_v2"):
        build_network("resnet19", depths=1)


def test_every_torchvision_classifier_has_a_family_or_is_cut_by_the_generic_rule_knowingly() -> None:
    without = {name for name in torchvision.models.list_models(module=torchvision.models) if not family_of(name)}
    assert {name for name in without if not name.startswith("vgg")} == {"alexnet", "googlenet", "inception_v3"}
    assert "generic rule" in build_network("alexnet", depths=1).notes[0]


def test_a_timm_model_is_one_group_over_an_empty_stem() -> None:
    pytest.importorskip("timm", reason="the optional extra timm is not installed")
    network = build_network("timm:test_efficientnet", depths=4)
    assert (network.num_groups, network.depths, network.group_parameters(0)) == (2, 1, [])
    with torch.inference_mode():
        assert network(pixels(2, 160)).shape == (2, network.feature_dim)
    with pytest.raises(BackboneError, match="no_such_model"):
        build_network("timm:no_such_model", depths=1)


@pytest.mark.parametrize(
    ("name", "last"), [("resnet18", "layer3"), ("mobilenet_v3_small", "features.11"), ("convnext_tiny", "features.5")]
)
def test_an_architecture_may_end_with_a_module_and_carries_nothing_behind_it(name: str, last: str) -> None:
    whole, cut = build_network(name, depths=1), build_network(f"{name}@{last}", depths=1)
    cut.load_trunk(whole.trunk_state())
    seen = []
    whole.trunk.get_submodule(last).register_forward_hook(lambda *call: seen.append(call[-1]))
    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        whole(pixels)
        embedding = cut(pixels)
    axes = (1, 2) if whole.family.channels_last else (2, 3)
    assert torch.equal(embedding, seen[0].mean(axes))
    assert set(cut.trunk_state()) < set(whole.trunk_state())
    owned = sum(len(cut.group_parameters(group)) for group in range(cut.num_groups))
    assert owned == len(list(cut.trunk.parameters()))


def test_a_module_that_is_no_layer_is_named_with_those_there_are() -> None:
    with pytest.raises(BackboneError, match=r"no layer 'layer9'.*layer1, layer2, layer3, layer4"):
        build_network("resnet18@layer9", depths=1)
