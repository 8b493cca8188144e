"""Two layouts of data/raw, one answer: what lies there, and its bytes."""

import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.files import sha256_file
from flows.shards import ShardWriter, bring_into, edit_images
from tasks import cache_features, index_images
from tasks.data.contact_sheet import Tile, contact_sheet
from tasks.data.image_store import EDITS_NAME, open_images, require_layout, shard_paths
from tasks.errors import DataError, StoreError
from tasks.layout import Layout
from tasks.params import DataParams, IndexImagesParams
from tests.tasks.feature_workspaces import AUGMENT, FEATURES, make_workspace

IMAGES = {f"{label}/{number:02d}.png": f"{label} {number} ".encode() * 90 for label in "ab" for number in range(6)}
SHARD_BYTES = 6000  # four of IMAGES


def put(raw: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (raw / path).parent.mkdir(parents=True, exist_ok=True)
        (raw / path).write_bytes(data)
    return raw


def digests(raw: Path) -> dict[str, str]:
    return {file.relative_to(raw).as_posix(): sha256_file(file) for file in raw.rglob("*") if file.is_file()}


def contents(raw: Path) -> dict[str, bytes]:
    images = open_images(raw)
    found = {image.path: images.read_bytes(image.path) for image in images.listing().images}
    assert found == {path: images.file(path).read_bytes() for path in found}
    return found


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Twelve images in three shards."""
    raw = put(tmp_path / "raw", IMAGES)
    bring_into(raw, "shards", shard_bytes=SHARD_BYTES)
    return raw


# --- one answer -------------------------------------------------------------------------------------------------------

FOLDERS = st.sampled_from(["cat", "train", "Val", "test", "Ka\u0308fer", "K\u00e4fer", "two words", "x" * 120, ".hid"])
FILES = st.sampled_from(
    ["a.png", "b.JPG", "no suffix", "\u305f\u306c\u304d.png", "y" * 140 + ".png", "notes.txt", ".hidden", "edits.jsonl"]
)
PATHS = st.builds("/".join, st.tuples(FOLDERS, FILES) | st.tuples(FOLDERS, FOLDERS, FILES) | st.tuples(FILES))


def is_tree(paths: dict[str, bytes]) -> bool:
    """Whether no file would lie where another has a folder."""
    return not any(other.startswith(f"{path}/") for path in paths for other in paths)


@settings(max_examples=60)
@given(
    files=st.dictionaries(PATHS, st.binary(max_size=1500), max_size=8).filter(is_tree),
    empty=st.lists(st.tuples(FOLDERS, FOLDERS).map("/".join), max_size=2),
    shard_bytes=st.integers(1, 5000),
)
def test_both_layouts_list_and_read_the_same_and_turn_into_each_other(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], empty: list[str], shard_bytes: int
) -> None:
    raw = put(tmp_path_factory.mktemp("raw"), {path: data for path, data in files.items() if path != EDITS_NAME})
    for folder in empty:
        (raw / folder).mkdir(parents=True, exist_ok=True)
    listing, bytes_by_path, before = open_images(raw).listing(), contents(raw), digests(raw)
    bring_into(raw, "shards", shard_bytes=shard_bytes)
    assert (open_images(raw).layout == "shards") == bool(listing.images)
    assert open_images(raw).listing() == listing
    assert contents(raw) == bytes_by_path
    assert not {image.path for image in listing.images} & set(digests(raw))
    bring_into(raw, "folders", shard_bytes=shard_bytes)
    assert digests(raw) == before


def test_a_shard_is_an_ordinary_tar_of_at_most_the_size_asked_for(raw: Path) -> None:
    found = {}
    for shard in shard_paths(raw):
        assert shard.stat().st_size <= SHARD_BYTES
        with tarfile.open(shard) as tar:
            found |= {each.name: tar.extractfile(each).read() for each in tar}  # type: ignore[union-attr]
    assert found == IMAGES
    assert len(shard_paths(raw)) == 3


def test_shards_are_the_same_bytes_whatever_the_files_times_and_modes(raw: Path, tmp_path: Path) -> None:
    again = put(tmp_path / "again", dict(reversed(IMAGES.items())))
    for number, path in enumerate(IMAGES):
        (again / path).chmod(0o600)
        os.utime(again / path, (number, number))
    bring_into(again, "shards", shard_bytes=SHARD_BYTES)
    assert digests(again) == digests(raw)
    assert shard_paths(raw)[0].name == GOLDEN_NAME


GOLDEN_NAME = "shard-000000-cc7a2bec541f.tar"
"""A change of this name is a change of the format: every shard that people have would be written anew."""


def test_an_image_larger_than_a_shard_gets_one_to_itself(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, shard_bytes=4000) as writer:
        for name, size in (("a/1", 100), ("a/2", 9000), ("a/3", 100)):
            writer.add(name, bytes(size))
    assert [len(path.read_bytes()) > 9000 for path in shard_paths(tmp_path)] == [False, True, False]
    assert {path: len(data) for path, data in contents(tmp_path).items()} == {"a/1": 100, "a/2": 9000, "a/3": 100}


def test_many_threads_read_at_once(raw: Path) -> None:
    images, gate = open_images(raw), threading.Barrier(8)

    def read(turn: int) -> bool:
        gate.wait(10)
        return all(
            images.file(path).read_bytes() == data for path, data in sorted(IMAGES.items())[:: 1 - 2 * (turn % 2)]
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_an_image_that_is_not_there_fails_like_a_file(raw: Path) -> None:
    gone = open_images(raw).file("a/99.png")
    assert not gone.is_file()
    for read in (gone.read_bytes, lambda: open_images(raw).read_bytes("a/99.png")):
        with pytest.raises(FileNotFoundError, match=r"a/99\.png"):
            read()


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_flipped_byte_is_found_before_an_image_is_taken_from_the_shard(raw: Path) -> None:
    first, *_, last = shard_paths(raw)
    flip(first, 700)
    flip(last, 700)
    images = open_images(raw)
    assert len(images.listing().images) == len(IMAGES)
    assert images.file("a/04.png").read_bytes() == IMAGES["a/04.png"]  # in a shard that is whole
    with pytest.raises(StoreError, match=r"2 damaged shard.*dvc checkout data/raw\.dvc.*dvc pull") as error:
        images.file("a/01.png").read_bytes()
    assert first.name in str(error.value)
    assert last.name in str(error.value)


@pytest.mark.parametrize("how", ["empty", "half", "a block", "a header", "the last header", "no tar"])
def test_a_shard_whose_members_cannot_be_listed_is_named(raw: Path, how: str) -> None:
    shard = shard_paths(raw)[1]
    data = shard.read_bytes()
    with tarfile.open(shard) as tar:
        headers = [each.offset for each in tar]
    match how:
        case "empty":
            shard.write_bytes(b"")
        case "half":
            shard.write_bytes(data[: len(data) // 2])
        case "a block":
            shard.write_bytes(data[:-512])
        case "a header":
            flip(shard, headers[1] + 3)
        case "the last header":
            flip(shard, headers[-1] + 130)
        case "no tar":
            shard.write_bytes(b"text" * 1000)
    with pytest.raises(StoreError, match=rf"1 damaged shard.*{shard.name}.*dvc checkout"):
        open_images(raw)


def test_edits_that_cannot_be_read_are_named(raw: Path) -> None:
    (raw / EDITS_NAME).write_text('{"shard": "shard-0000')
    with pytest.raises(StoreError, match=r"edits\.jsonl cannot be read.*dvc checkout"):
        open_images(raw)


def test_a_path_in_two_shards_is_told_with_both(raw: Path) -> None:
    with ShardWriter(raw, shard_bytes=SHARD_BYTES) as writer:
        writer.add("a/00.png", b"another")
    with pytest.raises(DataError, match=r"1 paths lie in two shards.*a/00\.png \(shard-000000.* and shard-000003"):
        open_images(raw)


# --- changes ----------------------------------------------------------------------------------------------------------


def test_adding_writes_new_shards_only(raw: Path) -> None:
    before = digests(raw)
    with ShardWriter(raw, shard_bytes=SHARD_BYTES) as writer:
        writer.add("c/new.png", b"new")
    assert before.items() <= digests(raw).items()
    assert len(digests(raw)) == len(before) + 1
    assert contents(raw) == IMAGES | {"c/new.png": b"new"}


def test_removing_and_relabelling_leave_every_shard_as_it_is(raw: Path) -> None:
    before = digests(raw)
    edit_images(raw, {"a/00.png": None, "a/01.png": "b/01-moved.png"})
    edit_images(raw, {"b/01-moved.png": "c/01.png", "b/00.png": "a/00.png"})
    expected = {path: data for path, data in IMAGES.items() if path not in ("a/00.png", "a/01.png", "b/00.png")}
    expected |= {"c/01.png": IMAGES["a/01.png"], "a/00.png": IMAGES["b/00.png"]}
    assert contents(raw) == expected
    assert {path: digest for path, digest in digests(raw).items() if path != EDITS_NAME} == before
    bring_into(raw, "folders", shard_bytes=SHARD_BYTES)
    assert contents(raw) == expected
    assert not (raw / EDITS_NAME).exists()


def test_two_images_may_change_places_and_back(raw: Path) -> None:
    edit_images(raw, {"a/00.png": "b/00.png", "b/00.png": "a/00.png"})
    assert contents(raw)["a/00.png"] == IMAGES["b/00.png"]
    edit_images(raw, {"a/00.png": "b/00.png", "b/00.png": "a/00.png"})
    assert contents(raw) == IMAGES
    assert (raw / EDITS_NAME).read_text() == ""


@pytest.mark.parametrize(
    ("moves", "told"),
    [
        ({"a/99.png": None}, r"1 are not there \(a/99\.png\)"),
        ({"a/00.png": "b/00.png"}, r"1 would take another's place \(b/00\.png\)"),
        ({"a/00.png": "c/x.png", "a/01.png": "c/x.png"}, "Nothing was changed"),
    ],
)
def test_moves_that_cannot_be_done_change_nothing(raw: Path, moves: dict[str, str | None], told: str) -> None:
    before = digests(raw)
    with pytest.raises(DataError, match=told):
        edit_images(raw, moves)
    assert digests(raw) == before


def test_images_in_folders_beside_shards_are_refused_until_brought_in(raw: Path) -> None:
    put(raw, {"c/by hand.png": b"by hand"})
    with pytest.raises(DataError, match=r"12 images in shards and 1 in folders.*c/by hand\.png.*tanuki layout"):
        open_images(raw).listing()
    bring_into(raw, "shards", shard_bytes=SHARD_BYTES)
    assert contents(raw) == IMAGES | {"c/by hand.png": b"by hand"}


@pytest.mark.parametrize("layout", ["shards", "folders"])
def test_other_bytes_under_the_path_of_an_image_in_a_shard_are_refused(raw: Path, layout: str) -> None:
    put(raw, {"a/00.png": b"other"})
    with pytest.raises(DataError, match=r"1 paths lie in a shard and as a file with other bytes: a/00\.png"):
        bring_into(raw, layout, shard_bytes=SHARD_BYTES)  # type: ignore[arg-type]


def test_a_layout_other_than_params_yaml_names_is_refused_with_both_ways_out(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"is folders, but .* in shards\. Run `tanuki layout`.* data\.layout: shards"):
        require_layout(open_images(raw), "folders", raw)
    folders = put(tmp_path / "folders", IMAGES)
    with pytest.raises(DataError, match=r"is shards, but .* in folders"):
        require_layout(open_images(folders), "shards", folders)
    require_layout(open_images(tmp_path / "nothing"), "shards", tmp_path / "nothing")


# --- stages -----------------------------------------------------------------------------------------------------------

INDEX = IndexImagesParams(val_fraction=0.2, test_fraction=0.2, max_megapixels=1)


def index(layout: Layout, data_layout: str) -> index_images.IndexImagesReport:
    data = DataParams.model_validate({"layout": data_layout, "shard_mb": 1})
    return index_images.run(layout, seed=0, data=data, index_images=INDEX)


def test_a_change_of_layout_decodes_nothing_and_extracts_no_feature(tmp_path: Path) -> None:
    layout = make_workspace(tmp_path, {"ant": 10, "bee": 10})
    index(layout, "folders")
    cache_features.run(layout, features=FEATURES, augment=AUGMENT)
    manifest, features = layout.images.read_bytes(), digests(layout.features_dir)
    bring_into(layout.raw, "shards", shard_bytes=5000)
    assert index(layout, "shards").decoded == 0
    assert layout.images.read_bytes() == manifest
    assert cache_features.run(layout, features=FEATURES, augment=AUGMENT).extracted == 0
    assert digests(layout.features_dir) == features


def test_a_contact_sheet_is_the_same_picture(tmp_path: Path) -> None:
    raw = make_workspace(tmp_path, {"ant": 3, "bee": 2}).raw
    paths = sorted(contents(raw))

    def sheet() -> bytes:
        images = open_images(raw)
        return contact_sheet([Tile(images.file(path), path, "") for path in (*paths, "ant/gone.png")], "all").tobytes()

    before = sheet()
    bring_into(raw, "shards", shard_bytes=5000)
    assert sheet() == before


def test_a_stage_stops_at_a_damaged_shard_with_one_message(tmp_path: Path) -> None:
    layout = make_workspace(tmp_path, {"ant": 10, "bee": 10})
    bring_into(layout.raw, "shards", shard_bytes=5000)
    flip(shard_paths(layout.raw)[2], 600)
    for stage in (
        lambda: index(layout, "shards"),
        lambda: cache_features.run(layout, features=FEATURES, augment=AUGMENT),
    ):
        with pytest.raises(StoreError, match=r"^1 damaged shard\(s\): \S*shard-000002"):
            stage()
