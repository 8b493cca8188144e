"""Images in: every one checked, none twice, none over another, none lost to a kill."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.files import sha256_file
from flows.ingest import PART_PREFIX, add_images
from flows.sample import lay_out_sample, sample_images
from tasks.data.image_files import list_images
from tasks.errors import DataError
from tests.tasks.test_index_images import picture


def put(folder: Path, files: dict[str, bytes | int]) -> Path:
    """Writes files; a number stands for the picture of that seed."""
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(picture(content) if isinstance(content, int) else content)
    return folder


def tree(folder: Path) -> dict[str, str]:
    """Digests by path of all files, hidden ones included."""
    return {file.relative_to(folder).as_posix(): sha256_file(file) for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return put(tmp_path / "mine", {"cat/a.png": 1, "cat/b.png": 2, "dog/a.png": 3, "dog/deep/b.png": 4})


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "data" / "raw"


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_a_folder_a_class_is_copied_as_it_is(source: Path, raw: Path) -> None:
    report = add_images(source, raw)
    assert tree(raw) == tree(source)
    assert report.added_per_class == {"cat": 2, "dog": 2}
    assert "4 images added: cat 2, dog 2." in report.text()


def test_official_splits_are_kept_under_one_spelling(tmp_path: Path, raw: Path) -> None:
    files = {"Train/cat/a.png": 1, "validation/cat/b.png": 2, "test/dog/c.png": 3}
    add_images(put(tmp_path / "mine", files), raw)
    assert set(tree(raw)) == {"train/cat/a.png", "val/cat/b.png", "test/dog/c.png"}


@pytest.mark.parametrize("label", ["no", "1e-3", "two words", "Käfer", "たぬき"])
def test_labels_are_text_whatever_they_look_like(tmp_path: Path, raw: Path, label: str) -> None:
    report = add_images(put(tmp_path / "mine", {f"{label}/a.png": 1}), raw)
    assert report.added_per_class == {label: 1}


def test_two_spellings_of_one_label_land_in_one_folder(tmp_path: Path, raw: Path) -> None:
    add_images(put(tmp_path / "mine", {"K\u00e4fer/a.png": 1, "Ka\u0308fer/b.png": 2}), raw)
    assert [folder.name for folder in raw.iterdir()] == ["K\u00e4fer"]


def test_a_class_called_test_beside_official_splits_is_refused(tmp_path: Path, raw: Path) -> None:
    add_images(put(tmp_path / "splits", {"train/cat/a.png": 1, "test/cat/b.png": 2}), raw)
    with pytest.raises(DataError, match="one or the other"):
        add_images(put(tmp_path / "classes", {"test/x.png": 3}), raw)


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "holds no labelled images"),
        ({"a.png": 1}, "a.png: lies beside the class folders"),
        ({".cat/a.png": 1}, ".cat: hidden"),
        ({"cat/notes.txt": b"text"}, "no image by its name"),
        ({"cat/a.jpg": b"", "cat/b.png": b"text"}, "cat/a.jpg: empty file"),
    ],
)
def test_nothing_to_add_is_told_with_reasons(
    tmp_path: Path, raw: Path, files: dict[str, bytes | int], told: str
) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match=told):
        add_images(put(tmp_path / "mine", files), raw)
    assert not raw.exists()


def test_a_missing_folder_and_one_inside_raw_are_refused(tmp_path: Path, source: Path, raw: Path) -> None:
    with pytest.raises(DataError, match="is no folder"):
        add_images(tmp_path / "nowhere", raw)
    add_images(source, raw)
    for overlapping in (raw, raw / "cat", raw.parent):
        with pytest.raises(DataError, match="within each other"):
            add_images(overlapping, raw)


# --- content ----------------------------------------------------------------------------------------------------------


def test_adding_again_changes_nothing(source: Path, raw: Path) -> None:
    add_images(source, raw)
    before = tree(raw)
    (source / "cat" / "a.png").rename(source / "cat" / "other name.png")
    report = add_images(source, raw)
    assert (report.added, report.known) == (0, 4)
    assert tree(raw) == before


def test_the_same_name_with_other_bytes_is_kept_beside_the_first(tmp_path: Path, source: Path, raw: Path) -> None:
    add_images(source, raw)
    before = tree(raw)
    report = add_images(put(tmp_path / "more", {"cat/a.png": 77}), raw)
    after = tree(raw)
    assert report.added == 1
    assert {path: after[path] for path in before} == before
    (new,) = set(after) - set(before)
    assert new == f"cat/a-{after[new][:12]}.png"


def test_bytes_that_are_there_under_another_label_are_refused_by_name(tmp_path: Path, source: Path, raw: Path) -> None:
    add_images(source, raw)
    report = add_images(put(tmp_path / "more", {"dog/x.png": 1, "dog/y.png": 9}), raw)
    assert report.refused == (("dog/x.png", "the same bytes are there under another label: cat/a.png"),)
    assert report.added == 1


def test_copies_in_the_folder_come_in_once_and_the_held_out_one(tmp_path: Path, raw: Path) -> None:
    files = {"train/cat/a.png": 1, "train/cat/b.png": 1, "test/cat/z.png": 1, "train/dog/c.png": 2}
    report = add_images(put(tmp_path / "mine", files), raw)
    assert set(tree(raw)) == {"test/cat/z.png", "train/dog/c.png"}
    assert (report.added, report.repeated) == (2, 2)


def test_bytes_under_two_labels_come_in_under_both_for_validation_to_tell(tmp_path: Path, raw: Path) -> None:
    mine = put(tmp_path / "mine", {"cat/a.png": 1, "dog/b.png": 1, "dog/c.png": 2})
    report = add_images(mine, raw)
    assert tree(raw) == tree(mine)
    assert report.disputed == (
        ("cat/a.png", "the same bytes as dog/b.png"),
        ("dog/b.png", "the same bytes as cat/a.png"),
    )
    (raw / "cat" / "a.png").unlink()  # as if the first run had been killed before this one
    add_images(mine, raw)
    assert tree(raw) == tree(mine)


def test_files_that_do_not_decode_are_left_where_they_are_with_a_reason(
    material: Path, tmp_path: Path, raw: Path
) -> None:
    mine = put(tmp_path / "mine", {"cat/a.png": 1})
    shutil.copytree(material / "dirt_pack", mine / "dirt")
    report = add_images(mine, raw)
    assert report.added_per_class == {"cat": 1, "dirt": 29}
    assert {Path(path).name.removeprefix("pillow_") for path, _ in report.refused} == {
        "broken.png",
        "broken_data_stream.png",
        "decompression_bomb.gif",
        "hopper.heif",
        "truncated_end_chunk.png",
        "truncated_image.png",
        "truncated_jpeg.jpg",
        "unknown_compression_method.png",
        "zero_width.gif",
    }
    assert all(reason for _, reason in report.refused)
    assert report.left_out == (("dirt/MANIFEST.tsv", "no image by its name"),)


def test_links_out_of_the_folder_are_refused_by_name(tmp_path: Path, source: Path, raw: Path) -> None:
    secret = put(tmp_path / "elsewhere", {"secret.png": 50}) / "secret.png"
    (source / "cat" / "link.png").symlink_to(secret)
    (source / "cat" / "inside.png").symlink_to(put(source, {"dog/z.png": 60}) / "dog" / "z.png")
    (source / "cat" / "nowhere.png").symlink_to(tmp_path / "gone")
    (source / "owl").symlink_to(tmp_path / "elsewhere")
    report = add_images(source, raw)
    assert dict(report.refused) == {"cat/link.png": "a link that leads out of the folder"}
    assert dict(report.left_out) == {"cat/nowhere.png": "a broken link or no plain file", "owl": "a link to a folder"}
    assert not any(file.is_symlink() for file in raw.rglob("*"))


def test_the_originals_stay_writable_files_of_their_own(source: Path, raw: Path) -> None:
    add_images(source, raw)
    (source / "cat" / "a.png").write_bytes(b"edited")
    assert (raw / "cat" / "a.png").read_bytes() == picture(1)


NAMES = st.sampled_from(["a.png", "b.png", "c.png"])
FOLDERS = st.dictionaries(st.tuples(st.sampled_from(["cat", "dog"]), NAMES), st.integers(0, 5), min_size=1, max_size=6)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(FOLDERS, min_size=1, max_size=3))
def test_whatever_is_added_in_whatever_order_nothing_is_lost_or_twice(
    tmp_path_factory: pytest.TempPathFactory, folders: list[dict[tuple[str, str], int]]
) -> None:
    place = tmp_path_factory.mktemp("add")
    raw = place / "raw"
    expected: set[tuple[str, int]] = set()
    for number, folder in enumerate(folders):
        source = put(place / str(number), {"/".join(path): seed for path, seed in folder.items()})
        before = tree(raw)
        mine = {(label, seed) for (label, _), seed in folder.items()}
        disputed = {seed for label, seed in mine if len({other for other, same in mine if same == seed}) > 1}
        held = {seed: label for label, seed in expected}
        expected |= {(label, seed) for label, seed in mine if seed in disputed or held.get(seed, label) == label}
        report = add_images_or_nothing(source, raw)
        after = tree(raw)
        assert {path: after[path] for path in before} == before
        assert len(after) == len(before) + report
    found = [(image.label, sha256_file(raw / image.path)) for image in list_images(raw).images]
    assert len(found) == len(set(found))
    assert {(label, DIGESTS[digest]) for label, digest in found} == expected


def add_images_or_nothing(source: Path, raw: Path) -> int:
    """How many images came in; 0 where all were refused."""
    try:
        return add_images(source, raw).added
    except DataError:
        return 0


@pytest.fixture(scope="module", autouse=True)
def _digests(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = put(tmp_path_factory.mktemp("digests"), {f"{seed}.png": seed for seed in range(6)})
    DIGESTS.update({sha256_file(folder / f"{seed}.png"): seed for seed in range(6)})


DIGESTS: dict[str, int] = {}


# --- the sample set ---------------------------------------------------------------------------------------------------


def test_the_sample_is_the_same_bytes_each_time_and_never_over_something(tmp_path: Path) -> None:
    assert lay_out_sample(tmp_path / "one") == lay_out_sample(tmp_path / "two") == 1797
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    with pytest.raises(DataError, match="not empty"):
        lay_out_sample(tmp_path / "one")
    assert sorted(folder.name for folder in (tmp_path / "one").iterdir()) == list("0123456789")
    assert (tmp_path / "one" / "0" / "digit-0000.png").read_bytes() == sample_images()["0/digit-0000.png"]


def test_other_classes_are_not_mixed_with_the_sample_but_replace_it(source: Path, raw: Path) -> None:
    lay_out_sample(raw)
    before = tree(raw)
    with pytest.raises(DataError, match="--replace"):
        add_images(source, raw)
    assert tree(raw) == before
    report = add_images(source, raw, replace=True)
    assert (report.replaced, tree(raw)) == (1797, tree(source))
    assert add_images(source, raw, replace=True).replaced == 0


def test_more_digits_may_be_added_to_the_sample(tmp_path: Path, raw: Path) -> None:
    lay_out_sample(raw)
    assert add_images(put(tmp_path / "mine", {"3/new.png": 1}), raw).added == 1
    with pytest.raises(DataError, match=r"1 images that are not of the sample set: 3/new\.png"):
        add_images(put(tmp_path / "mine", {"cat/new.png": 2}), raw, replace=True)
    assert len(tree(raw)) == 1798


def test_a_folder_that_cannot_be_added_does_not_cost_the_sample(tmp_path: Path, raw: Path) -> None:
    lay_out_sample(raw)
    with pytest.raises(DataError, match="can be added"):
        add_images(put(tmp_path / "mine", {"cat/a.png": b"text"}), raw, replace=True)
    assert len(tree(raw)) == 1797


# --- kills ------------------------------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from flows.ingest import add_images
left = int(sys.argv[3])
def hook(event, args):
    global left
    if event == "os.rename":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
add_images(Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("renames", [0, 2])
def test_a_kill_leaves_whole_images_and_the_next_run_the_rest(
    repository: Path, source: Path, raw: Path, renames: int
) -> None:
    command = [sys.executable, "-c", KILLED_AT, str(source), str(raw), str(renames)]
    assert subprocess.run(command, cwd=repository).returncode == -signal.SIGKILL
    half = list_images(raw).images
    assert len(half) == renames
    assert all(sha256_file(raw / image.path) in tree(source).values() for image in half)
    assert any(PART_PREFIX in path for path in tree(raw))
    report = add_images(source, raw)
    assert (report.added, report.known) == (4 - renames, renames)
    assert tree(raw) == tree(source)
