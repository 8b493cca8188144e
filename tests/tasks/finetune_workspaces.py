"""Small real workspaces for the tests of fine-tuning: pictures on disk, a manifest, a backbone and a probe."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from deploy.files import sha256_bytes, sha256_file, write_bytes
from deploy.images import decode_image
from deploy.runtime import open_session
from tasks import finetune
from tasks.data.manifest import Facts, Row, Split, read_manifest, rows_to_frame, write_manifest
from tasks.data.views import CENTRE
from tasks.export.preprocessing import preprocessing_graph
from tasks.layout import Layout
from tasks.models.architectures import Network, build_network
from tasks.models.backbone_card import BackboneCard, read_card, write_card
from tasks.models.head import Head, read_head, write_head
from tasks.params import AugmentParams
from tasks.training.augmented import LabelledPixels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


def digit_images(num: int) -> tuple[list[NDArray[np.uint8]], list[str]]:
    """The first real handwritten digits of scikit-learn, 8x8 grey as RGB, and their classes."""
    digits = load_digits()
    grey = (digits.images[:num] / 16 * 255).round().astype(np.uint8)  # (N, 8, 8)
    return [np.repeat(each[:, :, None], 3, axis=2) for each in grey], [str(each) for each in digits.target[:num]]


def splits(num: int, num_val: int) -> list[Split]:
    """The last ones are for validation."""
    return ["train"] * (num - num_val) + ["val"] * num_val


def write_images(
    layout: Layout, images: Sequence[NDArray[np.uint8]], labels: Sequence[str], split: Sequence[Split]
) -> None:
    """PNG files under data/raw and the manifest of accepted images."""
    rows = []
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = layout.raw / label / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        data = path.read_bytes()
        facts = Facts(
            sha256_bytes(data), len(data), image.shape[1], image.shape[0], "RGB", "PNG", 1, 1, group=f"{number}"
        )
        rows.append(Row(path.relative_to(layout.raw).as_posix(), label, facts, split[number], False))
    write_manifest(layout.accepted, rows_to_frame(rows))


def write_backbone(
    layout: Layout, architecture: str, *, size_px: int, depths: int, weights: dict[str, torch.Tensor] | None = None
) -> Network:
    """Weights (random from a fixed seed if none are given), card and preprocessing of a backbone."""
    torch.manual_seed(0)
    network = build_network(architecture, depths=depths)
    if weights:
        network.load_trunk(weights)
    layout.backbone_dir.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in network.trunk_state().items()}, layout.backbone_weights)
    graph = preprocessing_graph(size_px=size_px, crop_fraction=1.0, mean=MEAN, std=STD, opset=20)
    write_bytes(layout.preprocess_onnx, graph.SerializeToString())
    card = BackboneCard(
        source="file:test",
        architecture=architecture,
        weights_sha256=sha256_file(layout.backbone_weights),
        licence=None,
        size_px=size_px,
        crop_fraction=1.0,
        mean=MEAN,
        std=STD,
        depths=network.depths,
        feature_dim=network.feature_dim,
        labels=None,
        preprocessing_sha256=sha256_file(layout.preprocess_onnx),
        trunk_sha256="0" * 64,
        notes=(),
    )
    write_card(layout.backbone_card, card)
    return network


@torch.no_grad()
def embed(layout: Layout, network: Network, paths: Sequence[str]) -> NDArray[np.float32]:
    """Embeddings (N, D) of whole pictures."""
    session = open_session(layout.preprocess_onnx)
    images = [decode_image((layout.raw / path).read_bytes()) for path in paths]
    pixels = [torch.from_numpy(session.run(["pixels"], {"images": image[None]})[0]) for image in images]
    parts = [network(torch.cat(pixels[start : start + 64])) for start in range(0, len(pixels), 64)]
    return torch.cat(parts).numpy()


def write_probe(layout: Layout, network: Network, *, max_iter: int = 200) -> Head:
    """A logistic regression on the training pictures."""
    frame = read_manifest(layout.accepted)
    train = frame[frame["split"] == "train"]
    features = embed(layout, network, train["path"].tolist())
    shift, scale = features.mean(axis=0), float(features.std()) or 1.0
    found = LogisticRegression(C=0.1, max_iter=max_iter).fit((features - shift) / scale, train["label"])
    weight = (found.coef_ / scale).astype(np.float32)
    head = Head(tuple(found.classes_), weight, (found.intercept_ - weight @ shift).astype(np.float32))
    write_head(layout.head_dir, head, {})
    return head


def stage_inputs(
    layout: Layout, augment: AugmentParams
) -> tuple[BackboneCard, Network, Head, LabelledPixels, LabelledPixels]:
    """What the stage finetune reads of a workspace: card, network and probe, training and validation pictures."""
    card, head = read_card(layout.backbone_card), read_head(layout.head_dir)
    sessions, frame = finetune.open_preprocessing(layout, card), read_manifest(layout.accepted)
    train, val = (
        finetune.labelled_pixels(layout, frame[frame["split"] == split], head, sessions, (CENTRE,), augment)
        for split in ("train", "val")
    )
    return card, finetune.load_network(layout, card), head, train, val
