"""Layer groups of torchvision's architectures, as data: group 0 is the stem, the last group is the top.

A group is what is frozen or tuned together, what gets one learning rate, and what an embedding is tapped from
(``features.depths``). Cuts lie where the resolution halves, so that a group is a stage of the architecture.

The steps of a group are applied one after another. A step is

- a module by its torchvision name, ``layer3``;
- a slice of a sequential module, ``features.4:9`` (``features.13:`` to its end);
- ``encoder.layers/3``: the children in groups of three, counted from the top (it makes several groups);
- an operation without a module, ``@relu`` or ``@tokens`` (tasks/models/architectures.py holds them).
"""

import re
from dataclasses import dataclass

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Family:
    """How a family of architectures is cut.

    Args:
        pattern: Regular expression that the whole architecture name matches.
        groups: Steps of each group, stem first.
        classifier: Names of the modules that are no part of the trunk.
        finish: Steps that end the last group (a norm, an activation).
        after_pool: Steps applied to the pooled maps of the last group (B, D, 1, 1), such as a norm.
        channels_last: Whether maps are (B, H, W, D) between groups.
        probe_px: Side of a picture that every member takes, in px; used to measure the embedding's width.
        note: What a reader of the card should know.
    """

    pattern: str
    groups: Groups
    classifier: tuple[str, ...]
    finish: tuple[str, ...] = ()
    after_pool: tuple[str, ...] = ()
    channels_last: bool = False
    probe_px: int = 64
    note: str = ""


RESNET_LAYERS = (("conv1", "bn1", "relu", "maxpool"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))
EFFICIENTNET_STAGES = ("features.0", "features.1", "features.2", "features.3", "features.4:6", "features.6:")


def _single(*steps: str) -> Groups:
    """Groups of one step each."""
    return tuple((step,) for step in steps)


FAMILIES = (
    Family(r"(wide_)?resne(x)?t\d+.*", RESNET_LAYERS, ("fc",)),
    Family(
        r"mobilenet_v2",
        _single("features.0", "features.1", "features.2:4", "features.4:7", "features.7:14", "features.14:"),
        ("classifier",),
    ),
    Family(
        r"mobilenet_v3_small",
        _single("features.0", "features.1", "features.2:4", "features.4:9", "features.9:"),
        ("classifier",),
    ),
    Family(
        r"mobilenet_v3_large",
        _single("features.0", "features.1", "features.2:4", "features.4:7", "features.7:13", "features.13:"),
        ("classifier",),
    ),
    Family(r"efficientnet_.*", _single(*EFFICIENTNET_STAGES), ("classifier",)),
    Family(
        r"convnext_.*",
        _single("features.0", "features.1", "features.2:4", "features.4:6", "features.6:"),
        ("classifier.2",),
        after_pool=("classifier.0", "classifier.1"),
    ),
    Family(
        r"squeezenet1_0",
        _single("features.0:3", "features.3:6", "features.6:8", "features.8:11", "features.11:"),
        ("classifier",),
    ),
    Family(
        r"squeezenet1_1",
        _single("features.0:3", "features.3:5", "features.5:8", "features.8:11", "features.11:"),
        ("classifier",),
    ),
    Family(
        r"regnet_.*",
        _single("stem", *(f"trunk_output.block{stage}" for stage in (1, 2, 3, 4))),
        ("fc",),
    ),
    Family(
        r"densenet\d+",
        (
            ("features.0:4",),
            *((f"features.denseblock{stage}", f"features.transition{stage}") for stage in (1, 2, 3)),
            ("features.denseblock4", "features.norm5"),
        ),
        ("classifier",),
        finish=("@relu",),
    ),
    Family(
        r"vit_.*",
        (("@tokens", "encoder.dropout"), ("encoder.layers/3",)),
        ("heads",),
        finish=("encoder.ln",),
        note="pooled is the class token",
    ),
    Family(
        r"swin_.*",
        _single("features.0", "features.1", "features.2:4", "features.4:6", "features.6:"),
        ("head",),
        finish=("norm",),
        channels_last=True,
    ),
    Family(
        r"maxvit_t",
        _single("stem", "blocks.0", "blocks.1", "blocks.2", "blocks.3"),
        ("classifier.5",),
        after_pool=("classifier.1", "classifier.2", "classifier.3", "classifier.4"),
        probe_px=224,
    ),
    Family(r"shufflenet_v2_.*", (("conv1", "maxpool"), ("stage2",), ("stage3",), ("stage4", "conv5")), ("fc",)),
    Family(
        r"mnasnet.*",
        _single("layers.0:8", "layers.8", "layers.9", "layers.10:12", "layers.12:"),
        ("classifier",),
    ),
    Family(
        r"timm:.*",
        ((), ("",)),
        (),
        note="a timm model is one layer group: its own pooled features, no tap below them",
    ),
)

# What the generic rule takes for no part of the trunk.
CLASSIFIERS = ("classifier", "fc", "head", "heads", "AuxLogits", "aux1", "aux2")
POOLS = ("avgpool", "dropout", "flatten")
GENERIC_TOP_GROUPS = 4


def family_of(architecture: str) -> Family | None:
    """The family that an architecture name belongs to, or None where only the generic rule applies."""
    return next((family for family in FAMILIES if re.fullmatch(family.pattern, architecture)), None)


def generic_family(architecture: str, children: tuple[str, ...], inside: str | None) -> Family:
    """The rule for an architecture that no family knows: its children, one after another.

    Args:
        architecture: Its name.
        children: Names of the top-level modules in order, or of those inside ``inside``.
        inside: The module that holds the children (``features``), or None for the model itself.
    """
    prefix = f"{inside}." if inside else ""
    steps = [f"{prefix}{child}" for child in children if child not in CLASSIFIERS + POOLS]
    stem, rest = steps[:1], steps[1:]
    size = -(-len(rest) // GENERIC_TOP_GROUPS) or 1
    groups = tuple(tuple(rest[start : start + size]) for start in range(0, len(rest), size))
    note = f"{architecture} is cut by the generic rule: its modules in order, in {len(groups) + 1} groups"
    return Family(re.escape(architecture), (tuple(stem), *groups), CLASSIFIERS, probe_px=224, note=note)
