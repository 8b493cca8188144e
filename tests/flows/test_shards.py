"""Shards as a person meets them: changes of layout, adding, kills, and DVC bringing a damaged shard back."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.files import sha256_file
from flows.ingest import PART_PREFIX, add_images
from flows.shards import PART_NAME, bring_into, change_layout
from flows.workspace import track_raw
from tasks.data.image_store import open_images, shard_paths
from tasks.errors import DataError, StoreError
from tasks.layout import Layout
from tests.awkward import awkward_files
from tests.conftest import Workspace, write_digits
from tests.flows.test_ingest import put, tree
from tests.tasks.test_image_store import IMAGES, SHARD_BYTES, contents, digests

# --- adding -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return put(
        tmp_path / "mine", {f"{label}/{number}.png": 10 * ord(label) + number for label in "ab" for number in (1, 2)}
    )


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return tmp_path / "raw"


def test_images_are_added_to_shards_as_they_are_to_folders(source: Path, raw: Path, tmp_path: Path) -> None:
    report = add_images(source, raw, shard_bytes=3000)
    assert report == add_images(source, tmp_path / "folders")
    assert contents(raw) == contents(tmp_path / "folders")
    before = digests(raw)
    assert add_images(source, raw, shard_bytes=3000).known == 4
    assert digests(raw) == before
    more = put(tmp_path / "more", {"a/1.png": 7, "c/1.png": 8, "b/x.png": 10 * ord("a") + 1})
    report, same = add_images(more, raw, shard_bytes=3000), add_images(more, tmp_path / "folders")
    assert report == same
    assert report.refused == (("b/x.png", "the same bytes are there under another label: a/1.png"),)
    assert contents(raw) == contents(tmp_path / "folders")  # a/1.png of other bytes has another name, the same in both
    assert before.items() < digests(raw).items()


def test_adding_anywhere_makes_the_same_shards(source: Path, raw: Path, tmp_path: Path) -> None:
    for folder in (raw, tmp_path / "elsewhere"):
        add_images(source, folder, shard_bytes=3000)
    assert digests(raw) == digests(tmp_path / "elsewhere")


def test_the_sample_is_replaced_in_shards_too(source: Path, raw: Path) -> None:
    write_digits(raw, 0, 2)
    bring_into(raw, "shards", shard_bytes=10**6)
    assert add_images(source, raw, replace=True, shard_bytes=10**6).replaced == 20
    assert set(contents(raw)) == set(tree(source))


# --- kills ------------------------------------------------------------------------------------------------------------

KILLED_AT = """
import os, signal, sys
from pathlib import Path
from flows.ingest import add_images
from flows.shards import bring_into
steps = int(sys.argv[3])
def hook(event, args):
    global steps
    if event in ("os.rename", "os.remove", "os.rmdir"):
        steps -= 1
        if steps < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
what, raw = sys.argv[1], Path(sys.argv[2])
if what == "add":
    add_images(Path(sys.argv[4]), raw, shard_bytes=3000)
else:
    bring_into(raw, what, shard_bytes=6000)
"""


def killed_at(repository: Path, *words: str | Path) -> bool:
    """Runs it until the kill; False where it was done before."""
    run = subprocess.run([sys.executable, "-c", KILLED_AT, *map(str, words)], cwd=repository, check=False)
    assert run.returncode in (0, -signal.SIGKILL)
    return run.returncode != 0


@pytest.mark.parametrize("steps", [0, 1, 4, 5, 9, 17])
def test_a_kill_while_shards_are_made_loses_nothing_and_leaves_no_trace(
    repository: Path, tmp_path: Path, steps: int
) -> None:
    whole, raw = tmp_path / "whole", tmp_path / "raw"
    for folder in (whole, raw):
        for path, data in IMAGES.items():
            put(folder, {path: data})
    bring_into(whole, "shards", shard_bytes=SHARD_BYTES)
    assert killed_at(repository, "shards", raw, steps)
    bring_into(raw, "shards", shard_bytes=SHARD_BYTES)
    assert digests(raw) == digests(whole)
    assert contents(raw) == IMAGES


@pytest.mark.parametrize("steps", [0, 3, 7, 14])
def test_a_kill_while_folders_are_made_loses_nothing(repository: Path, tmp_path: Path, steps: int) -> None:
    raw = tmp_path / "raw"
    for path, data in IMAGES.items():
        put(raw, {path: data})
    before = digests(raw)
    bring_into(raw, "shards", shard_bytes=SHARD_BYTES)
    assert killed_at(repository, "folders", raw, steps)
    bring_into(raw, "folders", shard_bytes=SHARD_BYTES)
    assert digests(raw) == before


@pytest.mark.parametrize("steps", [0, 1])
def test_a_kill_while_images_are_added_to_shards_changes_no_byte_of_what_comes_of_it(
    repository: Path, source: Path, raw: Path, tmp_path: Path, steps: int
) -> None:
    add_images(source, tmp_path / "whole", shard_bytes=3000)
    assert killed_at(repository, "add", raw, steps, source)
    assert len(shard_paths(raw)) == steps
    assert PART_NAME.startswith(PART_PREFIX)  # so that a later add sweeps what this one left
    add_images(source, raw, shard_bytes=3000)
    assert digests(raw) == digests(tmp_path / "whole")


def test_without_images_there_is_nothing_to_lay_out_anew(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((repository / "params.yaml").read_bytes())
    with pytest.raises(DataError, match=r"holds no images.*tanuki add FOLDER"):
        change_layout(Layout(tmp_path))


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_workspace_lives_in_shards_and_dvc_brings_a_damaged_one_back(
    workspace: Workspace, source: Path, tmp_path: Path
) -> None:
    raw = workspace.root / "data" / "raw"
    add_images(source, raw)
    in_folders = contents(raw)
    workspace.set_param("data.layout", "shards")
    refused = workspace.tanuki("add", source, check=False)
    assert refused.returncode == 1
    assert "Run `tanuki layout` to bring them into shards" in refused.stderr
    stopped = workspace.run(sys.executable, "-m", "tasks", "index_images", check=False)
    assert stopped.returncode == 1
    assert "Run `tanuki layout`" in stopped.stderr
    assert "4 images were moved" in workspace.tanuki("layout").stdout
    assert contents(raw) == in_folders
    workspace.tanuki("add", put(tmp_path / "more", {"c/1.png": 99}))
    assert [open_images(raw).layout, len(shard_paths(raw))] == ["shards", 2]

    shard = shard_paths(raw)[0]
    whole, pointer = sha256_file(shard), (raw.parent / "raw.dvc").read_bytes()
    shard.write_bytes(shard.read_bytes()[:-2000])
    with pytest.raises(StoreError, match=f"1 damaged shard.*{shard.name}"):
        track_raw(Layout(workspace.root))
    assert (raw.parent / "raw.dvc").read_bytes() == pointer  # damage is no new version of the data
    shard.unlink()
    workspace.dvc("checkout", "data/raw.dvc")
    assert sha256_file(shard) == whole

    workspace.set_param("data.layout", "folders")
    change_layout(Layout(workspace.root))
    assert set(in_folders) | {"c/1.png"} == set(contents(raw))
    assert open_images(raw).layout == "folders"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_pipeline_over_shards_comes_to_the_same_model(retrained: Path, tmp_path: Path, prefect_home: Path) -> None:
    workspace = Workspace(tmp_path / "workspace", prefect_home)
    shutil.copytree(retrained, workspace.root, symlinks=True)
    data = workspace.root / "data"
    made = [data / "manifest" / "accepted.parquet", data / "bundle" / "model.onnx", data / "features"]
    before = [digests(path) if path.is_dir() else sha256_file(path) for path in made]
    workspace.set_param("data.layout", "shards")
    workspace.set_param("data.shard_mb", 0.05)
    workspace.tanuki("layout")
    workspace.dvc("repro")
    assert [digests(path) if path.is_dir() else sha256_file(path) for path in made] == before
    unreadable = len(awkward_files()[1])  # those are looked at again each time
    assert json.loads((data / "reports" / "index_images.json").read_text())["decoded"] == unreadable
    assert json.loads((data / "reports" / "cache_features.json").read_text())["extracted"] == 0
    assert len(shard_paths(data / "raw")) > 3
