"""What do features cost, against the machine's own limits and against the tutorials' way?

    python -m benchmarks.features                      # all of it, a quarter of an hour on two cores
    python -m benchmarks.features rate retrain --photos 400

Prints a markdown table a question, ratios of what ran by turns, the median of the turns:

- rate: cache_features from JPEGs of 500x375 px over the rate at which its engine runs on tensors that lie ready, and
  over the bound that decode, resize and forward of an image set on the same cores, with each engine that runs here; a
  run that finds nothing new is taken off, so that what does not grow with the images is not told of as a rate;
- tutorial: ten epochs of head training as tutorials do it (eager PyTorch, a DataLoader, the trunk in every epoch; its
  start-up is left out) over cache_features and train_head in new processes (their start-up is not);
- retrain: after +1 % and +10 % new images, in new processes, over start-up plus the same share of a cold run;
- growth: seconds and peak memory against the number of images, copies with one pixel changed;
- fidelity: of each engine that runs here against onnxruntime, and the accuracy of probes on their features.

Weights and photos lie in $TANUKI_MATERIAL (default ../shared/material). Other work on the machine moves wall times;
what CPU stands at is of processor seconds, which it moves less.
"""

from __future__ import annotations

import argparse
import io
import operator
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from deploy.files import sha256_bytes
from deploy.images import decode_image
from deploy.machine import available_cores
from deploy.runtime import open_session
from tasks import cache_features, fetch_backbone
from tasks.data.manifest import Facts, Row, read_manifest, rows_to_frame, write_manifest
from tasks.data.splits import Split
from tasks.layout import Layout
from tasks.models.backbone_card import read_card
from tasks.models.engines import (
    EngineName,
    Forward,
    onnxruntime_forward,
    open_engine,
    openvino_forward,
    this_machine,
    torch_forward,
)
from tasks.params import BackboneParams, Params, load_params
from tasks.training.linear_probe import out_of_fold_probabilities

REPOSITORY = Path(__file__).parents[1]
MATERIAL = Path(os.environ.get("TANUKI_MATERIAL", REPOSITORY.parent / "shared" / "material"))
PHOTO_SIZE = (500, 375)
SETS = ("trashnet6_dev", "grocery8")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "size_px": 224, "crop_fraction": 0.875}
EPOCHS = 10
BATCHES = (1, 2, 4, 8, 32)
WHOSE = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
SPLITS: tuple[Split, ...] = ("train", "train", "train", "val", "test")


def main() -> None:
    questions = {"rate": rate, "tutorial": tutorial, "retrain": retrain, "growth": growth, "fidelity": fidelity}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.features", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(questions)} (default: all)")
    parser.add_argument("--photos", type=int, default=300)
    parser.add_argument("--tutorial-photos", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3, help="turns of which the median is told")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 5000, 20_000], help="numbers of images of growth")
    arguments = parser.parse_args()
    if unknown := set(arguments.questions) - set(questions):
        parser.error(f"no such question: {', '.join(sorted(unknown))}")
    print(f"{available_cores()} cores")
    for name in arguments.questions or questions:
        with tempfile.TemporaryDirectory() as scratch:
            print(f"\n{questions[name](Path(scratch), arguments)}", flush=True)


def rate(scratch: Path, arguments: argparse.Namespace) -> str:
    lines = [
        "| images/s | forward | decode, resize | cache_features "
        "| CPU: bound of forward | CPU: of forward | of the bound | CPU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for architecture in ("mobilenet_v2", "resnet18"):
        layout = workspace(scratch / architecture, architecture, arguments.photos)
        for wanted in installed_engines():
            engine = open_engine(
                wanted,
                trunk=layout.trunk_onnx,
                weights=layout.backbone_weights,
                card=read_card(layout.backbone_card),
                place=0,
            )
            turns = rate_turns(layout, wanted, engine.forward, arguments.repeats)
            rates = [1 / medians(column).wall_s for column in zip(*turns, strict=True)]
            # A GPU works while the cores decode: the slower of both is its bound, and processor time says little.
            ratios = [
                (
                    forward.cpu_s / (forward.cpu_s + show.cpu_s),
                    forward.cpu_s / stage.cpu_s,
                    (max if wanted == "torch" else operator.add)(forward.wall_s, show.wall_s) / stage.wall_s,
                    (forward.cpu_s + show.cpu_s) / stage.cpu_s,
                )
                for forward, show, stage in turns
            ]
            lines.append(
                f"| {architecture}, {engine.name} | {' | '.join(f'{each:.0f}' for each in rates)} "
                f"| {' | '.join(f'{statistics.median(column):.2f}' for column in zip(*ratios, strict=True))} |"
            )
    return "\n".join(lines)


def installed_engines() -> tuple[EngineName, ...]:
    """Those that run here."""
    machine = this_machine()
    engines: list[EngineName] = ["onnxruntime"]
    engines += ["openvino"] if machine.openvino_bfloat16 is not None else []
    engines += ["torch"] if machine.has_cuda else []
    return tuple(engines)


def rate_turns(
    layout: Layout, engine: EngineName, run_trunk: Forward, repeats: int
) -> list[tuple[Spent, Spent, Spent]]:
    """Forward at its best batch size, decode with resize, and the stage: seconds an image, measured in turn."""
    preprocess = open_session(layout.preprocess_onnx)
    files = [path.read_bytes() for path in sorted(layout.raw.rglob("*.jpg"))]
    pixels = np.random.default_rng(0).standard_normal((max(BATCHES), 3, 224, 224), dtype=np.float32)

    def forward(size: int, count: int) -> Spent:
        batches = [pixels[:size]] * max(available_cores(), count // size)
        return timed(lambda: each(run_trunk, batches), len(batches) * size)

    def show(data: bytes) -> None:
        preprocess.run(["pixels"], {"images": decode_image(data)[None]})

    def stage() -> Spent:
        shutil.rmtree(layout.features_dir, ignore_errors=True)
        whole = timed(lambda: extract(layout, engine), len(files))
        return whole - timed(lambda: extract(layout, engine), len(files))

    best = min(BATCHES, key=lambda size: forward(size, len(files) // 2).cpu_s)
    return [(forward(best, len(files)), timed(lambda: each(show, files), len(files)), stage()) for _ in range(repeats)]


def tutorial(scratch: Path, arguments: argparse.Namespace) -> str:
    layout = workspace(scratch, "mobilenet_v2", arguments.tutorial_photos)
    turns = []
    for _ in range(arguments.repeats):
        shutil.rmtree(layout.features_dir, ignore_errors=True)
        turns.append((tutorial_epoch(layout), run_stages(layout, views=1)))
    epoch, ours = map(medians, zip(*turns, strict=True))
    ratios = [EPOCHS * theirs / mine for theirs, mine in zip(epoch.seconds, ours.seconds, strict=True)]
    return (
        f"| {arguments.tutorial_photos} photos, mobilenet_v2, one view | s | CPU s |\n|---|---|---|\n"
        f"| {EPOCHS} epochs the tutorials' way | {EPOCHS * epoch.wall_s:.0f} | {EPOCHS * epoch.cpu_s:.0f} |\n"
        f"| cache_features and train_head, start-up included | {ours.wall_s:.1f} | {ours.cpu_s:.1f} |\n"
        f"| ratio | {ratios[0]:.1f} | {ratios[1]:.1f} |"
    )


def tutorial_epoch(layout: Layout) -> Spent:
    """An epoch of training a head as tutorials do: the trunk runs eagerly on every image."""
    import torch
    from safetensors.torch import load_file
    from torchvision import transforms

    from tasks.models.architectures import build_network

    torch.set_num_threads(available_cores())
    card, rows = read_card(layout.backbone_card), read_manifest(layout.accepted)
    network = build_network(card.architecture, depths=1)
    network.load_trunk(load_file(layout.backbone_weights))
    labels = sorted(set(rows["label"]))
    head = torch.nn.Linear(network.feature_dim, len(labels))
    optimiser = torch.optim.SGD(head.parameters(), lr=0.001, momentum=0.9)
    show = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(card.mean, card.std),
        ]
    )

    class Photos(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return len(rows)

        def __getitem__(self, index: int) -> Any:
            row = rows.iloc[index]
            return show(Image.open(layout.raw / row["path"]).convert("RGB")), labels.index(row["label"])

    loader = torch.utils.data.DataLoader(Photos(), batch_size=32, shuffle=True, num_workers=available_cores())

    def epoch() -> None:
        for images, targets in loader:
            with torch.no_grad():
                features = network(images)
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(head(features), targets).backward()
            optimiser.step()

    return timed(epoch, 1)


def retrain(scratch: Path, arguments: argparse.Namespace) -> str:
    layout = workspace(scratch, "mobilenet_v2", arguments.photos)
    cold = run_stages(layout)
    lines = [
        "| cache_features and train_head, new processes | s | CPU s | over start-up and share | CPU |",
        "|---|---|---|---|---|",
        f"| cold, {arguments.photos} photos | {cold.wall_s:.1f} | {cold.cpu_s:.1f} | | |",
    ]
    total = arguments.photos
    for share in (0.01, 0.1):
        new = max(1, round(share * arguments.photos))
        turns = []
        for _ in range(arguments.repeats):
            nothing = run_stages(layout)
            put_photos(layout, new, start=total)
            total += new
            turns.append((nothing, run_stages(layout)))
        nothing, more = map(medians, zip(*turns, strict=True))
        bound = [a + new / arguments.photos * (b - a) for a, b in zip(nothing.seconds, cold.seconds, strict=True)]
        lines += [
            f"| nothing new | {nothing.wall_s:.1f} | {nothing.cpu_s:.1f} | | |",
            f"| +{share:.0%}, {new} photos | {more.wall_s:.1f} | {more.cpu_s:.1f} "
            f"| {more.wall_s / bound[0]:.2f} | {more.cpu_s / bound[1]:.2f} |",
        ]
    return "\n".join(lines)


def growth(scratch: Path, arguments: argparse.Namespace) -> str:
    lines = ["| images of 32 px | s | CPU s | CPU ms an image more | peak MB |", "|---|---|---|---|---|"]
    count_before, cpu_before = 0, 0.0
    for count in arguments.rows:
        layout = Layout(scratch / str(count))
        put_backbone(layout, BackboneParams(**NOTHING | {"source": "embedded:glyphs_mobilenet_v3_small"}))
        put_copies(layout, count)
        spent = run_stage(layout, "cache_features", {"features.views": 1})
        slope = 1e3 * (spent.cpu_s - cpu_before) / (count - count_before)
        lines.append(
            f"| {count:,} | {spent.wall_s:.1f} | {spent.cpu_s:.1f} "
            f"| {f'{slope:.2f}' if count_before else ''} | {spent.peak_bytes / 1e6:.0f} |"
        )
        count_before, cpu_before = count, spent.cpu_s
    return "\n".join(lines)


def fidelity(scratch: Path, arguments: argparse.Namespace) -> str:
    lines = ["| mobilenet_v2 | | features off by | accuracy | difference, 95 % |", "|---|---|---|---|---|"]
    for name in SETS:
        layout = workspace(scratch / name, "mobilenet_v2", arguments.photos, photos=MATERIAL / "datasets" / name)
        card, rows = read_card(layout.backbone_card), read_manifest(layout.accepted)
        preprocess = open_session(layout.preprocess_onnx)
        images = [decode_image((layout.raw / path).read_bytes()) for path in rows["path"]]
        pixels = [preprocess.run(["pixels"], {"images": image[None]})[0] for image in images]
        engines: dict[str, Forward] = {"onnxruntime float32": onnxruntime_forward(layout.trunk_onnx)}
        engines["torch float32, CPU"], _ = torch_forward(layout.backbone_weights, card, device="cpu", place=0)
        if "torch" in installed_engines():
            forward, precision = torch_forward(layout.backbone_weights, card, device="cuda", place=0)
            engines[f"torch {precision}, CUDA"] = forward
        if "openvino" in installed_engines():
            engines["openvino float32"] = openvino_forward(layout.trunk_onnx, "float32")
            engines["openvino bfloat16, where the CPU has it"] = openvino_forward(layout.trunk_onnx, "bfloat16")
        features = {engine: np.concatenate(each(forward, pixels)) for engine, forward in engines.items()}
        exact = features["onnxruntime float32"]
        features["onnxruntime float32, kept as float16"] = exact.astype(np.float16).astype(np.float32)
        right_before = held_out_answers(exact, rows)
        for engine, found in features.items():
            off = float((np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)).max())
            right = held_out_answers(found, rows)
            gain = right.astype(float) - right_before
            width = 1.96 * gain.std() / np.sqrt(len(gain))
            lines.append(
                f"| {name}, {len(rows)} photos | {engine} | {off:.1e} | {right.mean():.4f} "
                f"| {gain.mean():+.4f} ± {width:.4f} |"
            )
    return "\n".join(lines)


def held_out_answers(features: NDArray[np.float32], rows: Any) -> NDArray[np.bool_]:
    """Whether a probe that has not seen the image is right."""
    labels, groups = rows["label"].tolist(), rows["group"].tolist()
    judged, names, probabilities = out_of_fold_probabilities(
        features, labels, groups, seed=0, log10_c=0.0, folds=5, max_iterations=200
    )
    return np.array([names[answer] for answer in probabilities.argmax(axis=1)]) == np.array(labels)[judged]


# Workspaces


NOTHING: dict[str, Any] = dict.fromkeys(BackboneParams.model_fields)


def workspace(root: Path, architecture: str, count: int, *, photos: Path = MATERIAL / "datasets") -> Layout:
    """A workspace up to what cache_features reads: photos of 500x375 px and a backbone that takes 224 px."""
    layout = Layout(root)
    put_backbone(layout, BackboneParams(**NOTHING | IMAGENET | weights_of(root, architecture)))
    put_photos(layout, count, photos=photos)
    return layout


def weights_of(root: Path, architecture: str) -> dict[str, str]:
    """Real weights where there are some, else random ones: the work is the same."""
    import torch
    from safetensors.torch import save_file

    from tasks.models.architectures import build_network

    path = MATERIAL / "weights" / f"{architecture}_imagenet1k.safetensors"
    if not path.is_file():
        torch.manual_seed(0)
        path = root / "random.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(build_network(architecture, depths=1).trunk_state(), path)
    return {"source": f"file:{path}", "architecture": architecture}


def put_backbone(layout: Layout, backbone: BackboneParams) -> None:
    params = base_params()
    features = params.features.model_copy(update={"depths": 1})
    fetch_backbone.run(layout, backbone=backbone, features=features, export_onnx=params.export_onnx)


def put_photos(layout: Layout, count: int, *, start: int = 0, photos: Path = MATERIAL / "datasets") -> None:
    """Photos as JPEGs of 500x375 px under their own labels, spread over all; where there are none, drawn ones."""
    sources = sorted(photos.rglob("*.jpg")) if photos.is_dir() else []
    random = np.random.default_rng(start)
    for number in range(start, start + count):
        if sources:
            source = sources[number * 7919 % len(sources)]  # a prime: all of them, none twice before all were
            picture, label = ImageOps.fit(Image.open(source).convert("RGB"), PHOTO_SIZE), source.parent.name
        else:
            coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
            picture, label = coarse.resize(PHOTO_SIZE), f"class-{number % 8}"
        picture.putpixel((number % PHOTO_SIZE[0], 0), (255, 0, 0))
        path = layout.raw / label / f"{number:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=88)
    put_manifest(layout)


def put_copies(layout: Layout, count: int) -> None:
    """PNGs of 32 px, copies with one pixel changed."""
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for number in range(count):
        picture[0, 0], picture[0, 1] = divmod(number, 256)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "PNG")
        path = layout.raw / f"class-{number % 8}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    put_manifest(layout)


def put_manifest(layout: Layout) -> None:
    """Accepts every file; three fifths are for training."""
    rows = []
    for number, path in enumerate(sorted(path for path in layout.raw.rglob("*") if path.is_file())):
        data = path.read_bytes()
        facts = Facts(sha256_bytes(data), len(data), group=sha256_bytes(data))
        rows.append(
            Row(path.relative_to(layout.raw).as_posix(), path.parent.name, facts, SPLITS[number % len(SPLITS)], False)
        )
    write_manifest(layout.accepted, rows_to_frame(rows))


def base_params() -> Params:
    return load_params(REPOSITORY / "params.yaml")


# Measuring


@dataclass(frozen=True)
class Spent:
    """Seconds, an image or in all, and the largest memory of the process."""

    wall_s: float
    cpu_s: float
    peak_bytes: int = 0

    @property
    def seconds(self) -> tuple[float, float]:
        return self.wall_s, self.cpu_s

    def __sub__(self, other: Spent) -> Spent:
        return Spent(self.wall_s - other.wall_s, self.cpu_s - other.cpu_s)

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s, max(self.peak_bytes, other.peak_bytes))


def medians(turns: Iterable[Spent]) -> Spent:
    return Spent(*(statistics.median(column) for column in zip(*(spent.seconds for spent in turns), strict=True)))


def timed(work: Callable[[], object], count: int) -> Spent:
    """Of work in this process and those that it starts and ends, an image of ``count``."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    work()
    return Spent((time.perf_counter() - wall) / count, (cpu_seconds() - cpu) / count)


def cpu_seconds() -> float:
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, WHOSE))


def each(call: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """On as many threads as there are cores, as cache_features does."""
    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(call, items))


def extract(layout: Layout, engine: EngineName) -> object:
    """The stage in this process, one view."""
    params = base_params()
    features = params.features.model_copy(update={"views": 1, "engine": engine})
    return cache_features.run(layout, features=features, augment=params.augment)


def run_stages(layout: Layout, views: int | str = "auto") -> Spent:
    changes = {"features.views": views}
    return run_stage(layout, "cache_features", changes) + run_stage(layout, "train_head", changes)


def run_stage(layout: Layout, stage: str, changes: dict[str, Any]) -> Spent:
    """A stage in a process of its own, from the start of Python to its end."""
    from ruamel.yaml import YAML

    yaml = YAML()
    values = yaml.load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    yaml.dump(values, layout.params)
    command = (sys.executable, "-c", ONE_STAGE, stage, "--root", str(layout.root))
    start = time.perf_counter()
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    cpu_s, peak = map(float, process.stdout.split()[-2:])
    return Spent(time.perf_counter() - start, cpu_s, int(peak))


# A process inherits its parent's ru_maxrss through exec; VmHWM is its own.
ONE_STAGE = """
import re, resource, sys
from pathlib import Path
from tasks.__main__ import main
code = main()
usage, status = resource.getrusage(resource.RUSAGE_SELF), Path("/proc/self/status")
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) if status.exists() else usage.ru_maxrss
print(usage.ru_utime + usage.ru_stime, peak)
sys.exit(code)
"""


if __name__ == "__main__":
    main()
