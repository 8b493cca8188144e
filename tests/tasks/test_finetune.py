import csv
import dataclasses
import io
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from deploy.runtime import open_session
from flows.shards import bring_into
from tasks import finetune
from tasks.data.manifest import read_manifest, write_manifest
from tasks.data.views import CENTRE, view_names
from tasks.errors import BackboneError, DataError, ParamsError
from tasks.export.preprocessing import preprocessing_graph
from tasks.finetune import FinetuneReport
from tasks.layout import Layout
from tasks.models.architectures import Network, build_network
from tasks.models.backbone_card import read_card
from tasks.models.head import Head, read_head, write_head
from tasks.models.weights import read_weights
from tasks.params import ScratchParams, load_params
from tasks.training import memory
from tasks.training.augmented import LabelledPixels, PixelSource
from tasks.training.boundary import CachedBoundary, RecomputedBoundary, open_boundary
from tasks.training.checkpoint import Checkpoint, CheckpointFile
from tasks.training.ema import Ema
from tasks.training.logit_adjustment import class_shift
from tasks.training.memory import is_out_of_memory
from tasks.training.schedule import (
    EPOCHS_ABOVE,
    MIN_STEPS,
    layer_group_learning_rates,
    recipe_for,
    stage_length,
    stage_shape,
    warmup_cosine,
)
from tasks.training.selection import best_temperature, compare, judge, negative_log_likelihood
from tasks.training.staged import EpochRecord, deterministic_torch, embeddings_of, fine_tune, flop_per_image
from tasks.training.tuner import (
    SGD_MOMENTUM,
    DivergedError,
    Pace,
    StageTuner,
    StandardisedHead,
    copied,
    frozen_digest,
    interpolated,
    put,
    trainable_tensors,
)
from tests.tasks.finetune_workspaces import (
    MEAN,
    STD,
    digit_images,
    embed,
    splits,
    stage_inputs,
    with_cuda,
    write_backbone,
    write_images,
    write_probe,
)

NUM_IMAGES, NUM_VAL, SIZE_PX = 220, 70, 32
ONE_BATCH, NUM_JUDGES = 60, 300
"""Training pictures of a stage that takes one step an epoch; validation pictures from which on an epoch is picked."""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace as train_head leaves it: real digits, a small real network, its probe."""
    layout = Layout(tmp_path_factory.mktemp("digits"))
    images, labels = digit_images(NUM_IMAGES)
    write_images(layout, images, labels, splits(NUM_IMAGES, NUM_VAL))
    network = write_backbone(layout, "squeezenet1_1", size_px=SIZE_PX, depths=2)
    write_probe(layout, network)
    return layout.root


@pytest.fixture
def layout(digits: Path, tmp_path: Path) -> Layout:
    """A copy of it that a test may change."""
    shutil.copytree(digits, tmp_path / "workspace")
    return Layout(tmp_path / "workspace")


@pytest.fixture(scope="module")
def judges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with as many validation pictures as it takes to pick an epoch, and few others."""
    layout = Layout(tmp_path_factory.mktemp("judges"))
    num = ONE_BATCH + NUM_JUDGES
    write_images(layout, *digit_images(num), splits(num, NUM_JUDGES))
    write_probe(layout, write_backbone(layout, "squeezenet1_1", size_px=SIZE_PX, depths=2))
    return layout.root


def run(layout: Layout, repository: Path, **changes: Any) -> FinetuneReport:
    """The stage with params.yaml's numbers, but short and brisk."""
    params = load_params(repository / "params.yaml")
    brisk = {"epochs": 4, "learning_rate": 2e-3, "views": 2, **changes}
    return finetune.run(
        layout, seed=params.seed, augment=params.augment, finetune=params.finetune.model_copy(update=brisk)
    )


def facts(layout: Layout) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((layout.finetuned_dir / "finetuned.json").read_text())
    return values


# Schedule


@given(st.integers(1, 40), st.floats(1e-6, 1.0), st.floats(0.01, 1.0))
def test_learning_rates_never_fall_towards_the_head(num_groups: int, base_lr: float, layer_decay: float) -> None:
    rates = layer_group_learning_rates(num_groups, base_lr, layer_decay)
    assert len(rates) == num_groups
    assert rates == sorted(rates)
    assert rates[-1] == base_lr


def test_a_layer_decay_outside_0_to_1_is_refused() -> None:
    with pytest.raises(ParamsError, match=r"layer_decay is 1\.5"):
        layer_group_learning_rates(3, 1e-3, 1.5)


@given(st.integers(1, 500), st.floats(0, 1))
def test_the_schedule_rises_once_falls_once_and_never_stops_learning(steps: int, warmup_fraction: float) -> None:
    factors = [warmup_cosine(step, steps=steps, warmup_fraction=warmup_fraction) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = int(np.argmax(factors))
    assert factors[peak] == 1
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


def test_more_images_take_fewer_epochs_but_never_fewer_than_the_least_steps() -> None:
    def length(num_images: int, **changes: Any) -> Any:
        settings = {"batch_size": 32, "epochs": "auto", "length_factor": 1.0, "max_steps": 10**9}
        return stage_length(num_images=num_images, affordable_steps=10**9, **{**settings, **changes})

    assert length(40).steps >= MIN_STEPS
    assert [length(num).epochs for num in (499, 1_170, 6_000)] == [20, 10, 6]
    assert length(50_000).epochs == EPOCHS_ABOVE
    assert length(1_170, length_factor=0.5).epochs == 5
    assert length(1_170, epochs=2).steps == 2 * math.ceil(1_170 / 32)


def test_the_tighter_limit_cuts_a_stage_short_and_is_named() -> None:
    settings: dict[str, Any] = {"num_images": 320, "batch_size": 32, "epochs": 10, "length_factor": 1.0}
    assert stage_length(**settings, max_steps=45, affordable_steps=60).limited_by == "max_steps"
    cut = stage_length(**settings, max_steps=60, affordable_steps=45)
    assert (cut.limited_by, cut.steps, cut.epochs) == ("max_tflop", 45, 5)
    assert stage_length(**settings, max_steps=100, affordable_steps=100).limited_by is None


def test_every_family_has_the_recipe_that_suits_it() -> None:
    assert recipe_for("mobilenet_v3_small").learning_rate == 3e-4
    assert recipe_for("resnet50").optimiser == "sgd"
    assert recipe_for("vit_b_16").learning_rate == 5e-5
    assert recipe_for("squeezenet1_1").optimiser == "adamw"
    rates = [recipe_for(each).hardening_rate for each in ("squeezenet1_1", "mobilenet_v2", "resnet50")]
    assert rates == [1e-3, 3e-4, 3e-4]


def test_the_stem_is_in_no_stage() -> None:
    groups = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3", "@relu"), ("layer4",))
    starts = {name: stage_shape(name).first_group(groups) for name in ("top", "rest", "layer2", "layer3")}
    assert starts == {"top": 4, "rest": 1, "layer2": 2, "layer3": 3}
    assert stage_shape("rest").first_group(groups[:2]) == 1
    for name in ("conv1", "layer5", "@relu2"):
        with pytest.raises(ParamsError, match=rf"no layer group.*'{name}'.*: layer1; layer2; layer3; layer4\."):
            stage_shape(name).first_group(groups)


# The average, the interpolation, the head


def test_the_average_follows_its_formula() -> None:
    weight = torch.zeros(1)
    ema = Ema({"w": weight}, decay=0.5)
    expected = 0.0
    for step in range(1, 30):
        weight.fill_(float(step))
        ema.update({"w": weight})
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert ema.average["w"].item() == pytest.approx(expected, rel=1e-5)


def test_interpolation_goes_from_start_to_end() -> None:
    start, end = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
    assert interpolated(start, end, 0.25)["w"].tolist() == [1.5, 3.0]
    assert interpolated(start, end, 1.0)["w"].tolist() == end["w"].tolist()


def test_a_standardised_head_is_the_same_function() -> None:
    generator = np.random.default_rng(0)
    head = Head(
        ("a", "b", "c"), generator.normal(size=(3, 5)).astype(np.float32), generator.normal(size=3).astype(np.float32)
    )
    features = (generator.normal(size=(40, 5)) * 7 + 3).astype(np.float32)
    inside = StandardisedHead(head, torch.from_numpy(features))
    with torch.no_grad():
        np.testing.assert_allclose(inside(torch.from_numpy(features)).numpy(), head.logits(features), atol=2e-4)
    np.testing.assert_allclose(inside.folded().logits(features), head.logits(features), atol=2e-4)


# Selection


def test_the_temperature_undoes_overconfidence() -> None:
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(5_000, 4))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    labels = np.array([generator.choice(4, p=each) for each in probabilities])
    assert best_temperature(logits * 3, labels) == pytest.approx(3, rel=0.1)


def test_confidence_alone_makes_no_candidate_better() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(3, size=200)
    logits = generator.normal(size=(200, 3)) + 2 * np.eye(3)[labels]
    before, after = judge(logits, labels), judge(logits * 5, labels)
    assert after.mean_nll == pytest.approx(before.mean_nll, abs=1e-3)
    assert not compare(before, before).better


def test_a_gain_must_exceed_its_standard_error() -> None:
    nll = np.random.default_rng(0).uniform(0.5, 1.5, size=100)
    start = judge(np.zeros((100, 2)), np.zeros(100, np.int64))
    before = dataclasses.replace(start, nll=nll)
    noise = np.random.default_rng(1).normal(size=100)
    noise -= noise.mean()
    for gain, better in ((0.05, False), (0.2, True), (-0.2, False)):
        assert compare(before, dataclasses.replace(start, nll=nll - gain + noise)).better is better


def test_likelihood_of_certain_error_is_bounded() -> None:
    assert negative_log_likelihood(np.array([[1e6, 0.0]]), np.array([1]))[0] == pytest.approx(-math.log(1e-12))


# The frozen boundary


def pixel_source(layout: Layout, num: int, views: tuple[str, ...], size_px: int = SIZE_PX) -> PixelSource:
    rows = read_manifest(layout.accepted).iloc[:num]
    session = open_session(
        preprocessing_graph(size_px=size_px, crop_fraction=1.0, mean=MEAN, std=STD, opset=20).SerializeToString()
    )
    return PixelSource(
        files=[layout.raw / path for path in rows["path"]],
        shas=rows["sha256"].tolist(),
        views=views,
        whole=session,
        crop=session,
        min_area_fraction=0.5,
        hflip=False,
        max_pixels=1_000,
        workers=2,
    )


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", pytest.param("swin_t", marks=pytest.mark.slow)])
def test_kept_and_recomputed_activations_agree(layout: Layout, tmp_path: Path, architecture: str) -> None:
    network = small_network(architecture)
    group = network.num_groups - 1
    pixels = pixel_source(layout, 5, view_names(3, hflip=False))
    work: dict[str, Any] = {"directory": tmp_path, "batch_size": 4, "what": "test"}
    cached, num_bytes = open_boundary(network, group, pixels, passes=3, max_bytes=10**9, **work)
    recomputed, none = open_boundary(network, group, pixels, passes=3, max_bytes=0, **work)
    seldom, _ = open_boundary(network, group, pixels, passes=2, max_bytes=10**9, **work)
    assert isinstance(seldom, RecomputedBoundary), "three views are kept only where they are seen three times"
    assert isinstance(cached, CachedBoundary)
    assert isinstance(recomputed, RecomputedBoundary)
    assert (num_bytes, none) == (cached.maps.nbytes, 0)
    batches = [[(4, 2), (0, 0)], [(1, 1)]]
    for one, other in zip(cached.batches(batches), recomputed.batches(batches), strict=True):
        with torch.no_grad():
            embeddings = [network.forward_from(boundary, group) for boundary in (one, other)]
        torch.testing.assert_close(*embeddings, rtol=5e-3, atol=5e-3)
        if len(embeddings[0]) > 1:
            assert float((embeddings[0][0] - embeddings[0][1]).abs().max()) > 0.1, "pictures make a difference"
    assert not list(tmp_path.glob("*.tmp")), "the file of activations has no name to leave behind"


@dataclasses.dataclass(frozen=True)
class CountedFile:
    """A picture that takes note of being read, as it is each time before it is decoded."""

    path: Path
    reads: list[Path]

    def read_bytes(self) -> bytes:
        self.reads.append(self.path)
        return self.path.read_bytes()


def test_a_picture_whose_views_are_kept_is_decoded_once(layout: Layout, tmp_path: Path) -> None:
    network, reads = small_network("mobilenet_v3_small"), list[Path]()
    pixels = pixel_source(layout, 5, view_names(3, hflip=False))
    files = [layout.raw / path for path in read_manifest(layout.accepted)["path"].iloc[:5]]
    pixels = dataclasses.replace(pixels, files=[CountedFile(path, reads) for path in files])
    work: dict[str, Any] = {"directory": tmp_path, "batch_size": 6, "what": "test"}
    source, _ = open_boundary(network, network.num_groups - 1, pixels, passes=3, max_bytes=10**9, **work)
    assert source.kind == "cached"
    assert sorted(reads) == sorted([files[0], *files]), "the first one once more, for the size of what is kept"


def test_on_a_cpu_eight_pictures_of_224_px_go_through_the_frozen_part_at_once_and_are_judged(layout: Layout) -> None:
    """And answer what they answer all together."""
    network, sizes = small_network("mobilenet_v3_small"), list[int]()
    group, pixels = network.num_groups - 1, pixel_source(layout, 10, ("centre",), size_px=224)
    (images,) = (torch.from_numpy(each) for each in pixels.batches([[(row, 0) for row in range(10)]]))
    with torch.no_grad():
        together, embeddings = network.forward_until(images, group), network(images)
    network.trunk.features[0].register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    (boundary,) = RecomputedBoundary(network, group, pixels).batches([[(row, 0) for row in range(10)]])
    judged = embeddings_of(network, 0, RecomputedBoundary(network, 0, pixels), batch_size=10)
    assert sizes == [8, 2, 8, 2]
    assert boundary.maps.is_contiguous(memory_format=torch.channels_last)
    for found, expected in ((boundary.maps, together.maps), (boundary.pooled, together.pooled), (judged, embeddings)):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        assert float((expected[0] - expected[9]).abs().max()) > 0.1, "pictures make a difference"


def small_network(architecture: str) -> Network:
    """With the embedded weights where they are of that architecture, else random ones; pictures make a difference."""
    torch.manual_seed(0)
    network = build_network(architecture, depths=2)
    if architecture == "mobilenet_v3_small":
        network.load_trunk(read_weights("embedded:glyphs_mobilenet_v3_small", root=Path(), sha256=None).state)
    return network.to(memory_format=torch.channels_last)


def test_crops_are_seen_and_centre_is_the_plain_picture(layout: Layout) -> None:
    pixels = pixel_source(layout, 3, ("centre", "crop-1"))
    centre, crop = pixels.pixels(0, [0, 1])
    assert centre.shape == crop.shape == (3, SIZE_PX, SIZE_PX)
    assert not np.array_equal(centre, crop)
    batches = list(pixels.batches([[(0, 0), (1, 0)], [(2, 0)], [(0, 1)], [(0, 0)]]))
    assert [len(batch) for batch in batches] == [2, 1, 1, 1]
    np.testing.assert_array_equal(batches[3][0], centre)


# Checkpoints


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path / "run" / "c.safetensors", "digest")
    tensors = {"now/w": torch.arange(6.0).reshape(2, 3), "optimiser/0/step": torch.tensor(7.0)}
    file.save(Checkpoint({"epoch": 3, "best_nll": None}, tensors))
    loaded = file.load()
    assert loaded is not None
    assert loaded.position == {"epoch": 3, "best_nll": None}
    assert {name: tensor.tolist() for name, tensor in loaded.tensors.items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }
    file.remove()
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_run_or_a_broken_one_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    CheckpointFile(path, "one").save(Checkpoint({}, {"w": torch.zeros(1)}))
    assert CheckpointFile(path, "other").load() is None
    path.write_bytes(path.read_bytes()[:40])
    assert CheckpointFile(path, "one").load() is None


# The stage


def test_a_stage_that_helps_is_kept_and_only_moves_what_it_may(layout: Layout, repository: Path) -> None:
    report = run(layout, repository)
    assert "top" in report.kept
    assert facts(layout) == json.loads(json.dumps(dataclasses.asdict(report)))
    for record, rate in zip(report.stages, (2e-3, 4e-4), strict=True):
        rates = [rate * 0.8**below for below in range(len(record.groups), -1, -1)]
        assert record.learning_rates == pytest.approx(rates), "they fall from the head on"
    before, after = (
        load_file(path) for path in (layout.backbone_weights, layout.finetuned_dir / "network.safetensors")
    )
    assert before.keys() == after.keys()
    stem = {name for name in before if name.startswith("features.0.")}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert stem
    assert moved
    assert not stem & moved
    assert not layout.checkpoints_dir.exists()

    # What was written is what was judged: the same likelihood from the files alone.
    assert report.val_nll_after is not None
    assert report.val_nll_before is not None
    assert report.val_nll_after < report.val_nll_before
    card = read_card(layout.backbone_card)
    network = build_network(card.architecture, depths=card.depths)
    network.load_trunk(after)
    head = read_head(layout.finetuned_dir)
    rows = read_manifest(layout.accepted).query("split == 'val'")
    labels = np.array([head.labels.index(label) for label in rows["label"]])
    logits = head.logits(embed(layout, network, rows["path"].tolist()))
    assert negative_log_likelihood(logits, labels).mean() == pytest.approx(report.val_nll_after, rel=1e-3)


@pytest.mark.parametrize("num_val", [NUM_JUDGES - 1, NUM_JUDGES])
def test_what_a_stage_keeps_is_the_best_of_the_way_from_its_start_to_the_average_of_its_steps(
    judges: Path, tmp_path: Path, repository: Path, num_val: int
) -> None:
    """At the best epoch where enough pictures tell which one that is, else at the end: here another one."""
    layout = Layout(judges)
    params = load_params(repository / "params.yaml")
    card, network, probe, train, val = stage_inputs(layout, params.augment)
    pixels = dataclasses.replace(val.pixels, files=val.pixels.files[:num_val], shas=val.pixels.shas[:num_val])
    val = LabelledPixels(pixels, val.labels[:num_val])
    weights = dict(network.trunk.named_parameters())
    start = copied(weights)
    ema, averages = Ema(weights, params.finetune.ema_decay), list[dict[str, torch.Tensor]]()

    def follow(_: Sequence[EpochRecord]) -> None:
        ema.update(weights)
        averages.append(copied(ema.average))

    settings = params.finetune.model_copy(update={"epochs": 8, "learning_rate": 1e-3, "batch_size": ONE_BATCH})
    with deterministic_torch(1):
        tuned = fine_tune(
            network,
            probe,
            train=train,
            val=val,
            stages=("top",),
            settings=finetune.tuning_settings(card, 0, settings, "cpu"),
            checkpoints=CheckpointFile(tmp_path / "c.safetensors", "digest"),
            on_epoch=follow,
        )
    (record,) = tuned.records
    best = int(np.argmin([each.val_nll for each in tuned.curve]))
    assert record.steps == len(averages) == 8
    assert best < 7, "the best epoch is not the last"
    taken = best if num_val == NUM_JUDGES else 7
    assert record.kept
    assert record.alpha is not None
    for name, tensor in interpolated(start, averages[taken], record.alpha).items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-7, msg=name)

    top, found = network.num_groups - 1, {}
    (images,) = pixels.batches([[(row, 0) for row in range(num_val)]])
    with torch.no_grad():
        boundary = network.forward_until(torch.from_numpy(images), top)
        for alpha in (0.25, 0.5, 0.75, 1.0):
            put(weights, interpolated(start, averages[taken], alpha))
            head = on_the_way(probe, tuned.head, alpha / record.alpha)
            logits = head.logits(network.forward_from(boundary, top).numpy())
            found[alpha] = judge(logits, val.labels).mean_nll
    assert record.alpha == min(found, key=lambda alpha: found[alpha])
    assert record.val_nll_after == pytest.approx(found[record.alpha], rel=1e-4)
    assert tuned.curve[taken].val_nll == pytest.approx(found[1.0], rel=1e-4)


def on_the_way(start: Head, other: Head, share: float) -> Head:
    """The head at so many times the way from one to the other."""
    weight, bias = start.weight + share * (other.weight - start.weight), start.bias + share * (other.bias - start.bias)
    return Head(start.labels, weight, bias)


def test_an_adjusted_probe_is_tuned_without_its_adjustment_and_has_it_again_in_the_end(
    layout: Layout, repository: Path
) -> None:
    head = read_head(layout.head_dir)
    rows = read_manifest(layout.accepted)
    shift = class_shift([int(((rows["split"] == "train") & (rows["label"] == each)).sum()) for each in head.labels], 1)
    adjusted = dataclasses.replace(head, bias=head.bias + 20 * shift)
    write_head(layout.head_dir, adjusted, {"logit_adjustment": 20.0})
    report = run(layout, repository, stages=("top",))
    assert report.kept == ("top",)
    assert report.logit_adjustment == 20
    val = rows[rows["split"] == "val"]
    labels = np.array([head.labels.index(label) for label in val["label"]])
    card = read_card(layout.backbone_card)
    network = build_network(card.architecture, depths=card.depths)

    def nll(head: Head, weights: Path) -> float:
        network.load_trunk(load_file(weights))
        logits = head.logits(embed(layout, network, val["path"].tolist()))
        return float(negative_log_likelihood(logits, labels).mean())

    assert nll(head, layout.backbone_weights) == pytest.approx(report.val_nll_before, rel=1e-3)
    ships = read_head(layout.finetuned_dir)
    plain = dataclasses.replace(ships, bias=ships.bias - 20 * shift)
    assert nll(plain, layout.finetuned_dir / "network.safetensors") == pytest.approx(report.val_nll_after, rel=1e-3)


def test_noise_for_labels_leaves_the_probe_as_it_is(layout: Layout, repository: Path) -> None:
    frame = read_manifest(layout.accepted)
    train = frame["split"] == "train"
    frame.loc[train, "label"] = np.random.default_rng(0).permutation(frame.loc[train, "label"].to_numpy())
    write_manifest(layout.accepted, frame)
    report = run(layout, repository)
    assert report.kept == ()
    assert report.reason == "no stage was kept"
    assert [record.kept for record in report.stages] == [False, False]
    assert report.stages[0].reason.startswith("dropped: ")
    assert report.stages[1].reason == "not tried: stage top was not kept"
    assert [path.name for path in layout.finetuned_dir.iterdir()] == ["finetuned.json"]


def test_batchnorm_statistics_and_frozen_groups_do_not_move() -> None:
    network = small_network("mobilenet_v3_small")
    head = blank_head(network)
    length = stage_length(num_images=16, batch_size=8, epochs=2, length_factor=1, max_steps=100, affordable_steps=100)
    rates = layer_group_learning_rates(network.num_groups + 1, 1e-2, 0.8)[1:]
    pace = Pace(recipe_for("mobilenet_v3_small"), rates, 0.01, length, warmup_fraction=0.1, clip_norm=1, ema_decay=0.9)
    tuner = StageTuner(network, 1, head, pace)
    before, digest = copied(network.trunk_state()), frozen_digest(network, 1)
    with torch.no_grad():
        batches = [network.forward_until(torch.randn(8, 3, SIZE_PX, SIZE_PX), 1) for _ in range(2)]
    losses = [tuner.run_epoch(batches, [torch.tensor([0, 1] * 4)] * 2) for _ in range(length.epochs)]
    after = network.trunk_state()
    assert tuner.step == length.steps == 4
    assert all(math.isfinite(loss) for loss in losses)
    assert frozen_digest(network, 1) == digest
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name.removeprefix("trunk.") for name in tuner.tensors if name.startswith("trunk.")}
    assert not any("running" in name or name.startswith("features.0.") for name in moved)


def after_one_step(network: Network, pace: Pace) -> tuple[StageTuner, dict[str, torch.Tensor]]:
    """A stage above the stem that took a step without weight decay, and how that moved each weight."""
    head = blank_head(network)
    torch.nn.init.normal_(head.weight)
    tuner = StageTuner(network, 1, head, dataclasses.replace(pace, weight_decay=0.0))
    before = copied(tuner.tensors)
    with torch.no_grad():
        boundary = network.forward_until(torch.randn(8, 3, SIZE_PX, SIZE_PX), 1)
    tuner.run_epoch([boundary], [torch.tensor([0, 1] * 4)])
    return tuner, {name: tensor.detach() - before[name] for name, tensor in tuner.tensors.items()}


def test_each_layer_group_moves_at_its_own_rate_and_the_head_fastest() -> None:
    """AdamW's first step moves a weight by its rate, however large its gradient."""
    network = small_network("mobilenet_v3_small")
    pace = dataclasses.replace(pace_of(network), recipe=recipe_for("mobilenet_v3_small"))
    tuner, moves = after_one_step(network, pace)
    owners = {id(each): index for index in range(1, network.num_groups) for each in network.group_parameters(index)}
    farthest = dict.fromkeys(range(1, network.num_groups + 1), 0.0)
    for name, tensor in tuner.tensors.items():
        owner = owners.get(id(tensor), network.num_groups)
        farthest[owner] = max(farthest[owner], float(moves[name].abs().max()))
    rates = [1e-3 * 0.8**below for below in range(network.num_groups - 1, -1, -1)]
    assert list(farthest.values()) == pytest.approx(rates, rel=0.02)


def test_the_gradient_of_a_step_is_no_longer_than_its_limit() -> None:
    """That of all layer groups and the head together; SGD's first step is 1 + momentum times as long."""
    rate, lengths = 0.1, []
    for clip_norm in (1e9, 0.01):
        network = small_network("mobilenet_v3_small")
        rates = [rate] * network.num_groups
        _, moves = after_one_step(
            network, dataclasses.replace(pace_of(network), clip_norm=clip_norm, learning_rates=rates)
        )
        moved = torch.cat([move.flatten() for move in moves.values()])
        lengths.append(float(moved.norm()) / (rate * (1 + SGD_MOMENTUM)))
    assert lengths[0] > 0.1
    assert lengths[1] == pytest.approx(0.01, rel=0.01)


def test_a_stage_whose_gradients_are_clipped_to_nothing_moves_nothing_and_is_dropped(
    layout: Layout, repository: Path
) -> None:
    changes: dict[str, Any] = {"stages": ("top",), "views": 1, "max_steps": 5, "precision": "float32"}
    (record,) = run(layout, repository, **changes, clip_norm=1e-20, weight_decay=0.0).stages
    assert record.steps == 5
    assert record.val_nll_after == record.val_nll_before
    assert record.reason.startswith("dropped: validation likelihood rose by 0.0000 nats a picture")


def blank_head(network: Network) -> StandardisedHead:
    dim = network.feature_dim
    return StandardisedHead(
        Head(("a", "b"), np.zeros((2, dim), np.float32), np.zeros(2, np.float32)), torch.randn(3, dim)
    )


def test_the_frozen_digest_sees_a_moved_weight_and_a_moved_statistic() -> None:
    network = small_network("mobilenet_v3_small")
    head = blank_head(network)
    top = network.num_groups - 1
    before = frozen_digest(network, top)
    tensors = trainable_tensors(network, top, head)
    assert all(name.startswith(("trunk.features.9", "trunk.features.1", "head.")) for name in tensors)
    with torch.no_grad():
        tensors["trunk.features.12.0.weight"].add_(1)
    assert frozen_digest(network, top) == before
    statistic = dict(network.trunk.named_buffers())["features.12.1.running_mean"]
    statistic.add_(1)
    assert frozen_digest(network, top) != before
    statistic.sub_(1)
    with torch.no_grad():
        network.group_parameters(0)[0].add_(1)
    assert frozen_digest(network, top) != before


def spoil_a_weight(network: Network) -> None:
    with torch.no_grad():
        network.group_parameters(network.num_groups - 2)[0].add_(1)


def let_statistics_follow(network: Network) -> None:
    norms = [each for each in network.trunk.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    norms[-1].train()


@pytest.mark.parametrize("spoil", [spoil_a_weight, let_statistics_follow])
def test_a_stage_in_which_something_frozen_moved_is_an_error(
    layout: Layout, repository: Path, spoil: Callable[[Network], None]
) -> None:
    """A weight below the boundary, or the statistics of a BatchNorm above it, which somebody let train."""
    params, network = load_params(repository / "params.yaml"), small_network("mobilenet_v3_small")
    card = dataclasses.replace(read_card(layout.backbone_card), architecture="mobilenet_v3_small")
    pictures = LabelledPixels(pixel_source(layout, 8, (CENTRE,)), np.array([0, 1] * 4))
    work: dict[str, Any] = {"train": pictures, "val": pictures, "stages": ("top",)}
    work["settings"] = finetune.tuning_settings(card, 0, params.finetune.model_copy(update={"epochs": 2}), "cpu")
    work["checkpoints"] = CheckpointFile(layout.checkpoints_dir / "c.safetensors", "digest")
    head = blank_head(network).folded()
    with deterministic_torch(1), pytest.raises(RuntimeError, match="stage top moved what it had frozen"):
        fine_tune(network, head, **work, on_epoch=lambda curve: spoil(network) if len(curve) == 1 else None)


@pytest.mark.slow
def test_training_is_the_same_whether_activations_are_kept_or_computed_again(layout: Layout, repository: Path) -> None:
    kept = run(layout, repository, stages=("top",))
    weights = load_file(layout.finetuned_dir / "network.safetensors")
    computed = run(layout, repository, stages=("top",), boundary_cache_gb=0.0)
    again = load_file(layout.finetuned_dir / "network.safetensors")
    assert [kept.stages[0].boundary, computed.stages[0].boundary] == ["cached", "recomputed"]
    assert computed.stages[0].val_nll_after == pytest.approx(kept.stages[0].val_nll_after, rel=0.02)
    start = load_file(layout.backbone_weights)
    moves = [torch.cat([(each[name] - start[name]).flatten() for name in start]) for each in (weights, again)]
    assert (
        torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.9
    )  # AdamW turns small gradients' noise into full steps


def test_training_in_bfloat16_learns_what_float32_learns_and_hands_on_float32(layout: Layout, repository: Path) -> None:
    """The end within 2 %, every epoch within 5 %: the layers' outputs differ by about 1 %."""
    changes: dict[str, Any] = {"stages": ("top",), "views": 1, "epochs": 6, "device": "cpu"}
    reports, curves, ends = [], [], []
    for precision in ("float32", "bfloat16"):
        report = run(layout, repository, precision=precision, **changes)
        assert report.compute is not None
        assert (report.compute.device, report.compute.precision) == ("cpu", precision)
        rows = list(csv.DictReader(io.StringIO(layout.epochs.read_text())))
        reports.append(report)
        curves.append([[float(row[name]) for row in rows] for name in ("train_loss", "val_nll")])
        ends.append(load_file(layout.finetuned_dir / "network.safetensors"))
    single, half = reports
    assert single.kept == half.kept == ("top",)
    assert single.val_nll_before == half.val_nll_before, "what is judged is judged in float32"
    assert half.val_nll_after == pytest.approx(single.val_nll_after, rel=0.02)
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.05)
    assert curves[1] != curves[0], "steps were not taken in bfloat16"
    before = load_file(layout.backbone_weights)
    frozen = {name for name in before if torch.equal(before[name], ends[0][name])}
    assert frozen == {name for name in before if torch.equal(before[name], ends[1][name])}
    assert 0 < len(frozen) < len(before)
    assert {tensor.dtype for tensor in ends[1].values()} == {torch.float32}


def test_a_network_that_trains_in_bfloat16_is_judged_in_float32(layout: Layout) -> None:
    pixels = pixel_source(layout, 5, (CENTRE,))
    network = small_network("squeezenet1_1")
    source = RecomputedBoundary(network, 0, pixels)
    expected = embeddings_of(network, 0, source, 4)
    network.precision = torch.bfloat16
    assert torch.equal(embeddings_of(network, 0, source, 4), expected)
    with torch.no_grad():
        trained_on = network.forward_from(next(source.batches([[(0, 0)]])), 0)
    assert 1e-4 < float((trained_on - expected[:1]).norm() / expected[:1].norm()) < 0.05


@with_cuda
def test_a_gpu_learns_what_the_cpu_learns(layout: Layout, repository: Path) -> None:
    curves = []
    for device in ("cpu", "cuda"):
        report = run(layout, repository, device=device, precision="float32", stages=("top",))
        assert report.compute is not None
        assert report.compute.device == device
        rows = list(csv.DictReader(io.StringIO(layout.epochs.read_text())))
        curves.append([[float(row[name]) for row in rows] for name in ("train_loss", "val_nll")])
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.02)


def test_too_few_validation_images_or_switched_off_means_no_stage(layout: Layout, repository: Path) -> None:
    run(layout, repository, epochs=1)
    for changes, reason in (
        ({"min_val_images": 1_000}, "70 validation images cannot judge a stage: finetune.min_val_images is 1000"),
        ({"enabled": False}, "finetune.enabled is false"),
        ({"stages": ()}, "finetune.stages is empty"),
    ):
        report = run(layout, repository, **changes)
        assert (report.kept, report.stages, report.reason) == ((), (), reason)
        assert [path.name for path in layout.finetuned_dir.iterdir()] == ["finetuned.json"]
        assert facts(layout)["kept"] == []


def test_a_stage_that_costs_too_much_is_cut_short_or_left_out(layout: Layout, repository: Path) -> None:
    assert run(layout, repository, max_steps=7, stages=("top",)).stages[0].steps == 7
    report = run(layout, repository, max_tflop=1e-6)
    assert report.stages[0].reason == "not tried: finetune.max_tflop affords 0 steps; 20 is the least"
    assert report.stages[0].steps == 0


@pytest.mark.parametrize("architecture", ["mobilenet_v3_small", "regnet_y_400mf", "resnet18"])
def test_a_step_of_all_layers_costs_three_times_the_forward_pass(architecture: str) -> None:
    """In groups and depthwise, too, where torch's own count of a gradient was up to forty times that."""
    network = build_network(architecture, depths=1)
    head = blank_head(network)
    pixels = torch.randn(1, 3, 64, 64)

    class OnePicture:
        def batches(self, batches: Sequence[Any]) -> Any:  # noqa: ARG002
            yield network.forward_until(pixels, 0)

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(pixels)
    assert 2.5 < flop_per_image(network, 0, head, OnePicture()) / counter.get_total_flops() < 3.1


def test_what_is_frozen_is_not_kept_for_more_views_than_the_limit_of_work_lets_training_see(
    layout: Layout, repository: Path
) -> None:
    """Ten epochs of four views, of which the limit affords less than three."""
    changes: dict[str, Any] = {"stages": ("top",), "views": 4, "epochs": 10, "batch_size": 5}
    (record,) = run(layout, repository, **changes, max_tflop=1e-3).stages
    assert (record.boundary, record.limited_by) == ("recomputed", "max_tflop")
    assert record.steps < 4 * (NUM_IMAGES - NUM_VAL) / 5


def test_a_diverging_stage_is_dropped(layout: Layout, repository: Path) -> None:
    report = run(layout, repository, learning_rate=1e30, warmup_fraction=0.0)
    assert report.kept == ()
    assert "the loss is" in report.stages[0].reason


def test_classes_that_the_probe_does_not_know_are_left_out_of_judging(layout: Layout, repository: Path) -> None:
    head = read_head(layout.head_dir)
    write_head(layout.head_dir, Head(head.labels[1:], head.weight[1:], head.bias[1:]), {})
    report = run(layout, repository, epochs=1, min_val_images=2)
    assert report.num_val < NUM_VAL
    assert report.num_train < NUM_IMAGES - NUM_VAL


def test_images_in_shards_make_the_same_network(layout: Layout, repository: Path) -> None:
    run(layout, repository, epochs=1)
    made = {path.name: path.read_bytes() for path in layout.finetuned_dir.iterdir()}
    bring_into(layout.raw, "shards", shard_bytes=10_000)
    run(layout, repository, epochs=1)
    assert {path.name: path.read_bytes() for path in layout.finetuned_dir.iterdir()} == made


def test_a_changed_or_missing_picture_is_named(layout: Layout, repository: Path) -> None:
    path = layout.raw / read_manifest(layout.accepted)["path"].iloc[0]
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=f"{path.name} has changed since it was indexed"):
        run(layout, repository)
    path.unlink()
    with pytest.raises(DataError, match=f"{path.name} was indexed and is gone"):
        run(layout, repository)


def test_other_weights_than_the_cards_are_refused(layout: Layout, repository: Path) -> None:
    layout.backbone_weights.write_bytes(layout.backbone_weights.read_bytes() + b"x")
    with pytest.raises(BackboneError, match=r"is not what backbone\.json describes"):
        run(layout, repository)


# Bad input


def test_float32_is_no_tf32_and_what_was_set_before_comes_back() -> None:
    before = (torch.backends.cudnn.allow_tf32, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    assert before[0], "cuDNN's default, else this test shows nothing"
    with deterministic_torch(1):
        inside = (
            torch.backends.cudnn.allow_tf32,
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
        )
    assert inside == (False, 1, True)
    after = (torch.backends.cudnn.allow_tf32, torch.get_num_threads(), torch.are_deterministic_algorithms_enabled())
    assert after == before


def test_a_loss_that_is_no_number_stops_the_stage_names_the_pictures_and_keeps_the_last_good_weights(
    layout: Layout, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight turns into no number after the fifth epoch, as a bad step or a bad memory cell would have it."""
    params = load_params(repository / "params.yaml")
    card, network, head, train, val = stage_inputs(layout, params.augment)
    brisk = params.finetune.model_copy(update={"epochs": 6, "learning_rate": 2e-3})

    def spoil(curve: Sequence[EpochRecord]) -> None:
        if len(curve) == 5:
            with torch.no_grad():
                network.group_parameters(network.num_groups - 1)[0].fill_(math.nan)

    with deterministic_torch(1):
        tuned = fine_tune(
            network,
            head,
            train=train,
            val=val,
            stages=("top",),
            settings=finetune.tuning_settings(card, 0, brisk, "cpu"),
            checkpoints=CheckpointFile(layout.checkpoints_dir / "c.safetensors", "digest"),
            on_epoch=spoil,
        )
    (record,) = tuned.records
    assert record.kept
    step = 5 * math.ceil((NUM_IMAGES - NUM_VAL) / brisk.batch_size) + 1
    assert re.search(
        rf"stopped early: the loss is nan at step {step} \(the batch was [0-9]/\d+\.png as centre", record.reason
    )
    assert (len(tuned.curve), record.epochs, record.steps) == (5, 6, step - 1)
    assert all(bool(tensor.isfinite().all()) for tensor in network.trunk_state().values())
    assert negative_log_likelihood(tuned.val_logits_after, val.labels).mean() < math.inf


def test_a_stage_that_goes_on_and_meets_a_loss_that_is_no_number_at_once_keeps_the_average_of_before(
    layout: Layout, repository: Path
) -> None:
    """Training pictures turn into no numbers while the run is interrupted."""
    params, path = load_params(repository / "params.yaml"), layout.checkpoints_dir / "c.safetensors"
    card, network, head, train, val = stage_inputs(layout, params.augment)
    brisk = params.finetune.model_copy(update={"epochs": 6, "learning_rate": 3e-4})
    work: dict[str, Any] = {"val": val, "stages": ("top",), "checkpoints": CheckpointFile(path, "digest")}
    work["settings"] = finetune.tuning_settings(card, 0, brisk, "cpu")

    def interrupt(curve: Sequence[EpochRecord]) -> None:
        if len(curve) == 5:
            raise KeyboardInterrupt

    with deterministic_torch(1), pytest.raises(KeyboardInterrupt):
        fine_tune(network, head, train=train, **work, on_epoch=interrupt)
    saved, (_, network, head, _, _) = load_file(path), stage_inputs(layout, params.augment)
    start = {f"trunk.{name}": each for name, each in copied(dict(network.trunk.named_parameters())).items()}
    no_numbers = preprocessing_graph(size_px=SIZE_PX, crop_fraction=1.0, mean=MEAN, std=(math.nan,) * 3, opset=20)
    spoilt = dataclasses.replace(train.pixels, whole=open_session(no_numbers.SerializeToString()))
    with deterministic_torch(1):
        tuned = fine_tune(network, head, train=dataclasses.replace(train, pixels=spoilt), **work)
    (record,) = tuned.records
    assert "; stopped early: the loss is nan at step 21" in record.reason
    assert record.kept
    assert record.alpha is not None
    averages = {name: saved[f"ema/{name}"] for name in start if f"ema/{name}" in saved}
    assert averages
    kept = interpolated({name: start[name] for name in averages}, averages, record.alpha)
    for name, tensor in network.trunk.named_parameters():
        torch.testing.assert_close(tensor, kept.get(f"trunk.{name}", start[f"trunk.{name}"]), rtol=0, atol=1e-7)


def test_out_of_memory_halves_the_batch_and_comes_to_the_same_step(caplog: pytest.LogCaptureFixture) -> None:
    """The device is the only thing that is played: it has room for three pictures."""
    network = small_network("mobilenet_v3_small")
    pixels = torch.randn(8, 3, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1] * 4)
    start = copied(network.trunk_state())
    ends, losses = [], []
    for room in (8, 3):
        network.load_trunk(start)
        torch.manual_seed(0)
        tuner = StageTuner(network, 1, blank_head(network), pace_of(network))

        def loss_of(part: slice, tuner: StageTuner = tuner, room: int = room) -> torch.Tensor:
            if part.stop - part.start > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
            return torch.nn.functional.cross_entropy(tuner.head(network(pixels[part])), labels[part])

        losses.append(tuner.descend(loss_of, len(labels)))
        ends.append(copied(tuner.tensors))
        assert tuner.part_size == (None if room == 8 else 2)
    assert "out of memory with 4 pictures at once: going on with 2, same steps" in caplog.text
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=2e-4, msg=name)


def test_a_stage_whose_batch_memory_does_not_hold_halves_it_and_is_gone_through(
    layout: Layout, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The device is the only thing that is played: it has room for sixteen pictures, and to train on eight."""

    def hold(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if not isinstance(module, torch.nn.Conv2d):
            return
        moves = module.weight.requires_grad and torch.is_grad_enabled()
        if len(inputs[0]) > (8 if moves else 16):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    caplog.set_level("INFO")
    device = torch.nn.modules.module.register_module_forward_pre_hook(hold)
    try:
        (record,) = run(layout, repository, stages=("top",)).stages
    finally:
        device.remove()
        memory._held.clear()
    assert "out of memory with 32 pictures at once: going on with 16, same steps" in caplog.text
    assert "out of memory with 16 pictures at once: going on with 8, same steps" in caplog.text
    assert (record.epochs, record.steps) == (4, 4 * math.ceil((NUM_IMAGES - NUM_VAL) / 32))


def test_a_gradient_that_is_no_number_moves_nothing() -> None:
    network = small_network("mobilenet_v3_small")
    tuner = StageTuner(network, 1, blank_head(network), pace_of(network))
    before = copied(tuner.tensors)
    with pytest.raises(DivergedError, match="the gradient's norm is nan at step 1"):
        tuner.descend(lambda _: (tuner.head.weight - tuner.head.weight).abs().sum().sqrt(), 8)
    assert all(torch.equal(before[name], tensor) for name, tensor in tuner.tensors.items())


def test_an_error_that_is_not_about_memory_is_not_taken_for_one() -> None:
    network = small_network("mobilenet_v3_small")
    tuner = StageTuner(network, 1, blank_head(network), pace_of(network))

    def loss_of(part: slice) -> torch.Tensor:
        raise RuntimeError(f"shapes do not fit, {part}")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        tuner.descend(loss_of, 8)
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"))


def pace_of(network: Network) -> Pace:
    length = stage_length(num_images=8, batch_size=8, epochs=1, length_factor=1, max_steps=100, affordable_steps=100)
    rates = layer_group_learning_rates(network.num_groups + 1, 1e-3, 0.8)[1:]
    return Pace(recipe_for("resnet18"), rates, 0.01, length, warmup_fraction=0.1, clip_norm=1e9, ema_decay=0.9)


def test_a_plan_with_a_stage_that_does_not_exist_lists_those_that_do(repository: Path, tmp_path: Path) -> None:
    text = (repository / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("stages: [top, rest]", "stages: [top, all]"))
    with pytest.raises(ParamsError, match=r"finetune\.stages: .*'all'.*top, rest, adversarial, scratch"):
        load_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text(text.replace("stages: [top, rest]", "stages: [scratch, top]"))
    with pytest.raises(ParamsError, match="stands alone"):
        load_params(tmp_path / "params.yaml")


def test_a_plan_that_unfreezes_a_group_that_does_not_exist_lists_the_groups(layout: Layout, repository: Path) -> None:
    with pytest.raises(ParamsError, match=r"'features\.70'.*: features\.3, features\.4; features\.5, "):
        run(layout, repository, stages=("top", "features.70"))
    assert not list(layout.finetuned_dir.glob("*"))


def test_a_plan_may_unfreeze_group_by_group(layout: Layout, repository: Path) -> None:
    report = run(layout, repository, stages=("top", "features.5", "features.5", "rest"), learning_rate=2e-3)
    assert [record.name for record in report.stages] == ["top", "features.5", "features.5", "rest"]
    first, second, again, third = (min(record.groups) for record in report.stages)
    assert first > second == again > third == 1
    assert [record.kept for record in report.stages] == [True, True, False, True]
    assert report.stages[2].reason == "not tried: stage features.5 moved the same layers"


# Curves, times and the baseline from random weights


def test_each_epoch_is_in_the_curves_and_seconds_are_told_apart(layout: Layout, repository: Path) -> None:
    report = run(layout, repository, epochs=2)
    rows = list(csv.DictReader(io.StringIO(layout.epochs.read_text())))
    assert [row["number"] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
    assert len(rows) == sum(record.epochs for record in report.stages)
    assert all(float(row["train_loss"]) > 0 and 0 <= float(row["val_accuracy"]) <= 1 for row in rows)
    times = json.loads(layout.times("finetune").read_text())
    assert [each["stage"] for each in times["stages"]] == [record.name for record in report.stages if record.steps]
    assert 0 < sum(each["seconds"] for each in times["stages"]) < times["seconds"]
    for each, record in zip(times["stages"], report.stages, strict=False):
        assert each["boundary"] == record.boundary == "cached"
        assert each["predicted_s"]["cached"] > 0
        assert 0 < each["training_s"] < each["seconds"]
        assert set(each["predicted_s"]) == {"cached", "recomputed"}


def test_from_scratch_starts_from_random_weights_and_is_taken_as_it_is(layout: Layout, repository: Path) -> None:
    report = run(layout, repository, stages=("scratch",), scratch=scratch_of(repository, 1.0), max_steps=10)
    (record,) = report.stages
    assert report.kept == ("scratch",)
    assert record.steps >= 20, "its limit is seconds, so that it gets as long as others"
    assert record.num_parameters == sum(each.numel() for each in load_trunk(layout).parameters()) + 10 * (
        read_card(layout.backbone_card).feature_dim + 1
    )
    before = load_file(layout.backbone_weights)
    after = load_file(layout.finetuned_dir / "network.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight"))
    losses = [float(row["train_loss"]) for row in csv.DictReader(io.StringIO(layout.epochs.read_text()))]
    assert losses[0] < 1.5 * math.log(10)
    assert not layout.checkpoints_dir.exists()


def test_from_scratch_batch_norm_learns_the_statistics_of_these_pictures(layout: Layout, repository: Path) -> None:
    write_backbone(layout, "mobilenet_v3_small", size_px=SIZE_PX, depths=2)
    write_probe(layout, load_trunk(layout))
    run(layout, repository, stages=("scratch",), scratch=scratch_of(repository, 1e-3))
    found = load_file(layout.finetuned_dir / "network.safetensors")
    means = [values for name, values in found.items() if name.endswith("running_mean")]
    assert len(means) > 20
    assert all(values.abs().max() > 0 for values in means)


def test_random_weights_that_diverge_leave_the_probe_and_say_so(layout: Layout, repository: Path) -> None:
    scratch = scratch_of(repository, 1e-3).model_copy(update={"learning_rate": 1e30})
    report = run(layout, repository, stages=("scratch",), scratch=scratch)
    (record,) = report.stages
    assert (report.kept, record.kept, record.val_accuracy_after) == ((), False, None)
    assert re.match(r"dropped: it diverged, the loss is nan at step \d+ \(.*\.png", record.reason)
    assert record.epochs >= 1
    assert [path.name for path in layout.finetuned_dir.iterdir()] == ["finetuned.json"]
    assert not layout.checkpoints_dir.exists()


def load_trunk(layout: Layout) -> Network:
    card = read_card(layout.backbone_card)
    return build_network(card.architecture, depths=card.depths)


@pytest.mark.slow
def test_a_baseline_from_random_weights_that_is_interrupted_gives_the_same_bytes(
    layout: Layout, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With BatchNorm, whose statistics are measured anew at the end; as many steps each time (the least)."""
    caplog.set_level(logging.INFO, logger="tasks")
    write_backbone(layout, "mobilenet_v3_small", size_px=SIZE_PX, depths=2)
    write_probe(layout, load_trunk(layout))
    changes = {"stages": ("scratch",), "scratch": scratch_of(repository, 1e-3)}
    whole = run(layout, repository, **changes)
    assert whole.stages[0].steps == 20
    expected = {path.name: path.read_bytes() for path in layout.finetuned_dir.iterdir()}
    handler, logger = InterruptAtEpoch(), logging.getLogger("tasks.training.scratch")
    logger.addHandler(handler)
    with pytest.raises(KeyboardInterrupt):
        run(layout, repository, **changes)
    logger.removeHandler(handler)
    assert run(layout, repository, **changes) == whole
    assert {path.name: path.read_bytes() for path in layout.finetuned_dir.iterdir()} == expected


def scratch_of(repository: Path, seconds: float) -> ScratchParams:
    return load_params(repository / "params.yaml").finetune.scratch.model_copy(update={"seconds": seconds})


# Several processes


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(layout: Layout, repository: Path, tmp_path: Path) -> None:
    """torchrun, gloo, DistributedDataParallel: the same curves up to rounding, as each takes half of every batch."""
    text = (repository / "params.yaml").read_text()
    for before, after in (
        ("epochs: auto", "epochs: 3"),
        ("learning_rate: auto", "learning_rate: 2.0e-3"),
        ("  views: 4 ", "  views: 2 "),
        ("stages: [top, rest]", "stages: [top]"),
        ("device: auto", "device: cpu"),
    ):
        assert before in text
        text = text.replace(before, after, 1)
    curves, kept, ends = [], [], []
    for num in (1, 2):
        layout.params.write_text(text.replace("num_processes: 1", f"num_processes: {num}"))
        process = start(repository, "-m", "tasks", "finetune", "--root", str(layout.root))
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
        assert told.count(b"finetune starts") == told.count(b"epoch 1/3") == 1, "one of them speaks"
        assert (b"DistributedDataParallel" in told) is (num == 2)
        rows = list(csv.DictReader(io.StringIO(layout.epochs.read_text())))
        curves.append([[float(row[name]) for row in rows] for name in ("train_loss", "val_nll")])
        kept.append(facts(layout)["kept"])
        ends.append(load_file(layout.finetuned_dir / "network.safetensors"))
        assert not layout.checkpoints_dir.exists()
    assert kept == [["top"]] * 2
    assert np.shape(curves) == (2, 2, 3)
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.01)
    start_weights = load_file(layout.backbone_weights)
    moves = [torch.cat([(end[name] - start_weights[name]).flatten() for name in end]) for end in ends]
    assert torch.nn.functional.cosine_similarity(*moves, dim=0) > 0.99


STEPS_OF_TWO = """
import sys
import torch
from safetensors.torch import save_file
from tasks.models.architectures import Boundary
from tasks.training import processes
from tasks.training.tuner import StageTuner, copied
from tests.tasks.test_finetune import blank_head, pace_of, small_network, three_batches

with processes.joined():
    network = small_network("mobilenet_v3_small")
    torch.manual_seed(0)
    tuner = StageTuner(network, 1, blank_head(network), pace_of(network))
    room = 3 if processes.count() == 2 and not processes.is_first() else 8
    for pixels, labels in three_batches():
        rows = processes.share_of(list(range(len(labels))))
        with torch.no_grad():
            boundary, targets = network.forward_until(pixels[rows], 1), labels[rows]
        def loss_of(part):
            if part.stop - part.start > room:
                raise torch.OutOfMemoryError("out of memory")
            return tuner._loss(boundary, targets, part)
        tuner.descend(loss_of, len(rows), processes.weight_of(labels))
    if processes.count() == 2:
        assert tuner.part_size == 2, tuner.part_size
    if processes.is_first():
        save_file(copied(tuner.tensors), sys.argv[1])
"""


def three_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The last one is shorter."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(21, 3, SIZE_PX, SIZE_PX, generator=generator)
    return [(pixels[start:stop], torch.arange(start, stop) % 2) for start, stop in ((0, 8), (8, 16), (16, 21))]


@pytest.mark.slow
def test_where_memory_runs_out_in_one_of_two_processes_both_take_the_same_steps(
    repository: Path, tmp_path: Path
) -> None:
    """The second one's device, which is played, has room for three of its four pictures: both take two at once."""
    (tmp_path / "steps.py").write_text(STEPS_OF_TWO)
    found = []
    for num in (1, 2):
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num}")
        command = [sys.executable, *torchrun, str(tmp_path / "steps.py"), str(tmp_path / f"{num}.safetensors")]
        environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, timeout=200)
        assert done.returncode == 0, done.stderr.decode()
        found.append(load_file(tmp_path / f"{num}.safetensors"))
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-3, atol=1e-5, msg=name)


# Killed and run again


class InterruptAtEpoch(logging.Handler):
    """Ctrl-C, each time a run comes to the end of its second epoch, or of another one."""

    def __init__(self, number: int = 2) -> None:
        super().__init__()
        self.number, self.epochs = number, 0

    def emit(self, record: logging.LogRecord) -> None:
        if "train loss" in record.getMessage():
            self.epochs += 1
            if self.epochs == self.number:
                raise KeyboardInterrupt


BF16_ON_CPU = {"device": "cpu", "precision": "bfloat16", "stages": ("top",), "views": 1, "epochs": 6}
CUDA = {"device": "cuda"}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, BF16_ON_CPU, pytest.param(CUDA, marks=with_cuda)])
def test_a_run_interrupted_at_every_epoch_gives_the_same_bytes(
    layout: Layout, repository: Path, caplog: pytest.LogCaptureFixture, changes: dict[str, Any]
) -> None:
    caplog.set_level(logging.INFO, logger="tasks")
    whole = run(layout, repository, **changes)
    expected = {path.name: path.read_bytes() for path in layout.finetuned_dir.iterdir()}
    assert "network.safetensors" in expected
    logger = logging.getLogger("tasks.training.staged")
    report, interruptions = None, 0
    while report is None:
        handler = InterruptAtEpoch()
        logger.addHandler(handler)
        try:
            report = run(layout, repository, **changes)
        except KeyboardInterrupt:
            interruptions += 1
        finally:
            logger.removeHandler(handler)
    assert interruptions == sum(record.epochs for record in whole.stages) - 1
    assert report == whole
    assert {path.name: path.read_bytes() for path in layout.finetuned_dir.iterdir()} == expected


def test_a_run_interrupted_after_its_best_epoch_comes_back_to_it(
    judges: Path, tmp_path: Path, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tasks")
    layout = Layout(tmp_path / "workspace")
    shutil.copytree(judges, layout.root)
    changes: dict[str, Any] = {"epochs": 8, "learning_rate": 1e-3, "batch_size": ONE_BATCH, "precision": "float32"}
    changes |= {"stages": ("top",), "views": 1, "device": "cpu"}
    whole = run(layout, repository, **changes)
    rows = list(csv.DictReader(io.StringIO(layout.epochs.read_text())))
    assert np.argmin([float(row["val_nll"]) for row in rows]) < 4, "the best is among the first four"
    expected = {path.name: path.read_bytes() for path in layout.finetuned_dir.iterdir()}
    assert "network.safetensors" in expected
    handler, logger = InterruptAtEpoch(5), logging.getLogger("tasks.training.staged")
    logger.addHandler(handler)
    with pytest.raises(KeyboardInterrupt):
        run(layout, repository, **changes)
    logger.removeHandler(handler)
    assert run(layout, repository, **changes) == whole
    assert caplog.messages.count("going on at stage 1, epoch 5") == 1
    assert {path.name: path.read_bytes() for path in layout.finetuned_dir.iterdir()} == expected


BOTH = """
import shutil, sys
from pathlib import Path
from tasks.__main__ import run_stage
from tasks.layout import Layout
from tasks.params import ScratchParams, load_params
for root in map(Path, sys.argv[1:]):
    run_stage("finetune", Layout(root), load_params(root / "params.yaml"))
"""


def start(repository: Path, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *arguments], cwd=repository, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )


def kill_in_stage(process: subprocess.Popen[bytes], layout: Layout, stage: int) -> None:
    """Kills a run, without a word of warning, after an epoch of a stage."""
    path = layout.checkpoints_dir / "finetune.safetensors"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        position = read_position(path) if path.exists() else {"records": [], "epoch": 0}
        if len(position["records"]) == stage and position["epoch"] >= 1:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.001)
    output = process.communicate()
    assert process.returncode == -signal.SIGKILL, output


def read_position(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    values: dict[str, Any] = json.loads(header["__metadata__"]["tanuki"])["position"]
    return values


class SlowToTheSecondEpoch(InterruptAtEpoch):
    """The same after a first epoch that takes two seconds more."""

    def emit(self, record: logging.LogRecord) -> None:
        if "train loss" in record.getMessage() and not self.epochs:
            time.sleep(2)
        super().emit(record)


def test_a_resumed_run_tells_the_seconds_before_it_was_interrupted_too(
    layout: Layout, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="tasks")
    logger, handler = logging.getLogger("tasks.training.staged"), SlowToTheSecondEpoch()
    logger.addHandler(handler)
    with pytest.raises(KeyboardInterrupt):
        run(layout, repository, stages=("top",))
    logger.removeHandler(handler)
    began = time.perf_counter()
    run(layout, repository, stages=("top",))
    resumed_s = time.perf_counter() - began
    assert json.loads(layout.times("finetune").read_text())["seconds"] > resumed_s + 1
    began = time.perf_counter()
    run(layout, repository, stages=("top",))
    own_s = time.perf_counter() - began
    assert json.loads(layout.times("finetune").read_text())["seconds"] < own_s, "a run of its own"


@pytest.mark.slow
def test_a_run_killed_in_each_stage_and_run_again_gives_the_same_bytes(
    layout: Layout, repository: Path, tmp_path: Path
) -> None:
    text = (repository / "params.yaml").read_text()
    for before, after in (("epochs: auto", "epochs: 12"), ("learning_rate: auto", "learning_rate: 2.0e-3")):
        assert before in text
        text = text.replace(before, after, 1)
    layout.params.write_text(text)
    undisturbed = Layout(tmp_path / "undisturbed")
    shutil.copytree(layout.root, undisturbed.root)
    for stage in (0, 1):
        kill_in_stage(start(repository, "-m", "tasks", "finetune", "--root", str(layout.root)), layout, stage)
    process = start(repository, "-c", BOTH, str(layout.root), str(undisturbed.root))
    output = process.communicate()
    assert process.returncode == 0, output
    assert "top" in facts(layout)["kept"]
    for name in ("network.safetensors", "head.safetensors", "head.json", "finetuned.json"):
        resumed, whole = ((each.finetuned_dir / name).read_bytes() for each in (layout, undisturbed))
        assert resumed == whole, name
    assert not layout.checkpoints_dir.exists()


def test_copies_do_not_follow() -> None:
    weight = torch.zeros(2)
    copy = copied({"w": weight})
    weight.add_(1)
    assert copy["w"].tolist() == [0, 0]
