"""Stored features of images, by content: what the probe, the prototypes and evaluation learn from.

Called by tasks.train_head and tasks.evaluate; tasks.cache_features puts there what they ask for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tasks.data.feature_store import Key, Space, open_store
from tasks.data.views import CENTRE

if TYPE_CHECKING:
    from tasks.models.backbone_card import BackboneCard

ENGINE = "onnxruntime-cpu-float32"


def feature_space(card: BackboneCard) -> Space:
    """Where the features of a backbone are kept."""
    return Space(
        trunk_sha256=card.trunk_sha256,
        preprocessing_sha256=card.preprocessing_sha256,
        engine=ENGINE,
        feature_dim=card.feature_dim,
    )


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
    store = open_store(features_dir, feature_space(card))
    return store.gather([Key(sha, view) for view in views for sha in shas])
