"""Views, the feature store, and the stage cache_features on real files."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from ruamel.yaml import YAML

from deploy.files import sha256_bytes, write_bytes
from tasks import cache_features
from tasks.data.feature_store import (
    LOCK_POLL_S,
    SPACE_CARD,
    FeatureStore,
    Key,
    Part,
    Space,
    adding,
    open_store,
    writing,
)
from tasks.data.features import STORE_CARD, feature_space, load_features, read_engine, write_engine
from tasks.data.manifest import read_manifest, write_manifest
from tasks.data.views import apply_view, training_views, view_names
from tasks.errors import BackboneError, DataError, StoreError
from tasks.layout import Layout
from tasks.models.backbone_card import read_card
from tests.tasks.feature_workspaces import (
    AUGMENT,
    FEATURES,
    make_workspace,
    put_backbone,
    put_images,
    put_manifest,
    trunk_graph,
)

SPACE = Space(trunk_sha256="t", preprocessing_sha256="p", engine="e", feature_dim=3)
IMAGE = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)


def run(layout: Layout, **changes: object) -> cache_features.CacheFeaturesReport:
    return cache_features.run(layout, features=FEATURES.model_copy(update=changes), augment=AUGMENT)


def store_of(layout: Layout) -> FeatureStore:
    space = feature_space(read_card(layout.backbone_card), read_engine(layout.features_dir))
    return open_store(layout.features_dir, space)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: sha256_bytes(path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


def keys_of(count: int, start: int = 0) -> list[Key]:
    return [Key(f"{number:064x}", "centre") for number in range(start, start + count)]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return make_workspace(tmp_path, {"ant": 10, "bee": 10})  # 6 train, 2 val, 2 test each


class TestViews:
    def test_names_start_with_the_picture_itself_and_mirror_only_where_allowed(self) -> None:
        assert view_names(4, hflip=True) == ("centre", "flip", "crop-1", "crop-2")
        assert view_names(3, hflip=False) == ("centre", "crop-1", "crop-2")
        assert view_names(1, hflip=True) == ("centre",)

    @pytest.mark.parametrize(("num_train", "expected"), [(1, 4), (499, 4), (500, 2), (19_999, 2), (20_000, 1)])
    def test_auto_takes_fewer_views_of_more_images(self, num_train: int, expected: int) -> None:
        assert len(training_views("auto", num_train=num_train, min_area_fraction=0.5, hflip=False)) == expected

    def test_the_name_of_a_crop_tells_the_settings_that_change_its_pixels(self) -> None:
        assert training_views(3, num_train=9, min_area_fraction=0.25, hflip=True) == ("centre", "flip", "crop-1@0.25h")

    @given(
        height=st.integers(1, 40),
        width=st.integers(1, 40),
        fraction=st.floats(0.01, 1.0),
        number=st.integers(1, 9),
        hflip=st.booleans(),
    )
    def test_a_crop_is_a_square_of_the_picture_and_keeps_at_least_the_share(
        self, height: int, width: int, fraction: float, number: int, hflip: bool
    ) -> None:
        image = np.arange(height * width * 3, dtype=np.uint8).reshape(height, width, 3)
        crop = apply_view(image, f"crop-{number}", key="k", min_area_fraction=fraction, hflip=hflip)
        side, largest = crop.shape[0], min(height, width)
        assert crop.shape == (side, side, 3)
        assert crop.flags.c_contiguous
        assert np.sqrt(fraction) * largest - 0.5 <= max(side, np.sqrt(fraction) * largest - 0.5) <= largest
        shown = {pixel.tobytes() for pixel in crop.reshape(-1, 3)}
        assert shown <= {pixel.tobytes() for pixel in image.reshape(-1, 3)}

    def test_a_view_depends_on_the_content_and_its_name_alone(self) -> None:
        def crop(key: str, view: str) -> bytes:
            return apply_view(IMAGE, view, key=key, min_area_fraction=0.3, hflip=True).tobytes()

        assert crop("a", "crop-1") == crop("a", "crop-1")
        assert len({crop(key, view) for key in "abcd" for view in ("crop-1", "crop-2")}) == 8

    def test_flip_mirrors_and_centre_leaves_the_picture_alone(self) -> None:
        flat = {"key": "k", "min_area_fraction": 0.5, "hflip": True}
        np.testing.assert_array_equal(apply_view(IMAGE, "flip", **flat), IMAGE[:, ::-1])  # type: ignore[arg-type]
        np.testing.assert_array_equal(apply_view(IMAGE, "centre", **flat), IMAGE)  # type: ignore[arg-type]

    def test_an_unknown_view_is_refused(self) -> None:
        with pytest.raises(ValueError, match="no such view"):
            apply_view(IMAGE, "upside-down", key="k", min_area_fraction=0.5, hflip=False)


class TestStore:
    def test_rows_come_back_in_the_order_asked_for(self, tmp_path: Path) -> None:
        rows = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float16)
        keys = keys_of(7)
        with writing(tmp_path, SPACE) as store:
            store.append(keys[:4], rows[:4])
            store.append(keys[4:], rows[4:])
        order = [5, 0, 6, 3, 3]
        found = open_store(tmp_path, SPACE).gather([keys[row] for row in order])
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, rows[order].astype(np.float32))

    def test_other_spaces_do_not_see_the_rows(self, tmp_path: Path) -> None:
        with writing(tmp_path, SPACE) as store:
            store.append(keys_of(2), np.zeros((2, 3)))
        for change in ({"trunk_sha256": "x"}, {"preprocessing_sha256": "x"}, {"engine": "x"}, {"feature_dim": 4}):
            other = Space(**{**SPACE.__dict__, **change})
            assert len(open_store(tmp_path, other)) == 0

    def test_equal_histories_make_equal_bytes(self, tmp_path: Path) -> None:
        for name in ("one", "two"):
            with writing(tmp_path / name, SPACE) as store:
                store.append(keys_of(3), np.full((3, 3), 0.1))
        assert contents(tmp_path / "one") == contents(tmp_path / "two")

    @pytest.mark.parametrize("value", [np.nan, np.inf, 70_000.0])
    def test_what_float16_cannot_hold_is_refused_by_name(self, tmp_path: Path, value: float) -> None:
        with writing(tmp_path, SPACE) as store:
            with pytest.raises(StoreError, match="not finite in float16: view centre of image 000000000000"):
                store.append(keys_of(2), np.array([[0, 0, 0], [0, value, 0]]))
            assert len(store) == 0

    def test_a_missing_row_says_what_to_run(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"2 of 2 features are not stored.*cache_features"):
            open_store(tmp_path, SPACE).gather(keys_of(2))

    @pytest.mark.parametrize("suffix", [".npy", ".json"])
    @pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "gone"])
    def test_a_damaged_shard_is_named_then_dropped_by_the_next_writer(
        self, tmp_path: Path, suffix: str, damage: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with writing(tmp_path, SPACE) as store:
            store.append(keys_of(2), np.ones((2, 3)))
            store.append(keys_of(2, start=2), np.full((2, 3), 2.0))
        broken = (store.directory / "000001.npy").with_suffix(suffix)
        hurt(broken, damage)
        if (suffix, damage) != (".json", "gone"):  # a shard without its index was never committed: it is swept
            with pytest.raises(StoreError, match=r"damaged: 000001.npy.*cache_features"):
                open_store(tmp_path, SPACE)
        with caplog.at_level(logging.INFO), writing(tmp_path, SPACE) as store:
            assert sorted(store.rows) == keys_of(2, start=2)
            store.append(keys_of(2), np.ones((2, 3)))
        assert "000001.npy" in caplog.text
        np.testing.assert_array_equal(open_store(tmp_path, SPACE).gather(keys_of(4))[:, 0], [1, 1, 2, 2])

    def test_a_second_writer_is_refused_with_the_reason_and_readers_are_not(self, tmp_path: Path) -> None:
        with writing(tmp_path, SPACE) as store:
            store.append(keys_of(1), np.ones((1, 3)))
            with pytest.raises(StoreError, match="being written by another process"):  # noqa: SIM117
                with writing(tmp_path, SPACE, wait_s=0.05):
                    pass
            assert len(open_store(tmp_path, SPACE)) == 1

    def test_a_second_writer_waits_for_the_first(self, tmp_path: Path) -> None:
        holding = threading.Event()

        def write_slowly() -> None:
            with writing(tmp_path, SPACE) as store:
                holding.set()
                time.sleep(0.3)
                store.append(keys_of(2), np.ones((2, 3)))

        first = threading.Thread(target=write_slowly)
        first.start()
        assert holding.wait(10)
        with writing(tmp_path, SPACE, wait_s=60) as store:
            assert len(store) == 2
        first.join()

    def test_who_waited_for_a_space_that_was_removed_meanwhile_holds_the_new_one(self, tmp_path: Path) -> None:
        waiting, holding, done = threading.Event(), threading.Event(), threading.Event()

        def write() -> None:
            waiting.set()
            with writing(tmp_path, SPACE, wait_s=60) as store:
                holding.set()
                assert done.wait(60)
                store.append(keys_of(2), np.ones((2, 3)))

        with writing(tmp_path, SPACE) as store:
            second = threading.Thread(target=write)
            second.start()
            assert waiting.wait(10)
            time.sleep(2 * LOCK_POLL_S)
            (store.directory / SPACE_CARD).unlink()  # as `drop_orphans` does with a space that nothing needs
            store.directory.rmdir()
        assert holding.wait(10)
        with pytest.raises(StoreError, match="being written by another process"):  # noqa: SIM117
            with writing(tmp_path, SPACE, wait_s=0.05):
                pass
        done.set()
        second.join()
        assert len(open_store(tmp_path, SPACE)) == 2


def hurt(path: Path, damage: str) -> None:
    data = path.read_bytes()
    match damage:
        case "truncated":
            path.write_bytes(data[:-3])
        case "flipped":
            path.write_bytes(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()


class TestCacheFeatures:
    def test_train_images_are_seen_in_all_views_and_the_others_as_they_will_be_served(self, layout: Layout) -> None:
        report = run(layout)
        assert (report.num_images, report.num_features, report.extracted) == (20, 12 * 2 + 8, 32)
        images = read_manifest(layout.accepted).set_index("sha256")
        for sha, split in images["split"].items():
            views = {key.view for key in store_of(layout).rows if key.image_sha256 == sha}
            assert views == ({"centre", "crop-1@0.5"} if split == "train" else {"centre"})

    def test_a_second_run_extracts_nothing_and_changes_no_byte(self, layout: Layout) -> None:
        run(layout)
        before = contents(layout.features_dir)
        report = run(layout)
        assert (report.extracted, report.reused, report.rechecked, report.stale) == (0, 32, 4, 0)
        assert contents(layout.features_dir) == before

    def test_only_new_images_are_extracted_and_shards_are_only_added(self, layout: Layout) -> None:
        run(layout)
        before = contents(layout.features_dir)
        put_images(layout, {"ant": 5, "bee": 0}, start=10)  # 3 train, 1 val, 1 test
        put_manifest(layout)
        report = run(layout)
        assert (report.extracted, report.reused) == (3 * 2 + 2, 32)
        assert before.items() <= contents(layout.features_dir).items()

    def test_relabelling_renaming_and_removing_cost_no_forward(self, layout: Layout) -> None:
        run(layout)
        (layout.raw / "ant" / "00000.png").rename(layout.raw / "ant" / "00100.png")
        (layout.raw / "bee" / "00001.png").unlink()
        put_manifest(layout, labels={"bee/00002.png": "ant"})
        assert run(layout).extracted == 0

    def test_more_views_cost_only_the_new_views(self, layout: Layout) -> None:
        run(layout)
        assert run(layout, views=3).extracted == 12
        assert run(layout, views=2).extracted == 0

    def test_other_weights_share_nothing_and_going_back_costs_nothing(self, layout: Layout) -> None:
        run(layout)
        put_backbone(layout, trunk_graph(seed=1))
        assert run(layout).extracted == 32
        put_backbone(layout, trunk_graph())
        assert run(layout).extracted == 0

    def test_two_copies_of_one_picture_are_extracted_once(self, layout: Layout) -> None:
        (layout.raw / "ant" / "00100.png").write_bytes((layout.raw / "ant" / "00000.png").read_bytes())
        put_manifest(layout)
        assert run(layout).num_images == 20

    def test_batch_size_changes_no_stored_feature(
        self, layout: Layout, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        other = make_workspace(tmp_path_factory.mktemp("other"), {"ant": 10, "bee": 10})
        run(layout, batch_size=1)
        run(other, batch_size="auto")
        assert contents(layout.features_dir) == contents(other.features_dir)

    @pytest.mark.parametrize(("num_views", "size"), [(0, 1), (3, 1), (1000, 63), (2048, 128), (10**6, 128)])
    def test_few_pictures_are_spread_over_all_threads(self, num_views: int, size: int) -> None:
        assert cache_features._batch_size(128, num_views, workers=16) == size

    def test_a_feature_is_what_the_backbone_gives_for_the_view(self, layout: Layout) -> None:
        run(layout)
        path = layout.raw / "ant" / "00000.png"
        sha, card = sha256_bytes(path.read_bytes()), read_card(layout.backbone_card)
        image = np.asarray(Image.open(path))
        crop = apply_view(image, "crop-1", key=sha, min_area_fraction=0.5, hflip=False)
        extractor = cache_features._open_extractor(layout, card, "onnxruntime", AUGMENT, 0)
        for view, shown, session in (
            ("centre", image, extractor.preprocess),
            ("crop-1@0.5", crop, extractor.preprocess_crop),
        ):
            pixels = session.run(["pixels"], {"images": shown[None]})[0]
            expected = extractor.engine.forward(pixels)
            np.testing.assert_allclose(load_features(layout.features_dir, card, [sha], [view]), expected, rtol=1e-3)

    def test_load_features_gives_views_one_after_the_other(self, layout: Layout) -> None:
        run(layout)
        card, images = read_card(layout.backbone_card), read_manifest(layout.accepted)
        shas = images.loc[images["split"] == "train", "sha256"].tolist()
        both = load_features(layout.features_dir, card, shas, ("centre", "crop-1@0.5"))
        assert both.shape == (2 * len(shas), card.feature_dim)
        np.testing.assert_array_equal(both[: len(shas)], load_features(layout.features_dir, card, shas))

    def test_a_damaged_shard_is_dropped_and_computed_again(self, layout: Layout) -> None:
        run(layout)
        before = contents(layout.features_dir)
        hurt(next(layout.features_dir.rglob("*.npy")), "flipped")
        assert run(layout).extracted == 32
        assert contents(layout.features_dir) == before

    def test_a_stale_cache_is_found_by_recheck_and_refilled(
        self, layout: Layout, caplog: pytest.LogCaptureFixture
    ) -> None:
        run(layout)
        before = contents(layout.features_dir)
        shift_stored_features(layout, 1.05)
        report = run(layout)
        assert (report.stale, report.extracted) == (4, 32)
        assert "4 of 4 stored features are not what the backbone gives now, of " in caplog.text
        assert caplog.text.count(".png (view ") == 4
        assert contents(layout.features_dir) == before

    def test_recheck_bears_the_rounding_of_float16(self, layout: Layout) -> None:
        run(layout)
        shift_stored_features(layout, 1.0005)
        assert run(layout).stale == 0

    def test_one_stale_entry_is_found_where_it_is_looked_at(self, layout: Layout) -> None:
        run(layout)
        before = contents(layout.features_dir)
        shift_stored_features(layout, 1.05, only=1)
        report = run(layout, recheck=32)
        assert (report.stale, report.extracted) == (1, 32)
        assert contents(layout.features_dir) == before

    def test_a_picture_that_changed_where_recheck_looks_keeps_no_other_from_being_stored(self, layout: Layout) -> None:
        run(layout)
        (layout.raw / "ant" / "00000.png").write_bytes((layout.raw / "ant" / "00001.png").read_bytes())
        rows = read_manifest(layout.accepted)
        put_images(layout, {"bee": 5}, start=10)
        put_manifest(layout)
        new = read_manifest(layout.accepted)
        write_manifest(layout.accepted, pd.concat([rows, new[~new["path"].isin(rows["path"])]]))
        with pytest.raises(DataError, match=r"1 accepted image\(s\) cannot be used: \S+/ant/00000.png \(changed"):
            run(layout, recheck=32)
        assert len(store_of(layout)) == 32 + 8

    def test_weights_swapped_under_the_same_name_are_refused_and_nothing_is_stored(self, layout: Layout) -> None:
        write_bytes(layout.trunk_onnx, trunk_graph(seed=1).SerializeToString())
        with pytest.raises(BackboneError, match=r"trunk\.onnx: not what backbone\.json speaks of.*fetch_backbone"):
            run(layout)
        assert not layout.features_dir.exists()

    def test_readers_follow_the_engine_that_filled_the_store(self, layout: Layout) -> None:
        run(layout)
        card, images = read_card(layout.backbone_card), read_manifest(layout.accepted)
        shas = images["sha256"].tolist()[:3]
        other = feature_space(card, "openvino-cpu-bfloat16")
        with writing(layout.features_dir, other) as store:
            store.append([Key(sha, "centre") for sha in shas], np.full((3, card.feature_dim), 7.0))
        assert not (load_features(layout.features_dir, card, shas) == 7).any()
        write_engine(layout.features_dir, other.engine)
        assert (load_features(layout.features_dir, card, shas) == 7).all()
        run(layout)
        assert not (load_features(layout.features_dir, card, shas) == 7).any()

    def test_a_store_of_another_format_is_left_alone_and_says_what_to_do(self, layout: Layout) -> None:
        run(layout)
        (layout.features_dir / STORE_CARD).write_text('{"format_version": 2, "engine": "x"}')
        before = contents(layout.features_dir)
        with pytest.raises(StoreError, match=r"format version 2; this code reads 1\. Delete .*, which loses only time"):
            run(layout)
        assert contents(layout.features_dir) == before
        (layout.features_dir / STORE_CARD).unlink()  # as stores were before they had a card
        assert run(layout).extracted == 0

    @pytest.mark.parametrize("size", [(1, 1), (1, 5000), (3000, 2)])
    def test_pictures_of_any_shape_have_features(self, layout: Layout, size: tuple[int, int]) -> None:
        Image.new("RGB", size, "red").save(layout.raw / "ant" / "00010.png")
        put_manifest(layout)
        report = run(layout)
        assert report.extracted == 34

    def test_missing_files_are_all_named_before_any_work(self, layout: Layout) -> None:
        for name in ("ant/00000.png", "bee/00003.png"):
            (layout.raw / name).unlink()
        with pytest.raises(DataError, match=r"2 accepted image.*ant/00000.png.*dvc checkout") as error:
            run(layout)
        assert "bee/00003.png" in str(error.value)

    def test_changed_and_undecodable_files_are_named_and_the_rest_is_kept(self, layout: Layout) -> None:
        changed = layout.raw / "ant" / "00000.png"
        torn = layout.raw / "bee" / "00001.png"
        torn.write_bytes(torn.read_bytes()[:200])
        put_manifest(layout)
        changed.write_bytes((layout.raw / "bee" / "00000.png").read_bytes())
        with pytest.raises(DataError, match=r"2 accepted image\(s\) cannot be used") as error:
            run(layout)
        assert "ant/00000.png (changed since it was indexed)" in str(error.value)
        assert "bee/00001.png" in str(error.value)
        assert len(store_of(layout)) == 32 - 2 * 2

    def test_features_too_large_for_float16_name_their_images_and_the_rest_is_kept(self, layout: Layout) -> None:
        put_backbone(layout, trunk_graph(scale=3e3))
        Image.new("RGB", (20, 20), "white").save(layout.raw / "bee" / "00013.png")
        put_manifest(layout)
        with pytest.raises(
            StoreError, match=r"1 feature.* float16 .*: \S+/bee/00013.png \(view centre\).*mean and std"
        ):
            run(layout)
        assert len(store_of(layout)) == 32

    @pytest.mark.parametrize("room", [10_000, 30_000], ids=["in the rows", "in their index"])
    def test_a_disk_that_fills_up_in_a_shard_costs_that_shard_only(
        self, layout: Layout, repository: Path, room: int
    ) -> None:
        put_params(layout, repository)
        survives = run(layout).extracted
        put_images(layout, {"ant": 300}, start=100)
        put_manifest(layout)
        command = [sys.executable, "-c", WITH_LITTLE_ROOM, str(room), str(layout.root)]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert "File too large" in done.stderr
        assert "Nothing was lost; free space" in done.stderr
        assert "Traceback" not in done.stderr
        assert len(store_of(layout)) == survives
        report = run(layout)
        assert (report.reused, report.stale) == (survives, 0)
        assert len(list(layout.features_dir.rglob("*.npy"))) == len(store_of(layout).shards)

    def test_files_left_by_a_killed_writer_are_swept(self, layout: Layout) -> None:
        run(layout)
        before = contents(layout.features_dir)
        space = store_of(layout).directory
        (space / ".000002.npy.abcd.npy").write_bytes(b"half")
        (space / "000002.npy").write_bytes(b"not committed")
        run(layout)
        assert contents(layout.features_dir) == before


class TestParts:
    def test_every_image_is_in_one_part_and_no_two_parts_write_one_file(self) -> None:
        shas = [f"{sha256_bytes(bytes([number]))}" for number in range(200)]
        for count in (1, 2, 5):
            parts = [Part(index, count) for index in range(1, count + 1)]
            assert all(sum(sha in part for part in parts) == 1 for sha in shas)
            for last in range(12):
                numbers = [part.next_number(last) for part in parts]
                assert sorted(numbers) == list(range(last + 1, last + 1 + count))

    def test_parts_at_the_same_time_store_what_one_process_stores(
        self, layout: Layout, repository: Path, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        alone = make_workspace(tmp_path_factory.mktemp("alone"), {"ant": 10, "bee": 10})
        run(alone)
        put_params(layout, repository)
        done = [part_process(layout, repository, part) for part in ("1/2", "2/2")]
        assert [process.wait() for process in done] == [0, 0]
        assert run(layout).extracted == 0
        keys = sorted(store_of(alone).rows)
        assert sorted(store_of(layout).rows) == keys
        np.testing.assert_array_equal(store_of(layout).gather(keys), store_of(alone).gather(keys))

    def test_doing_a_part_again_does_nothing_and_a_damaged_one_is_mended(self, layout: Layout) -> None:
        part = Part(1, 2)
        num_rows = cache_features.run_part(layout, part, features=FEATURES, augment=AUGMENT)
        before = contents(layout.features_dir)
        assert cache_features.run_part(layout, part, features=FEATURES, augment=AUGMENT) == 0
        assert contents(layout.features_dir) == before
        hurt(next(layout.features_dir.rglob("[0-9]*.npy")), "flipped")
        assert cache_features.run_part(layout, part, features=FEATURES, augment=AUGMENT) == num_rows
        assert run(layout).extracted == 32 - num_rows

    def test_parts_do_not_wait_for_each_other_and_who_needs_the_store_alone_does(self, tmp_path: Path) -> None:
        one, other = (Part(1, 2), Part(2, 2))
        with adding(tmp_path, SPACE, one) as first, adding(tmp_path, SPACE, other, wait_s=0) as second:
            first.append(keys_of(1), np.ones((1, 3)))
            second.append(keys_of(1, start=1), np.full((1, 3), 2.0))
            with pytest.raises(StoreError, match="being written by another process"):  # noqa: SIM117
                with writing(tmp_path, SPACE, wait_s=0.05):
                    pass
        with writing(tmp_path, SPACE) as store:
            np.testing.assert_array_equal(store.gather(keys_of(2))[:, 0], [1, 2])

    def test_a_part_that_two_processes_add_at_once_loses_no_row(self, tmp_path: Path) -> None:
        part = Part(2, 3)
        with adding(tmp_path, SPACE, part) as first, adding(tmp_path, SPACE, part) as second:
            first.append(keys_of(2), np.full((2, 3), 1.0))
            second.append(keys_of(2, start=1), np.full((2, 3), 2.0))
            first.append(keys_of(1, start=3), np.full((1, 3), 3.0))
        store = open_store(tmp_path, SPACE)
        assert [shard.path.stem for shard in store.shards] == ["000001", "000004", "000007"]
        np.testing.assert_array_equal(store.gather(keys_of(4))[:, 0], [1, 2, 2, 3])

    def test_a_part_ends_with_who_reads_what_it_says(self, layout: Layout, repository: Path) -> None:
        put_params(layout, repository)
        put_images(layout, {"ant": 1200}, start=100)
        put_manifest(layout)
        part = part_process(layout, repository, "1/1", stdout=subprocess.PIPE)
        while not list(layout.features_dir.rglob("[0-9]*.json")):
            assert part.poll() is None
            time.sleep(0.01)
        assert part.stdout is not None
        part.stdout.close()
        assert part.wait(timeout=60) == 128 + signal.SIGPIPE
        survived = len(store_of(layout))
        assert survived >= cache_features.COMMIT_ROWS
        report = run(layout)
        assert (report.reused, report.stale) == (survived, 0)
        assert report.extracted > 0, "it ended too late to test anything"

    def test_a_part_that_does_not_exist_is_wrong_usage(self, layout: Layout, repository: Path) -> None:
        for words in (["cache_features", "--part", "3/2"], ["train_head", "--part", "1/2"]):
            command = [sys.executable, "-m", "tasks", *words, "--root", str(layout.root)]
            assert subprocess.run(command, cwd=repository, capture_output=True, check=False).returncode == 2


# To a process a file that may not grow is a full disk.
WITH_LITTLE_ROOM = """
import resource, sys
from tasks.__main__ import main
room, root = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))
sys.argv = ["tasks", "cache_features", "--root", root]
sys.exit(main())
"""


def put_params(layout: Layout, repository: Path) -> None:
    """params.yaml with what `run` is given here."""
    yaml = YAML()
    values = yaml.load((repository / "params.yaml").read_text())
    values["features"].update(FEATURES.model_dump())
    values["augment"].update(AUGMENT.model_dump())
    yaml.dump(values, layout.params)


def part_process(
    layout: Layout, repository: Path, part: str, *, stdout: int | None = None
) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tasks", "cache_features", "--part", part, "--root", str(layout.root)]
    return subprocess.Popen(command, cwd=repository, stdout=stdout, stderr=subprocess.DEVNULL)


def shift_stored_features(layout: Layout, factor: float, *, only: int | None = None) -> None:
    """Rewrites the store, digests and all, as if another backbone had filled it (or its first rows) under this name."""
    old = store_of(layout)
    keys = list(old.rows)
    features = old.gather(keys)
    features[:only] *= factor
    with writing(layout.features_dir, old.space) as store:
        store.drop_all()
        store.append(keys, features)


def test_a_kill_in_the_middle_loses_at_most_what_was_not_committed(tmp_path: Path) -> None:
    counts = {"ant": 600, "bee": 600}
    killed = make_workspace(tmp_path / "killed", counts)
    script = (
        "import sys; from pathlib import Path; from tests.tasks.test_features import run;"
        "from tasks.layout import Layout; run(Layout(Path(sys.argv[1])))"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(killed.root)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 120
    while not any(killed.features_dir.rglob("[0-9]*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    survived = len(store_of(killed))
    assert cache_features.COMMIT_ROWS <= survived < 1920, "the kill came too late to test anything"
    report = run(killed)
    assert (report.extracted, report.reused) == (1920 - survived, survived)
    assert (report.stale, len(store_of(killed))) == (0, 1920)
