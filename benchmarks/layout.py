"""What DVC costs with a file an image and with shards: add, status, push to a folder, pull into a new clone.

    python -m benchmarks.layout --images 20000 --repeats 3

prints a markdown table of medians in seconds. The images are small JPEGs of noise, so nothing compresses or repeats. A
last row is our own: opening data/raw and listing its images, which every stage begins with.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from flows.shards import bring_into
from tasks.data.image_store import DataLayout, open_images

LAYOUTS: tuple[DataLayout, ...] = ("folders", "shards")
IMAGES_PER_CLASS = 1000
STEPS = ("dvc add", "dvc status", "dvc push", "dvc pull, new clone", "open and list")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--side-px", type=int, default=64)
    parser.add_argument("--shard-mb", type=float, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Path(scratch) / "pictures"
        draw(pictures, arguments.images, arguments.side_px)
        seconds = {
            layout: [
                measure(Path(scratch) / layout, pictures, layout, int(arguments.shard_mb * 1e6))
                for _ in range(arguments.repeats)
            ]
            for layout in LAYOUTS
        }
    print(table(seconds, arguments.images))


def draw(folder: Path, num_images: int, side_px: int) -> None:
    """Writes JPEGs of noise, a folder a class."""
    rng = np.random.default_rng(0)
    for number in range(num_images):
        path = folder / f"class-{number // IMAGES_PER_CLASS:03d}" / f"{number:07d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)).save(buffer, format="JPEG")
        path.write_bytes(buffer.getvalue())


def measure(scratch: Path, pictures: Path, layout: DataLayout, shard_bytes: int) -> dict[str, float]:
    """Seconds of each step, in repositories of their own with a cache of their own."""
    shutil.rmtree(scratch, ignore_errors=True)
    first, second, remote = scratch / "first", scratch / "second", scratch / "remote"
    raw = first / "raw"
    shutil.copytree(pictures, raw)
    bring_into(raw, layout, shard_bytes=shard_bytes)
    run(first, "git", "init", "--quiet")
    dvc(first, "init", "--quiet")
    dvc(first, "remote", "add", "--default", "folder", str(remote))
    seconds = {
        "dvc add": timed(lambda: dvc(first, "add", "--quiet", "raw")),
        "dvc status": timed(lambda: dvc(first, "status")),
        "dvc push": timed(lambda: dvc(first, "push", "--quiet")),
    }
    run(first, "git", "add", "--all")
    run(first, "git", "commit", "--quiet", "--message", "Images")
    run(scratch, "git", "clone", "--quiet", str(first), str(second))
    seconds["dvc pull, new clone"] = timed(lambda: dvc(second, "pull", "--quiet"))
    assert len(open_images(second / "raw").listing().images) == sum(1 for _ in pictures.rglob("*.jpg"))
    seconds["open and list"] = timed(lambda: open_images(second / "raw").listing())
    return seconds


def timed(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def dvc(folder: Path, *arguments: str) -> None:
    run(folder, sys.executable, "-m", "dvc", *arguments)


def run(folder: Path, *command: str) -> None:
    """Runs a command with caches, settings and names of its own, so that no other repository's help it."""
    home = folder.parent / "home"
    home.mkdir(parents=True, exist_ok=True)
    names = {f"GIT_{who}_{what}": "bench@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    site = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "DVC_SITE_CACHE_DIR")}
    environment = {**os.environ, **names, **site, "DVC_NO_ANALYTICS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)


def table(seconds: dict[DataLayout, list[dict[str, float]]], num_images: int) -> str:
    """The medians, and how many times faster shards are."""
    lines = [f"| {num_images:,} images, s | folders | shards | ratio |", "|---|---|---|---|"]
    for step in STEPS:
        folders, shards = (statistics.median(each[step] for each in seconds[layout]) for layout in LAYOUTS)
        lines.append(f"| {step} | {folders:.2f} | {shards:.2f} | {folders / shards:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
