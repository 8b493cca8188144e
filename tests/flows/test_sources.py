"""Every shape that labelled images come in, and every way in which such a source can be wrong or hostile."""

import io
import os
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from flows.ingest import add_images
from flows.sources import copy_file, open_source
from tasks.errors import DataError
from tests.flows.test_ingest import put, tree
from tests.tasks.test_index_images import picture


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "data" / "raw"


def archive(path: Path, members: dict[str, bytes | int] | list[tuple[tarfile.TarInfo, bytes]]) -> Path:
    """Writes a tar archive; a number stands for the picture of that seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(members, dict):
        members = [
            (tarfile.TarInfo(name), picture(content) if isinstance(content, int) else content)
            for name, content in members.items()
        ]
    with tarfile.open(path, "w:" if path.suffix == ".tar" else "w:gz") as shard:
        for member, data in members:
            member.size = len(data) if member.isreg() else 0
            shard.addfile(member, io.BytesIO(data))
    return path


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_says_label_and_split_of_each_image(tmp_path: Path, raw: Path, kind: str) -> None:
    mine = put(tmp_path / "mine", {"images/1.png": 1, "images/2.png": 2, "images/cat/3.png": 3})
    rows = {
        "path": ["images/1.png", "images/2.png", "images/cat/3.png"],
        "label": ["cat", "007", "cat"],
        "split": ["Train", "validation", ""],
    }
    table = mine / f"labels.{kind}"
    if kind == "csv":
        table.write_text("\n".join(map(",".join, [rows, *zip(*rows.values(), strict=True)])), encoding="utf-8-sig")
    else:
        parquet.write_table(pa.table(rows), table)
    report = add_images(table, raw)
    assert set(tree(raw)) == {"train/cat/1.png", "val/007/2.png", "cat/3.png"}
    assert report.added_per_class == {"007": 1, "cat": 2}
    assert add_images(table, raw).known == 3


def test_every_bad_row_of_a_table_is_named_and_nothing_is_added(tmp_path: Path, raw: Path) -> None:
    table = put(tmp_path / "mine", {"a.png": 1}) / "labels.csv"
    rows = [
        "a.png,cat,train",
        "gone.png,cat,",
        "a.png,dog,train",
        ",cat,",
        "a.png,,",
        "../a.png,cat,",
        "a.png,cat,half",
    ]
    table.write_text("\n".join(["path,label,split", *rows]))
    with pytest.raises(DataError) as told:
        add_images(table, raw)
    for part in (
        "6 row(s)",
        "line 3: gone.png: there is no such file",
        "line 4: a.png: is cat (train) in an earlier row",
        "line 5: no path",
        "line 6: a.png: '' cannot be a label",
        "line 7: ../a.png: expected a path below",
        "line 8: a.png: half is no split",
    ):
        assert part in str(told.value)
    assert not raw.exists()


@pytest.mark.parametrize(
    ("text", "told"), [(b"file,label\nx,y\n", "no column path"), (b"path,label\n", "no file"), (b"\xff\xfe,", "UTF-8")]
)
def test_what_is_no_table_is_told(tmp_path: Path, raw: Path, text: bytes, told: str) -> None:
    with pytest.raises(DataError, match=told):
        add_images(put(tmp_path, {"labels.csv": text}) / "labels.csv", raw)
    parquet.write_table(pa.table({"path": ["x.png"], "label": [1.5]}), tmp_path / "labels.parquet")
    with pytest.raises(DataError, match="row 1: path, label and split must be text"):
        add_images(tmp_path / "labels.parquet", raw)
    with pytest.raises(DataError, match="cannot be read as a table"):
        add_images(put(tmp_path, {"broken.parquet": b"PAR1"}) / "broken.parquet", raw)


# --- tar shards -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_a_tar_of_folders_is_a_folder(tmp_path: Path, raw: Path, suffix: str) -> None:
    members = {"./cat/b.png": 2, "cat/deep/a.png": 1, "dog/._a.png": b"x", "dog/a.png": 3, "dog/notes.txt": b"text"}
    report = add_images(archive(tmp_path / f"mine{suffix}", members), raw)
    assert set(tree(raw)) == {"cat/b.png", "cat/deep/a.png", "dog/a.png"}
    assert report.left_out == (("dog/._a.png", "hidden"), ("dog/notes.txt", "no image by its name"))
    assert add_images(tmp_path / f"mine{suffix}", raw).known == 3


def test_shards_keep_official_splits_from_their_members_or_their_names(tmp_path: Path, raw: Path) -> None:
    archive(tmp_path / "mine" / "one.tar", {"train/cat/a.png": 1, "valid/cat/a.png": 2})
    archive(tmp_path / "mine" / "test-000.tar.gz", {"cat/a.png": 3})
    add_images(tmp_path / "mine", raw)
    assert set(tree(raw)) == {"train/cat/a.png", "val/cat/a.png", "test/cat/a.png"}


@pytest.mark.parametrize("suffix", ["cls", "txt"])
def test_webdataset_pairs_are_read(tmp_path: Path, raw: Path, suffix: str) -> None:
    members = {"0001.png": 1, f"0001.{suffix}": b"3\n", "0001.json": b"{}", "0002.png": 2, f"0002.{suffix}": b"two"}
    archive(tmp_path / "mine" / "train-000.tar", members)
    archive(tmp_path / "mine" / "train-001.tar", {"0001.png": 3, f"0001.{suffix}": b"3"})
    report = add_images(tmp_path / "mine", raw)
    assert report.added_per_class == {"3": 2, "two": 1}
    assert all(path.startswith("train/") for path in tree(raw))


def test_webdataset_images_without_one_label_are_named(tmp_path: Path, raw: Path) -> None:
    members = {
        "1.png": 1,
        "1.cls": b"3",
        "2.png": 2,
        "3.png": 3,
        "3.seg.png": 4,
        "3.cls": b"1",
        "4.png": 5,
        "4.cls": b"/",
    }
    with pytest.raises(DataError) as told:
        add_images(archive(tmp_path / "mine.tar", members), raw)
    assert "4 image(s) without one label" in str(told.value)
    assert "2.png: has no 2.cls" in str(told.value)
    assert "3.seg.png: another image has the same key" in str(told.value)
    assert "4.png: its label '/' cannot be" in str(told.value)


def test_hostile_members_are_refused_by_name_and_nothing_is_added(tmp_path: Path, raw: Path) -> None:
    def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tuple[tarfile.TarInfo, bytes]:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        return info, picture(1) if kind == tarfile.REGTYPE else b""

    members = [
        member("cat/good.png"),
        member("/cat/absolute.png"),
        member("cat/../../up.png"),
        member("cat/soft.png", tarfile.SYMTYPE, "/etc/passwd"),
        member("cat/hard.png", tarfile.LNKTYPE, "cat/good.png"),
        member("cat/device.png", tarfile.CHRTYPE),
        member("cat/pipe.png", tarfile.FIFOTYPE),
        member("./cat/good.png"),
    ]
    with pytest.raises(DataError) as told:
        add_images(archive(tmp_path / "mine.tar", members), raw)
    assert "7 member(s)" in str(told.value)
    assert "cat/soft.png: a link to /etc/passwd" in str(told.value)
    assert "./cat/good.png: a second member" in str(told.value)
    assert not raw.exists()
    assert not (tmp_path / "up.png").exists()


@pytest.mark.parametrize("name", ["mine.tar", "mine.tar.gz"])
def test_a_cut_archive_is_told_and_nothing_is_lost(tmp_path: Path, raw: Path, name: str) -> None:
    whole = archive(tmp_path / name, {"cat/a.png": os.urandom(9000), "cat/b.png": os.urandom(9000)}).read_bytes()
    (tmp_path / name).write_bytes(whole[:12000])
    with pytest.raises(DataError, match=r"no whole tar archive|ends within it"):
        add_images(tmp_path / name, raw)
    (tmp_path / name).write_bytes(b"text")
    with pytest.raises(DataError, match="no whole tar archive"):
        add_images(tmp_path / name, raw)


# --- URLs -------------------------------------------------------------------------------------------------------------


def test_a_url_of_folders_is_a_folder(tmp_path: Path, raw: Path) -> None:
    mine = put(tmp_path / "mine", {"train/cat/a.png": 1, "test/two words/b.png": 2, "test/dog/notes.txt": b"text"})
    report = add_images(f"file://{mine}", raw)
    assert set(tree(raw)) == {"train/cat/a.png", "test/two words/b.png"}
    assert report.left_out == (("test/dog/notes.txt", "no image by its name"),)


def test_an_object_store_is_read_by_prefix(raw: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    store.pipe({"/bucket/in/cat/a.png": picture(1), "/bucket/in/x.png": picture(2), "/bucket/other/cat/b.png": b""})
    report = add_images("memory://bucket/in", raw)
    assert set(tree(raw)) == {"cat/a.png"}
    assert dict(report.left_out) == {"x.png": "lies beside the class folders, so it has no label"}
    with pytest.raises(DataError, match="memory://bucket/gone"):
        add_images("memory://bucket/gone", raw)


@pytest.mark.parametrize(
    ("url", "told"), [("gs://bucket/x", "package that is not installed.*gcsfs"), ("nonsense://x", "cannot be read")]
)
def test_a_url_that_cannot_be_read_says_what_it_needs(raw: Path, url: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        open_source(url)


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 3 << 20])
def test_a_copy_has_the_bytes_and_is_no_hard_link(tmp_path: Path, size: int) -> None:
    source, target = put(tmp_path, {"a": os.urandom(size)}) / "a", tmp_path / "b"
    target.write_bytes(b"left over from before")
    copy_file(source, target)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_nlink == 1
