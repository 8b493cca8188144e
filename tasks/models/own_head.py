"""The classifier that came with a backbone as a head for other labels: the class map, where all names overlap.

A pretrained classifier that is one linear layer on the pooled features is a `Head` already: its rows of the classes
that bear the wanted names. Zero gradient steps. Called by tasks.train_head. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import safe_open

from tasks.errors import BackboneError
from tasks.models.head import Head
from tasks.models.layer_groups import family_of


def same_names(wanted: Sequence[str], known: Sequence[str]) -> dict[str, int]:
    """Which of the known classes bears the name of each wanted label; those without one are left out.

    Case and the letters between words do not matter; ``crane bird, crane`` is known by either name.
    """
    index: dict[str, int] = {}
    for number, names in enumerate(known):
        for name in (names, *names.split(",")):
            index.setdefault(_plain(name), number)
    return {label: index[_plain(label)] for label in wanted if _plain(label) in index}


def own_head(
    weights_path: Path, architecture: str, *, columns: dict[str, int], num_classes: int, feature_dim: int
) -> Head | None:
    """The rows of a backbone's own classifier for some labels, or None where it is no linear layer on the features.

    Args:
        weights_path: weights.safetensors.
        architecture: Whose classifier it is.
        columns: Row of the classifier by label.
        num_classes: That are said to be in it.
        feature_dim: Width D of the embedding; the classifier reads its last part, the pooled last layer group.

    Raises:
        BackboneError: If there are others.
    """
    family = family_of(architecture)
    if family is None or not family.classifier or "@" in architecture:  # what ends early ends before its classifier
        return None
    with safe_open(weights_path, "np") as file:
        layers = {name: file.get_slice(name) for name in file.keys() if name.startswith(f"{family.classifier[0]}.")}  # noqa: SIM118  no mapping
        weights = [name for name in layers if name.endswith(".weight")]
        if len(weights) != 1 or len(layers[weights[0]].get_shape()) != 2:
            return None
        weight = file.get_tensor(weights[0])  # (classes, d)
        bias_name = weights[0].removesuffix("weight") + "bias"
        bias = file.get_tensor(bias_name) if bias_name in layers else np.zeros(len(weight), np.float32)
    if len(weight) != num_classes:
        raise wrong_labels(num_classes, len(weight))
    labels = tuple(sorted(columns))
    rows = [columns[label] for label in labels]
    padded = np.zeros((len(rows), feature_dim), np.float32)
    padded[:, feature_dim - weight.shape[1] :] = weight[rows]
    return Head(labels, padded, bias[rows].astype(np.float32))


def wrong_labels(num_named: int, num_classes: int) -> BackboneError:
    """What is wrong where a list of labels is not that of the classifier."""
    return BackboneError(f"backbone.labels names {num_named} classes, the classifier in the weights has {num_classes}.")


def _plain(name: str) -> str:
    return " ".join(re.split(r"[\s_\-]+", name.strip().casefold()))
