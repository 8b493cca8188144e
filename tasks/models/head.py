"""The linear head: class scores from an embedding, as plain arrays.

A probe, class prototypes and the last layer of a fine-tuned network are all this one thing, so that evaluation and
export handle them alike and need no torch. On disk it is head.safetensors (weight, bias) beside head.json (labels,
notes).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from deploy.files import sha256_bytes, write_bytes, write_json
from tasks.errors import StoreError

FORMAT_VERSION = 1
WEIGHTS_NAME = "head.safetensors"
CARD_NAME = "head.json"


@dataclass(frozen=True, eq=False)
class Head:
    """Logits ``features @ weight.T + bias``, everything folded in (standardisation, temperature).

    Args:
        labels: Class names in the order of the rows.
        weight: (C, D) float32.
        bias: (C,) float32.
    """

    labels: tuple[str, ...]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def __post_init__(self) -> None:
        num_classes = len(self.labels)
        if self.weight.ndim != 2 or self.weight.shape[0] != num_classes or self.bias.shape != (num_classes,):
            raise ValueError(f"{num_classes} labels, weight {self.weight.shape}, bias {self.bias.shape}")

    def logits(self, features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Class scores (N, C) float32 of features (N, D)."""
        return cast(NDArray[np.float32], features.astype(np.float32) @ self.weight.T + self.bias)

    def probabilities(self, features: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Class probabilities (N, C) float32 of features (N, D); rows sum to 1."""
        logits = self.logits(features)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        return cast(NDArray[np.float32], odds / odds.sum(axis=1, keepdims=True))


def write_head(directory: Path, head: Head, notes: dict[str, Any]) -> None:
    """Writes a head as head.safetensors and head.json; equal heads make equal bytes.

    Args:
        directory: Where to; made if missing.
        head: The head.
        notes: How it was found; JSON values only.
    """
    weights = save(
        {
            "weight": np.ascontiguousarray(head.weight, dtype=np.float32),
            "bias": np.ascontiguousarray(head.bias, dtype=np.float32),
        }
    )
    write_bytes(directory / WEIGHTS_NAME, weights)
    card = {
        "format_version": FORMAT_VERSION,
        "labels": list(head.labels),
        "feature_dim": int(head.weight.shape[1]),
        "weights_sha256": sha256_bytes(weights),
        "notes": notes,
    }
    write_json(directory / CARD_NAME, card)


def read_notes(directory: Path) -> dict[str, Any]:
    """How the head that `read_head` reads was found."""
    notes: dict[str, Any] = json.loads((directory / CARD_NAME).read_text(encoding="utf-8"))["notes"]
    return notes


def read_head(directory: Path) -> Head:
    """Reads what `write_head` wrote.

    Raises:
        StoreError: If it is missing, damaged, or of another format version.
    """
    remedy = "Run `dvc repro train_head` (or `dvc checkout`) to make it again."
    try:
        card = json.loads((directory / CARD_NAME).read_text(encoding="utf-8"))
        weights = (directory / WEIGHTS_NAME).read_bytes()
        if card["format_version"] != FORMAT_VERSION:
            raise StoreError(
                f"{directory / CARD_NAME} has format version {card['format_version']}; "
                f"this code reads {FORMAT_VERSION}. {remedy}"
            )
        if card["weights_sha256"] != sha256_bytes(weights):
            raise StoreError(f"{directory / WEIGHTS_NAME} is not what {CARD_NAME} says was written. {remedy}")
        arrays = load(weights)
        return Head(tuple(card["labels"]), arrays["weight"], arrays["bias"])
    except FileNotFoundError as error:
        raise StoreError(f"{error.filename} is missing. {remedy}") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StoreError(f"{directory} holds no readable head: {error}. {remedy}") from error
