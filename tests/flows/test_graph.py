"""dvc.yaml as data."""

from pathlib import Path

from flows.graph import Stage, downstream, read_stages


def write(folder: Path, text: str) -> Path:
    path = folder / "dvc.yaml"
    path.write_text(text)
    return path


def test_a_stage_comes_after_all_it_reads_from(tmp_path: Path) -> None:
    pipeline = write(
        tmp_path,
        """
stages:
  last: {cmd: c, deps: [out/middle/file], outs: [out/last]}
  middle: {cmd: b, deps: [out/first.txt], outs: [{out/middle: {persist: true}}]}
  first: {cmd: a, outs: [out/first.txt], metrics: [{out/first.json: {cache: false}}]}
""",
    )
    stages = read_stages(pipeline)
    assert [stage.name for stage in stages] == ["first", "middle", "last"]
    assert stages[0].outs == ("out/first.txt", "out/first.json")


def test_what_is_downstream_of_a_change_runs_and_nothing_else() -> None:
    def stage(name: str, deps: tuple[str, ...]) -> Stage:
        return Stage(name, "", deps, (), (f"out/{name}",))

    stages = (stage("a", ()), stage("b", ()), stage("c", ("out/a",)), stage("d", ("out/c", "out/b")))
    assert downstream(stages, {"a"}) == ("a", "c", "d")
    assert downstream(stages, {"b"}) == ("b", "d")
    assert downstream(stages, set()) == ()


def test_a_path_that_only_begins_alike_is_not_read() -> None:
    stages = (Stage("a", "", (), (), ("out/model",)), Stage("b", "", ("out/model_card",), (), ("out/b",)))
    assert downstream(stages, {"a"}) == ("a",)
