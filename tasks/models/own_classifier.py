"""A pretrained network with the classifier that came with it: the model as it is, without a step of training.

Most classifiers are layers on the pooled features, which are the embedding; SqueezeNet's is a convolution on the maps
before they are pooled. What is put together here is held to torchvision's own model on a picture of noise. Called by
export_pretrained.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tasks.errors import BackboneError
from tasks.models.architectures import MAX_NAMED, Network, build_network, fit_tokens, torchvision_model
from tasks.models.layer_groups import Family, family_of

TOLERANCE = 1e-4


class OwnClassifier(nn.Module):
    """Normalised pixels (B, 3, S, S) to the embedding (B, D) and the classifier's logits (B, C).

    Args:
        network: The trunk, pooled at its last layer group.
        classifier: What follows it; its last parameter has a row a class.
    """

    def __init__(self, network: Network, classifier: nn.Module) -> None:
        super().__init__()
        self.network, self.classifier = network, classifier
        first = next(layer for layer in classifier.modules() if list(layer.parameters(recurse=False)))
        self.takes_maps = isinstance(first, nn.Conv2d)
        self.num_classes = len(list(classifier.parameters())[-1])
        self.eval()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See the class."""
        last = self.network.forward_until(pixels, self.network.num_groups)
        logits = self.classifier(last.maps if self.takes_maps else last.pooled).flatten(1)  # (B, C)
        return last.pooled, logits


def own_classifier(architecture: str, state: Mapping[str, Tensor], *, size_px: int) -> OwnClassifier:
    """A torchvision architecture with all of its weights, classifier included.

    Args:
        architecture: A torchvision name.
        state: Weights under torchvision's names.
        size_px: Side of the pictures that it is checked on.

    Raises:
        BackboneError: If the weights hold no classifier, do not fit, or the architecture's classifier is not known.
    """
    family = _family_with_classifier(architecture, state)
    name = family.classifier[0]
    model = torchvision_model(architecture)
    fit_tokens(model, state)
    last = [each for each in model.state_dict() if each.startswith(f"{name}.")][-1]  # the bias of the last layer
    if last not in state:
        raise BackboneError(
            f"The weights hold no classifier: {last} is not among them. They are a trunk alone, which `tanuki retrain` "
            "puts a head of your own classes on; to see it answer as it is, name weights that still have theirs, such "
            "as torchvision:mobilenet_v2/IMAGENET1K_V1, or a file."
        )
    if state[last].shape != model.state_dict()[last].shape:
        model = torchvision_model(architecture, num_classes=len(state[last]))
        fit_tokens(model, state)
    _load(model, state)
    model.eval()
    network = build_network(architecture, depths=1)
    network.load_trunk(state)
    made = OwnClassifier(network, model.get_submodule(name))
    _hold_to(model, made, size_px)
    return made


def _load(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Takes weights as they are: some models' own loading asks for a version that safetensors does not keep.

    Raises:
        BackboneError: If one is missing or has another shape.
    """
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    odd = [name for name, tensor in own.items() if name not in state or state[name].shape != tensor.shape]
    if odd:
        raise BackboneError(
            f"The weights do not fit: {', '.join(odd[:MAX_NAMED])} are missing or have another shape. Is "
            "backbone.architecture right?"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])  # shares memory with the model


def _family_with_classifier(architecture: str, state: Mapping[str, Tensor]) -> Family:
    """The family, where its classifier follows the trunk.

    Raises:
        BackboneError: If the trunk ends early, or only the generic rule knows the architecture.
    """
    family = family_of(architecture)
    if "@" in architecture:
        raise BackboneError(
            f"{architecture} ends before its classifier, and its {len(state)} tensors hold none. Name weights that "
            "still have theirs, such as torchvision:mobilenet_v2/IMAGENET1K_V1, or a file."
        )
    if family is None or architecture.startswith("timm:"):
        raise BackboneError(
            f"Where the classifier of {architecture} begins is not known, so it cannot answer as it is. torchvision's "
            "ResNet, MobileNet, EfficientNet, ConvNeXt, SqueezeNet, RegNet, DenseNet, ViT, Swin, MaxViT, ShuffleNet "
            "and MNASNet can."
        )
    return family


def _hold_to(model: nn.Module, made: OwnClassifier, size_px: int) -> None:
    """Compares with torchvision's own model.

    Raises:
        BackboneError: If they differ.
    """
    pixels = torch.randn(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = model(pixels), made(pixels)[1]
    difference = float((found - expected).abs().max())
    if found.shape != expected.shape or not difference <= TOLERANCE * float(expected.abs().max()):
        raise BackboneError(
            f"Trunk and classifier put together differ from torchvision's own model by {difference:.2g} in a logit. "
            "Please report this architecture."
        )
