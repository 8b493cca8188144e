"""What stops a set, what is left out of it, and what a person reads about it."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks import index_images, validate_data
from tasks.data.class_map import ClassMap, read_class_map, sealed, write_class_map
from tasks.data.complaints import listed
from tasks.data.contact_sheet import Tile, contact_sheet
from tasks.data.expectations import Validator, expectations
from tasks.data.judgement import Judgement, judge
from tasks.data.manifest import Facts, Row, class_names, read_manifest, rows_to_frame, write_manifest
from tasks.data.set_summary import stability_index, summarise, write_history
from tasks.data.set_tables import robust_z
from tasks.data.splits import SPLITS, Split
from tasks.errors import DataError
from tasks.layout import Layout
from tasks.params import DataParams, IndexImagesParams, ValidateDataParams

PARAMS = ValidateDataParams(
    min_images_per_class=5,
    min_train_images_per_class=2,
    max_class_ratio=50,
    max_quarantined_fraction=0.05,
    min_side_px=4,
    max_aspect_ratio=20,
    min_kind_fraction=0.05,
    max_robust_z=6.0,
    max_shift=0.25,
)
GOOD: dict[Split, int] = {"train": 30, "val": 8, "test": 8}


class Rows:
    """Builds the rows of a manifest; every image has its own content unless told otherwise."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(
        self,
        label: str,
        split: Split = "train",
        *,
        path: str | None = None,
        sha256: str | None = None,
        group: str | None = None,
        official: bool = False,
        size: tuple[int, int] = (64, 64),
        brightness: float = 0.0,
        error: str | None = None,
    ) -> "Rows":
        number = len(self.rows)
        sha256 = sha256 or 4 * f"{number:016x}"
        width, height = (0, 0) if error else size
        facts = Facts(
            sha256=sha256,
            size_bytes=10,
            width=width,
            height=height,
            brightness=brightness,
            error=error,
            group=group or sha256[-16:],
        )
        self.rows.append(Row(path or f"{label}/{number:03d}.png", label, facts, split, official))
        return self

    def add_class(self, label: str, *, official: bool = False, **counts: int) -> "Rows":
        for split in ("train", "val", "test"):
            for _ in range(counts.get(split, 0)):
                self.add(label, split, official=official)
        return self


def good(*, official: bool = False) -> Rows:
    return Rows().add_class("cat", official=official, **GOOD).add_class("dog", official=official, **GOOD)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path)


def validate(layout: Layout, rows: Rows, **changes: float) -> validate_data.ValidateDataReport:
    """The whole stage, with its files."""
    write_manifest(layout.images, rows_to_frame(rows.rows))
    return validate_data.run(layout, validate_data=PARAMS.model_copy(update=changes))


def judged(rows: Rows, *, after: Rows | None = None, **changes: float) -> Judgement:
    """What the stage makes of a set that is accepted after another, without its files."""
    history = () if after is None else (summarise(rows_to_frame(after.rows)),)
    expected = expectations(**PARAMS.model_copy(update=changes).model_dump())
    return judge(rows_to_frame(rows.rows), expected, Validator(), history, where="data/raw")


def stops(rows: Rows, **changes: float) -> str:
    return "\n".join(judged(rows, **changes).stops)


def quarantine(layout: Layout) -> dict[str, str]:
    with layout.quarantine.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["path", "reason"]
    return dict(rows[1:])


# --- left out ---------------------------------------------------------------------------------------------------------


def test_bad_images_are_left_out_by_name_and_reason() -> None:
    rows = good()
    rows.add("cat", path="cat/broken.jpg", error="empty file")
    rows.add("cat", path="cat/tiny.png", size=(3, 9))
    rows.add("dog", path="dog/strip.png", size=(2, 900))
    found = judged(rows)
    assert found.quarantined == {
        "cat/broken.jpg": "does not decode: empty file",
        "cat/tiny.png": "too small: 3x9 px, validate_data.min_side_px is 4",
        "dog/strip.png": "too small: 2x900 px, validate_data.min_side_px is 4; "
        "too long and narrow: 2x900 px, validate_data.max_aspect_ratio is 20",
    }
    assert {each.name: len(paths) for each, paths in found.offenders.items()} == {
        "decodes": 1,
        "large enough": 2,
        "no strip": 1,
    }
    assert list(found.accepted["path"]) == sorted(row.path for row in good().rows)


def test_the_same_bytes_under_two_labels_are_left_out_under_both() -> None:
    rows = good().add("cat", path="cat/x.png", sha256="a" * 64).add("dog", path="dog/y.png", sha256="a" * 64)
    assert judged(rows).quarantined == {
        "cat/x.png": "the same bytes under another label: dog/y.png",
        "dog/y.png": "the same bytes under another label: cat/x.png",
    }


def test_of_copies_the_held_out_one_stays_and_nothing_counts_as_lost() -> None:
    rows = good(official=True)
    for split in ("train", "val", "test"):
        rows.add("cat", split, path=f"{split}/cat/everywhere.png", sha256="a" * 64, official=True)
    rows.add("dog", path="train/dog/1.png", sha256="b" * 64, official=True)
    rows.add("dog", path="train/dog/2.png", sha256="b" * 64, official=True)
    found = judged(rows, max_quarantined_fraction=0.0)
    assert found.quarantined == {
        "train/cat/everywhere.png": "the same bytes are in another split, which keeps them: test/cat/everywhere.png",
        "train/dog/2.png": "a copy of train/dog/1.png",
        "val/cat/everywhere.png": "the same bytes are in another split, which keeps them: test/cat/everywhere.png",
    }
    assert (len(found.accepted), found.stops) == (94, [])


# --- stops ------------------------------------------------------------------------------------------------------------


def test_small_classes_are_told_with_their_counts_the_number_and_what_to_do() -> None:
    rows = good().add_class("kite", train=3, test=1).add_class("owl", train=2)
    assert stops(rows).splitlines() == [
        "data/raw: 2 classes have fewer than 5 images: owl (2), kite (4).",
        "validate_data.min_images_per_class is 5. Add images, or lower it in params.yaml.",
    ]


def test_every_reason_is_told_at_once() -> None:
    rows = good().add_class("owl", train=1, val=5).add_class("kite", test=9).add_class("wren", train=1)
    rows.add("emu", path="emu/a.png", error="truncated")
    text = stops(rows)
    assert "2 classes have fewer than 5 images: emu (0), wren (1)" in text
    assert "2 classes have fewer than 2 images in train: owl (1), wren (1)" in text
    assert "1 class has val or test images but none in train: kite" in text


def test_one_class_left_stops() -> None:
    assert "only one class is left" in stops(Rows().add_class("cat", **GOOD))


def test_too_much_left_out_stops() -> None:
    rows = good()
    for _ in range(8):
        rows.add("cat", error="truncated")
    assert "8.0% of the images had to be left out" in stops(rows)
    assert stops(rows, max_quarantined_fraction=0.08) == ""


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_empty_split_stops_with_a_remedy(split: Split) -> None:
    counts = {**GOOD, split: 0}
    text = stops(Rows().add_class("cat", **counts).add_class("dog", **counts))
    assert f"no image is in {split}" in text
    assert "index_images." in text


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_what_does_not_stop_is_a_warning() -> None:
    rows = good(official=True).add_class("owl", train=5).add_class("Owl ", train=5, val=1, test=1)
    rows.add("cat", path="train/cat/near.png", group="f" * 16, official=True)
    rows.add("cat", "test", path="test/cat/near.png", group="f" * 16, official=True)
    found = judged(rows, max_class_ratio=6)
    told = "\n".join(found.warnings)
    assert "6 times the train images of the least frequent" in told
    for split in ("val", "test"):
        (line,) = (each for each in found.warnings if f"1 class has no image in {split}" in each)
        assert ": owl. Add images; or, where folders give the splits, put some there" in line
        assert f"raise index_images.{split}_fraction" in line
    assert "differ only in case or outer spaces count as different classes: Owl , owl" in told
    assert "test/cat/near.png ~ train/cat/near.png" in told
    assert (len(found.warnings), found.stops) == (5, [])


def test_an_empty_val_warns_that_fine_tuning_is_left_out() -> None:
    counts = {**GOOD, "val": 0}
    found = judged(Rows().add_class("cat", **counts).add_class("dog", **counts))
    assert (len(found.warnings), found.stops) == (1, [])
    assert "fine-tuning cannot be judged" in found.warnings[0]


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_good_set_passes_whole_and_twice_with_the_same_bytes(layout: Layout) -> None:
    report = validate(layout, good())
    assert (report.num_accepted, report.num_quarantined, report.warnings) == (92, 0, [])
    assert report.images_per_split == {"train": 60, "val": 16, "test": 16}
    assert quarantine(layout) == {}
    first = layout.accepted.read_bytes(), layout.quarantine.read_bytes()
    accepted = read_manifest(layout.accepted)
    assert accepted.drop(columns="class_id").equals(read_manifest(layout.images).drop(columns="class_id"))
    assert validate(layout, good()) == report
    assert (layout.accepted.read_bytes(), layout.quarantine.read_bytes()) == first


def test_a_stop_names_images_and_leaves_pages_and_pictures_for_a_person(layout: Layout) -> None:
    rows = Rows()
    for number in range(25):
        rows.add("cat", path=f"cat/たぬき-{number:02d}.png", error="truncated").add("dog", error="truncated")
    with pytest.raises(DataError) as caught:
        validate(layout, rows)
    text = str(caught.value)
    assert "no image is left" in text
    assert text.count("does not decode: truncated") == 20
    assert "and 30 more. The full list is in data/manifest/quarantine.csv" in text
    assert text.endswith("Look at data/reports/validation/docs/index.html")
    assert len(quarantine(layout)) == 50
    assert not layout.accepted.exists()
    pages = layout.validation_dir / "docs"
    assert (pages / "index.html").is_file()
    assert len(list((pages / "validations").rglob("*.html"))) == 3
    with Image.open(layout.validation_dir / "quarantine.png") as sheet:
        assert sheet.size == (960, 30 + 8 * 230)  # a title over eight rows of six
    assert (layout.validation_dir / "decodes.png").read_bytes() != (
        layout.validation_dir / "quarantine.png"
    ).read_bytes()


def test_a_name_is_told_and_drawn_in_one_line(tmp_path: Path) -> None:
    assert listed(["cat/a\nb\u202e.png", "たぬき/é.png"]) == "cat/a\\nb\\u202e.png, たぬき/é.png"
    sheet = contact_sheet([Tile(tmp_path / "none", "cat/a\nb.png", "c\n" * 99)] * 50, "a\ntitle")
    assert sheet.size == (960, 30 + 8 * 230)


def test_there_is_a_picture_of_what_is_behind_each_unmet_expectation(layout: Layout) -> None:
    rows = good()
    for number, row in enumerate(rows.rows):
        brightness = 0.0 if number == 3 else 100.0 + number % 7
        rows.rows[number] = replace(row, facts=replace(row.facts, brightness=brightness))
    Path(layout.raw / "cat").mkdir(parents=True)
    Image.new("RGB", (64, 64), "navy").save(layout.raw / "cat" / "003.png")
    report = validate(layout, rows.add("cat", path="cat/small.png", size=(2, 2), brightness=100.0))
    assert (report.quarantined_per_expectation, report.flagged_per_expectation) == (
        {"large enough": 1},
        {"usual brightness": 1},
    )
    pictures = {path.stem for path in layout.validation_dir.glob("*.png")}
    assert pictures == {"quarantine", "large_enough", "usual_brightness"}
    with Image.open(layout.validation_dir / "usual_brightness.png") as sheet:
        assert sheet.getpixel((80, 30 + 80)) == (0, 0, 128)


def test_photos_that_carry_two_labels_are_found(material: Path, layout: Layout) -> None:
    pairs = (("metal91", "glass115"), ("plastic332", "glass389"), ("plastic152", "glass176"))
    for label in ("glass", "metal", "plastic"):
        files = sorted((material / "datasets" / "trashnet6_dev" / label).glob("*.jpg"))
        disputed = [file for file in files if any(file.stem in pair for pair in pairs)]
        (layout.raw / label).mkdir(parents=True)
        for file in [*files[:20], *disputed]:
            shutil.copy(file, layout.raw / label)
    params = IndexImagesParams(val_fraction=0.15, test_fraction=0.2, max_megapixels=100)
    index_images.run(layout, seed=0, data=DataParams(layout="folders", shard_mb=1), index_images=params)
    validate_data.run(layout, validate_data=PARAMS.model_copy(update={"max_quarantined_fraction": 0.2}))
    found = quarantine(layout)
    assert {Path(path).stem for path in found} == {name for pair in pairs for name in pair}
    assert all("under another label" in reason for reason in found.values())
    with Image.open(layout.validation_dir / "quarantine.png") as sheet:
        assert sheet.width == 960


# --- the class map ----------------------------------------------------------------------------------------------------


def ids(layout: Layout) -> dict[str, int]:
    accepted = read_manifest(layout.accepted)
    return {str(label): int(number) for label, number in zip(accepted["label"], accepted["class_id"], strict=True)}


def kept(layout: Layout) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in (layout.accepted, layout.classes, layout.accepted_summary))


def with_class(label: str) -> Rows:
    return good().add_class(label, **GOOD)


def test_a_new_class_is_appended_to_the_others_and_told_as_often_as_asked(layout: Layout) -> None:
    assert validate(layout, good()).new_classes == []
    report = validate(layout, with_class("aardvark"))
    assert ids(layout) == {"cat": 0, "dog": 1, "aardvark": 2}
    assert class_names(read_manifest(layout.accepted)) == ("cat", "dog", "aardvark")
    assert (report.new_classes, report.vanished_classes, report.renamed_classes) == (["aardvark"], [], {})
    assert report.warnings == [
        "data/raw: 1 class has come since the last accepted set: aardvark (46). It is appended to the outputs."
    ]
    first = kept(layout)
    assert validate(layout, with_class("aardvark")) == report
    assert kept(layout) == first


def test_a_vanished_class_keeps_its_id_and_comes_back_with_it(layout: Layout) -> None:
    validate(layout, with_class("bat"))
    before = kept(layout)[0]
    report = validate(layout, good().add_class("zebra", **{**GOOD, "test": 9}))
    assert ids(layout) == {"cat": 1, "dog": 2, "zebra": 3}
    assert class_names(read_manifest(layout.accepted)) == ("cat", "dog", "zebra")
    assert report.renamed_classes == {"zebra": "bat"}
    report = validate(layout, good())
    assert report.vanished_classes == ["zebra"]
    assert "zebra. Its id stays its own" in report.warnings[0]
    assert [each["present"] for each in json.loads(layout.classes.read_bytes())["classes"]] == [
        False,
        True,
        True,
        False,
    ]
    validate(layout, with_class("bat"))
    assert ids(layout)["bat"] == 0
    assert kept(layout)[0] == before, "the same data are the same bytes, whatever came in between"


def test_a_set_that_stops_numbers_nothing(layout: Layout) -> None:
    validate(layout, good())
    first = kept(layout)[1:]
    with pytest.raises(DataError, match="fewer than 5 images: owl"):
        validate(layout, good().add("owl"))
    assert (layout.classes.read_bytes(), layout.accepted_summary.read_bytes()) == first


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "list", "other version"])
def test_a_damaged_history_is_told_with_a_remedy_and_never_made_anew(layout: Layout, damage: str) -> None:
    rows = rows_to_frame(good().rows)
    write_manifest(layout.images, rows)
    write_class_map(layout.classes, ClassMap().with_accepted(["cat", "dog"]))
    write_history(layout.accepted_summary, now=summarise(rows), before=None)
    for path in (layout.accepted_summary, layout.classes):
        whole = path.read_bytes()
        content = {**json.loads(whole), "format_version": 2}
        content.pop("digest")
        damaged = {
            "flip": whole.replace(b"dog", b"dug"),
            "cut": whole[: len(whole) // 2],
            "empty": b"",
            "list": b"[1]",
            "other version": json.dumps(sealed(content)).encode(),
        }[damage]
        path.write_bytes(damaged)
        with pytest.raises(
            DataError, match=rf"{path.name}.*dvc checkout --force data/manifest/{path.name}`.*remove the file"
        ):
            validate_data.run(layout, validate_data=PARAMS)
        assert path.read_bytes() == damaged


@settings(max_examples=50)
@given(st.lists(st.frozensets(st.text(max_size=3)), max_size=6))
def test_an_id_never_moves_and_is_never_given_twice(sets: list[frozenset[str]]) -> None:
    class_map = ClassMap()
    for labels in sets:
        later = class_map.with_accepted(labels)
        assert later.labels[: len(class_map.labels)] == class_map.labels
        assert labels == later.present <= set(later.labels)
        assert len(later.ids) == len(later.labels)
        assert later == later.with_accepted(labels)
        class_map = later


def test_a_written_class_map_reads_as_it_was(tmp_path: Path) -> None:
    class_map = ClassMap().with_accepted(["たぬき", "b\n", "a"]).with_accepted(["a", "0"])
    write_class_map(tmp_path / "classes.json", class_map)
    assert read_class_map(tmp_path / "classes.json") == class_map
    assert class_map.ids == {"a": 0, "b\n": 1, "たぬき": 2, "0": 3}


def test_a_class_whose_images_lie_under_another_name_is_told_as_renamed() -> None:
    before = with_class("hound")
    rows = Rows()
    rows.rows = [replace(row, label="terrier") if row.label == "hound" else row for row in before.rows]
    rows.add_class("newt", **GOOD)
    rows.rows = [row for row in rows.rows if row.label != "terrier" or int(row.facts.sha256, 16) % 5]  # a fifth is lost
    found = judged(rows, after=before)
    changed = found.classes.set_index("label")
    assert list(changed.index[changed["new"] > 0]) == ["newt"]
    assert changed.loc["terrier", "earlier_label"] == "hound"
    assert changed["vanished"].sum() == 0
    assert any("by their images: hound is now terrier." in warning for warning in found.warnings)


# --- unusual images ---------------------------------------------------------------------------------------------------


def test_images_unlike_the_others_are_named_and_stay() -> None:
    rows = good()
    for number, row in enumerate(rows.rows):
        facts = replace(row.facts, mode="RGB", format="JPEG", brightness=100.0 + number % 7, sharpness=50.0 + number)
        rows.rows[number] = replace(row, facts=facts)
    for number, changes in ((3, {"mode": "CMYK"}), (5, {"format": "GIF"}), (7, {"brightness": 2.0})):
        rows.rows[number] = replace(rows.rows[number], facts=replace(rows.rows[number].facts, **changes))
    found = judged(rows)
    assert found.warnings == [
        "data/raw: 1 image is of a colour mode that few others have: cat/003.png (mode CMYK).",
        "data/raw: 1 image is of a format that few others have: cat/005.png (format GIF).",
        "data/raw: 1 image is of unusual brightness: cat/007.png (brightness 2.0, -34.1 deviations from the median).",
    ]
    assert (found.quarantined, found.stops, len(found.accepted)) == ({}, [], 92)
    assert judged(rows, max_robust_z=40, min_kind_fraction=0.01).warnings == []


def test_outliers_are_asked_for_only_where_there_is_something_usual() -> None:
    few = pd.Series([1.0, 2.0, 3.0, 900.0])
    assert robust_z(few).isna().all()
    assert robust_z(pd.Series([5.0] * 99 + [900.0])).isna().all()
    normal = pd.Series(np.random.default_rng(0).normal(3, 2, 5000))
    assert robust_z(normal).std() == pytest.approx(1, abs=0.05)


def test_near_duplicates_under_two_labels_are_named_with_each_other() -> None:
    rows = good()
    rows.add("cat", path="cat/x.png", group="f" * 16).add("dog", path="dog/y.png", group="f" * 16)
    rows.add("dog", path="dog/z.png", group="f" * 16)
    (warning,) = judged(rows).warnings
    assert "3 images are all but the same as an image under another label" in warning
    assert "cat/x.png (looks like dog/y.png), dog/y.png (looks like cat/x.png), dog/z.png (looks like cat/x" in warning


# --- shift ------------------------------------------------------------------------------------------------------------


def bright(mean: float, *, cats: int = 200, dogs: int = 200, seed: int = 0) -> Rows:
    rng = np.random.default_rng(seed)
    rows = Rows()
    for number in range(cats + dogs):
        label, split = "cat" if number < cats else "dog", SPLITS[number % 3]
        rows.add(label, split, sha256=f"{rng.integers(2**62):064x}", brightness=float(rng.normal(mean, 20)))
    return rows


def test_another_draw_of_the_same_pictures_is_no_shift() -> None:
    assert judged(bright(120, seed=1), after=bright(120)).warnings == []


def test_darker_pictures_and_another_mix_are_told_each() -> None:
    warnings = judged(bright(90, cats=350, dogs=50, seed=1), after=bright(120)).warnings
    assert [warning.split(" of the images moved")[0] for warning in warnings] == [
        "data/raw: the class mix",
        "data/raw: the brightness",
    ]
    assert all("validate_data.max_shift is 0.25" in warning for warning in warnings)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 500), min_size=2, max_size=9))
def test_a_set_has_not_moved_from_itself(counts: list[int]) -> None:
    assert stability_index(counts, counts) == 0.0


def test_the_stability_index_is_what_it_is_known_to_be() -> None:
    # (0.9 - 0.5) ln(0.9 / 0.5) + (0.1 - 0.5) ln(0.1 / 0.5); chance and smoothing are small for so many
    assert stability_index([50_000, 50_000], [90_000, 10_000]) == pytest.approx(0.8789, abs=1e-3)
