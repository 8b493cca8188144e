import dataclasses
import json
import logging
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from deploy.runtime import open_session
from tasks import attack, finetune
from tasks.data.manifest import read_manifest, write_manifest
from tasks.errors import DataError, ParamsError
from tasks.finetune import FinetuneReport
from tasks.layout import Layout
from tasks.models.architectures import build_network
from tasks.models.backbone_card import read_card
from tasks.models.head import read_head, write_head
from tasks.models.weights import read_weights
from tasks.params import load_params
from tasks.training import memory
from tasks.training.adversarial import (
    ATTACK_DRAWS,
    STRONGEST,
    AdversarialRecord,
    PixelClassifier,
    answered_rightly,
    fixed_rows,
    harden,
    has_collapsed,
    robustness_attacks,
)
from tasks.training.attacks import climb, fgsm, fgsm_rs, pgd, uniform_noise
from tasks.training.augmented import LabelledPixels, PixelSource
from tasks.training.auto_attack import auto_attack, is_installed
from tasks.training.checkpoint import CheckpointFile
from tasks.training.device import Compute, place
from tasks.training.logit_adjustment import class_shift
from tasks.training.schedule import slow_growth, slow_start_fast_decay
from tasks.training.selection import SIGNIFICANCE, compare_robustness
from tasks.training.staged import EpochRecord, FineTuned, deterministic_torch
from tasks.training.tuner import StandardisedHead, copied
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

NUM_IMAGES, NUM_VAL, SIZE_PX = 200, 60, 32
EPSILON = 4 / 255


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace as train_head leaves it: real digits, the embedded backbone at half its size, its probe."""
    layout = Layout(tmp_path_factory.mktemp("digits"))
    write_images(layout, *digit_images(NUM_IMAGES), splits(NUM_IMAGES, NUM_VAL))
    weights = read_weights("embedded:glyphs_mobilenet_v3_small", root=Path(), sha256=None)
    network = write_backbone(layout, weights.architecture or "", size_px=SIZE_PX, depths=4, weights=weights.state)
    write_probe(layout, network)
    return layout.root


@pytest.fixture
def layout(digits: Path, tmp_path: Path) -> Layout:
    """A copy of it that a test may change."""
    shutil.copytree(digits, tmp_path / "workspace")
    return Layout(tmp_path / "workspace")


@pytest.fixture(scope="module", autouse=True)
def flushed() -> Iterator[None]:
    with deterministic_torch(1):
        yield


def run(layout: Layout, repository: Path, changes: dict[str, Any], **others: Any) -> FinetuneReport:
    """The stage with params.yaml's numbers, but short and brisk, and with the adversarial stage alone."""
    params = load_params(repository / "params.yaml")
    adversarial = params.finetune.adversarial.model_copy(
        update={"epochs": 3, "val_images": 30, "learning_rate": 2e-3, **changes}
    )
    brisk = {"views": 1, "batch_size": 20, "min_val_images": 10, "stages": ("adversarial",)}
    settings = params.finetune.model_copy(update={**brisk, "adversarial": adversarial, **others})
    return finetune.run(layout, seed=params.seed, augment=params.augment, finetune=settings)


def shrink(layout: Layout, num_train: int = 20, num_val: int = 10) -> None:
    """Leaves a few images of each split, of many classes."""
    images = read_manifest(layout.accepted)
    write_manifest(
        layout.accepted,
        pd.concat(
            [
                images[images["split"] == "train"].iloc[::4][:num_train],
                images[images["split"] == "val"].iloc[::6][:num_val],
            ]
        ),
    )


def stage_of(report: FinetuneReport) -> AdversarialRecord:
    record = report.stages[-1]
    assert isinstance(record, AdversarialRecord)
    return record


def outputs(layout: Layout) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in layout.finetuned_dir.iterdir()}


def val_pixels(layout: Layout) -> LabelledPixels:
    rows = read_manifest(layout.accepted).query("split == 'val'")
    session, labels = open_session(layout.preprocess_onnx), read_head(layout.head_dir).labels
    pixels = PixelSource(
        files=[layout.raw / path for path in rows["path"]],
        shas=rows["sha256"].tolist(),
        views=("centre",),
        whole=session,
        crop=session,
        min_area_fraction=0.5,
        hflip=False,
        max_pixels=1_000,
        workers=1,
    )
    return LabelledPixels(pixels, np.array([labels.index(label) for label in rows["label"]]))


def classifier(layout: Layout, network_path: Path, head_dir: Path) -> PixelClassifier:
    card, head = read_card(layout.backbone_card), read_head(head_dir)
    network = build_network(card.architecture, depths=card.depths)
    network.load_trunk(load_file(network_path))
    embeddings = torch.from_numpy(embed(layout, network, read_manifest(layout.accepted)["path"].tolist()))
    return PixelClassifier(network, StandardisedHead(head, embeddings), card.mean, card.std)


# The attacks, on the embedded backbone with its probe


@dataclasses.dataclass(frozen=True)
class Target:
    model: PixelClassifier
    images: torch.Tensor
    labels: torch.Tensor

    def accuracy(self, disturbed: torch.Tensor) -> float:
        with torch.no_grad():
            return float((self.model(disturbed).argmax(1) == self.labels).float().mean())

    def pgd(self, epsilon: float, num_steps: int, restarts: int = 1) -> float:
        rng = np.random.default_rng(0)
        found = pgd(
            self.model, self.images, self.labels, epsilon=epsilon, num_steps=num_steps, restarts=restarts, rng=rng
        )
        return self.accuracy(found)


@pytest.fixture(scope="module")
def target(digits: Path) -> Target:
    layout = Layout(digits)
    model, data = classifier(layout, layout.backbone_weights, layout.head_dir), val_pixels(layout)
    (pixels,) = data.pixels.batches([[(row, 0) for row in range(NUM_VAL)]])
    return Target(model.requires_grad_(False), model.images(pixels), torch.from_numpy(data.labels))


@pytest.mark.parametrize("attack", ["fgsm", "fgsm_rs", "pgd", "climb", "noise"])
@pytest.mark.parametrize("epsilon", [0.0, EPSILON, 0.5])
def test_an_attack_stays_within_epsilon_and_makes_a_picture(target: Target, attack: str, epsilon: float) -> None:
    """Nothing misleads this model, so that PGD, too, takes all its steps."""
    images, labels, rng = target.images[:8], target.labels[:8], np.random.default_rng(0)
    sure = 1e3 * torch.nn.functional.one_hot(labels, 10)
    given = (lambda images: target.model(images) + sure, images, labels)
    found = {
        "fgsm": lambda: fgsm(*given, epsilon=epsilon),
        "fgsm_rs": lambda: fgsm_rs(*given, epsilon=epsilon, rng=rng),
        "pgd": lambda: pgd(*given, epsilon=epsilon, num_steps=2, rng=rng),
        "climb": lambda: climb(*given, epsilon=epsilon, num_steps=2, rng=rng),
        "noise": lambda: uniform_noise(images, epsilon=epsilon, rng=rng),
    }[attack]()
    assert float((found - images).abs().max()) == pytest.approx(epsilon, abs=1e-4)
    assert 0 <= float(found.min()) <= float(found.max()) <= 1


def test_normalisation_is_inside_the_model(target: Target, digits: Path) -> None:
    layout = Layout(digits)
    card, data = read_card(layout.backbone_card), val_pixels(layout)
    (pixels,) = data.pixels.batches([[(row, 0) for row in range(NUM_VAL)]])
    inside = (target.images - torch.tensor(card.mean).view(1, 3, 1, 1)) / torch.tensor(card.std).view(1, 3, 1, 1)
    np.testing.assert_allclose(inside.numpy(), pixels, atol=1e-5)
    logits = read_head(layout.head_dir).logits(target.model.network(torch.from_numpy(pixels)).numpy())
    np.testing.assert_allclose(target.model(target.images).numpy(), logits, atol=1e-3, rtol=1e-3)


def test_a_network_that_trains_in_bfloat16_is_attacked_in_float32(target: Target, digits: Path) -> None:
    """And goes on in bfloat16 afterwards, when it trains."""
    rows, seen = range(20), list[torch.Tensor]()

    def looked_at(images: torch.Tensor, _labels: torch.Tensor, _rng: np.random.Generator) -> torch.Tensor:
        seen.append(target.model(images))
        return images

    network = target.model.network
    for precision in (torch.float32, torch.bfloat16):
        network.precision = precision
        try:
            answered_rightly(target.model, val_pixels(Layout(digits)), rows, {"a": looked_at}, seed=(0,), batch_size=20)
            trained_on = target.model(target.images[:20])
        finally:
            network.precision = torch.float32
    assert torch.equal(*seen)
    assert not torch.equal(trained_on, target.model(target.images[:20]))


def test_what_was_held_moves_again_whatever_happened(target: Target) -> None:
    moving = next(target.model.parameters()).requires_grad_(True)

    def fail() -> None:
        with target.model.held():
            assert not moving.requires_grad
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    assert moving.requires_grad
    moving.requires_grad_(False)


def test_a_larger_epsilon_never_helps_the_defender(target: Target) -> None:
    accuracies = [target.pgd(epsilon / 255, num_steps=5) for epsilon in (0, 4, 16)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] == target.accuracy(target.images) > 0.8
    assert accuracies[-1] < 0.2


def test_without_bounds_nothing_withstands(target: Target) -> None:
    assert target.pgd(1.0, num_steps=10) < 0.05


def test_gradients_are_not_masked(target: Target) -> None:
    """Many steps are stronger than few, they than one, one than chance; and a restart never makes it weaker."""
    noise = target.accuracy(uniform_noise(target.images, epsilon=EPSILON, rng=np.random.default_rng(0)))
    single = target.accuracy(fgsm(target.model, target.images, target.labels, epsilon=EPSILON))
    few, many = target.pgd(EPSILON, num_steps=3), target.pgd(EPSILON, num_steps=10)
    one_picture = 1 / NUM_VAL
    assert noise > single >= few >= many - one_picture
    assert single < target.accuracy(target.images)
    assert target.pgd(EPSILON, num_steps=3, restarts=2) <= few


def test_confidence_is_no_defence(target: Target) -> None:
    """Where float32 rounds a probability to 1, the right class drops out of the cross-entropy's gradient."""
    sure = dataclasses.replace(target, model=lambda images: 30 * target.model(images))
    assert abs(sure.pgd(EPSILON, num_steps=5) - target.pgd(EPSILON, num_steps=5)) <= 2.5 / NUM_VAL


@given(st.integers(0, 1_000))
def test_pgd_misleads_a_linear_model_wherever_it_can_be(seed: int) -> None:
    """And goes no further with a picture that is misjudged, nor lets one hang on the others."""
    generator = np.random.default_rng(seed)
    images = torch.from_numpy(generator.uniform(0.3, 0.7, size=(8, 3, 2, 2)).astype(np.float32))
    weight = torch.from_numpy(generator.normal(size=(2, 12)).astype(np.float32))
    labels = torch.from_numpy(generator.integers(2, size=8))
    seen = list[torch.Tensor]()

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.detach().clone())
        return x.flatten(1) @ weight.T

    def right(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1) @ weight.T).argmax(1) == labels

    found = pgd(model, images, labels, epsilon=0.1, num_steps=10, rng=np.random.default_rng(seed))
    worst = images + 0.1 * (weight[1 - labels] - weight[labels]).sign().view(8, 3, 2, 2)
    assert torch.equal(right(found), right(worst))
    torch.testing.assert_close(found[right(worst)], worst[right(worst)], atol=1e-6, rtol=0)
    torch.testing.assert_close(found[~right(images)], images[~right(images)], atol=0, rtol=0)
    sizes = [len(each) for each in seen]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 8
    assert sizes[1:2] in ([], [int(right(images).sum())])
    alone = pgd(model, images[:1], labels[:1], epsilon=0.1, num_steps=10, rng=np.random.default_rng(seed))
    torch.testing.assert_close(alone, found[:1], atol=1e-6, rtol=0)


def test_a_cpu_attacks_eight_pictures_of_224_px_at_once() -> None:
    """And finds what it finds for each alone; smaller ones go together."""
    generator, sizes = np.random.default_rng(0), list[int]()
    images = torch.from_numpy(generator.uniform(size=(20, 3, 224, 224)).astype(np.float32))
    weight = torch.from_numpy(generator.normal(size=(3, 3)).astype(np.float32))
    labels = torch.from_numpy(generator.integers(3, size=20))

    def model(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x.mean((2, 3)) @ weight.T

    together = fgsm(model, images, labels, epsilon=0.1)
    assert sizes == [8, 8, 4]
    alone = [fgsm(model, images[[row]], labels[[row]], epsilon=0.1) for row in range(20)]
    torch.testing.assert_close(together, torch.cat(alone), atol=0, rtol=0)
    sizes.clear()
    fgsm(model, images[..., :64, :64], labels, epsilon=0.1)
    assert sizes == [20]


def test_where_memory_ends_an_attack_goes_on_with_half_as_many_and_keeps_to_that(target: Target) -> None:
    """The device is the only thing that is played: it has room for five pictures."""
    sizes = list[int]()

    def device(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return target.model(images)

    images, labels = target.images[:16], target.labels[:16]
    found = [
        pgd(model, images, labels, epsilon=EPSILON, num_steps=3, rng=np.random.default_rng(0))
        for model in (target.model, device)
    ]
    memory._held.clear()
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)
    assert sizes[:6] == [16, 8, 4, 4, 4, 4]
    assert max(sizes[2:]) == 4


def test_pgd_counts_a_picture_that_any_step_misleads(target: Target) -> None:
    """Never weaker than where the last step leads, from the same start."""
    given = (target.model, target.images, target.labels)
    last, found = (
        attack(*given, epsilon=EPSILON, num_steps=10, rng=np.random.default_rng(0)) for attack in (climb, pgd)
    )
    with torch.no_grad():
        wrong_at_the_end, wrong = (target.model(each).argmax(1) != target.labels for each in (last, found))
    assert float((found - target.images).abs().max()) <= EPSILON + 1e-6
    assert wrong_at_the_end.any()
    assert wrong[wrong_at_the_end].all()


# Schedule, guard and rule


@given(st.integers(1, 500))
def test_the_rate_starts_slowly_and_decays_fast(steps: int) -> None:
    factors = [slow_start_fast_decay(step, steps=steps, warmup_fraction=0.3) for step in range(steps)]
    peak = factors.index(1.0)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if steps >= 10:
        assert peak == round(0.3 * steps)
        assert factors[0] == 0.01
        assert factors[-1] == pytest.approx(0.001)


@given(st.integers(1, 500))
def test_epsilon_grows_as_long_as_the_rate_and_then_stays(steps: int) -> None:
    factors = [slow_growth(step, steps=steps, warmup_fraction=0.3) for step in range(steps)]
    peak = round(0.3 * steps)
    assert factors[: peak + 1] == pytest.approx([(step + 1) / (peak + 1) for step in range(min(peak + 1, steps))])
    assert all(factor == 1 for factor in factors[peak:])


def test_a_collapse_is_a_fall_under_pgd_or_to_withstand_fgsm_alone() -> None:
    assert has_collapsed(0.5, fgsm=0.3, pgd=0.25, max_fall=0.2)
    assert has_collapsed(0.0, fgsm=0.3, pgd=0.0, max_fall=0.2)
    assert not has_collapsed(0.5, fgsm=0.5, pgd=0.4, max_fall=0.2)
    assert not has_collapsed(0.3, fgsm=0.7, pgd=0.6, max_fall=0.2)
    assert not has_collapsed(0.0, fgsm=0.1, pgd=0.0, max_fall=0.2)


def robustness_of(won: int, lost: int, clean_lost: int, max_clean_loss: float = 0.05) -> Any:
    num = 100
    robust_before, robust_after = np.zeros(num, bool), np.zeros(num, bool)
    robust_after[:won], robust_before[num - lost :] = True, lost > 0
    return compare_robustness(
        clean_before=np.ones(num, bool),
        clean_after=np.arange(num) >= clean_lost,
        robust_before=robust_before,
        robust_after=robust_after,
        max_clean_loss=max_clean_loss,
    )


def test_robustness_is_kept_if_it_is_no_luck_and_affordable() -> None:
    assert robustness_of(won=30, lost=2, clean_lost=5).better
    assert not robustness_of(won=30, lost=2, clean_lost=6).better
    assert not robustness_of(won=8, lost=5, clean_lost=0).better
    assert not robustness_of(won=0, lost=0, clean_lost=0).better
    assert robustness_of(won=5, lost=0, clean_lost=0).p_value == pytest.approx(1 / 64)  # half of five heads in a row
    assert robustness_of(won=3, lost=0, clean_lost=0).p_value > SIGNIFICANCE
    assert "clean accuracy fell by 0.0600 (0.05 is the limit)" in robustness_of(won=30, lost=2, clean_lost=6).reason


# The stage


@pytest.mark.slow
def test_the_stage_makes_the_network_withstand_what_it_did_not(layout: Layout, repository: Path) -> None:
    report = run(layout, repository, {"epsilon": 8.0, "max_clean_loss": 0.1}, batch_size=14)
    record = stage_of(report)
    assert report.kept == ("adversarial",)
    assert record.robustness_before is not None
    assert record.robustness_after is not None
    assert set(record.robustness_after) == {"clean", "fgsm", STRONGEST}
    before, after = record.robustness_before[STRONGEST], record.robustness_after[STRONGEST]
    assert after.accuracy > before.accuracy + 0.2
    assert after.accuracy_low < after.accuracy < after.accuracy_high
    assert json.loads((layout.finetuned_dir / "finetuned.json").read_text()) == json.loads(
        json.dumps(dataclasses.asdict(report))
    )
    assert record.attack == "pgd"
    assert record.num_attacked == 30
    assert not layout.checkpoints_dir.exists()

    # BatchNorm's statistics stayed, the stem moved, and what was written is what was measured.
    network_path = layout.finetuned_dir / "network.safetensors"
    start, end = load_file(layout.backbone_weights), load_file(network_path)
    moved = {name for name in start if not torch.equal(start[name], end[name])}
    assert "features.0.0.weight" in moved
    assert not any("running" in name for name in moved)
    model = classifier(layout, network_path, layout.finetuned_dir)
    right = answered_rightly(
        model,
        val_pixels(layout),
        range(NUM_VAL),
        robustness_attacks(model, 8 / 255),
        seed=(1,),
        batch_size=NUM_VAL,
    )
    assert after.accuracy_low < right[STRONGEST].mean() <= right["fgsm"].mean() <= right["clean"].mean()


@pytest.mark.slow
def test_the_robustness_that_is_told_is_that_of_the_head_that_ships(layout: Layout, repository: Path) -> None:
    """Where classes are uneven, what each gains from that is taken out of the head when all stages are over."""
    images, head = read_manifest(layout.accepted), read_head(layout.head_dir)
    rare = (images["split"] == "train") & (images["label"].isin(head.labels[:5])) & (images.index % 4 > 0)
    images = images[~rare].reset_index(drop=True)
    write_manifest(layout.accepted, images)
    train_labels = list(images["label"][images["split"] == "train"])
    shift = class_shift([train_labels.count(label) for label in head.labels], 4)
    write_head(layout.head_dir, dataclasses.replace(head, bias=head.bias + shift), {"logit_adjustment": 4.0})
    report = run(layout, repository, {"epsilon": 8.0, "max_clean_loss": 1.0}, batch_size=10)
    record, ships = stage_of(report), read_head(layout.finetuned_dir)
    plain = dataclasses.replace(ships, bias=ships.bias - shift)
    card, data, right = read_card(layout.backbone_card), val_pixels(layout), []
    draws = (load_params(repository / "params.yaml").seed, 0, ATTACK_DRAWS)
    for each in (ships, plain):
        network = build_network(card.architecture, depths=card.depths)
        network.load_trunk(load_file(layout.finetuned_dir / "network.safetensors"))
        place(network, Compute("cpu", "float32", "as finetune has it"))
        model = PixelClassifier.of(network, each, MEAN, STD)
        attacks = robustness_attacks(model, 8 / 255)
        right.append(answered_rightly(model, data, fixed_rows(data, 30), attacks, seed=draws, batch_size=10))
    assert record.robustness_after is not None
    told = {name: found.accuracy for name, found in record.robustness_after.items()}
    assert told == pytest.approx({name: float(found.mean()) for name, found in right[0].items()}, abs=1e-5)
    assert any((right[0][name] != right[1][name]).any() for name in right[0]), "the heads differ"


def test_a_stage_without_effect_leaves_the_network_as_it_is(layout: Layout, repository: Path) -> None:
    shrink(layout)
    report = run(layout, repository, {"epsilon": 0.01, "epochs": 1})
    assert (report.kept, report.reason) == ((), "no stage was kept")
    assert stage_of(report).reason.startswith("dropped: robust accuracy rose by ")
    assert list(outputs(layout)) == ["finetuned.json"]


def test_a_stage_that_diverges_or_costs_too_much_is_dropped(layout: Layout, repository: Path) -> None:
    shrink(layout)
    report = run(layout, repository, {"epochs": 2, "learning_rate": 1e30})
    assert "the loss is" in stage_of(report).reason
    report = run(layout, repository, {"max_tflop": 1e-6})
    assert stage_of(report).reason == "not tried: finetune.adversarial.max_tflop affords 0 steps; 20 is the least"
    assert report.kept == ()


def test_a_loss_that_is_no_number_stops_the_stage_and_the_best_epoch_so_far_is_judged(
    layout: Layout, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight turns into no number after the second epoch, as a bad step or a bad memory cell would have it."""
    caplog.set_level(logging.INFO, logger="tasks")
    shrink(layout)
    params = load_params(repository / "params.yaml")
    card, network, head, train, val = stage_inputs(layout, params.augment)
    changes = {"epochs": 4, "max_fall": 1.0, "learning_rate": 2e-3}
    adversarial = params.finetune.adversarial.model_copy(update=changes)
    brisk = params.finetune.model_copy(update={"batch_size": 20, "adversarial": adversarial})
    settings = finetune.tuning_settings(card, 0, brisk, "cpu")

    def spoil(curve: Sequence[EpochRecord]) -> None:
        if len(curve) == 2:
            with torch.no_grad():
                network.group_parameters(network.num_groups - 1)[0].fill_(math.nan)

    start = copied(network.trunk_state())
    logits = np.zeros((len(val.labels), len(head.labels)), np.float32)
    tuned = harden(
        network,
        FineTuned(head, (), logits, logits),
        train=train,
        val=val,
        mean=card.mean,
        std=card.std,
        settings=settings,
        adversarial=finetune.adversarial_settings(card, brisk, "cpu"),
        checkpoints=CheckpointFile(layout.checkpoints_dir / "c.safetensors", "digest"),
        on_epoch=spoil,
    )
    (record,) = tuned.records
    assert isinstance(record, AdversarialRecord)
    assert re.search(
        r"; stopped early: the loss is nan at step 3 \(the batch was [0-9]/\d+\.png as centre", record.reason
    )
    assert (record.epochs, record.steps) == (3, 2)
    assert record.best_epoch == 2, "the first ended within a smaller epsilon"
    assert record.robustness_after is not None
    assert len(tuned.curve) == 2
    state = network.trunk_state()
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert record.kept or all(torch.equal(state[name], start[name]) for name in start)


def test_the_adversarial_stage_comes_last(repository: Path, tmp_path: Path) -> None:
    text = (repository / "params.yaml").read_text()
    for stages, fine in (
        ("[top, adversarial]", True),
        ("[adversarial, top]", False),
        ("[top, adversarial, adversarial]", False),
    ):
        (tmp_path / "params.yaml").write_text(text.replace("stages: [top, rest]", f"stages: {stages}"))
        if fine:
            assert load_params(tmp_path / "params.yaml").finetune.stages == ("top", "adversarial")
        else:
            with pytest.raises(ParamsError, match="adversarial comes once, as the last stage"):
                load_params(tmp_path / "params.yaml")


# Killed and run again, and catastrophic overfitting


class InterruptAtSecondEpoch(logging.Handler):
    """Ctrl-C, each time a run comes to the end of its second epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "train loss" in record.getMessage():
            self.epochs += 1
            if self.epochs == 2:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("max_fall", "stages"),
    [
        pytest.param(-1.0, ("adversarial",), id="collapsing", marks=pytest.mark.slow),
        pytest.param(1.0, ("top", "adversarial"), id="after-another-stage", marks=pytest.mark.slow),
    ],
)
def test_a_run_interrupted_at_every_epoch_gives_the_same_bytes(
    layout: Layout, repository: Path, caplog: pytest.LogCaptureFixture, max_fall: float, stages: tuple[str, ...]
) -> None:
    """A ``max_fall`` below 0 takes any epoch for a collapse: the first is taken again with PGD, from its checkpoint."""
    caplog.set_level(logging.INFO, logger="tasks")
    shrink(layout)
    changes = {"attack": "fgsm_rs", "max_fall": max_fall, "pgd_steps": 2}

    def again() -> FinetuneReport:
        return run(layout, repository, changes, stages=stages, epochs=2)

    whole = again()
    collapses = max_fall < 0
    assert (stage_of(whole).attack, stage_of(whole).collapsed_epoch) == (("pgd", 1) if collapses else ("fgsm_rs", None))
    assert ("again, with PGD" in caplog.text) is collapses
    expected, report, interruptions = outputs(layout), None, 0
    loggers = [logging.getLogger(f"tasks.training.{name}") for name in ("staged", "adversarial")]
    while report is None:
        handler = InterruptAtSecondEpoch()
        for logger in loggers:
            logger.addHandler(handler)
        try:
            report = again()
        except KeyboardInterrupt:
            interruptions += 1
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
    assert interruptions == sum(record.epochs for record in whole.stages) - 1
    assert report == whole
    assert outputs(layout) == expected


# What ships, attacked


@pytest.fixture
def attackable(layout: Layout) -> Layout:
    """With test images: the last validation images are said to be some."""
    images = read_manifest(layout.accepted)
    val = images.index[images["split"] == "val"]
    images.loc[val[-12:], "split"] = "test"
    write_manifest(layout.accepted, images)
    return layout


@pytest.mark.slow
def test_what_ships_is_attacked_on_test_images_and_hardly_withstands(attackable: Layout, repository: Path) -> None:
    """At 16/255: what falls at once costs AutoAttack a tenth of the time."""
    params = load_params(repository / "params.yaml")
    adversarial = params.finetune.adversarial.model_copy(update={"epsilon": 16.0})
    settings = params.finetune.model_copy(update={"adversarial": adversarial})
    work = {"finetune": settings, "evaluate": params.evaluate}
    report = attack.run(attackable, seed=0, attack=params.attack.model_copy(update={"images": 6}), **work)
    assert (report.model, report.num_images, report.epsilon) == ("linear probe", 6, 16)
    shares = [report.accuracy[name].accuracy for name in ("clean", STRONGEST, attack.LONG_PGD, attack.WITHSTOOD)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.6
    assert shares[-1] < 0.2
    assert report.auto_attack is is_installed()
    images = read_manifest(attackable.accepted)
    write_manifest(attackable.accepted, images[images["split"] != "test"])
    with pytest.raises(DataError, match="no test images"):
        attack.run(attackable, seed=0, attack=params.attack, **work)


@with_cuda
def test_a_gpu_finds_what_the_cpu_finds(attackable: Layout, repository: Path) -> None:
    params = load_params(repository / "params.yaml")
    found = {}
    for device in ("cpu", "cuda"):
        settings = params.finetune.model_copy(update={"device": device})
        work = {"attack": params.attack.model_copy(update={"images": 12}), "evaluate": params.evaluate}
        found[device] = attack.run(attackable, seed=0, finetune=settings, **work).accuracy
    assert found["cuda"].keys() == found["cpu"].keys()
    for name, on_cpu in found["cpu"].items():
        assert found["cuda"][name].accuracy == pytest.approx(on_cpu.accuracy, abs=0.1)  # one picture of twelve


@pytest.mark.slow
def test_auto_attack_leaves_an_undefended_model_nothing_and_queries_do_not_beat_gradients(target: Target) -> None:
    """At 12/255: what APGD leaves standing costs hundreds of passes more."""
    pytest.importorskip("art", reason="the optional extra robust is not installed")
    few = dataclasses.replace(target, images=target.images[:8], labels=target.labels[:8])
    settings = {"epsilon": 3 * EPSILON, "seed": 0, "square_queries": 50}
    state = np.random.get_state()[1].copy()
    found = auto_attack(few.model, few.images, few.labels, **settings)
    assert np.array_equal(np.random.get_state()[1], state)
    assert float((found - few.images).abs().max()) == pytest.approx(3 * EPSILON, abs=1e-4)
    assert few.accuracy(found) <= few.pgd(3 * EPSILON, num_steps=20)
    assert few.accuracy(found) < 0.3 < few.accuracy(few.images)
    without_gradients = square(few, epsilon=3 * EPSILON, num_queries=50)
    assert few.pgd(3 * EPSILON, num_steps=20) <= without_gradients <= few.accuracy(few.images)


def square(target: Target, epsilon: float, num_queries: int) -> float:
    """Accuracy under the toolbox's attack that sees no gradient."""
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import PyTorchClassifier

    loss, shape = torch.nn.CrossEntropyLoss(), tuple(target.images.shape[1:])
    model = PyTorchClassifier(target.model, loss=loss, input_shape=shape, nb_classes=10, clip_values=(0.0, 1.0))
    attack = SquareAttack(model, norm=np.inf, eps=epsilon, max_iter=num_queries, nb_restarts=1, verbose=False)
    return target.accuracy(torch.from_numpy(attack.generate(x=target.images.numpy(), y=target.labels.numpy())))


class Margin(torch.nn.Module):
    """Logit of the best wrong class over that of the right one: the loss of our PGD."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        right = torch.nn.functional.one_hot(labels, 10).bool() if labels.ndim == 1 else labels.bool()
        return (logits.masked_fill(right, -torch.inf).amax(dim=1) - logits[right]).mean()


@pytest.mark.slow
def test_our_pgd_finds_what_the_toolboxs_finds(target: Target) -> None:
    """The same number of pictures but for two, with the same loss; with its own loss, cross-entropy, no more."""
    pytest.importorskip("art", reason="the optional extra robust is not installed")
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    shape, accuracies = tuple(target.images.shape[1:]), []
    for loss in (Margin(), torch.nn.CrossEntropyLoss()):
        facts = {"loss": loss, "input_shape": shape, "nb_classes": 10, "clip_values": (0.0, 1.0)}
        model = PyTorchClassifier(target.model, **facts, device_type="cpu")  # where the model and its pictures lie
        step = {"eps": EPSILON, "eps_step": 2.5 * EPSILON / 20, "max_iter": 20, "num_random_init": 1}
        theirs = ProjectedGradientDescent(model, **step, batch_size=NUM_VAL, verbose=False)
        found = torch.from_numpy(theirs.generate(x=target.images.numpy(), y=target.labels.numpy()))
        accuracies.append(target.accuracy(found))
    ours = target.pgd(EPSILON, num_steps=20)
    assert accuracies[0] == pytest.approx(ours, abs=2.5 / NUM_VAL)
    assert accuracies[1] >= ours - 2.5 / NUM_VAL
