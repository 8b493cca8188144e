"""The source task, its training, and what the committed weights are worth."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from benchmarks.transfer import EMBEDDED, Digits, Floats, draw_labelled, extract, load, probe, raw_pixels
from deploy.files import sha256_file
from flows.shards import bring_into
from tasks import pretrain
from tasks.errors import DataError
from tasks.layout import Layout
from tasks.models.depthwise import use_fast_depthwise
from tasks.models.weights import EMBEDDED_DIR, read_weights
from tasks.params import PretrainParams, load_params
from tasks.pretraining.folders import folder_source
from tasks.pretraining.glyphs import (
    UNICODE_FONTS,
    GlyphAtlas,
    GlyphDistortion,
    GlyphSource,
    base_character,
    build_atlas,
    font_code_points,
    thin,
)
from tasks.pretraining.train import HEAD_NAMES, TrainingRecipe, ahead, build_model, train

pytestmark = pytest.mark.xdist_group("pretraining")  # one worker: the fixtures cost more than the tests

NAME = "glyphs_mobilenet_v3_small"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine threads that wait for each other cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def atlas() -> GlyphAtlas:
    return build_atlas(seed=0, max_characters=12, num_invented=4, hands_per_invented=6, max_similarity=0.9)


@pytest.fixture(scope="module")
def digits_and_features() -> tuple[Digits, Floats]:
    weights = read_weights(EMBEDDED, root=Path(), sha256=None)
    digits = load(weights)
    return digits, extract(weights, digits.pictures, depths=4)


def glyph_source(atlas: GlyphAtlas, *, seed: int = 0, images: int = 64) -> GlyphSource:
    return GlyphSource(atlas, GlyphDistortion(), image_px=64, images_per_epoch=images, seed=seed)


def tiny_params(repository: Path, **changes: object) -> PretrainParams:
    params = load_params(repository / "params.yaml").pretrain
    small = {"epochs": 2, "images_per_epoch": 64, "batch_size": 32, "max_characters": 8, "num_invented": 2}
    return params.model_copy(update={**small, **changes})


def test_the_same_seed_draws_the_same_pictures_and_another_seed_does_not(atlas: GlyphAtlas) -> None:
    first, again, other = (next(glyph_source(atlas, seed=seed).training_batches(0, 32)) for seed in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_pictures_are_in_range_and_every_class_is_drawn(atlas: GlyphAtlas) -> None:
    pictures, labels = next(glyph_source(atlas, images=512).training_batches(0, 512))
    assert pictures.shape == (512, 3, 64, 64)
    assert 0 <= float(pictures.min()) < float(pictures.max()) <= 1
    assert set(labels.tolist()) == set(range(16))


def test_no_two_classes_have_the_same_shape(atlas: GlyphAtlas) -> None:
    first_of_each = [int(torch.nonzero(atlas.labels == label)[0]) for label in range(len(atlas.class_names))]
    ink = (atlas.distances[first_of_each, 0] > 0).flatten(1).float()
    ink = ink / ink.norm(dim=1, keepdim=True)
    similarity = ink @ ink.T - torch.eye(len(ink))
    assert float(similarity.max()) < 0.97


def test_no_digit_of_any_kind_is_a_class() -> None:
    digits = "0123456789０１９²³¹𝟎𝟙𝟵①⑨٣߀½Ⅷ"
    assert [digit for digit in digits if base_character(ord(digit)) is not None] == []
    assert base_character(ord("𝔎")) == "K"
    assert base_character(ord("é")) is None


def test_a_font_is_only_asked_for_glyphs_that_it_has() -> None:
    assert ord("Ж") in font_code_points("DejaVuSans")
    assert 0x4E00 not in frozenset().union(*(font_code_points(font) for font in UNICODE_FONTS))
    assert font_code_points("cmsy10") == frozenset(range(0x41, 0x5B))


def test_validation_glyphs_are_never_trained_on(atlas: GlyphAtlas) -> None:
    assert bool(atlas.is_validation.any())
    per_class = torch.bincount(atlas.labels[~atlas.is_validation], minlength=len(atlas.class_names))
    assert int(per_class.min()) >= 1
    seen = sum(len(labels) for _, labels in glyph_source(atlas).validation_batches(8))
    assert seen == int(atlas.is_validation.sum())


def test_thinning_leaves_a_line_of_one_pixel() -> None:
    bar = np.zeros((1, 24, 24), bool)
    bar[0, 8:15, 3:21] = True
    skeleton = thin(bar)[0]
    assert skeleton.sum(0).max() == 1
    assert 8 <= skeleton.sum() <= 18


def test_the_fast_depthwise_gradient_is_the_librarys() -> None:
    torch.manual_seed(0)
    plain = build_model("mobilenet_v3_small", 5).eval()
    fast = build_model("mobilenet_v3_small", 5).eval()
    fast.load_state_dict(plain.state_dict())
    use_fast_depthwise(fast)
    pictures = torch.randn(4, 3, 64, 64)
    for model in (plain, fast):
        model(pictures).square().sum().backward()
    largest = max(float(weight.grad.abs().max()) for weight in plain.parameters() if weight.grad is not None)
    for (name, weight), other in zip(plain.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_working_ahead_keeps_order_and_passes_errors_on() -> None:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number in range(3):
            yield torch.tensor(number), torch.tensor(number)
        raise DataError("a broken picture")

    coming = ahead(batches())
    assert [int(next(coming)[0]) for _ in range(2)] == [0, 1]
    with pytest.raises(DataError, match="broken picture"):
        list(coming)


class KilledError(Exception):
    """Stands for a kill between two epochs."""


def test_a_killed_run_goes_on_to_the_same_bytes(atlas: GlyphAtlas, tmp_path: Path) -> None:
    recipe = TrainingRecipe("mobilenet_v3_small", 3, 32, 1e-3, 0.01, 0.0, 0.1, 0.9, seed=3)
    source = glyph_source(atlas)

    def kill_after_the_second(epoch: int) -> None:
        if epoch == 2:
            raise KilledError

    undisturbed = train(source, recipe, checkpoint_path=tmp_path / "a.safetensors")
    with pytest.raises(KilledError):
        train(source, recipe, checkpoint_path=tmp_path / "b.safetensors", on_epoch=kill_after_the_second)
    resumed_epochs: list[int] = []
    resumed = train(source, recipe, checkpoint_path=tmp_path / "b.safetensors", on_epoch=resumed_epochs.append)
    assert resumed_epochs == [3]
    assert undisturbed.trunk.keys() == resumed.trunk.keys()
    assert all(torch.equal(undisturbed.trunk[key], resumed.trunk[key]) for key in resumed.trunk)
    assert undisturbed.source_accuracy == resumed.source_accuracy


def test_pretraining_writes_weights_that_load_and_a_card_that_describes_them(repository: Path, tmp_path: Path) -> None:
    report = pretrain.run(Layout(tmp_path), seed=0, pretrain=tiny_params(repository, output="out/weights.safetensors"))
    weights = read_weights("file:out/weights.safetensors", root=tmp_path, sha256=report.sha256)
    assert (weights.architecture, weights.size_px, weights.licence) == ("mobilenet_v3_small", 64, "Apache-2.0")
    card = json.loads((tmp_path / "out" / "weights.json").read_text())
    assert card["sha256"] == sha256_file(tmp_path / "out" / "weights.safetensors")
    assert card["source"]["num_characters"] == 8
    assert card["num_images"] == report.num_images == 128
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["weights.json", "weights.safetensors"]


def test_an_image_folder_is_a_source_too(repository: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("dark", "light"):
        (tmp_path / "set" / label).mkdir(parents=True)
        for number in range(20):
            pixels = rng.integers(0, 100, (20, 30, 3)) + (150 if label == "light" else 0)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "set" / label / f"{number}.png")
    params = tiny_params(repository, source="set", output="w.safetensors", batch_size=8, size_px=32)
    report = pretrain.run(Layout(tmp_path), seed=0, pretrain=params)
    card = json.loads((tmp_path / "w.json").read_text())
    assert report.num_classes == 2
    assert card["source"]["classes"] == ["dark", "light"]
    assert card["source"]["images"] + card["source"]["held_out"] == 40
    assert card["licence"] is None


def test_images_in_shards_are_the_same_source(tmp_path: Path) -> None:
    numbers = {"image_px": 16, "val_fraction": 0.4, "hflip": True, "min_area_fraction": 0.5, "seed": 0}
    for label, shade in (("dark", 20), ("light", 200)):
        (tmp_path / label).mkdir()
        for number in range(4):
            Image.new("RGB", (20 + number, 24), (shade + number, 0, 0)).save(tmp_path / label / f"{number}.png")
    files = folder_source(tmp_path, **numbers)
    before = list(files.training_batches(0, 3))
    bring_into(tmp_path, "shards", shard_bytes=2000)
    shards = folder_source(tmp_path, **numbers)
    assert shards.identity == files.identity
    for batch, same in zip(before, shards.training_batches(0, 3), strict=True):
        assert all(torch.equal(*pair) for pair in zip(batch, same, strict=True))


@pytest.mark.parametrize("folders", [(), ("only",)])
def test_a_folder_without_two_classes_is_named(tmp_path: Path, folders: tuple[str, ...]) -> None:
    for folder in folders:
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.png")
    with pytest.raises(DataError, match="at least two"):
        folder_source(tmp_path, image_px=32, val_fraction=0.1, hflip=False, min_area_fraction=0.5, seed=0)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        folder_source(tmp_path / "nowhere", image_px=32, val_fraction=0.1, hflip=False, min_area_fraction=0.5, seed=0)


def test_the_committed_weights_fit_torchvision_exactly_and_are_what_their_card_says() -> None:
    path = EMBEDDED_DIR / f"{NAME}.safetensors"
    card = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert path.stat().st_size <= 4_000_000
    assert card["sha256"] == sha256_file(path)
    model = torchvision.models.mobilenet_v3_small(weights=None)
    missing, unexpected = model.load_state_dict(load_file(path), strict=False)
    assert unexpected == []
    assert {key.split(".")[0] for key in missing} <= set(HEAD_NAMES)


@pytest.mark.parametrize(("per_class", "margin"), [(1, 0.08), (3, 0.06), (10, 0.03)])
def test_the_embedded_backbone_beats_raw_pixels_on_digits_it_never_saw(
    digits_and_features: tuple[Digits, Floats], per_class: int, margin: float
) -> None:
    digits, features = digits_and_features
    splits = [draw_labelled(digits.labels, per_class, seed) for seed in range(3)]
    probed = np.mean([probe(features, digits.labels, *split) for split in splits])
    raw = np.mean([raw_pixels(digits, *split) for split in splits])
    assert probed > raw + margin
