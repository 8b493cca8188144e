"""What nothing needs any more, of the feature store, clones, DVC's cache and Prefect's runs: behind `tanuki gc`.

Needed are the features of the images of the current manifest under the current backbone, and those of every registry
version: its images under its backbone, read from DVC's cache by the hashes in its lineage. So going back to any of them
costs no forward. In DVC's cache (flows/dvc_cache.py) all stays that a kept version's lineage names, or a clone that a
killed run will go on in; the registry's own files are swept by itself. What is needed is known before the first of
these loses anything.
"""

import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.files import remove_leftovers
from deploy.registry import Registry
from flows.clones import ClonesSweep, clones_at_rest, sweep_clones
from flows.dvc_cache import CacheSweep, sweep_cache
from flows.registries import registry_of
from flows.workspace import WorkspaceError, cache_dir
from tasks.data.feature_store import Orphans, Space, drop_orphans
from tasks.data.manifest import read_manifest
from tasks.errors import BackboneError, DataError
from tasks.layout import Layout
from tasks.models.backbone_card import read_card

AT_WORK = "A scheduled run works in a clone, so DVC's cache and the clones were left alone: try again when it has ended"
UNKNOWN = (
    "The stored features were left alone: {} is not there (a stage that fails leaves nothing), so nobody can tell "
    "which of them the current images need. `tanuki retrain` brings it back"
)
LEFT_S = 3600.0  # `dvc repro` by hand may be writing a report right now, which takes seconds


@dataclass(frozen=True)
class Backbone:
    """What of a space tells whose features it holds; of whichever engine, and in whichever views, they are kept."""

    trunk_sha256: str
    preprocessing_sha256: str


@dataclass(frozen=True)
class GarbageReport:
    """What was taken out, or would be.

    Args:
        dry_run: Whether it is only told.
        orphans: Of each space that has some.
        versions: Of the registry.
        cache: Of DVC's cache.
        clones: Of the clones that scheduled runs work in.
        features_left_alone: Why none of them was taken out, if so.
    """

    dry_run: bool
    orphans: tuple[Orphans, ...]
    versions: tuple[int, ...] = ()
    cache: CacheSweep = field(default_factory=CacheSweep)
    clones: ClonesSweep = field(default_factory=ClonesSweep)
    features_left_alone: str = ""

    def text(self) -> str:
        """The report for a person."""
        told = "Would remove" if self.dry_run else "Removed"
        versions = f"{told} version {', '.join(map(str, self.versions))}, never live."
        clones = f"{told} {self.clones.removed} idle clones of scheduled runs, {self.clones.freed_bytes / 1e6:,.1f} MB."
        lines = [*([versions] if self.versions else []), *([clones] if self.clones.removed else [])]
        return "\n".join([*lines, self._features_text(), self._cache_text(told)])

    def _cache_text(self, told: str) -> str:
        if self.cache.left_alone:
            return f"{self.cache.left_alone}."
        if not self.cache.objects:
            return "DVC's cache holds nothing that no commit and no version names."
        return (
            f"{told} {self.cache.objects:,} files from DVC's cache that no commit and no version names, "
            f"{self.cache.freed_bytes / 1e6:,.1f} MB."
        )

    def _features_text(self) -> str:
        if self.features_left_alone:
            return f"{self.features_left_alone}."
        if not self.orphans:
            return "Every stored feature is needed by the current images or by a version of the registry."
        rows, freed = (sum(getattr(each, name) for each in self.orphans) for name in ("rows", "freed_bytes"))
        lines = [
            f"{each.rows:>9,} of {each.of_rows:,} features of backbone {each.space.trunk_sha256[:12]} "
            f"({each.space.engine}): {each.freed_bytes / 1e6:,.1f} MB"
            for each in self.orphans
        ]
        total = f"{rows:,} features that nothing needs, {freed / 1e6:,.1f} MB"
        if self.dry_run:
            return "\n".join([*lines, f"Would free {total}. Without --dry-run it does."])
        return "\n".join([*lines, f"Freed {total}. The next `tanuki retrain` looks at the store again, in seconds."])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def collect_garbage(
    layout: Layout, *, dry_run: bool, forget: Collection[int] = (), keep_last: int | None = None
) -> GarbageReport:
    """Takes out of data/features and DVC's cache what neither the workspace nor a registry version needs.

    Args:
        layout: The workspace, held by the caller.
        dry_run: Only tell.
        forget: Registry versions whose features may go, and what DVC's cache has of them.
        keep_last: Where given, versions that were never live go first, but for this many of the youngest.

    Raises:
        WorkspaceError: If DVC's cache lacks what tells a version's images or backbone; names all such versions.
        StoreError: If the store is being written or does not tell what it holds.
        RegistryError: If the registry does not answer: a version that nobody here has seen may need something.
    """
    needed: defaultdict[Backbone, set[str]] = defaultdict(set)
    gone = [path for path in (layout.accepted, layout.backbone_card) if not path.is_file()]
    if not gone:
        needed[_backbone(layout.backbone_card)] |= _images(layout.accepted)
    registry = registry_of(layout)
    if registry.versions() and not dry_run:
        registry.repair()  # one behind a URL is up to date after that, or away
    versions = () if keep_last is None else tuple(registry.sweepable(keep_last=keep_last))
    for backbone, images in _needs_of_versions(layout, registry, {*forget, *versions}):
        needed[backbone] |= images
    if versions and keep_last is not None and not dry_run:
        registry.sweep(keep_last=keep_last)

    def images_of(space: Space) -> set[str]:
        return needed.get(Backbone(space.trunk_sha256, space.preprocessing_sha256), set())

    left_alone = UNKNOWN.format(", ".join(_relative(layout, path) for path in gone)) if gone else ""
    orphans = [] if gone else drop_orphans(layout.features_dir, images_of, dry_run=dry_run)
    kept = _outputs_of_versions(layout, registry, {*forget, *versions})
    if not dry_run:
        for folder in (layout.reports_dir, layout.decision.parent):
            remove_leftovers(folder, older_than_s=LEFT_S)
    with clones_at_rest(layout) as at_rest:
        if not at_rest:  # what it has just computed is named by no dvc.lock yet
            cache = CacheSweep(left_alone=AT_WORK)
            return GarbageReport(dry_run, tuple(orphans), versions, cache, features_left_alone=left_alone)
        clones = sweep_clones(layout, dry_run=dry_run)
        cache = sweep_cache(layout, kept, dry_run=dry_run, also=clones.unfinished)
    return GarbageReport(dry_run, tuple(orphans), versions, cache, clones, left_alone)


def _outputs_of_versions(layout: Layout, registry: Registry, forget: Collection[int]) -> dict[int, dict[str, str]]:
    """DVC's hash of every output, and of the images, of every version."""
    lineages = {each.id: registry.registered_lineage(each.id) for each in registry.versions() if each.id not in forget}
    raw = _relative(layout, layout.raw)
    return {
        id_: {**told.get("dvc_outputs", {}), **({raw: told["data_version"]} if told.get("data_version") else {})}
        for id_, told in lineages.items()
    }


def _needs_of_versions(layout: Layout, registry: Registry, forget: Collection[int]) -> list[tuple[Backbone, set[str]]]:
    """Backbone and images of every version."""
    versions = [version.id for version in registry.versions() if version.id not in forget]
    if not versions:
        return []
    cache = cache_dir(layout) / "files" / "md5"
    needs, lost = [], []
    for version in versions:
        hashes = registry.registered_lineage(version).get("dvc_outputs", {})
        try:
            manifest = _cached(cache, hashes[_relative(layout, layout.accepted)])
            folder = json.loads(_cached(cache, hashes[_relative(layout, layout.backbone_dir)]).read_bytes())
            card = next(entry["md5"] for entry in folder if entry["relpath"] == layout.backbone_card.name)
            needs.append((_backbone(_cached(cache, card)), _images(manifest)))
        except (OSError, ValueError, KeyError, StopIteration, BackboneError, DataError):
            lost.append(version)
    if lost:
        names = ", ".join(map(str, lost))
        raise WorkspaceError(
            f"DVC's cache lacks the manifest or the backbone of version(s) {names}, so nobody can tell which features "
            f"they need; nothing was changed. Bring them back (`dvc fetch` at the version's git commit, see `tanuki "
            f"lineage {lost[0]}`), or let their features go: `tanuki gc {' '.join(f'--forget {id_}' for id_ in lost)}`."
        )
    return needs


def _relative(layout: Layout, path: Path) -> str:
    return path.relative_to(layout.root).as_posix()


def _cached(cache: Path, md5: str) -> Path:
    """Where DVC's cache keeps the bytes of a hash."""
    return cache / md5[:2] / md5[2:]


def _backbone(card_path: Path) -> Backbone:
    card = read_card(card_path)
    return Backbone(card.trunk_sha256, card.preprocessing_sha256)


def _images(manifest: Path) -> set[str]:
    return set(read_manifest(manifest)["sha256"].astype(str))
