"""The head, the linear probe, prototypes, and the stage train_head on stored features."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from tasks import cache_features, suspects, train_head
from tasks.data.features import load_features
from tasks.data.manifest import read_manifest, write_manifest
from tasks.errors import BackboneError, DataError, ParamsError, StoreError, TrainingError
from tasks.layout import Layout
from tasks.models.backbone_card import read_card, write_card
from tasks.models.head import Head, read_head, write_head
from tasks.models.own_head import own_head, same_names
from tasks.training.folds import NEVER_HELD_OUT, assign_folds
from tasks.training.linear_probe import PathPoint, Probe, choose, fit_probe, grouped_standard_error, mean_recall
from tasks.training.logistic import fit_logistic, principal_basis
from tasks.training.logit_adjustment import adjustment_strength, class_shift
from tasks.training.prototypes import class_prototypes
from tasks.training.temperature import fit_temperature, row_nll
from tests.tasks.feature_workspaces import AUGMENT, FEATURES, GATE, TRAIN_HEAD, make_workspace

Features = NDArray[np.float32]


def digits() -> tuple[Features, list[str]]:
    """1,797 real handwritten digits as raw pixels (N, 64), and their labels, in scikit-learn's order."""
    features, targets = load_digits(return_X_y=True)
    return features.astype(np.float32), [str(target) for target in targets]


def probe(features: Features, labels: list[str], groups: list[str] | None = None, **changes: object) -> Probe:
    """A probe of one view a row."""
    settings = TRAIN_HEAD.model_dump(exclude={"method", "logit_adjustment"})
    settings |= {"seed": 0, "classes": sorted(set(labels)), "adjustment": 0.0} | changes
    return fit_probe(features[None], labels, groups or [f"{row}" for row in range(len(labels))], **settings)


def accuracy(head: Head, features: Features, labels: list[str]) -> float:
    found = head.probabilities(features).argmax(axis=1)
    return float(np.mean([head.labels[row] == label for row, label in zip(found, labels, strict=True)]))


class TestHead:
    head = Head(("a", "b", "c"), np.arange(6, dtype=np.float32).reshape(3, 2), np.array([0, 1, -1], np.float32))

    def test_it_comes_back_as_it_was_written_with_equal_bytes(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            write_head(tmp_path / name, self.head, {"kind": "test"})
        assert [path.read_bytes() for path in sorted((tmp_path / "one").iterdir())] == [
            path.read_bytes() for path in sorted((tmp_path / "two").iterdir())
        ]
        again = read_head(tmp_path / "one")
        assert again.labels == self.head.labels
        np.testing.assert_array_equal(again.weight, self.head.weight)
        np.testing.assert_array_equal(again.bias, self.head.bias)

    def test_probabilities_are_softmax_of_logits_even_where_logits_are_huge(self) -> None:
        probabilities = self.head.probabilities(np.array([[1.0, 2.0], [1e4, -3e4]], np.float32))
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-6)
        logits = self.head.logits(np.array([[1.0, 2.0]], np.float32)).astype(np.float64)
        np.testing.assert_allclose(probabilities[:1], np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)

    @pytest.mark.parametrize("name", ["head.safetensors", "head.json"])
    @pytest.mark.parametrize("damage", [b"", b"{}", b'{"format_version": 99}'])
    def test_a_damaged_or_foreign_head_is_refused_with_a_remedy(self, tmp_path: Path, name: str, damage: bytes) -> None:
        write_head(tmp_path, self.head, {})
        (tmp_path / name).write_bytes(damage)
        with pytest.raises(StoreError, match="dvc repro train_head"):
            read_head(tmp_path)

    def test_a_missing_head_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"head.json is missing"):
            read_head(tmp_path)

    def test_a_head_whose_parts_do_not_fit_is_a_bug(self) -> None:
        with pytest.raises(ValueError, match="3 labels"):
            Head(("a", "b", "c"), np.zeros((2, 5), np.float32), np.zeros(2, np.float32))


class TestLogistic:
    @pytest.mark.parametrize("log10_c", [-3, -1, 1])
    @pytest.mark.parametrize("shape", ["tall", "wide"])
    def test_the_optimum_is_that_of_scikit_learn(self, log10_c: int, shape: str) -> None:
        features, labels = digits()
        features, labels = (features[:400], labels[:400]) if shape == "tall" else (features[:50], labels[:50])
        targets = np.array(labels, dtype=np.intp)
        basis = principal_basis(features)
        rotated = basis.rotate(features)
        fit = fit_logistic(
            rotated,
            targets,
            basis.variances,
            num_classes=10,
            c=10.0**log10_c,
            row_weight=1.0,
            max_iterations=500,
            tolerance=1e-6,
        )
        scaled = (features - basis.mean) / basis.scale
        reference = LogisticRegression(C=10.0**log10_c, max_iter=5000, tol=1e-8).fit(scaled, targets)
        weight, bias = basis.unfold(fit.weight, fit.bias)
        logits = features @ weight.T + bias
        ours = np.exp(logits - logits.max(axis=1, keepdims=True))
        np.testing.assert_allclose(ours / ours.sum(axis=1, keepdims=True), reference.predict_proba(scaled), atol=2e-4)

    def test_folding_the_standardisation_back_is_exact(self) -> None:
        random = np.random.default_rng(0)
        features = (random.normal(size=(60, 12)) * 3 + 40).astype(np.float32)
        basis = principal_basis(features)
        weight, bias = random.normal(size=(4, len(basis.variances))), random.normal(size=4)
        raw_weight, raw_bias = basis.unfold(weight, bias)
        rotated = (features - basis.mean) / basis.scale @ basis.directions
        np.testing.assert_allclose(features @ raw_weight.T + raw_bias, rotated @ weight.T + bias, atol=1e-9)

    def test_two_views_of_every_image_weigh_as_much_as_one(self) -> None:
        features, labels = digits()
        features, targets = features[:200], np.array(labels[:200], dtype=np.intp)
        basis = principal_basis(features)
        rotated = basis.rotate(features)
        settings = {"num_classes": 10, "c": 0.1, "max_iterations": 300, "tolerance": 1e-6}
        once = fit_logistic(rotated, targets, basis.variances, row_weight=1.0, **settings)  # type: ignore[arg-type]
        twice = fit_logistic(
            np.tile(rotated, (2, 1)),
            np.tile(targets, 2),
            basis.variances,
            row_weight=0.5,
            **settings,  # type: ignore[arg-type]
        )
        np.testing.assert_allclose(once.weight, twice.weight, atol=1e-4)


class TestFolds:
    @given(
        rows=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), min_size=1, max_size=80),
        num_folds=st.integers(2, 6),
        seed=st.integers(0, 5),
    )
    def test_groups_stay_together_and_a_lone_group_of_a_class_is_never_held_out(
        self, rows: list[tuple[int, int]], num_folds: int, seed: int
    ) -> None:
        targets, groups = [row[0] for row in rows], [f"{row[1]}" for row in rows]
        folds = assign_folds(targets, groups, num_folds=num_folds, seed=seed)
        assert set(folds.tolist()) <= {NEVER_HELD_OUT, *range(num_folds)}
        for group in set(groups):
            assert len({folds[row] for row in range(len(rows)) if groups[row] == group}) == 1
        for target in set(targets):
            mine = {groups[row] for row in range(len(rows)) if targets[row] == target}
            if len(mine) == 1 and len({targets[row] for row in range(len(rows)) if groups[row] in mine}) == 1:
                assert {folds[row] for row in range(len(rows)) if targets[row] == target} == {NEVER_HELD_OUT}

    def test_every_class_is_spread_over_the_folds(self) -> None:
        targets = [0] * 50 + [1] * 10
        folds = assign_folds(targets, [f"{row}" for row in range(60)], num_folds=5, seed=0)
        assert np.bincount(folds[:50]).tolist() == [10] * 5
        assert np.bincount(folds[50:]).tolist() == [2] * 5

    def test_another_seed_deals_otherwise(self) -> None:
        deal = [assign_folds([0] * 20, [f"{row}" for row in range(20)], num_folds=5, seed=seed) for seed in (0, 0, 1)]
        assert deal[0].tolist() == deal[1].tolist() != deal[2].tolist()


class TestChoice:
    def test_the_strongest_penalty_within_one_standard_error_is_chosen(self) -> None:
        path = [PathPoint(-2, 0.9, 0.05, 0.7), PathPoint(-1, 0.53, 0.04, 0.8), PathPoint(0, 0.50, 0.0, 0.8)]
        assert choose(path) == -1
        assert choose([*path[:1], PathPoint(-1, 0.53, 0.02, 0.8), path[2]]) == 0

    def test_copies_of_one_image_do_not_make_a_standard_error_smaller(self) -> None:
        values = np.random.default_rng(0).normal(size=50)
        once = grouped_standard_error(values, np.arange(50))
        assert once == pytest.approx(values.std() / math.sqrt(50))
        assert grouped_standard_error(np.tile(values, 4), np.tile(np.arange(50), 4)) == pytest.approx(once)

    def test_temperature_undoes_a_known_scale(self) -> None:
        random = np.random.default_rng(0)
        logits = random.normal(size=(4000, 5)) * 2
        odds = np.exp(logits)
        drawn = (random.random((4000, 1)) > (odds / odds.sum(axis=1, keepdims=True)).cumsum(axis=1)).sum(axis=1)
        assert fit_temperature(logits * 3, drawn) == pytest.approx(3, rel=0.1)
        assert fit_temperature(logits[:50] * 3, drawn[:50]) == 1.0

    def test_rows_that_are_all_right_do_not_make_a_model_sure_of_everything(self) -> None:
        """Likelihood alone would have T as small as it may be; 120 right answers say 99 % (Platt)."""
        random = np.random.default_rng(0)
        targets = random.integers(0, 5, 120)
        logits = random.normal(size=(120, 5))
        logits[np.arange(120), targets] = logits.max(axis=1) + 2
        temperature = fit_temperature(logits, targets)
        assert 0.98 < np.exp(-row_nll(logits / temperature, targets)).mean() < 0.995


class TestProbe:
    def test_it_reads_handwritten_digits_from_raw_pixels(self) -> None:
        """Shuffled: in scikit-learn's order the last third comes from other writers (.92 there)."""
        features, labels = digits()
        order = np.random.default_rng(0).permutation(len(labels))
        features, labels = features[order], [labels[row] for row in order]
        found = probe(features[:1200], labels[:1200])
        assert accuracy(found.head, features[1200:], labels[1200:]) > 0.95
        assert found.accuracy is not None
        assert found.accuracy > 0.93
        assert found.num_held_out == 1200
        assert found.converged

    def test_ten_labelled_digits_a_class_reach_what_logistic_regression_on_pixels_reaches(self) -> None:
        """.901 on average over ten seeds, the project's reference for raw pixels at 10 a class."""
        features, labels = digits()
        results = []
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(len(labels))
            train = np.concatenate([[row for row in order if labels[row] == f"{digit}"][:10] for digit in range(10)])
            rest = np.setdiff1d(order, train)
            found = probe(features[train], [labels[row] for row in train], num_c=7)
            results.append(accuracy(found.head, features[rest], [labels[row] for row in rest]))
        assert np.mean(results) > 0.88

    def test_two_runs_give_the_same_bytes(self) -> None:
        features, labels = digits()
        heads = [probe(features[:300], labels[:300]).head for _ in range(2)]
        assert heads[0].weight.tobytes() == heads[1].weight.tobytes()
        assert heads[0].bias.tobytes() == heads[1].bias.tobytes()

    def test_two_classes_give_two_rows(self) -> None:
        features, labels = digits()
        rows = [row for row, label in enumerate(labels[:600]) if label in "18"]
        chosen = [labels[row] for row in rows]
        head = probe(features[rows], chosen).head
        assert head.labels == ("1", "8")
        assert head.weight.shape == (2, 64)
        assert accuracy(head, features[rows], chosen) > 0.95

    def test_a_class_of_two_images_is_held_out_one_at_a_time(self) -> None:
        features, labels = digits()
        rare = [row for row, label in enumerate(labels) if label == "7"][:2]
        rows = [row for row, label in enumerate(labels[:400]) if label in "012"] + rare
        found = probe(features[rows], [labels[row] for row in rows])
        assert found.head.labels == ("0", "1", "2", "7")
        assert found.num_held_out == len(rows)

    def test_a_class_in_one_group_is_learnt_and_never_judged(self) -> None:
        features, labels = digits()
        rare = [row for row, label in enumerate(labels) if label == "7"][:3]
        rows = [row for row, label in enumerate(labels[:400]) if label in "012"]
        groups = [f"{row}" for row in rows] + ["burst"] * 3
        rows += rare
        found = probe(features[rows], [labels[row] for row in rows], groups)
        assert found.num_held_out == len(rows) - 3
        assert accuracy(found.head, features[rare], ["7"] * 3) == 1.0

    def test_one_image_a_class_gives_a_head_without_cross_validation(self) -> None:
        features, labels = digits()
        rows = [labels.index(digit) for digit in "0123456789"]
        found = probe(features[rows], list("0123456789"))
        assert (found.path, found.num_held_out, found.nll, found.temperature) == ((), 0, None, 1.0)
        assert accuracy(found.head, features, labels) > 0.4

    def test_constant_features_give_the_class_shares(self) -> None:
        labels = ["a"] * 30 + ["b"] * 10
        found = probe(np.full((40, 5), 3.0, np.float32), labels)
        np.testing.assert_allclose(
            found.head.probabilities(np.full((1, 5), 3.0, np.float32)), [[0.75, 0.25]], atol=2e-2
        )

    def test_near_duplicates_across_folds_would_flatter_and_are_kept_together(self) -> None:
        """Random labels on groups of eight copies: grouped folds see chance, ungrouped folds see copies."""
        random = np.random.default_rng(0)
        features = np.repeat(random.normal(size=(40, 30)), 8, axis=0).astype(np.float32)
        labels = np.repeat(random.choice(["a", "b"], size=40), 8).tolist()
        grouped = probe(features, labels, np.repeat(np.arange(40), 8).astype(str).tolist())
        alone = probe(features, labels)
        assert grouped.accuracy is not None
        assert alone.accuracy is not None
        assert grouped.accuracy < 0.75 < 0.95 < alone.accuracy

    def test_above_the_limit_one_tenth_is_held_out_once(self) -> None:
        features, labels = digits()
        found = probe(features, labels, holdout_above=1000)
        assert found.num_parts == 1
        assert found.num_held_out == pytest.approx(180, abs=10)

    def test_a_choice_on_the_end_extends_the_path_once(self) -> None:
        features, labels = digits()
        found = probe(features[:400], labels[:400], min_log10_c=-6, max_log10_c=-4, num_c=3)
        assert [point.log10_c for point in found.path] == [-6, -5, -4, -3, -2]
        assert found.log10_c > -4
        noise = np.random.default_rng(0).normal(size=(60, 20)).astype(np.float32)
        strong = probe(noise, ["a", "b"] * 30, min_log10_c=-1, max_log10_c=1, num_c=3)
        assert [point.log10_c for point in strong.path] == [-3, -2, -1, 0, 1]

    def test_penalties_that_only_overfit_are_not_tried(self) -> None:
        features, labels = digits()
        wrong = np.random.default_rng(0).permutation(400)[:80]
        noisy = [f"{row % 10}" if row in wrong else label for row, label in enumerate(labels[:400])]
        found = probe(features[:400], noisy, num_c=13)
        assert 4 <= len(found.path) < 13
        assert found.log10_c < found.path[-1].log10_c

    def test_one_class_is_refused(self) -> None:
        with pytest.raises(TrainingError, match=r"two classes; all 3 training images are 'a'"):
            probe(np.zeros((3, 4), np.float32), ["a"] * 3)

    def test_features_that_are_not_finite_are_refused(self) -> None:
        with pytest.raises(TrainingError, match="1 images are not finite"):
            probe(np.array([[0.0], [np.nan]], np.float32), ["a", "b"])


class TestLogitAdjustment:
    def test_rare_classes_are_found_more_often_and_balanced_accuracy_rises(self) -> None:
        """Real digits from raw pixels, five classes cut to 8 of 100, judged on others: .881 to .924 over five seeds."""
        features, labels = digits()
        gains, plain_losses = [], []
        for seed in range(2):
            order = np.random.default_rng(seed).permutation(len(labels))
            taken = {digit: 100 if int(digit) < 5 else 8 for digit in "0123456789"}
            train = [row for digit, num in taken.items() for row in [r for r in order if labels[r] == digit][:num]]
            rest = np.setdiff1d(order, train)
            told = [labels[row] for row in train]
            plain, adjusted = (probe(features[train], told, adjustment=strength) for strength in (0.0, 1.0))
            assert np.array_equal(plain.head.weight, adjusted.head.weight), "only the bias moves"
            targets = np.array([plain.head.labels.index(labels[row]) for row in rest], np.intp)
            recall = [mean_recall(each.head.logits(features[rest]), targets) for each in (plain, adjusted)]
            gains.append(recall[1] - recall[0])
            rare = np.isin(targets, range(5, 10))
            found = [(each.head.logits(features[rest]).argmax(axis=1) == targets) for each in (plain, adjusted)]
            assert found[1][rare].mean() > found[0][rare].mean()
            plain_losses.append(found[0][~rare].mean() - found[1][~rare].mean())
            assert plain.adjusted_balanced_accuracy == plain.balanced_accuracy == adjusted.balanced_accuracy
            assert adjusted.adjusted_balanced_accuracy is not None
            assert adjusted.balanced_accuracy is not None
            assert adjusted.adjusted_balanced_accuracy > adjusted.balanced_accuracy
        assert np.mean(gains) > 0.01
        assert np.mean(plain_losses) < 0.05

    def test_at_strength_1_it_is_the_answer_under_equal_shares(self) -> None:
        """A mixture whose likelihoods are known: Bayes' rule with the training shares, then with equal ones."""
        shares, likelihood = np.array([0.8, 0.15, 0.05]), np.array([0.2, 0.5, 0.3])
        logits = np.log(shares * likelihood)
        shifted = logits + class_shift([800, 150, 50], 1.0)
        np.testing.assert_allclose(np.exp(shifted) / np.exp(shifted).sum(), likelihood / likelihood.sum(), rtol=1e-5)
        assert class_shift([800, 150, 50], 0.0).tolist() == [0, 0, 0]
        np.testing.assert_allclose(class_shift([7, 7], 1.0), 0, atol=1e-7)

    def test_auto_follows_what_the_gate_will_judge_by(self) -> None:
        even, uneven = ["a", "b"] * 10, ["a"] * 31 + ["b"] * 10

        def strength(
            train: list[str], test: list[str], balanced: bool | Literal["auto"], wanted: object = "auto"
        ) -> float:
            return adjustment_strength(wanted, train_labels=train, test_labels=test, balanced=balanced)  # type: ignore[arg-type]

        assert strength(uneven, uneven, "auto") == 1
        assert strength(uneven, even, "auto") == strength(even, uneven, "auto") == strength(uneven, [], "auto") == 0
        assert strength(uneven, uneven, False) == strength(even, even, True) == 0
        assert strength(uneven, even, True) == 1
        assert strength(even, even, False, wanted=0.5) == 0.5

    def test_the_stage_adjusts_by_rule_says_so_and_can_be_told_not_to(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level("INFO", logger="tasks")
        counts = {"ant": 200, "bee": 20, "cat": 20}
        report = train_on(tmp_path / "auto", counts)
        assert report.class_ratio == 10
        assert report.logit_adjustment == 1
        assert "the largest class has 10.0 times the images of the smallest: scores adjusted" in caplog.text
        off = train_on(tmp_path / "off", counts, logit_adjustment=0.0)
        assert (off.class_ratio, off.logit_adjustment) == (10, 0)
        assert report.path == off.path
        heads = [read_head(Layout(tmp_path / name).head_dir) for name in ("auto", "off")]
        np.testing.assert_array_equal(heads[0].weight, heads[1].weight)
        np.testing.assert_allclose(heads[0].bias - heads[1].bias, class_shift([120, 12, 12], 1.0), atol=1e-5)
        assert train_on(tmp_path / "even", {"ant": 20, "bee": 20}).logit_adjustment == 0


class TestPrototypes:
    def test_the_nearest_class_mean_is_chosen(self) -> None:
        features, labels = digits()
        head = class_prototypes(features[:1200], labels[:1200])
        targets = np.array(labels[:1200])
        means = np.stack([features[:1200][targets == label].mean(axis=0) for label in head.labels])
        distances = ((features[1200:, None, :] - means) ** 2).sum(axis=2)
        np.testing.assert_array_equal(head.probabilities(features[1200:]).argmax(axis=1), distances.argmin(axis=1))

    def test_its_confidence_is_honest(self) -> None:
        features, labels = digits()
        head = class_prototypes(features[:1200], labels[:1200])
        probabilities = head.probabilities(features[1200:])
        confident = float(probabilities.max(axis=1).mean())
        assert confident == pytest.approx(accuracy(head, features[1200:], labels[1200:]), abs=0.1)
        targets = np.array([head.labels.index(label) for label in labels[1200:]], dtype=np.intp)
        assert row_nll(head.logits(features[1200:]), targets).mean() < 0.7

    @pytest.mark.parametrize("features", [np.ones((4, 3), np.float32), np.eye(4, dtype=np.float32)])
    def test_degenerate_features_give_finite_numbers(self, features: Features) -> None:
        head = class_prototypes(features, ["a", "a", "b", "b"])
        assert np.isfinite(head.probabilities(features)).all()
        assert np.isfinite(class_prototypes(features[:2], ["a", "b"]).probabilities(features)).all()


class TestStage:
    def test_the_probe_learns_from_stored_features_alone(self, tmp_path: Path) -> None:
        layout = make_workspace(tmp_path, {"ant": 50, "bee": 50, "cat": 50})
        cache_features.run(layout, features=FEATURES, augment=AUGMENT)
        for path in layout.raw.rglob("*.png"):
            path.unlink()
        layout.trunk_onnx.unlink()
        report = train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=TRAIN_HEAD, gate=GATE)
        assert (report.num_train, report.num_val, report.num_classes) == (90, 30, 3)
        assert report.views == ("centre", "crop-1@0.5")
        assert report.val_accuracy is not None
        assert report.val_accuracy > 0.9
        head = read_head(layout.head_dir)
        assert head.labels == ("ant", "bee", "cat")
        first = (layout.head_dir / "head.safetensors").read_bytes()
        assert (
            train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=TRAIN_HEAD, gate=GATE)
            == report
        )
        assert (layout.head_dir / "head.safetensors").read_bytes() == first

    def test_a_class_that_came_later_is_the_last_output_and_moves_no_other(self, tmp_path: Path) -> None:
        layout = make_workspace(tmp_path, {"aardvark": 20, "bee": 20, "cat": 20})
        accepted = read_manifest(layout.accepted)
        ids = {"bee": 0, "cat": 2, "aardvark": 3}  # the second class of this workspace vanished
        write_manifest(layout.accepted, accepted.assign(class_id=accepted["label"].map(ids)))
        cache_features.run(layout, features=FEATURES, augment=AUGMENT)
        report = train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=TRAIN_HEAD, gate=GATE)
        head = read_head(layout.head_dir)
        assert head.labels == ("bee", "cat", "aardvark")
        assert report.val_accuracy is not None
        assert report.val_accuracy > 0.9

    def test_features_that_were_not_cached_say_what_to_run(self, tmp_path: Path) -> None:
        layout = make_workspace(tmp_path, {"ant": 5, "bee": 5})
        with pytest.raises(StoreError, match="12 of 12 features are not stored"):
            train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=TRAIN_HEAD, gate=GATE)

    def test_a_path_that_runs_backwards_is_refused(self, tmp_path: Path) -> None:
        layout = make_workspace(tmp_path, {"ant": 5, "bee": 5})
        wrong = TRAIN_HEAD.model_copy(update={"min_log10_c": 3.0})
        with pytest.raises(ParamsError, match=r"min_log10_c \(3\) must be below"):
            train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=wrong, gate=GATE)


def train_on(root: Path, counts: dict[str, int], **changes: object) -> train_head.TrainHeadReport:
    """The stage on drawn pictures."""
    layout = make_workspace(root, counts)
    cache_features.run(layout, features=FEATURES, augment=AUGMENT)
    settings = TRAIN_HEAD.model_copy(update=changes)
    return train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=settings, gate=GATE)


class TestBadInput:
    def test_two_images_a_class_make_a_head(self, tmp_path: Path) -> None:
        report = train_on(tmp_path, {"ant": 2, "bee": 2, "cat": 2})
        assert report.num_train_by_class == {"ant": 2, "bee": 2, "cat": 2}
        assert report.temperature == 1
        assert np.isfinite(read_head(Layout(tmp_path).head_dir).weight).all()

    def test_a_class_with_hundreds_of_times_anothers_images_does_not_swallow_it(self, tmp_path: Path) -> None:
        report = train_on(tmp_path, {"ant": 502, "bee": 2})
        assert report.num_train_by_class == {"ant": 302, "bee": 2}
        layout = Layout(tmp_path)
        features = load_features(layout.features_dir, read_card(layout.backbone_card), shas_of(layout, "bee"))
        assert read_head(layout.head_dir).probabilities(features).argmax(axis=1).tolist() == [1, 1]

    def test_all_labels_the_same_are_refused(self, tmp_path: Path) -> None:
        for method in ("probe", "as_is"):
            with pytest.raises(TrainingError, match="needs two classes"):
                train_on(tmp_path / method, {"ant": 20}, method=method)

    def test_shuffled_labels_are_told_to_be_at_chance(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level("INFO", logger="tasks")
        counts = {"ant": 60, "bee": 60, "cat": 60}
        assert not train_on(tmp_path, counts).is_at_chance
        assert "at chance" not in caplog.text
        layout = Layout(tmp_path)
        images = read_manifest(layout.accepted)
        write_manifest(layout.accepted, images.assign(label=np.random.default_rng(0).permutation(images["label"])))
        report = train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=TRAIN_HEAD, gate=GATE)
        assert report.is_at_chance
        assert report.chance_accuracy == pytest.approx(1 / 3, abs=0.1)
        assert "the probe is at chance" in caplog.text

    @pytest.mark.parametrize(("large", "small"), [(302, 2), (100, 5)])
    def test_a_probe_that_has_all_images_of_uneven_classes_right_is_not_at_chance(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, large: int, small: int
    ) -> None:
        """Always naming the large class is nearly as often right, and no interval of an accuracy tells them apart."""
        caplog.set_level("INFO", logger="tasks")
        counts = {"ant": 5 * large // 3 + 1, "bee": 5 * small // 3 + 1}
        layout = make_workspace(tmp_path, counts)
        images = read_manifest(layout.accepted)
        train = images[images["split"] == "train"]
        rows = [*train.index[train["label"] == "ant"][:large], *train.index[train["label"] == "bee"][:small]]
        write_manifest(layout.accepted, images.loc[rows])
        cache_features.run(layout, features=FEATURES, augment=AUGMENT)
        report = train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=TRAIN_HEAD, gate=GATE)
        assert report.num_train_by_class == {"ant": large, "bee": small}
        assert report.out_of_fold_accuracy == 1
        assert report.chance_accuracy == pytest.approx(large / (large + small))
        assert not report.is_at_chance
        assert "at chance" not in caplog.text

    def test_what_is_at_chance_by_paired_answers(self) -> None:
        assert train_head.is_at_chance(0, 0), "it always names the largest class itself"
        assert train_head.is_at_chance(20, 20)
        assert train_head.is_at_chance(24, 18), "noise"
        assert not train_head.is_at_chance(30, 12)
        assert not train_head.is_at_chance(2, 0), "two images can show nothing"
        assert not train_head.is_at_chance(8, 1), "too few to call it noise"


def shas_of(layout: Layout, label: str) -> list[str]:
    images = read_manifest(layout.accepted)
    return images.loc[(images["label"] == label) & (images["split"] == "train"), "sha256"].tolist()


class TestAsIs:
    def test_names_are_the_same_whatever_their_case_and_what_is_between_words(self) -> None:
        known = ("tench", "Great_white-shark", "crane bird, crane")
        assert same_names(["great white  shark", "CRANE", "owl"], known) == {"great white  shark": 1, "CRANE": 2}

    def test_without_names_in_common_the_prototypes_answer(self, tmp_path: Path) -> None:
        report = train_on(tmp_path, {"ant": 50, "bee": 50}, method="as_is")
        assert (report.method, report.num_same_names, report.log10_c, report.solver) == ("prototypes", 0, None, None)
        assert report.val_accuracy is not None
        assert report.val_accuracy > 0.9
        layout = Layout(tmp_path)
        with pytest.raises(DataError, match=r"train_head\.method"):
            suspects.run(layout, seed=0, train_head=TRAIN_HEAD)

    def test_a_linear_classifier_that_knows_all_the_names_answers_itself(self, tmp_path: Path) -> None:
        """Its rows of these classes, in the part of the embedding that it was made for."""
        layout = make_workspace(tmp_path, {"ant": 20, "bee": 20})
        cache_features.run(layout, features=FEATURES, augment=AUGMENT)
        card = read_card(layout.backbone_card)
        write_card(
            layout.backbone_card,
            dataclasses.replace(card, architecture="resnet18", labels=("owl", "Bee", "wren", "ANT")),
        )
        width = card.feature_dim - 1
        weight = np.random.default_rng(0).normal(size=(4, width)).astype(np.float32)
        save_file({"fc.weight": weight, "fc.bias": np.arange(4, dtype=np.float32)}, layout.backbone_weights)
        settings = TRAIN_HEAD.model_copy(update={"method": "as_is"})
        report = train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=settings, gate=GATE)
        assert (report.method, report.num_same_names) == ("own_classes", 2)
        head = read_head(layout.head_dir)
        assert head.labels == ("ant", "bee")
        np.testing.assert_array_equal(head.weight, np.pad(weight[[3, 1]], ((0, 0), (1, 0))))
        assert head.bias.tolist() == [3, 1]
        save_file({"fc.weight": weight[:3], "fc.bias": np.arange(3, dtype=np.float32)}, layout.backbone_weights)
        with pytest.raises(BackboneError, match=r"backbone\.labels names 4 classes, the classifier .* has 3"):
            train_head.run(layout, seed=0, augment=AUGMENT, features=FEATURES, train_head=settings, gate=GATE)

    def test_a_classifier_of_several_layers_gives_way_to_prototypes(self, tmp_path: Path) -> None:
        arrays = {
            "classifier.0.weight": np.zeros((4, 3), np.float32),
            "classifier.3.weight": np.zeros((2, 4), np.float32),
            "fc.weight": np.zeros((4, 3), np.float32),
        }
        save_file(arrays, tmp_path / "w.safetensors")
        given = {"columns": {"ant": 0}, "num_classes": 4, "feature_dim": 3}
        for architecture in ("mobilenet_v3_small", "vgg11", "timm:resnet18", "resnet18@layer3"):
            assert own_head(tmp_path / "w.safetensors", architecture, **given) is None
