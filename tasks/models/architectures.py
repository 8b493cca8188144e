"""A backbone as layer groups: run up to a boundary, go on from there, and pool the last groups into an embedding.

The cuts are data (tasks/models/layer_groups.py). Pooling several depths is Head2Toe's idea in its light form (Evci et
al. 2022, arXiv:2201.03529): global averages of the last stages beside each other. Called by fetch_backbone, finetune
and export_onnx.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from tasks.errors import BackboneError
from tasks.models.layer_groups import Family, Groups, family_of, generic_family

MAX_NAMED = 8


@dataclass(frozen=True)
class Boundary:
    """What has come out of the groups below a cut.

    Args:
        maps: Output of the last group that ran: (B, C, H, W), (B, H, W, C) or tokens (B, T, C).
        pooled: Pooled outputs of the groups tapped so far (B, P); P may be 0.
    """

    maps: Tensor
    pooled: Tensor

    @classmethod
    def joined(cls, parts: Sequence["Boundary"]) -> "Boundary":
        """Of all their pictures."""
        return cls(torch.cat([each.maps for each in parts]), torch.cat([each.pooled for each in parts]))


class Network(nn.Module):
    """A torchvision model without its classifier, cut into layer groups.

    Always in eval: BatchNorm statistics, dropout and stochastic depth never wake up, whatever ``train`` is called with
    (frozen statistics keep cached features and boundaries valid; METHOD: they move even under ``requires_grad=False``).
    Its layers compute in ``precision``, which is float32 unless told otherwise; weights and what it pools are float32.

    Args:
        trunk: The model; its classifier is taken off.
        family: How it is cut.
        depths: Groups, from the last, that make up the embedding; at most all but the stem.
        last: The module that the trunk ends with; empty for the whole.

    Raises:
        BackboneError: If the trunk cannot end with that module.
    """

    def __init__(self, trunk: nn.Module, family: Family, depths: int, last: str = "") -> None:
        super().__init__()
        for name in family.classifier:
            _take_off(trunk, name)
        self.trunk = trunk
        self.precision = torch.float32
        self.groups = _expand(trunk, family)
        if last:
            family, self.groups = replace(family, after_pool=()), _cut(trunk, self.groups, last)
        self.family = family
        self.num_groups = len(self.groups)
        self.depths = min(depths, self.num_groups - 1)
        self._parameter_names = _parameter_names(trunk, self.groups)
        super().train(False)
        self.feature_dim = _feature_dim(self)

    @property
    def image_size(self) -> int | None:
        """The only picture side in px that the network takes, or None where any will do."""
        size = getattr(self.trunk, "image_size", None)
        return int(size) if size is not None else None

    @property
    def device(self) -> torch.device:
        """Where its weights lie."""
        return next(self.parameters()).device

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the card should know."""
        return (self.family.note,) if self.family.note else ()

    def train(self, mode: bool = True) -> "Network":  # noqa: ARG002  the mode is refused on purpose
        """Stays in eval."""
        return super().train(False)

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """While it computes in float32, as what ships does."""
        before, self.precision = self.precision, torch.float32
        try:
            yield
        finally:
            self.precision = before

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised float32 pixels (B, 3, S, S) to the embedding (B, D)."""
        return torch.cat(self._run(pixels, 0, self.num_groups)[1], dim=1)  # (B, D)

    def forward_until(self, pixels: Tensor, group: int) -> Boundary:
        """Runs the groups below ``group`` on pixels (B, 3, S, S)."""
        maps, pooled = self._run(pixels, 0, group)
        return Boundary(maps, torch.cat(pooled, dim=1) if pooled else pixels.new_zeros((len(maps), 0)))

    def forward_from(self, boundary: Boundary, group: int) -> Tensor:
        """Goes on from ``forward_until(pixels, group)`` to the embedding (B, D)."""
        pooled = self._run(boundary.maps, group, self.num_groups)[1]
        return torch.cat([boundary.pooled, *pooled], dim=1)  # (B, D)

    def group_parameters(self, group: int) -> list[nn.Parameter]:
        """Parameters of a layer group, in the model's order; every parameter is in exactly one group."""
        return [self.trunk.get_parameter(name) for name in self._parameter_names[group]]

    def load_trunk(self, state: Mapping[str, Tensor]) -> None:
        """Takes weights under torchvision's names; those of a classifier are left aside.

        Raises:
            BackboneError: If one is missing or has another shape; all of them are named.
        """
        fit_tokens(self.trunk, state)
        own = self.trunk.state_dict()
        counters = {name for name in own if name.endswith("num_batches_tracked")}
        missing = [name for name in own if name not in state and name not in counters]
        shapes = [
            f"{name}: {tuple(state[name].shape)} where {tuple(own[name].shape)} is expected"
            for name in own
            if name in state and name not in counters and state[name].shape != own[name].shape
        ]
        if missing or shapes:
            raise BackboneError(_misfit(missing, shapes, len(own) - len(counters)))
        with torch.no_grad():
            for name in own.keys() - counters:
                own[name].copy_(state[name])  # shares memory with the trunk

    def trunk_state(self) -> dict[str, Tensor]:
        """Weights of the trunk under torchvision's names."""
        return {name: tensor.detach() for name, tensor in self.trunk.state_dict().items()}

    def _run(self, maps: Tensor, start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        """Groups ``start`` to ``stop - 1`` in ``precision``: the last maps, and what was pooled on the way."""
        if self.precision == torch.float32:
            return self._run_groups(maps, start, stop)
        with torch.autocast(maps.device.type, self.precision):
            maps, pooled = self._run_groups(maps, start, stop)
        return maps, [each.float() for each in pooled]

    def _run_groups(self, maps: Tensor, start: int, stop: int) -> tuple[Tensor, list[Tensor]]:
        pooled = []
        for group in range(start, stop):
            maps = self._chain(self.groups[group], maps)
            if group >= self.num_groups - self.depths:
                pooled.append(self._pool(maps, last=group == self.num_groups - 1))
        return maps, pooled

    def _chain(self, steps: tuple[str, ...], value: Tensor) -> Tensor:
        for step in steps:
            operation = OPERATIONS.get(step)
            value = operation(self.trunk, value) if operation else self.trunk.get_submodule(step)(value)
        return value

    def _pool(self, maps: Tensor, *, last: bool) -> Tensor:
        """Global average of maps, the class token of tokens, or what is pooled already: (B, C)."""
        if maps.ndim == 2:
            return maps
        if maps.ndim == 3:
            return maps[:, 0]
        mean = maps.mean((1, 2) if self.family.channels_last else (2, 3))  # (B, C)
        if last and self.family.after_pool:
            return self._chain(self.family.after_pool, mean[:, :, None, None])
        return mean


def build_network(architecture: str, *, depths: int) -> Network:
    """A network with random weights; the global random state is left as it was.

    Args:
        architecture: A torchvision classification architecture, or ``timm:NAME``; ``ARCHITECTURE@MODULE`` is without
            what comes after a module.
        depths: Layer groups, from the last, that make up the embedding; more than there are means all but the stem.

    Raises:
        BackboneError: If there is no such architecture.
    """
    name, _, last = architecture.partition("@")
    with torch.random.fork_rng(devices=[]):
        trunk = _timm_model(name) if name.startswith("timm:") else torchvision_model(name)
        return Network(trunk, family_of(name) or _generic(name, trunk), depths, last)


def torchvision_model(architecture: str, **options: Any) -> nn.Module:
    """A torchvision model with random weights.

    Raises:
        BackboneError: If there is no such architecture.
    """
    names = torchvision.models.list_models(module=torchvision.models)
    if architecture not in names:
        raise BackboneError(
            f"backbone.architecture: torchvision has no classification architecture {architecture!r}. "
            f"It has: {', '.join(names)}."
        )
    if architecture in ("googlenet", "inception_v3"):
        options = {"init_weights": False, **options}
    model: nn.Module = torchvision.models.get_model(architecture, weights=None, **options)
    return model


def _timm_model(architecture: str) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise BackboneError(
            f"{architecture} needs timm, which is not installed. Install the extra: pip install 'tanuki[timm]'."
        ) from error
    name = architecture.removeprefix("timm:")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, num_classes=0)
    except RuntimeError as error:
        raise BackboneError(f"timm has no model {name!r}: {error}") from error
    return model


def _generic(architecture: str, trunk: nn.Module) -> Family:
    """The generic rule on the children of ``features``, else of the model."""
    features = getattr(trunk, "features", None)
    inside = features if isinstance(features, nn.Sequential) else trunk
    children = tuple(name for name, child in inside.named_children() if child is not None)
    return generic_family(architecture, children, "features" if inside is features else None)


def _take_off(trunk: nn.Module, name: str) -> None:
    """Replaces a module by one that does nothing and holds nothing."""
    owner, _, attribute = name.rpartition(".")
    parent = trunk.get_submodule(owner)
    if getattr(parent, attribute, None) is not None:
        setattr(parent, attribute, nn.Identity())


def _expand(trunk: nn.Module, family: Family) -> Groups:
    """Slices and ``/n`` steps written out as the modules' own names."""
    groups: list[tuple[str, ...]] = []
    for steps in family.groups:
        chunked = next((step for step in steps if "/" in step), None)
        if chunked:
            groups += _chunks(trunk, chunked)
        else:
            groups.append(tuple(name for step in steps for name in _slice(trunk, step)))
    groups[-1] += family.finish
    return tuple(groups)


def _cut(trunk: nn.Module, groups: Groups, last: str) -> Groups:
    """The groups up to and with a module; what comes after it is taken off the trunk."""
    steps = [step for group in groups for step in group]
    ends = [step for step in steps[len(groups[0]) :] if step and step not in OPERATIONS]
    if last not in ends:
        raise BackboneError(
            f"backbone.architecture: there is no layer {last!r} to end with. There is: {', '.join(ends) or 'none'}."
        )
    kept = steps[: steps.index(last) + 1]
    for step in steps[len(kept) :]:
        if step not in OPERATIONS:
            _take_off(trunk, step)
    cut = (tuple(step for step in group if step in kept) for group in groups)
    return tuple(group for group in cut if group)


def _slice(trunk: nn.Module, step: str) -> list[str]:
    """``features.4:6`` as ``features.4``, ``features.5`` (children by position); any other step as it is."""
    if ":" not in step:
        return [step]
    owner, _, bounds = step.rpartition(".")
    start, _, stop = bounds.partition(":")
    children = [name for name, _ in trunk.get_submodule(owner).named_children()]
    return [f"{owner}.{name}" for name in children[int(start) : int(stop) if stop else None]]


def _chunks(trunk: nn.Module, step: str) -> list[tuple[str, ...]]:
    """``encoder.layers/3`` as groups of three children, counted from the top."""
    owner, _, size = step.partition("/")
    names = [f"{owner}.{name}" for name, _ in trunk.get_submodule(owner).named_children()]
    starts = range(len(names) % int(size) or 0, len(names), int(size))
    first = names[: len(names) % int(size)]
    return ([tuple(first)] if first else []) + [tuple(names[start : start + int(size)]) for start in starts]


def _parameter_names(trunk: nn.Module, groups: Groups) -> list[list[str]]:
    """Names of each group's parameters; one that no step owns (a class token, a pooled norm) goes to stem or top."""
    owners = {step: group for group, steps in enumerate(groups) for step in steps}
    names: list[list[str]] = [[] for _ in groups]
    for name, _ in trunk.named_parameters():
        owner = next((group for step, group in owners.items() if name.startswith(f"{step}.") or not step), None)
        top = name.startswith(("classifier.", "head"))
        names[(len(groups) - 1 if top else 0) if owner is None else owner].append(name)
    return names


def _feature_dim(network: Network) -> int:
    """Width of the embedding, from one small picture."""
    made_for = getattr(network.trunk, "default_cfg", {}).get("input_size", (3, network.family.probe_px))  # timm's
    size = network.image_size or made_for[-1]
    with torch.inference_mode():
        return int(network(torch.zeros(1, 3, size, size)).shape[1])


def fit_tokens(trunk: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Gives a vision transformer the picture side that its weights were made for (their position embedding tells)."""
    name = "encoder.pos_embedding"
    positions = state.get(name)
    own = dict(trunk.named_parameters()).get(name)
    if positions is None or own is None or positions.ndim != 3 or positions.shape == own.shape:
        return
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1 or positions.shape[2] != own.shape[2]:
        return
    encoder = trunk.get_submodule("encoder")
    encoder.pos_embedding = nn.Parameter(torch.empty_like(positions, dtype=own.dtype))
    trunk.image_size = side * int(trunk.patch_size)  # type: ignore[assignment, arg-type]
    trunk.seq_length = positions.shape[1]  # type: ignore[assignment]


def _misfit(missing: list[str], shapes: list[str], num_tensors: int) -> str:
    """One message for weights that do not fit."""
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {num_tensors} tensors are missing ({_some(missing)})")
    if shapes:
        parts.append(f"{len(shapes)} have another shape ({_some(shapes)})")
    return f"The weights do not fit the architecture: {'; '.join(parts)}. Is backbone.architecture right?"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _relu(trunk: nn.Module, maps: Tensor) -> Tensor:  # noqa: ARG001
    return torch.relu(maps)


def _tokens(trunk: Any, pixels: Tensor) -> Tensor:
    """Patches, the class token before them, and positions added: (B, T, C)."""
    patches = trunk._process_input(pixels)
    token = trunk.class_token.expand(len(patches), -1, -1)
    positions: Tensor = trunk.encoder.pos_embedding
    return torch.cat([token, patches], dim=1) + positions


OPERATIONS = {"@relu": _relu, "@tokens": _tokens}
