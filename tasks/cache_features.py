"""Stage cache_features: each new image through the frozen backbone once, in a few views, into the feature store.

What is stored already is not computed again: adding 1 % of images costs 1 %, relabelling or renaming costs nothing.
A few stored rows are computed again in each run; if they differ, the cache is stale and its space is refilled.
Images of the val and test splits are only seen as they will be served (view centre).
The engines and the decoders release the GIL, so plain threads use all cores: while one picture is decoded, another is
resized and others are in the trunk. No torch, except on a GPU.
"""

from __future__ import annotations

import heapq
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from deploy.errors import ImageError
from deploy.files import sha256_bytes, sha256_file
from deploy.images import decode_image
from deploy.machine import available_cores
from deploy.runtime import open_session
from tasks.data.feature_store import FeatureStore, Key, Part, Space, adding, not_storable, writing
from tasks.data.features import feature_space, read_engine, write_engine
from tasks.data.image_store import ImageStore, open_images
from tasks.data.manifest import read_columns
from tasks.data.views import CENTRE, apply_view, is_crop, training_views
from tasks.errors import BackboneError, DataError, StoreError
from tasks.export.preprocessing import preprocessing_graph
from tasks.models.backbone_card import read_card
from tasks.models.engines import TrunkEngine, open_engine
from tasks.parallel import ordered_map
from tasks.progress import progress

if TYPE_CHECKING:
    import onnxruntime as ort

    from tasks.layout import Layout
    from tasks.models.backbone_card import BackboneCard
    from tasks.models.engines import EngineName
    from tasks.params import AugmentParams, FeaturesParams

COMMIT_ROWS = 512  # a kill loses at most these
NAMED = 20  # how many images an error names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheFeaturesReport:
    """What was done, in images and in features (one image in one view is one feature)."""

    num_images: int
    num_features: int
    views: tuple[str, ...]
    extracted: int
    reused: int
    rechecked: int
    stale: int
    feature_dim: int
    engine: str
    engine_reason: str


@dataclass(frozen=True, slots=True)
class Work:
    """One picture, by its path in data/raw, and the views of it to compute."""

    path: str
    sha256: str
    views: tuple[str, ...]


@dataclass(frozen=True)
class Extracted:
    """Features (n, D) float32 of these keys, and what was wrong with the pictures that have none."""

    keys: list[Key]
    features: NDArray[np.float32]
    unusable: list[str]
    overflowing: list[str]


@dataclass(frozen=True)
class Problems:
    """What was wrong so far; raised once everything else is stored."""

    unusable: list[str] = field(default_factory=list)
    overflowing: list[str] = field(default_factory=list)

    def note(self, part: Extracted) -> None:
        self.unusable.extend(part.unusable)
        self.overflowing.extend(part.overflowing)


@dataclass(frozen=True)
class Extractor:
    """Pictures to features: the frozen backbone behind its preprocessing, safe to call from several threads."""

    images: ImageStore
    preprocess: ort.InferenceSession
    preprocess_crop: ort.InferenceSession
    engine: TrunkEngine
    feature_dim: int
    min_area_fraction: float
    hflip: bool

    def __call__(self, batch: Sequence[Work]) -> Extracted:
        """Decodes and shows each picture of a batch, and runs the trunk on all of them at once."""
        keys: list[Key] = []
        pixels: list[NDArray[np.float32]] = []
        unusable: list[str] = []
        for work in batch:
            try:
                image = self._decode(work)
            except (OSError, ImageError, DataError) as error:
                unusable.append(f"{self.place(work)} ({error})")
                continue
            keys += [Key(work.sha256, view) for view in work.views]
            pixels += [self._pixels(image, view, work.sha256) for view in work.views]
        if not pixels:
            return Extracted([], np.empty((0, self.feature_dim), np.float32), unusable, [])
        features = self.engine.forward(np.concatenate(pixels))  # (n, D)
        bad = set(not_storable(features))
        works = {work.sha256: work for work in batch}
        good = [row for row in range(len(keys)) if row not in bad]
        return Extracted(
            [keys[row] for row in good],
            features[good],
            unusable,
            [f"{self.place(works[keys[row].image_sha256])} (view {keys[row].view})" for row in sorted(bad)],
        )

    def place(self, work: Work) -> str:
        """Where the picture lies, in a person's words."""
        return str(self.images.file(work.path))

    def _decode(self, work: Work) -> NDArray[np.uint8]:
        """The picture (H, W, 3), if its bytes are still those that were indexed."""
        data = self.images.read_bytes(work.path)
        if sha256_bytes(data) != work.sha256:
            raise DataError("changed since it was indexed")
        return decode_image(data, max_pixels=sys.maxsize)  # index_images has judged the size of these bytes

    def _pixels(self, image: NDArray[np.uint8], view: str, key: str) -> NDArray[np.float32]:
        """(1, 3, S, S) normalised, of one view."""
        shown = apply_view(image, view, key=key, min_area_fraction=self.min_area_fraction, hflip=self.hflip)
        session = self.preprocess_crop if is_crop(view) else self.preprocess
        (pixels,) = session.run(["pixels"], {"images": shown[None]})
        return pixels  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Job:
    """What there is to extract, and what by."""

    wanted: list[Work]
    views: tuple[str, ...]
    space: Space
    extractor: Extractor


def run(layout: Layout, *, features: FeaturesParams, augment: AugmentParams) -> CacheFeaturesReport:
    """Fills data/features with what is missing for data/manifest/accepted.parquet.

    Raises:
        BackboneError: If the backbone is missing, or not the one that its card speaks of.
        DataError: If images are missing, changed or do not decode; all are named, and the others are stored.
        ParamsError: If the engine that is asked for cannot run here.
        StoreError: If features are not finite in float16, or another process writes the store.
    """
    job = _job(layout, features, augment, place=0)
    _refuse_missing(job.wanted, job.extractor)
    with writing(layout.features_dir, job.space) as store:
        rechecked = _recheck_choice(store, job.wanted, features.recheck)
        problems = Problems()
        stale = _recheck(store, rechecked, job.extractor, features.batch_size, problems)
        missing = _missing(store, job.wanted)
        extracted = _extract(store, missing, job.extractor, features.batch_size, problems)
        write_engine(layout.features_dir, job.space.engine)
    num_features = sum(len(work.views) for work in job.wanted)
    logger.info("%d features: %d extracted, %d reused", num_features, extracted, num_features - extracted)
    return CacheFeaturesReport(
        num_images=len(job.wanted),
        num_features=num_features,
        views=job.views,
        extracted=extracted,
        reused=num_features - extracted,
        rechecked=len(rechecked),
        stale=stale,
        feature_dim=job.space.feature_dim,
        engine=job.space.engine,
        engine_reason=job.extractor.engine.reason,
    )


def run_part(layout: Layout, part: Part, *, features: FeaturesParams, augment: AugmentParams) -> int:
    """Extracts what is missing of one part of the images; other processes may extract theirs, and `run` finds it all.

    Returns:
        How many features were extracted.

    Raises:
        BackboneError, DataError, ParamsError, StoreError: As `run`, of this part's images.
    """
    job = _job(layout, features, augment, place=part.index - 1)
    mine = [work for work in job.wanted if work.sha256 in part]
    _refuse_missing(mine, job.extractor)
    with adding(layout.features_dir, job.space, part) as store:
        extracted = _extract(store, _missing(store, mine), job.extractor, features.batch_size, Problems())
    logger.info("part %d of %d: %d images, %d features extracted", part.index, part.count, len(mine), extracted)
    return extracted


def _job(layout: Layout, features: FeaturesParams, augment: AugmentParams, *, place: int) -> Job:
    """Reads what there is to do and opens the backbone."""
    read_engine(layout.features_dir)  # a store of another format is left alone
    card = read_card(layout.backbone_card)
    columns = read_columns(layout.accepted, ("path", "sha256", "split"))
    views = training_views(
        features.views,
        num_train=columns["split"].count("train"),
        min_area_fraction=augment.min_area_fraction,
        hflip=augment.hflip,
    )
    wanted = _wanted(zip(columns["path"], columns["sha256"], columns["split"], strict=True), views)
    extractor = _open_extractor(layout, card, features.engine, augment, place)
    logger.info("the trunk runs on %s: %s", extractor.engine.name, extractor.engine.reason)
    return Job(wanted, views, feature_space(card, extractor.engine.name), extractor)


def _wanted(images: Iterable[tuple[str, str, str]], views: tuple[str, ...]) -> list[Work]:
    """Each distinct picture and its views, in the order of content: the order of the shards hangs on no file name.

    Args:
        images: Path, sha256 and split of each.
        views: Of pictures to train on; all others are only seen as they will be served.
    """
    work: dict[str, Work] = {}
    for path, sha, split in sorted(images):
        mine = views if split == "train" else (CENTRE,)
        if sha not in work or len(mine) > len(work[sha].views):
            work[sha] = Work(path, sha, mine)
    return [work[sha] for sha in sorted(work)]


def _refuse_missing(wanted: Iterable[Work], extractor: Extractor) -> None:
    """Raises DataError naming all images whose file is gone."""
    if gone := [extractor.place(work) for work in wanted if not extractor.images.file(work.path).is_file()]:
        raise DataError(
            f"{len(gone)} accepted image(s) are not there any more: {_named(gone)}. "
            "Put them back (`dvc checkout`), or run `dvc repro` so that index_images takes note."
        )


def _open_extractor(
    layout: Layout, card: BackboneCard, engine: EngineName | Literal["auto"], augment: AugmentParams, place: int
) -> Extractor:
    """The backbone of the card.

    Raises:
        BackboneError: If a file is not the one that the card speaks of: its features would get another's key.
    """
    files = ((layout.preprocess_onnx, card.preprocessing_sha256), (layout.trunk_onnx, card.trunk_sha256))
    if wrong := [path for path, sha256 in files if sha256_file(path) != sha256]:
        raise BackboneError(
            f"{', '.join(map(str, wrong))}: not what {layout.backbone_card.name} speaks of. "
            "Run `dvc repro fetch_backbone`, or `dvc checkout`."
        )
    opset = max(entry.version for entry in onnx.load(layout.preprocess_onnx).opset_import)
    crop_graph = preprocessing_graph(size_px=card.size_px, crop_fraction=1.0, mean=card.mean, std=card.std, opset=opset)
    return Extractor(
        images=open_images(layout.raw),
        preprocess=open_session(layout.preprocess_onnx),
        preprocess_crop=open_session(crop_graph.SerializeToString()),
        engine=open_engine(engine, trunk=layout.trunk_onnx, weights=layout.backbone_weights, card=card, place=place),
        feature_dim=card.feature_dim,
        min_area_fraction=augment.min_area_fraction,
        hflip=augment.hflip,
    )


def _missing(store: FeatureStore, wanted: Iterable[Work]) -> list[Work]:
    """What is not stored yet."""
    missing = []
    for work in wanted:
        views = tuple(view for view in work.views if Key(work.sha256, view) not in store)
        if views:
            missing.append(work if views == work.views else replace(work, views=views))
    return missing


def _recheck_choice(store: FeatureStore, wanted: Sequence[Work], number: int) -> list[Work]:
    """Stored rows to compute again: spread by a hash that moves with the set of images, one view each."""
    salt = sha256_bytes("".join(work.sha256 for work in wanted).encode())
    stored = ((work, view) for work in wanted for view in work.views if Key(work.sha256, view) in store)
    chosen = heapq.nsmallest(number, stored, key=lambda pair: sha256_bytes(f"{salt}{pair[0].sha256}{pair[1]}".encode()))
    return [replace(work, views=(view,)) for work, view in chosen]


def _recheck(
    store: FeatureStore,
    chosen: list[Work],
    extractor: Extractor,
    batch_size: int | Literal["auto"],
    problems: Problems,
) -> int:
    """Number of stored rows that are not what is computed now; with one such row none of the space can be trusted."""
    works = {work.sha256: work for work in chosen}
    stale: list[str] = []
    for again in _computed(chosen, len(chosen), extractor, batch_size):
        problems.note(again)
        difference = np.linalg.norm(store.gather(again.keys) - again.features, axis=1)
        allowed = extractor.engine.tolerance * np.linalg.norm(again.features, axis=1) + 1e-6
        stale += [
            f"{extractor.place(works[key.image_sha256])} (view {key.view})"
            for key, wrong in zip(again.keys, difference > allowed, strict=True)
            if wrong
        ]
    if stale:
        logger.warning(
            "%s: %d of %d stored features are not what the backbone gives now, of %s: "
            "all %d are dropped and computed again",
            store.directory,
            len(stale),
            len(chosen),
            _named(stale),
            len(store),
        )
        store.drop_all()
    return len(stale)


def _extract(
    store: FeatureStore,
    missing: list[Work],
    extractor: Extractor,
    batch_size: int | Literal["auto"],
    problems: Problems,
) -> int:
    """Computes and commits what is missing, `COMMIT_ROWS` at a time; gives the number of rows stored.

    Raises:
        DataError, StoreError: If there were problems, these or earlier ones.
    """
    works = progress(missing, total=len(missing), what="cache_features")
    num_views = sum(len(work.views) for work in missing)
    pending: list[Extracted] = []
    before = len(store)
    try:
        for part in _computed(works, num_views, extractor, batch_size):
            problems.note(part)
            pending.append(part)
            if sum(len(each.keys) for each in pending) >= COMMIT_ROWS:
                _commit(store, pending)
    finally:
        _commit(store, pending)
    _raise_problems(problems)
    return len(store) - before


def _computed(
    works: Iterable[Work], num_views: int, extractor: Extractor, batch_size: int | Literal["auto"]
) -> Iterator[Extracted]:
    """Features of these pictures' ``num_views`` views on all cores, in batches, in order."""
    workers = available_cores()
    size = _batch_size(extractor.engine.batch_size, num_views, workers) if batch_size == "auto" else batch_size
    return ordered_map(extractor, _batches(works, size), workers=workers)


def _commit(store: FeatureStore, pending: list[Extracted]) -> None:
    """Stores and forgets what was computed."""
    if keys := [key for part in pending for key in part.keys]:
        store.append(keys, np.concatenate([part.features for part in pending]))
    pending.clear()


def _batch_size(fast: int, num_views: int, workers: int) -> int:
    """What the engine is fast at, or less where some threads would have no batch: each also decodes its pictures."""
    return max(1, min(fast, math.ceil(num_views / workers)))


def _batches(works: Iterable[Work], batch_size: int) -> Iterator[list[Work]]:
    """Pictures together until they have ``batch_size`` views (a picture's views stay together: it is decoded once)."""
    batch: list[Work] = []
    for work in works:
        batch.append(work)
        if sum(len(each.views) for each in batch) >= batch_size:
            yield batch
            batch = []
    if batch:
        yield batch


def _raise_problems(problems: Problems) -> None:
    """Raises one error that names every picture without features."""
    unusable, overflowing = (list(dict.fromkeys(names)) for names in (problems.unusable, problems.overflowing))
    if unusable:
        raise DataError(
            f"{len(unusable)} accepted image(s) cannot be used: {_named(unusable)}. Every other feature is stored. "
            "Run `dvc repro` so that index_images takes note of them, or put the old files back (`dvc checkout`)."
        )
    if overflowing:
        raise StoreError(
            f"{len(overflowing)} feature(s) are not finite in float16 (NaN, or above 65,504): {_named(overflowing)}. "
            "Every other feature is stored. The weights or their mean and std (backbone in params.yaml) may be wrong."
        )


def _named(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
