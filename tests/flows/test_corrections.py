"""Wrong labels put right: all or none, never over another file, recorded, and finished after a kill."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from deploy.files import sha256_bytes, sha256_file
from flows.cli import app
from flows.corrections import Wanted, read_wanted, relabel, remove
from flows.ingest import add_images
from flows.raw_log import read_changes
from flows.shards import bring_into
from flows.workspace import WorkspaceError
from tasks.data.image_files import list_images
from tasks.data.image_store import open_images
from tasks.errors import DataError
from tasks.layout import Layout
from tests.conftest import Workspace
from tests.flows.test_ingest import put, tree

FILES = {"cat/a.png": 1, "cat/b.png": 2, "dog/a.png": 3, "dog/deep/b.png": 4}


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path.resolve())
    put(layout.raw, FILES)
    return layout


def named(label: str | None, *files: str | Path) -> list[Wanted]:
    return [Wanted(Path(file), label) for file in files]


def test_images_move_to_their_label_and_never_over_another(layout: Layout) -> None:
    before = tree(layout.raw)
    files = named("cat", "dog/a.png", layout.raw / "dog" / "deep" / "b.png")
    report = relabel(layout, files, reason="the vet says so")
    beside = f"cat/a-{before['dog/a.png'][:12]}.png"
    assert tree(layout.raw) == {
        "cat/a.png": before["cat/a.png"],
        "cat/b.png": before["cat/b.png"],
        beside: before["dog/a.png"],
        "cat/deep/b.png": before["dog/deep/b.png"],
    }
    assert report.moved == (("dog/a.png", beside), ("dog/deep/b.png", "cat/deep/b.png"))
    assert report.emptied_labels == ("dog",)
    assert not (layout.raw / "dog").exists()


def test_an_official_split_is_kept(tmp_path: Path) -> None:
    layout = Layout(tmp_path.resolve())
    put(layout.raw, {"train/cat/a.png": 1, "test/dog/a.png": 2})
    relabel(layout, named("cat", "test/dog/a.png"), reason=None)
    assert set(tree(layout.raw)) == {"train/cat/a.png", "test/cat/a.png"}
    with pytest.raises(DataError, match="official split"):
        relabel(layout, named("Test", "test/cat/a.png"), reason=None)


def test_each_file_is_recorded_with_where_it_was_and_why(layout: Layout) -> None:
    digest = sha256_file(layout.raw / "dog" / "a.png")
    relabel(layout, named("owl", "dog/a.png"), reason="feathers")
    remove(layout, named(None, "owl/a.png"), reason="blurred")
    lines = [json.loads(line) for line in layout.raw_changes.read_text().splitlines()]
    assert all(line.pop("time").endswith("+00:00") for line in lines)
    assert lines == [
        {
            "command": "relabel",
            "path": "dog/a.png",
            "moved_to": "owl/a.png",
            "from_label": "dog",
            "to_label": "owl",
            "sha256": digest,
            "reason": "feathers",
        },
        {"command": "remove", "path": "owl/a.png", "from_label": "owl", "sha256": digest, "reason": "blurred"},
    ]


def test_every_mistake_is_named_and_nothing_moves(layout: Layout, tmp_path: Path) -> None:
    before = tree(layout.raw)
    put(layout.raw, {"dog/notes.txt": b"text"})
    wanted = named("cat", "dog/a.png", "dog/gone.png", "dog", "dog/notes.txt") + named("a/b", "dog/deep/b.png")
    with pytest.raises(DataError) as told:
        relabel(layout, wanted, reason=None)
    message = str(told.value)
    assert "4 mistake(s), so nothing was changed" in message
    assert "dog/gone.png: is not in" in message
    assert "dog: a folder" in message
    assert "dog/notes.txt: no image by its name" in message
    assert "a/b: cannot be a label" in message
    with pytest.raises(DataError, match=r"elsewhere.*lies outside"):
        remove(layout, named(None, "dog/a.png", put(tmp_path / "elsewhere", {"x.png": 9}) / "x.png"), reason="no")
    with pytest.raises(DataError, match="two labels, cat and owl"):
        relabel(layout, [*named("cat", "dog/a.png"), *named("owl", "dog/a.png")], reason=None)
    (layout.raw / "dog" / "notes.txt").unlink()
    assert tree(layout.raw) == before
    assert not layout.raw_changes.exists()


def test_in_shards_images_are_relabelled_and_removed_alike(layout: Layout) -> None:
    before = {image.path: sha256_file(layout.raw / image.path) for image in list_images(layout.raw).images}
    bring_into(layout.raw, "shards", shard_bytes=10**6)
    shards = {path.name: path.read_bytes() for path in layout.raw.glob("*.tar")}
    first, second, *rest = sorted(before)
    other = next(label for label in {path.split("/")[0] for path in rest} if not first.startswith(f"{label}/"))
    moved = relabel(layout, named(other, first), reason=None).moved
    assert remove(layout, named(None, second), reason="blurred").removed == (second,)
    assert relabel(layout, named(other, first), reason=None).done_before
    store = open_images(layout.raw)
    now = {image.path: sha256_bytes(store.file(image.path).read_bytes()) for image in store.listing().images}
    expected = {path: sha256 for path, sha256 in before.items() if path in rest}
    assert now == {**expected, moved[0][1]: before[first]}
    assert {path.name: path.read_bytes() for path in layout.raw.glob("*.tar")} == shards


def test_a_label_that_is_right_already_and_a_second_run_change_nothing(layout: Layout) -> None:
    wanted = [*named("cat", "cat/a.png"), *named("owl", "dog/a.png")]
    relabel(layout, wanted, reason=None)
    before, log = tree(layout.raw), layout.raw_changes.read_bytes()
    report = relabel(layout, wanted, reason=None)
    assert report.done_before == (("cat/a.png", "labelled cat"), ("dog/a.png", "now owl/a.png"))
    assert (tree(layout.raw), layout.raw_changes.read_bytes()) == (before, log)
    with pytest.raises(DataError, match=r"dog/a\.png: now owl/a\.png"):
        remove(layout, named(None, "dog/a.png"), reason="other")


def test_the_same_bytes_under_the_same_name_twice_are_told(layout: Layout) -> None:
    digest = sha256_file(layout.raw / "cat" / "a.png")
    put(layout.raw, {"dog/a.png": 1, f"cat/a-{digest[:12]}.png": 1})
    with pytest.raises(DataError, match="`tanuki remove` this one"):
        relabel(layout, named("cat", "dog/a.png"), reason=None)


def test_a_table_names_many_files(layout: Layout, tmp_path: Path) -> None:
    table = tmp_path / "right.csv"
    table.write_text("label,path\nno,cat/a.png\n1e-3,dog/a.png\n", encoding="utf-8-sig")
    assert read_wanted(table, with_labels=True) == [
        Wanted(Path("cat/a.png"), "no", "line 2"),
        Wanted(Path("dog/a.png"), "1e-3", "line 3"),
    ]
    relabel(layout, read_wanted(table, with_labels=True), reason=None)
    assert {"no/a.png", "1e-3/a.png"} <= set(tree(layout.raw))
    for text, told in (("file\nx\n", "no column path"), ("path,label\n", "names no file"), ("path\nx\n", "label")):
        table.write_text(text)
        with pytest.raises(DataError, match=told):
            read_wanted(table, with_labels=True)


def test_what_was_added_is_recorded_once_whatever_was_killed(tmp_path: Path, layout: Layout) -> None:
    mine = put(tmp_path / "mine", {"owl/a.png": 10, "owl/b.png": 11})
    for _ in range(2):  # the second time as if the first had been killed right after it was recorded
        add_images(mine, layout.raw, log=layout.raw_changes)
        for file in (layout.raw / "owl").iterdir():
            file.unlink()
    (change,) = read_changes(layout.raw_changes)
    assert (change.command, change.source, change.added_per_class) == ("add", str(mine), {"owl": 2})


def test_an_unfinished_line_is_no_change_and_a_wrong_one_is_named(layout: Layout) -> None:
    relabel(layout, named("owl", "dog/a.png"), reason=None)
    with layout.raw_changes.open("a") as file:
        file.write('{"time": "2026')
    relabel(layout, named("owl", "cat/a.png"), reason=None)
    assert len(read_changes(layout.raw_changes)) == 2
    with layout.raw_changes.open("a") as file:
        file.write("<<<<<<< ours\n")
    with pytest.raises(WorkspaceError, match=r"line 3 .*merge"):
        remove(layout, named(None, "cat/b.png"), reason="x")


KILLED_AT = """
import os, signal, sys
from pathlib import Path
from flows.cli import app
from flows.corrections import Wanted, relabel, remove
from tasks.layout import Layout
command, left, files = sys.argv[1], int(sys.argv[2]), [Path(name) for name in sys.argv[3:]]
def hook(event, args):
    global left
    if event in ("os.rename", "os.remove", "os.rmdir", "os.truncate") or event == "open" and args[1] == "ab":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
layout = Layout(Path.cwd())
sys.addaudithook(hook)
if command == "relabel":
    relabel(layout, [Wanted(file, "cat") for file in files], reason=None)
else:
    remove(layout, [Wanted(file, None) for file in files], reason="x")
"""


@pytest.mark.parametrize("command", ["relabel", "remove"])
@pytest.mark.parametrize("step", [2, 3])  # between the two files, and before the empty folders go
def test_killed_at_any_step_the_same_command_finishes_it(
    repository: Path, layout: Layout, tmp_path: Path, command: str, step: int
) -> None:
    def do(place: Layout) -> None:
        files = named("cat" if command == "relabel" else None, "dog/a.png", "dog/deep/b.png")
        relabel(place, files, reason=None) if command == "relabel" else remove(place, files, reason="x")

    whole = Layout(tmp_path.resolve() / "whole")
    put(whole.raw, FILES)
    do(whole)
    words = [sys.executable, "-c", KILLED_AT, command, str(step), "dog/a.png", "dog/deep/b.png"]
    killed = subprocess.run(words, cwd=layout.root, env={"PYTHONPATH": str(repository)})
    assert killed.returncode == -signal.SIGKILL
    assert (layout.raw / "dog").exists()
    do(layout)
    assert tree(layout.raw) == tree(whole.raw)
    assert not (layout.raw / "dog").exists()
    assert read_changes(layout.raw_changes) == read_changes(whole.raw_changes)


LABELS = st.sampled_from(["cat", "dog", "owl"])


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.dictionaries(st.sampled_from(list(FILES)), LABELS, min_size=1), min_size=1, max_size=3))
def test_whatever_is_relabelled_no_bytes_are_lost(
    tmp_path_factory: pytest.TempPathFactory, corrections: list[dict[str, str]]
) -> None:
    layout = Layout(tmp_path_factory.mktemp("relabel").resolve())
    put(layout.raw, FILES)
    before = sorted(tree(layout.raw).values())
    for labels in corrections:
        here = [Wanted(Path(path), label) for path, label in labels.items() if (layout.raw / path).is_file()]
        expected = {sha256_file(layout.raw / each.file): each.label for each in here}
        relabel(layout, here, reason=None)
        after = tree(layout.raw)
        assert sorted(after.values()) == before
        assert all(expected.get(digest, Path(path).parts[0]) == Path(path).parts[0] for path, digest in after.items())


def test_the_commands_tell_dvc_and_git(workspace: Workspace, tmp_path: Path) -> None:
    workspace.tanuki("add", put(tmp_path / "mine", FILES))
    raw = workspace.root / "data" / "raw"
    told = workspace.tanuki("relabel", "owl", "dog/a.png", raw / "cat" / "a.png").stdout
    assert "2 relabelled" in told
    assert "New as a label: owl." in told
    workspace.tanuki("remove", "cat/b.png", "--reason", "not a cat")
    assert json.loads(workspace.dvc("status", "--json", "data/raw.dvc").stdout or "{}") == {}
    staged = workspace.run("git", "diff", "--cached", "--name-only").stdout.split()
    assert staged == ["data/raw-changes.jsonl", "data/raw.dvc"]
    commands = [change.command for change in read_changes(Layout(workspace.root).raw_changes)]
    assert commands == ["add", "relabel", "relabel", "remove"]


@pytest.mark.parametrize("words", [["relabel", "owl"], ["relabel"], ["remove", "--reason", "y"], ["remove", "a.png"]])
def test_a_command_that_names_too_little_is_wrong_usage(words: list[str]) -> None:
    assert CliRunner().invoke(app, words).exit_code == 2
