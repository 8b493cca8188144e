"""What stops a set, what is left out of it, and what a person reads about it."""

import csv
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tasks import index_images, validate_data
from tasks.data.expectations import Validator, expectations
from tasks.data.judgement import Judgement, judge
from tasks.data.manifest import Facts, Row, rows_to_frame, write_manifest
from tasks.data.splits import Split
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
        error: str | None = None,
    ) -> "Rows":
        number = len(self.rows)
        sha256 = sha256 or f"{number:064x}"
        width, height = (0, 0) if error else size
        facts = Facts(
            sha256=sha256, size_bytes=10, width=width, height=height, error=error, group=group or sha256[-16:]
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


def judged(rows: Rows, **changes: float) -> Judgement:
    """What the stage makes of a set, without its files."""
    expected = expectations(**PARAMS.model_copy(update=changes).model_dump())
    return judge(rows_to_frame(rows.rows), expected, Validator(), where="data/raw")


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
    assert found.quarantined_per_expectation == {"decodes": 1, "large enough": 2, "no strip": 1}
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
    assert "1 class has no image in val: owl" in told
    assert "1 class has no image in test" in told
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
    assert first[0] == layout.images.read_bytes()
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
        assert sheet.size == (960, 8 * 204)


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
