"""The manifest: what gets a row, what is never decoded twice, and splits that never move."""

import io
import os
import resource
import shutil
import struct
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.fftpack
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deploy.files import atomic_path, sha256_bytes
from flows.shards import bring_into, edit_images
from tasks import index_images as stage
from tasks.data import manifest, stamps
from tasks.data.facts import image_facts, reduced
from tasks.data.image_files import ImageFile, Listing
from tasks.data.image_store import ShardImages, shard_paths
from tasks.data.known_facts import KnownFacts
from tasks.data.manifest import (
    SCHEMA,
    Facts,
    Row,
    class_names,
    read_columns,
    read_manifest,
    rows_to_frame,
    write_manifest,
)
from tasks.data.perceptual_hash import hashes, lowest_frequencies
from tasks.data.splits import SPLITS, assigned_split, hashed_split
from tasks.data.stamps import Stamps
from tasks.errors import DataError, StoreError
from tasks.layout import Layout
from tasks.params import DataParams, IndexImagesParams

PARAMS = IndexImagesParams(val_fraction=0.2, test_fraction=0.3, max_megapixels=1)


def picture(seed: int, *, side: int = 24, flat: int | None = None, file_format: str = "PNG") -> bytes:
    """A small picture that has no near-duplicate, or a flat one."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    image = coarse.resize((side, side)) if flat is None else Image.new("RGB", (side, side), (flat, flat, flat))
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return buffer.getvalue()


def put(layout: Layout, path: str, data: bytes) -> None:
    (layout.raw / path).parent.mkdir(parents=True, exist_ok=True)
    (layout.raw / path).write_bytes(data)


def index(layout: Layout, *, seed: int = 0, params: IndexImagesParams = PARAMS) -> stage.IndexImagesReport:
    data = DataParams(layout=stage.open_images(layout.raw).layout, shard_mb=1)
    return stage.run(layout, seed=seed, data=data, index_images=params)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Two classes of 20 pictures."""
    layout = Layout(tmp_path)
    for number in range(40):
        put(layout, f"{'cat' if number % 2 else 'dog'}/{number:02d}.png", picture(number))
    return layout


def splits_by_content(layout: Layout) -> dict[str, str]:
    frame = read_manifest(layout.images)
    return dict(zip(frame["sha256"], frame["split"], strict=True))


# --- splits -----------------------------------------------------------------------------------------------------------

GROUPS = st.text("0123456789abcdef", min_size=16, max_size=16)
FRACTIONS = st.floats(0, 0.45)


@given(GROUPS, st.integers(0, 2**31), FRACTIONS, FRACTIONS, FRACTIONS)
def test_a_changed_fraction_never_moves_an_image_between_the_other_two(
    group: str, seed: int, val: float, test: float, other: float
) -> None:
    before = hashed_split(group, seed=seed, val_fraction=val, test_fraction=test)
    after = hashed_split(group, seed=seed, val_fraction=other, test_fraction=test)
    assert before in SPLITS
    assert (before == "test") == (after == "test")
    after = hashed_split(group, seed=seed, val_fraction=val, test_fraction=other)
    assert (before == "val") == (after == "val")


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.05, 0.4), st.floats(0.05, 0.4))
def test_fractions_hold_within_sampling_error(seed: int, val: float, test: float) -> None:
    number = 2000
    splits = [hashed_split(f"{i:016x}", seed=seed, val_fraction=val, test_fraction=test) for i in range(number)]
    for split, fraction in (("val", val), ("test", test)):
        five_sigma = 5 * (fraction * (1 - fraction) / number) ** 0.5
        assert abs(splits.count(split) / number - fraction) < five_sigma


@given(GROUPS, st.sampled_from([None, *SPLITS]), st.sets(st.sampled_from(SPLITS)), st.integers(0, 99))
def test_official_val_and_test_are_kept_and_only_what_folders_lack_is_hashed(
    group: str, official: str | None, named: set[str], seed: int
) -> None:
    named = named | {official} - {None}
    split = assigned_split(group, official, named, seed=seed, val_fraction=0.3, test_fraction=0.3)
    if official in ("val", "test") or (official == "train" and {"val", "test"} <= named):
        assert split == official
    elif official == "train":
        assert split == "train" or split not in named
    else:
        assert split == hashed_split(group, seed=seed, val_fraction=0.3, test_fraction=0.3)


def test_adding_renaming_relabelling_and_removing_images_never_moves_an_image(layout: Layout) -> None:
    index(layout)
    before = splits_by_content(layout)
    assert set(before.values()) == set(SPLITS)
    for number in range(100, 130):
        put(layout, f"owl/deep/{number}.png", picture(number))
    (layout.raw / "cat" / "01.png").rename(layout.raw / "cat" / "another name.png")
    (layout.raw / "cat" / "03.png").rename(layout.raw / "dog" / "03.png")
    (layout.raw / "dog" / "00.png").unlink()
    index(layout)
    after = splits_by_content(layout)
    assert all(after[sha256] == split for sha256, split in before.items() if sha256 in after)
    assert len(after) == 69


def test_another_seed_draws_other_splits(layout: Layout) -> None:
    index(layout, seed=0)
    before = splits_by_content(layout)
    index(layout, seed=1)
    assert splits_by_content(layout) != before


def test_a_near_duplicate_group_never_lies_in_two_splits(layout: Layout) -> None:
    for number in range(40):
        put(layout, f"cat/again-{number}.png", picture(number))
        put(layout, f"dog/larger-{number}.png", picture(number, side=48))
    index(layout)
    frame = read_manifest(layout.images)
    assert frame.groupby("group")["split"].nunique().max() == 1
    assert frame["group"].nunique() < 80


def test_blank_pages_are_no_near_duplicates_of_each_other() -> None:
    white, grey = (image_facts(picture(0, flat=value), max_pixels=10**6) for value in (255, 128))
    assert white.group != grey.group
    assert white.sharpness == white.contrast == 0


# --- statistics and hash ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (31, 17), (32, 32), (200, 150), (500, 375), (301, 1001)])
def test_the_hash_is_imagehashs_phash_but_for_what_it_rounds(size: tuple[int, int]) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (12, 12), dtype=np.uint8))
    image = noise.resize(size, Image.Resampling.BICUBIC)
    small = image.resize((32, 32), Image.Resampling.LANCZOS)  # what ImageHash takes, in whole numbers
    theirs = scipy.fftpack.dct(scipy.fftpack.dct(np.asarray(small), axis=0), axis=1)[:8, :8]
    values = np.asarray(image).astype(np.float64)
    ours = lowest_frequencies(values, height=size[1], width=size[0], factor=1)
    np.testing.assert_allclose(ours, theirs, atol=0.005 * np.abs(theirs).max())
    far = np.abs(theirs - np.median(theirs)) > 2 * np.abs(ours - theirs).max()
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(hashes(ours[None])[0]), np.uint8)).reshape(8, 8).astype(bool)
    assert far.sum() > 40
    np.testing.assert_array_equal(bits[far], imagehash.phash(image).hash[far])


def test_hashes_are_written_as_imagehash_writes_them() -> None:
    frequencies = np.random.default_rng(0).normal(size=(20, 8, 8))
    assert hashes(frequencies) == [str(imagehash.ImageHash(each > np.median(each))) for each in frequencies]


@pytest.mark.parametrize("factor", [2, 3, 8])
def test_blocks_stand_for_their_pixels_in_the_hash(factor: int) -> None:
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 256, (12, 12), dtype=np.uint8))
    image = noise.resize((250 * factor - 1, 190 * factor - 1), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    sizes = {"height": image.height, "width": image.width}
    whole = lowest_frequencies(pixels.astype(np.float64), **sizes, factor=1)
    blocks = lowest_frequencies(reduced(pixels, factor).astype(np.float64), **sizes, factor=factor)
    np.testing.assert_allclose(blocks, whole, atol=0.002 * np.abs(whole).max())


@pytest.mark.parametrize("size", [(512, 512), (511, 511), (511, 300), (300, 511), (257, 1), (1, 258), (600, 401)])
def test_blocks_are_those_of_pillow(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    factor = -(-max(size) // 256)
    np.testing.assert_array_equal(reduced(pixels, factor), np.asarray(Image.fromarray(pixels).reduce(factor)))


@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_pictures_that_are_looked_at_at_the_same_time_leave_each_other_alone(file_format: str) -> None:
    """They share a thread's memory one after the other, and nothing at once."""
    sides = [3, 20, 255, 256, 257, 300, 511, 512, 513, 700] * 4
    files = [picture(number, side=side, file_format=file_format) for number, side in enumerate(sides)]
    alone = [image_facts(data, max_pixels=10**6) for data in files]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(partial(image_facts, max_pixels=10**6), files * 5)) == alone * 5


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (2, 50), (181, 256), (256, 256)])
def test_statistics_are_those_of_numpy(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    facts = image_facts(buffer.getvalue(), max_pixels=10**6)
    assert facts.brightness == pytest.approx(pixels.mean())
    assert facts.contrast == pytest.approx(pixels.std(), abs=1e-9)
    x = np.pad(pixels, 0).astype(float)
    laplacian = x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:] - 4 * x[1:-1, 1:-1]
    assert facts.sharpness == pytest.approx(laplacian.var() if laplacian.size else 0)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_labels_are_text_whatever_they_look_like(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    labels = ["no", "1e-3", "null", "two words ", "Käfer", "たぬき", "0"]
    for number, label in enumerate(labels):
        put(layout, f"{label}/a.png", picture(number))
    report = index(layout)
    assert sorted(read_manifest(layout.images)["label"]) == sorted(labels)
    assert sorted(report.images_per_class) == sorted(labels)


def test_two_spellings_of_one_unicode_text_are_one_label(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    put(layout, "K\u00e4fer/a.png", picture(0))
    put(layout, "Ka\u0308fer/b.png", picture(1))
    put(layout, "owl/c.png", picture(2))
    assert index(layout).num_classes == 2
    for path in read_manifest(layout.images)["path"]:
        assert (layout.raw / path).is_file()


def test_what_is_no_image_by_its_name_is_left_out_and_told(layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    for path in (".DS_Store", "cat/Thumbs.db", "cat/notes.txt", ".hidden/a.png", "__MACOSX/cat/a.png", "top.png"):
        put(layout, path, picture(0))
    with caplog.at_level("WARNING"):
        report = index(layout)
    assert (report.num_images, report.num_skipped) == (40, 6)
    for told in (".DS_Store", "Thumbs.db", "notes.txt", ".hidden", "__MACOSX", "top.png"):
        assert told in caplog.text


def test_odd_names_and_links_are_rows_or_told_and_nothing_outside_is_walked(
    layout: Layout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(picture(90))
    (layout.raw / "cat" / "folder").symlink_to(outside)
    (layout.raw / "cat" / "loop").symlink_to(layout.raw)
    (layout.raw / "owl").symlink_to(outside)
    (layout.raw / "cat" / "gone.png").symlink_to(outside / "gone.png")
    (layout.raw / "cat" / "file.png").symlink_to(outside / "secret.png")  # as DVC's cache.type symlink lays them out
    deep = "cat/" + "/".join(["d" * 60] * 5) + "/a.png"
    named = ["cat/two\nlines.png", "cat/A.png", "cat/a.png", deep]
    for number, path in enumerate(named):
        put(layout, path, picture(50 + number))
    with caplog.at_level("WARNING"):
        index(layout)
    frame = read_manifest(layout.images)
    assert set(frame["path"]) - {path for path in frame["path"] if path[4:6].isdigit()} == {*named, "cat/file.png"}
    assert frame["error"].isna().all()
    assert len(deep) > 300
    assert "a link to a folder): cat/folder, cat/loop, owl" in caplog.text
    assert "cat/gone.png" in caplog.text


def test_a_file_that_does_not_decode_gets_a_row_with_the_reason(layout: Layout) -> None:
    put(layout, "cat/broken.png", picture(99)[:60])
    put(layout, "cat/empty.jpg", b"")
    put(layout, "cat/huge.png", picture(99, side=1001))
    assert index(layout).num_errors == 3
    frame = read_manifest(layout.images).set_index("path")
    assert frame.loc["cat/empty.jpg", "error"] == "empty file"
    assert "1001x1001" in frame.loc["cat/huge.png", "error"]
    assert frame["error"].isna().sum() == 40


@pytest.mark.parametrize("folder", ["train", "val", "valid", "validation", "Test"])
def test_a_split_folder_that_holds_images_directly_is_a_class(layout: Layout, folder: str) -> None:
    put(layout, f"{folder}/a.png", picture(99))
    index(layout)
    frame = read_manifest(layout.images).set_index("path")
    assert frame.loc[f"{folder}/a.png", "label"] == folder
    assert not frame["official_split"].any()


def test_official_splits_are_kept(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for number in range(60):
        folder = ("train", "validation", "test")[number % 3]
        put(layout, f"{folder}/{'cat' if number % 2 else 'dog'}/deep/{number}.png", picture(number))
    report = index(layout)
    assert report.official_splits == ["test", "train", "val"]
    assert report.images_per_split == {"train": 20, "val": 20, "test": 20}
    assert read_manifest(layout.images)["official_split"].all()


def test_without_an_official_val_it_is_drawn_from_train_and_test_stays(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    for number in range(80):
        folder = "test" if number % 4 == 0 else "train"
        put(layout, f"{folder}/{'cat' if number % 2 else 'dog'}/{number}.png", picture(number))
    splits = index(layout).images_per_split
    assert splits["test"] == 20
    assert splits["val"] > 0
    frame = read_manifest(layout.images)
    assert (frame["official_split"] == (frame["split"] != "val")).all()


@pytest.mark.parametrize("files", [[], ["notes.txt"], ["cat/notes.txt", "dog/.hidden.png"]])
def test_no_images_is_told_with_what_was_expected(tmp_path: Path, files: list[str]) -> None:
    layout = Layout(tmp_path)
    for path in files:
        put(layout, path, b"text")
    with pytest.raises(DataError, match=r"holds no images.*folder a class.*tanuki add"):
        index(layout)


def test_one_class_only_is_told_by_name(tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    put(layout, "only cats/a.png", picture(0))
    with pytest.raises(DataError, match=r"one class only: only cats \(1 images\)"):
        index(layout)


# --- caching ----------------------------------------------------------------------------------------------------------


def test_only_new_content_is_decoded(layout: Layout) -> None:
    assert (index(layout).decoded, index(layout).reused) == (40, 40)
    put(layout, "cat/new.png", picture(77))
    (layout.raw / "cat" / "01.png").rename(layout.raw / "dog" / "renamed.png")
    report = index(layout)
    assert (report.decoded, report.reused) == (1, 40)


def test_an_incremental_manifest_is_the_same_bytes_as_a_fresh_one(layout: Layout) -> None:
    index(layout)
    put(layout, "cat/new.png", picture(77))
    (layout.raw / "cat" / "01.png").unlink()
    index(layout)
    incremental = layout.images.read_bytes()
    layout.images.unlink()
    index(layout)
    assert layout.images.read_bytes() == incremental


def test_what_a_killed_run_left_half_written_goes_and_nothing_else_does(layout: Layout) -> None:
    index(layout)
    folder = layout.images.parent
    with atomic_path(layout.images) as half:
        half.write_bytes(layout.images.read_bytes())
    for name in (half.name, ".keep.parquet"):  # the first as a writer names it
        (folder / name).write_bytes(b"PAR1")
    index(layout)
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == {".keep.parquet", ".stamps"}


def test_a_picture_of_30000_by_30000_is_told_by_its_size_and_not_decoded(layout: Layout) -> None:
    row = zlib.compressobj(1)
    packed = b"".join(row.compress(bytes(1 + 30_000 // 8)) for _ in range(30_000)) + row.flush()
    chunks = ((b"IHDR", struct.pack("!IIBBBBB", 30_000, 30_000, 1, 0, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    png = b"".join(
        struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    put(layout, "cat/bomb.png", b"\x89PNG\r\n\x1a\n" + png)  # half a megabyte that would be 2.7 GB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert index(layout).num_errors == 1
    assert "900000000 pixels" in read_manifest(layout.images).set_index("path").loc["cat/bomb.png", "error"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000  # kB


def test_a_picture_that_was_too_large_is_decoded_once_the_limit_allows(layout: Layout) -> None:
    put(layout, "cat/large.png", picture(5, side=1001))
    assert index(layout).num_errors == 1
    raised = PARAMS.model_copy(update={"max_megapixels": 2.0})
    assert index(layout, params=raised).num_errors == 0
    assert index(layout).num_errors == 1


@pytest.mark.parametrize("damage", [b"", b"no parquet at all"])
def test_a_damaged_manifest_costs_only_time(layout: Layout, damage: bytes) -> None:
    index(layout)
    good = layout.images.read_bytes()
    layout.images.write_bytes(damage)
    assert index(layout).decoded == 40
    assert layout.images.read_bytes() == good


def known_facts(layout: Layout) -> dict[str, Facts]:
    known = KnownFacts([layout.images])
    found = {sha256_bytes(file.read_bytes()): None for file in layout.raw.rglob("*.png")}
    return {sha256: facts for sha256 in found if (facts := known.get(sha256)) is not None}


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :]


def test_a_flipped_bit_is_never_believed(layout: Layout) -> None:
    index(layout)
    whole, frame, known = layout.images.read_bytes(), read_manifest(layout.images), known_facts(layout)
    told = []
    for position in range(0, len(whole), len(whole) // 150):
        layout.images.write_bytes(flipped(whole, position))
        assert known_facts(layout) in ({}, known)
        try:
            assert read_manifest(layout.images).equals(frame)
        except DataError as error:
            told.append(str(error))
    assert len(told) > 50
    assert all("images.parquet is damaged" in text and "Remove it; `tanuki retrain`" in text for text in told)


def test_a_flipped_bit_in_a_statistic_is_named_and_everything_looked_at_again(
    layout: Layout, caplog: pytest.LogCaptureFixture
) -> None:
    index(layout)
    whole = layout.images.read_bytes()
    table = pq.read_table(layout.images)  # a file that parquet finds whole, with one wrong number
    place = table.schema.get_field_index("brightness")
    pq.write_table(table.set_column(place, "brightness", pa.array([7.0] * 40, pa.float32())), layout.images)
    with caplog.at_level("WARNING"):
        assert index(layout).decoded == 40
    assert "images.parquet is damaged (its rows no longer have their digest)" in caplog.text
    assert layout.images.read_bytes() == whole


def test_facts_of_another_version_are_not_trusted(layout: Layout) -> None:
    index(layout)
    table = pq.read_table(layout.images).replace_schema_metadata({"tanuki.facts_version": "0"})
    pq.write_table(table, layout.images)
    assert index(layout).decoded == 40


def test_a_manifest_of_several_groups_is_the_same_rows_and_known_again(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = index(layout)
    frame = read_manifest(layout.images)
    layout.images.unlink()
    for module in (stage, manifest):
        monkeypatch.setattr(module, "ROWS_PER_GROUP", 7)
    assert index(layout) == report
    assert pq.ParquetFile(layout.images).num_row_groups == 6
    assert read_manifest(layout.images).equals(frame)
    assert index(layout).reused == 40
    written = layout.images.read_bytes()
    write_manifest(layout.images, frame)
    assert layout.images.read_bytes() == written


@pytest.mark.parametrize(("written", "now"), [(7, 8192), (8192, 7)])
def test_a_manifest_is_whole_whatever_number_of_rows_its_groups_have(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, written: int, now: int
) -> None:
    """Once a manifest was one group of up to 2^20 rows, with one digest of them."""
    for module in (stage, manifest):
        monkeypatch.setattr(module, "ROWS_PER_GROUP", written)
    index(layout)
    for module in (stage, manifest):
        monkeypatch.setattr(module, "ROWS_PER_GROUP", now)
    assert len(read_manifest(layout.images)) == 40
    assert index(layout).reused == 40


def test_rows_cost_the_same_each_however_many_there_are() -> None:
    """Each once looked through the whole set for official splits: 20,000 rows took 17 s."""
    number = 20_000
    images = tuple(ImageFile(f"cat/{place:05d}.png", "cat", None) for place in range(number))
    groups = [f"{place:016x}" for place in range(number)]
    start = time.process_time()
    columns = stage._paths_and_splits(Listing(images, (), ()), slice(0, number), groups, 0, 0.2, 0.2)
    assert len(columns["split"]) == number
    assert time.process_time() - start < 5


def test_a_killed_run_goes_on_where_it_stopped(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "SAVE_INTERVAL_S", 0.0)
    store = stage.open_images(layout.raw)
    images = store.listing().images[:30]
    now = Stamps(layout.stamps, store, images)
    for _ in stage._read(layout, store, images, range(30), KnownFacts([]), 10**6, now, stage.Tally()):
        pass  # and here the power went
    assert not layout.images.exists()
    assert len(list(layout.images_partial.iterdir())) == 30
    assert index(layout).decoded == 10
    assert not layout.images_partial.exists()


# --- what has not changed is not read ---------------------------------------------------------------------------------


class Opened:
    """The files that this process opens, as Python's own audit events tell; a hook cannot be taken off again."""

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.paths is not None and event == "open":
            self.paths.append(str(arguments[0]))


@cache
def opened() -> Opened:
    return Opened()


def settle() -> None:
    """Waits until no file was changed a moment ago."""
    time.sleep(stamps.RECENT_S + 0.1)


def opened_by_index(layout: Layout) -> Counter[str]:
    """How often the stage opens each file of data/raw; its manifest must be the one that it makes of nothing."""
    data = DataParams(layout=stage.open_images(layout.raw).layout, shard_mb=1)
    opened().paths = paths = []
    try:
        stage.run(layout, seed=0, data=data, index_images=PARAMS)
    finally:
        opened().paths = None
    written, raw = layout.images.read_bytes(), f"{layout.raw}/"
    fresh = Layout(layout.root / "fresh")
    fresh.data.mkdir(parents=True, exist_ok=True)
    if not fresh.raw.exists():
        fresh.raw.symlink_to(layout.raw)
    fresh.images.unlink(missing_ok=True)
    index(fresh)
    assert fresh.images.read_bytes() == written
    return Counter(path.removeprefix(raw) for path in paths if path.startswith(raw))


def read_by_index(layout: Layout) -> list[str]:
    return sorted(opened_by_index(layout))


def test_only_what_has_changed_is_read(layout: Layout) -> None:
    settle()
    assert len(read_by_index(layout)) == 40
    assert read_by_index(layout) == []
    put(layout, "cat/new.png", picture(77))
    put(layout, "cat/01.png", picture(78))
    (layout.raw / "cat" / "03.png").rename(layout.raw / "dog" / "renamed.png")
    (layout.raw / "cat" / "05.png").touch()
    (layout.raw / "cat" / "07.png").unlink()
    settle()
    assert read_by_index(layout) == ["cat/01.png", "cat/05.png", "cat/new.png", "dog/renamed.png"]
    assert read_by_index(layout) == []


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_other_bytes_of_the_same_size_and_time_are_read(layout: Layout, how: str) -> None:
    path = layout.raw / "cat" / "01.bmp"
    put(layout, "cat/01.bmp", picture(101, file_format="BMP"))
    settle()
    index(layout)
    assert read_by_index(layout) == []
    before, other = path.stat(), picture(102, file_format="BMP")
    assert len(other) == before.st_size
    written = path if how == "written" else path.with_name("other.bmp")
    written.write_bytes(other)
    os.utime(written, ns=(before.st_atime_ns, before.st_mtime_ns))
    written.rename(path)
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert read_by_index(layout) == ["cat/01.bmp"]
    assert sha256_bytes(other) in splits_by_content(layout)


def test_what_was_changed_a_moment_ago_is_not_trusted_yet(layout: Layout) -> None:
    settle()
    put(layout, "cat/new.png", picture(77))
    assert len(read_by_index(layout)) == 41
    assert read_by_index(layout) == ["cat/new.png"]
    settle()
    assert read_by_index(layout) == ["cat/new.png"]
    assert read_by_index(layout) == []


def test_what_does_not_decode_is_read_again(layout: Layout) -> None:
    put(layout, "cat/torn.png", picture(99)[:40])
    settle()
    index(layout)
    assert read_by_index(layout) == ["cat/torn.png"]


def test_a_lost_manifest_is_made_again_from_the_images(layout: Layout) -> None:
    settle()
    index(layout)
    assert read_by_index(layout) == []
    layout.images.unlink()
    assert len(read_by_index(layout)) == 40
    assert read_by_index(layout) == []


def test_damaged_stamps_are_told_and_everything_is_read(layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    settle()
    index(layout)
    whole = layout.stamps.read_bytes()
    flips = [flipped(whole, position) for position in range(0, len(whole), len(whole) // 50)]
    for damaged in (b"", b"no stamps", whole[:-48], whole + bytes(48), *flips):
        layout.stamps.write_bytes(damaged)
        caplog.clear()
        assert len(read_by_index(layout)) == 40
        assert ".stamps is damaged" in caplog.text
    assert layout.stamps.read_bytes() == whole
    assert read_by_index(layout) == []


def test_of_unchanged_shards_only_the_headers_are_read_and_a_changed_one_is_checked(layout: Layout) -> None:
    bring_into(layout.raw, "shards", shard_bytes=20_000)
    images = stage.open_images(layout.raw)
    assert isinstance(images, ShardImages)
    one, other, *_ = images.images  # of one shard: only where in it they lie tells them apart
    holding = {images.images[path].shard.path.name for path in (one, other)}
    assert len(holding) == 1
    settle()
    shards = {shard.name for shard in shard_paths(layout.raw)}
    first, second = opened_by_index(layout), opened_by_index(layout)
    assert {name for name, count in first.items() if count > 1} == shards > holding
    assert second == dict.fromkeys((*shards, "edits.jsonl"), 1)
    edit_images(layout.raw, {one: other, other: one})
    counts = opened_by_index(layout)
    assert {name for name, count in counts.items() if count > 1} == holding
    shard = shard_paths(layout.raw)[0]
    status = shard.stat()
    shard.write_bytes(flipped(shard.read_bytes(), 600))
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(StoreError, match=r"^1 damaged shard\(s\): \S*shard-000000"):
        index(layout)


# --- manifest ---------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ROWS = st.builds(
    Row,
    path=TEXT,
    label=TEXT,
    facts=st.builds(
        Facts,
        sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
        size_bytes=st.integers(0, 2**40),
        width=st.integers(0, 2**31 - 1),
        mode=TEXT,
        format=TEXT,
        phash=st.just("0123456789abcdef"),
        brightness=st.floats(0, 255, width=32),
        error=st.none() | TEXT,
        group=st.just("0123456789abcdef"),
    ),
    split=st.sampled_from(SPLITS),
    official_split=st.booleans(),
)


@settings(max_examples=25)
@given(st.lists(ROWS, max_size=5, unique_by=(lambda row: row.path, lambda row: row.facts.sha256)))
def test_a_manifest_round_trips_to_the_same_bytes(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    path = tmp_path_factory.mktemp("manifest") / "images.parquet"
    write_manifest(path, rows_to_frame(rows))
    first = path.read_bytes()
    frame = read_manifest(path)
    write_manifest(path, frame.sample(frac=1, random_state=0))
    assert path.read_bytes() == first
    assert list(frame["path"]) == sorted(row.path for row in rows)
    assert list(frame.columns) == SCHEMA.names
    known = KnownFacts([path])
    decoded = {row.facts.sha256: row.facts for row in rows if row.facts.error is None}
    assert all(known.get(row.facts.sha256) == decoded.get(row.facts.sha256) for row in rows)


def test_classes_are_the_sorted_labels_of_train() -> None:
    facts = Facts(sha256="0", size_bytes=1)
    rows = [
        Row("a", "b", facts, "train", False),
        Row("b", "a", facts, "train", False),
        Row("c", "A", facts, "test", False),
    ]
    assert class_names(rows_to_frame(rows)) == ("a", "b")


@pytest.mark.parametrize("content", [None, b"", b"nonsense"])
def test_a_missing_or_broken_manifest_is_told_with_a_remedy(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "images.parquet"
    if content is not None:
        path.write_bytes(content)
    for read in (read_manifest, partial(read_columns, columns=["path"])):
        with pytest.raises(DataError, match=r"images\.parquet.*(tanuki retrain|index_images again)"):
            read(path)


def test_some_columns_are_those_of_the_whole(tmp_path: Path) -> None:
    rows = [Row(f"{number:05d}.png", "a", Facts(str(number), number), "train", False) for number in range(20_000)]
    path = tmp_path / "images.parquet"
    write_manifest(path, rows_to_frame(rows))
    assert pq.ParquetFile(path).num_row_groups == 3
    expected = {"sha256": [row.facts.sha256 for row in rows], "size_bytes": [row.facts.size_bytes for row in rows]}
    assert read_columns(path, ("sha256", "size_bytes")) == expected


# --- real photos ------------------------------------------------------------------------------------------------------


NO_PICTURE = "no picture in a format that is read"
TRUNCATED = "cannot be decoded: image file is truncated"

# What becomes of each file of the dirt pack: the mode and format of the picture, or why there is none.
DIRT = {
    "pillow_16_bit_noise.tif": "I;16 TIFF",
    "pillow_1_trns.png": "1 PNG",
    "pillow_broken.png": NO_PICTURE,
    "pillow_broken_data_stream.png": "cannot be decoded: unrecognized data stream contents",
    "pillow_chi.gif": "P GIF",
    "pillow_decompression_bomb.gif": "too large",
    "pillow_exif_gps_typeerror.jpg": "RGB JPEG",
    "pillow_flower.jpg": "RGB JPEG",
    "pillow_flower2.jpg": "RGB JPEG",
    "pillow_frozenpond.mpo": "RGB MPO",
    "pillow_hopper.avif": "RGB AVIF",
    "pillow_hopper.bmp": "RGB BMP",
    "pillow_hopper.gif": "P GIF",
    "pillow_hopper.heif": "HEIC is not supported: convert it to JPEG",
    "pillow_hopper.webp": "RGB WEBP",
    "pillow_hopper_bad_exif.jpg": "L JPEG",
    "pillow_hopper_bw_500.png": "1 PNG",
    "pillow_hopper_gray.jpg": "L JPEG",
    "pillow_hopper_orientation_3.jpg": "RGB JPEG",
    "pillow_hopper_orientation_6.jpg": "RGB JPEG",
    "pillow_hopper_orientation_8.webp": "RGB WEBP",
    "pillow_icc_profile_big.jpg": "RGB JPEG",
    "pillow_junk_jpeg_header.jpg": "RGB JPEG",
    "pillow_l_trns.png": "L PNG",
    "pillow_mode_16bit.png": "RGBA PNG",
    "pillow_photoshop-200dpi-broken.jpg": "RGB JPEG",
    "pillow_pil_sample_cmyk.jpg": "CMYK JPEG",
    "pillow_rgb.jpg": "RGB JPEG",
    "pillow_sugarshack_bad_mpo_header.jpg": "RGB JPEG",
    "pillow_transparent.gif": "P GIF",
    "pillow_transparent.png": "RGBA PNG",
    "pillow_truncated_end_chunk.png": "cannot be decoded: Truncated File Read",
    "pillow_truncated_image.png": TRUNCATED,
    "pillow_truncated_jpeg.jpg": "damaged or truncated JPEG (Premature end of JPEG file)",
    "pillow_uncompressed_la.png": "LA PNG",
    "pillow_unknown_compression_method.png": NO_PICTURE,
    "pillow_xmp_tags_orientation.png": "RGBA PNG",
    "pillow_zero_width.gif": NO_PICTURE,
}

# Pillow raises for these as well, once: asked again of the same object, as the list's maker did after getexif raised,
# it gives what it has, black from where the data end. We ask once.
STRICTER = frozenset({"pillow_broken_data_stream.png", "pillow_truncated_end_chunk.png"})


@pytest.mark.parametrize("name", DIRT)
def test_each_file_of_the_dirt_pack_has_the_verdict_that_is_expected_of_it(material: Path, name: str) -> None:
    facts = image_facts((material / "dirt_pack" / name).read_bytes(), max_pixels=10**8)
    lines = (material / "dirt_pack" / "MANIFEST.tsv").read_text().splitlines()
    (pillow,) = (
        dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines if line.startswith(f"{name}\t")
    )
    verdict = pillow["convert(RGB) with Pillow 13.0.0"]
    assert facts.sha256 == pillow["sha256"]
    if facts.error is None:
        assert f"{facts.mode} {facts.format}" == DIRT[name]
        assert f"{pillow['mode']} {pillow['format']}" == DIRT[name]
        assert facts.num_frames == int(pillow["frames"])
        assert facts.exif_orientation == int(pillow["EXIF_orientation"] or 1)
        turned = facts.exif_orientation >= 5
        assert pillow["size"] == str((facts.height, facts.width) if turned else (facts.width, facts.height))
    else:
        assert facts.error.startswith(DIRT[name])
    assert (facts.error is not None) == (not verdict.startswith("ok") or name in STRICTER)


def test_the_dirt_pack_holds_no_other_file(material: Path) -> None:
    assert {path.name for path in (material / "dirt_pack").iterdir()} == {*DIRT, "MANIFEST.tsv"}


def test_the_dirt_pack_is_indexed_whole(material: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    shutil.copytree(material / "dirt_pack", layout.raw / "dirt")
    put(layout, "clean/a.png", picture(0))
    report = index(layout, params=PARAMS.model_copy(update={"max_megapixels": 100.0}))
    assert (report.num_images, report.num_errors, report.num_skipped) == (39, 9, 1)
