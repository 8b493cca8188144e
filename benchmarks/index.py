"""What does index_images cost beside decoding, and does its memory follow the pixels?

    python -m benchmarks.index --images FOLDER
    python -m benchmarks.index --more
    python -m benchmarks.index --rows 1000 10000 100000

The first prints the rate of the stage over the rate at which the same files are read and decoded to RGB, by the same
decoder on as many threads, and nothing else: the ratio of the medians of several turns, taken in turn, each stage run
from nothing; by the clock, and by processor time, which other work on the machine moves less. The stage decodes luma
alone: what that costs by itself bounds the ratio, and is the last column. Without a folder it draws JPEGs of three
sizes. The second draws more of those and prints what another run costs where nothing has changed, and where one image
in a hundred is new, as shares of the first run's time. The third indexes generated PNGs of 32 px, in a process of its
own for each number of rows, and prints its peak memory, that of a second run over the same images, which are all known
then, and what a twin of the first that is given pictures of 128 px needs more: a stage that kept pixels would need
46,080 bytes a row more.
"""

from __future__ import annotations

import argparse
import io
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deploy.images import decode_image, decode_luma
from deploy.machine import available_cores
from tasks import index_images
from tasks.data.image_files import list_images
from tasks.data.image_store import open_images
from tasks.layout import Layout
from tasks.params import DataParams, IndexImagesParams

NUM_CLASSES = 10
LARGE_SIDE_PX = 128
# Number, range of widths and range of heights of the JPEGs that are drawn.
DRAWN = ((1000, (224, 500), (224, 500)), (600, (500, 500), (375, 375)), (60, (2000, 2000), (1500, 1500)))
GROWN = 8  # times as many where growth is measured, so that what a run costs whatever there is does not count
DATA = DataParams(layout="folders", shard_mb=256.0)
PARAMS = IndexImagesParams(val_fraction=0.15, test_fraction=0.2, max_megapixels=100.0)


def main() -> int:
    """Prints a markdown table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of labelled images (default: generated)")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--more", action="store_true", help="measure what 1 % more images cost instead")
    parser.add_argument("--rows", type=int, nargs="+", help="measure memory at these numbers of images instead")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--again", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        index(Layout(arguments.one), again=arguments.again)
        status = Path("/proc/self/status").read_text()  # the resource module's figure begins with the parent's
        print(int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) // 1024)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if arguments.rows:
            print_memory(Path(folder), arguments.rows)
        elif arguments.more:
            print("| images | px | first run, s | nothing changed | +1 % | by processor |")
            print("|---|---|---|---|---|---|")
            for number, widths, heights in DRAWN:
                print_growth(Layout(Path(folder) / str(number)), GROWN * number, widths, heights, arguments.repeats)
        else:
            print(
                "| images | px | cores | decoding, images/s | index_images, images/s | ratio | by processor | bound |"
            )
            print("|---|---|---|---|---|---|---|---|")
            if arguments.images:
                print_rates(Layout(Path(folder)), arguments.images.resolve(), arguments.repeats, str(arguments.images))
            for number, widths, heights in () if arguments.images else DRAWN:
                photos = Path(folder) / f"photos-{number}"
                draw_photos(photos, number, widths, heights)
                print_rates(Layout(Path(folder) / str(number)), photos, arguments.repeats, sizes(widths, heights))
    return 0


def print_rates(layout: Layout, photos: Path, repeats: int, name: str) -> None:
    """Images a second of decoding alone and of the stage, and their ratio."""
    layout.data.mkdir(parents=True)
    layout.raw.symlink_to(photos)
    num_images = len(list_images(layout.raw).images)
    works = (
        lambda: decode_all(layout, lambda data: decode_image(data)),
        lambda: decode_all(layout, lambda data: decode_luma(data)[1]),
        lambda: index(layout),
    )
    for work in works:
        work()  # the files are in memory from here on, and every library is loaded
    turns = np.array([[seconds(work) for work in works] for _ in range(repeats)])  # (repeats, works, 2)
    (decoding, by_processor), (_, luma), (stage, stage_by_processor) = np.median(turns, axis=0)
    rates = f"{num_images / decoding:,.0f} | {num_images / stage:,.0f} | {decoding / stage:.2f}"
    ratios = f"{by_processor / stage_by_processor:.2f} | {by_processor / luma:.2f}"
    print(f"| {num_images} | {name} | {available_cores()} | {rates} | {ratios} |", flush=True)


def print_growth(layout: Layout, number: int, widths: tuple[int, int], heights: tuple[int, int], repeats: int) -> None:
    """What nothing and 1 % of new images cost a run, of what the first one cost."""
    more = max(1, number // 100)
    draw_photos(layout.raw, number + more, widths, heights)
    listed = [layout.raw / image.path for image in list_images(layout.raw).images]
    new = sorted(listed, key=lambda path: path.name)[-more:]
    aside = [layout.root / path.name for path in new]
    turns = []
    for _ in range(repeats):
        for path, other in zip(new, aside, strict=True):
            path.rename(other)
        time.sleep(2.5)  # a file that was changed a moment ago is read again
        first, same = seconds(lambda: index(layout)), seconds(lambda: index(layout, again=True))
        for path, other in zip(new, aside, strict=True):
            other.rename(path)
        turns.append((first, same, seconds(lambda: index(layout, again=True))))
    (first_s, processor_s), (same_s, _), (grown_s, grown_processor_s) = np.median(np.array(turns), axis=0)
    shares = f"{same_s / first_s:.1%} | {grown_s / first_s:.1%} | {grown_processor_s / processor_s:.1%}"
    print(f"| {number} | {sizes(widths, heights)} | {first_s:.2f} | {shares} |", flush=True)


def sizes(widths: tuple[int, int], heights: tuple[int, int]) -> str:
    """The range of pictures' sizes in words."""
    return f"{widths[0]}x{heights[0]} to {widths[1]}x{heights[1]}"


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """What a piece of work takes, by the clock and of processors."""
    start, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - processor


def decode_all(layout: Layout, decode: Callable[[bytes], NDArray[np.uint8]]) -> None:
    """Reads and decodes every file."""
    store = open_images(layout.raw)
    paths = [image.path for image in store.listing().images]
    with ThreadPoolExecutor(available_cores()) as pool:
        for _ in pool.map(lambda path: decode(store.read_bytes(path)).size, paths):
            pass


def index(layout: Layout, *, again: bool = False) -> None:
    """The stage, from nothing or ``again``."""
    if not again:
        layout.images.unlink(missing_ok=True)
        layout.stamps.unlink(missing_ok=True)
    index_images.run(layout, seed=0, data=DATA, index_images=PARAMS)


def print_memory(root: Path, numbers: list[int]) -> None:
    """Peak memory of a process that indexes so many images, of 32 px and of 128 px."""
    print("| rows | peak, MiB | of a second run, MiB | of 128 px instead of 32 px, MiB | if pixels were kept, MiB |")
    print("|---|---|---|---|---|")
    for number in numbers:
        small, large = Layout(root / f"{number}-small"), Layout(root / f"{number}-large")
        draw_squares(small.raw, number, 32)
        first, again = peak_mib(small), peak_mib(small, "--again")
        draw_squares(large.raw, number, LARGE_SIDE_PX)
        kept = number * 3 * (LARGE_SIDE_PX**2 - 32**2) / 2**20
        print(f"| {number:,} | {first} | {again} | {peak_mib(large) - first:+d} | +{kept:,.0f} |", flush=True)


def peak_mib(layout: Layout, *options: str) -> int:
    """Peak resident memory, in MiB, of a process of its own that runs the stage."""
    command = [sys.executable, "-m", "benchmarks.index", "--one", str(layout.root), *options]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def draw_squares(raw: Path, number: int, side_px: int) -> None:
    """PNGs of so many pixels a side, no two alike."""
    rng = np.random.default_rng(0)
    for place in range(number):
        file = raw / str(place % NUM_CLASSES) / f"{place:06d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((side_px, side_px), Image.Resampling.NEAREST).save(file, compress_level=1)


def draw_photos(raw: Path, number: int, widths: tuple[int, int], heights: tuple[int, int]) -> None:
    """JPEGs of noise at several scales, about as hard to decode as photos."""
    rng = np.random.default_rng(0)
    for place in range(number):
        width, height = rng.integers(*widths, endpoint=True), rng.integers(*heights, endpoint=True)
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
