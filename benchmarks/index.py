"""What does index_images cost beside decoding, and does its memory follow the pixels?

    python -m benchmarks.index --images FOLDER
    python -m benchmarks.index --rows 1000 10000 100000

The first prints the decode rate of the stage over the rate at which the same files are read and decoded, by the same
decoder on as many threads, and nothing else: the ratio of the medians of several turns, taken in turn, each stage run
from nothing. Without a folder it draws JPEGs of 224 to 500 px. The second indexes generated PNGs of 32 px, in a process
of its own for each number of rows, and prints its peak memory and, after ``+``, what a twin of it that is given
pictures of 128 px needs more: a stage that kept pixels would need 46,080 bytes a row more.
"""

from __future__ import annotations

import argparse
import io
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from deploy.images import decode_image
from deploy.machine import available_cores
from tasks import index_images
from tasks.data.image_files import list_images
from tasks.layout import Layout
from tasks.params import DataParams, IndexImagesParams

NUM_GENERATED = 1000
NUM_CLASSES = 10
SIDES_PX = (224, 500)
DATA = DataParams(layout="folders", shard_mb=256.0)
PARAMS = IndexImagesParams(val_fraction=0.15, test_fraction=0.2, max_megapixels=100.0)


def main() -> int:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of labelled images (default: generated)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="+", help="measure memory at these numbers of images instead")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        index(Layout(arguments.one))
        status = Path("/proc/self/status").read_text()  # the resource module's figure begins with the parent's
        print(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) // 1024)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.rows:
            print_memory(Path(folder), arguments.rows)
        else:
            print_rates(Path(folder), arguments.images, arguments.repeats)
    return 0


def print_rates(root: Path, images: Path | None, repeats: int) -> None:
    """Images a second of decoding alone and of the stage, and their ratio."""
    layout = Layout(root)
    layout.data.mkdir()
    if images is None:
        draw_photos(layout.raw)
    else:
        layout.raw.symlink_to(images.resolve())
    num_images = len(list_images(layout.raw).images)
    decode_all(layout), index(layout)  # the files are in memory from here on, and every library is loaded
    times = [(decode_all(layout), index(layout)) for _ in range(repeats)]
    decoding, stage = (statistics.median(turn) for turn in zip(*times, strict=True))
    print("| images | cores | decoding, images/s | index_images, images/s | ratio |")
    print("|---|---|---|---|---|")
    rates = f"{num_images / decoding:,.0f} | {num_images / stage:,.0f} | {decoding / stage:.3f}"
    print(f"| {num_images} | {available_cores()} | {rates} |")


def decode_all(layout: Layout) -> float:
    """Seconds that reading and decoding every file takes."""
    files = [layout.raw / image.path for image in list_images(layout.raw).images]
    start = time.perf_counter()
    with ThreadPoolExecutor(available_cores()) as pool:
        for _ in pool.map(lambda file: decode_image(file.read_bytes()).size, files):
            pass
    return time.perf_counter() - start


def index(layout: Layout) -> float:
    """Seconds that the stage takes from nothing."""
    layout.images.unlink(missing_ok=True)
    start = time.perf_counter()
    index_images.run(layout, seed=0, data=DATA, index_images=PARAMS)
    return time.perf_counter() - start


def print_memory(root: Path, numbers: list[int]) -> None:
    """Peak memory of a process that indexes so many images, of 32 px and of 128 px."""
    print("| rows | peak, MiB | of 128 px instead of 32 px, MiB | if pixels were kept, MiB |")
    print("|---|---|---|---|")
    for number in numbers:
        small, large = (peak_mib(root / f"{number}-{side}", number, side) for side in (32, 128))
        kept = number * 3 * (128**2 - 32**2) / 2**20
        print(f"| {number:,} | {small} | {large - small:+d} | +{kept:,.0f} |", flush=True)


def peak_mib(root: Path, number: int, side_px: int) -> int:
    """Peak resident memory, in MiB, of the stage on so many images."""
    layout = Layout(root)
    rng = np.random.default_rng(0)
    for place in range(number):
        file = layout.raw / str(place % NUM_CLASSES) / f"{place:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((side_px, side_px), Image.Resampling.NEAREST).save(file, compress_level=1)
    command = [sys.executable, "-m", "benchmarks.index", "--one", str(root)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def draw_photos(raw: Path) -> None:
    """JPEGs of noise at several scales, about as hard to decode as photos."""
    rng = np.random.default_rng(0)
    for place in range(NUM_GENERATED):
        width, height = rng.integers(*SIDES_PX, endpoint=True, size=2)
        coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((width, height))
        noise = rng.normal(0, 6, (height, width, 1))
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
        file = raw / str(place % NUM_CLASSES) / f"{place:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(buffer.getvalue())


if __name__ == "__main__":
    sys.exit(main())
