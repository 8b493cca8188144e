"""Stored features of images, by content: what the probe, the prototypes and evaluation learn from.

Called by tasks.train_head and tasks.evaluate; tasks.cache_features puts there what they ask for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deploy.files import write_json
from tasks.data.feature_store import Key, Space, open_store
from tasks.data.views import CENTRE
from tasks.errors import StoreError

if TYPE_CHECKING:
    from tasks.models.backbone_card import BackboneCard

FORMAT_VERSION = 1
STORE_CARD = "store.json"
FIRST_ENGINE = "onnxruntime-cpu-float32"  # of stores that are older than their card


def feature_space(card: BackboneCard, engine: str) -> Space:
    """Where the features of a backbone are kept that an engine has computed."""
    return Space(
        trunk_sha256=card.trunk_sha256,
        preprocessing_sha256=card.preprocessing_sha256,
        engine=engine,
        feature_dim=card.feature_dim,
    )


def write_engine(features_dir: Path, engine: str) -> None:
    """Says which engine's features are to be read: who reads them may not have that engine, nor choose the same."""
    write_json(features_dir / STORE_CARD, {"engine": engine, "format_version": FORMAT_VERSION})


def read_engine(features_dir: Path) -> str:
    """The engine whose features are to be read.

    Raises:
        StoreError: If the store is of another version of the format, or its card is damaged.
    """
    path = features_dir / STORE_CARD
    remedy = f"Delete {features_dir}, which loses only time, and run `python -m tasks cache_features`."
    try:
        card = json.loads(path.read_bytes())
        version, engine = card["format_version"], str(card["engine"])
    except FileNotFoundError:
        return FIRST_ENGINE
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}). Delete it and run `python -m tasks cache_features`.") from error
    if version != FORMAT_VERSION:
        raise StoreError(f"{path} has format version {version}; this code reads {FORMAT_VERSION}. {remedy}")
    return engine


def load_features(
    features_dir: Path, card: BackboneCard, shas: Sequence[str], views: Sequence[str] = (CENTRE,)
) -> NDArray[np.float32]:
    """Features of images, as tasks.cache_features stored them.

    Args:
        features_dir: The feature store.
        card: The backbone that made them.
        shas: sha256 of each image, N of them.
        views: V view variants (see tasks.data.views.training_views).

    Returns:
        (V * N, D) float32: all images in the first view, then all in the second, and so on. With one view, (N, D).

    Raises:
        StoreError: If features are missing or the store is damaged.
    """
    store = open_store(features_dir, feature_space(card, read_engine(features_dir)))
    return store.gather([Key(sha, view) for view in views for sha in shas])
