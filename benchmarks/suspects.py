"""How well wrong labels are found: some labels of a folder of photos are flipped, then looked for.

python -m benchmarks.suspects PHOTOS WEIGHTS --architecture mobilenet_v2
"""

import argparse
import time
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score

from deploy.files import sha256_file
from deploy.images import decode_image
from deploy.runtime import open_session
from tasks.data.facts import image_facts
from tasks.data.image_files import list_images
from tasks.export.preprocessing import preprocessing_graph
from tasks.models.architectures import build_network
from tasks.models.weights import read_weights
from tasks.training.confident_learning import rank_labels
from tasks.training.linear_probe import fit_probe, out_of_fold_probabilities

FOLDS = 5
MAX_ITERATIONS = 200


def extract(files: list[Path], weights: Path, architecture: str) -> np.ndarray:
    """Features (N, D) of the frozen backbone."""
    import torch

    pretrained = read_weights(f"file:{weights}", root=Path(), sha256=None)
    facts = {key: getattr(pretrained, key) for key in ("size_px", "crop_fraction", "mean", "std")}
    preprocess = open_session(preprocessing_graph(**facts, opset=20).SerializeToString())
    network = build_network(architecture, depths=1)
    network.load_trunk(pretrained.state)
    features = []
    for file in files:
        (pixels,) = preprocess.run(None, {"images": decode_image(file.read_bytes())[None]})
        with torch.inference_mode():
            features.append(network(torch.from_numpy(pixels)).numpy()[0])
    return np.stack(features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path, help="a folder a class")
    parser.add_argument("weights", type=Path)
    parser.add_argument("--architecture", default="mobilenet_v2")
    parser.add_argument("--flipped", type=float, default=0.05, help="share of the labels")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    images = list_images(arguments.photos).images
    digests = [sha256_file(arguments.photos / image.path) for image in images]
    # The same bytes under two labels are wrong already: validate_data leaves them out.
    images = [image for image, digest in zip(images, digests, strict=True) if digests.count(digest) == 1]
    files = [arguments.photos / image.path for image in images]
    groups = [image_facts(file.read_bytes(), max_pixels=10**8).group for file in files]
    start = time.perf_counter()
    features = extract(files, arguments.weights, arguments.architecture).astype(np.float32)
    print(f"{len(files)} photos, features in {time.perf_counter() - start:.0f} s")
    labels = np.array([image.label for image in images])
    names = np.unique(labels)
    rows = []
    for seed in range(arguments.seeds):
        random = np.random.default_rng(seed)
        flipped = random.choice(len(labels), round(arguments.flipped * len(labels)), replace=False)
        wrong = labels.copy()
        wrong[flipped] = [random.choice(names[names != label]) for label in labels[flipped]]
        start = time.perf_counter()
        path = {"min_log10_c": -4.0, "max_log10_c": 2.0, "num_c": 7, "holdout_above": 5000, "adjustment": 0.0}
        fit = {"seed": 0, "folds": FOLDS, "max_iterations": MAX_ITERATIONS}
        log10_c = fit_probe(features[None], wrong.tolist(), groups, classes=names.tolist(), **path, **fit).log10_c
        judged, classes, probabilities = out_of_fold_probabilities(
            features, wrong.tolist(), groups, log10_c=log10_c, **fit
        )
        assert judged.all()
        ranking = rank_labels(probabilities, np.searchsorted(classes, wrong))
        is_flipped = np.isin(np.arange(len(labels)), flipped)
        found, suspect = is_flipped[ranking.order], ranking.num_suspects
        rows.append(
            (
                found[: len(flipped)].mean(),
                suspect,
                found[:suspect].mean(),
                found[:suspect].sum() / len(flipped),
                average_precision_score(found, -np.arange(len(found))),
                time.perf_counter() - start,
            )
        )
    precision, suspect, of_suspects, recall, average, seconds = np.median(rows, axis=0)
    print(f"{len(flipped)} of {len(labels)} labels flipped, medians of {arguments.seeds} seeds:")
    print(f"precision at {len(flipped)}: {precision:.3f} (a list in random order: {arguments.flipped:.3f})")
    print(f"suspects: {suspect:.0f}, of which flipped {of_suspects:.3f}; of the flipped, found {recall:.3f}")
    print(f"average precision {average:.3f}; {seconds:.1f} s a seed for the path and the folds")


if __name__ == "__main__":
    main()
