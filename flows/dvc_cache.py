"""Sweeps DVC's cache of what neither the workspace, git nor a kept version of the registry needs, with `dvc gc`.

DVC knows git's references only. A version's outputs may be in no commit, so they are put before DVC as one more project
that uses this cache: it then collects them by its own rules, folders and all. Behind `tanuki gc`.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.workspace import cache_dir, dvc
from tasks.layout import Layout

SCOPE = ("--all-commits", "--all-experiments")  # and the workspace, always


@dataclass(frozen=True)
class CacheSweep:
    """What went out of DVC's cache, or would.

    Args:
        objects: Files of the cache.
        freed_bytes: Their sizes; less is freed where the workspace has links to them.
        left_alone: Why the cache was not looked at, or None.
    """

    objects: int = 0
    freed_bytes: int = 0
    left_alone: str | None = None


def sweep_cache(
    layout: Layout, versions: Mapping[int, Mapping[str, str]], *, dry_run: bool, also: Sequence[str] = ()
) -> CacheSweep:
    """Removes from DVC's cache what nothing needs; the remotes stay as they are.

    Args:
        layout: The workspace, held by the caller.
        versions: DVC's hash of each output, by its path, of every version that is kept.
        dry_run: Only tell.
        also: Folders of other DVC projects that use this cache: unfinished clones.

    Raises:
        WorkspaceError: If DVC refuses; nothing was removed then.
    """
    cache = cache_dir(layout)
    if not cache.resolve().is_relative_to(layout.root.resolve()):
        return CacheSweep(
            left_alone=f"DVC's cache {cache} lies outside this workspace, and others may use it: look at `dvc gc "
            f"{' '.join(SCOPE)} --projects OTHER`"
        )
    with tempfile.TemporaryDirectory(prefix="tanuki-gc-") as folder:
        _write_project(Path(folder), cache, versions)
        command = ("gc", *SCOPE, "--projects", folder, *also)
        if dry_run:
            told = dvc(layout, *command, "--dry")
            removed = [Path(path) for path in re.findall(r"^Removing (.+)$", told, re.MULTILINE)]
            return CacheSweep(len(removed), sum(path.stat().st_size for path in removed if path.is_file()))
        before = _sizes(cache)  # DVC lists only what it would remove, and reads all commits each time that it is asked
        dvc(layout, *command, "--force", "--quiet")
    gone = before.keys() - _sizes(cache).keys()
    return CacheSweep(len(gone), sum(before[path] for path in gone))


def _sizes(cache: Path) -> dict[str, int]:
    """Bytes of each file in DVC's cache, by its path."""
    entries = (entry for folder in (cache / "files" / "md5").glob("??") for entry in os.scandir(folder))
    return {entry.path: entry.stat(follow_symlinks=False).st_size for entry in entries}


def _write_project(folder: Path, cache: Path, versions: Mapping[int, Mapping[str, str]]) -> None:
    """A DVC project whose outputs are those of the versions."""
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    (folder / ".dvc").mkdir()
    (folder / ".dvc" / "config").write_text(f"[cache]\n    dir = {cache.resolve()}\n", encoding="utf-8")
    for id_, hashes in versions.items():
        outputs = [
            f"- md5: {md5}\n  hash: md5\n  path: {id_}-{number}\n"
            for number, md5 in enumerate(sorted({*hashes.values()}))
        ]
        if outputs:
            (folder / f"version-{id_}.dvc").write_text("outs:\n" + "".join(outputs), encoding="utf-8")
