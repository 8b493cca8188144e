"""dvc.yaml as data: which stages there are, in which order, and what each reads and writes."""

import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML


@dataclass(frozen=True)
class Stage:
    """One stage of dvc.yaml.

    Args:
        name: The stage's one word.
        cmd: What DVC runs.
        deps: Paths it reads, code included.
        params: Sections or keys of params.yaml.
        outs: Paths it writes, metrics and plots included.
        uncached: Those of them that DVC does not keep.
    """

    name: str
    cmd: str
    deps: tuple[str, ...]
    params: tuple[str, ...]
    outs: tuple[str, ...]
    uncached: tuple[str, ...] = ()


def read_stages(pipeline: Path) -> tuple[Stage, ...]:
    """The stages of dvc.yaml in an order in which each comes after all that it reads from.

    Stages that do not depend on each other keep the file's order.
    """
    declared = YAML(typ="safe", pure=True).load(pipeline.read_text(encoding="utf-8"))["stages"]
    pending = [_stage(name, spec) for name, spec in declared.items()]
    ordered: list[Stage] = []
    while pending:
        ready = next(stage for stage in pending if not any(_reads(stage, other) for other in pending if other != stage))
        pending.remove(ready)
        ordered.append(ready)
    return tuple(ordered)


def downstream(stages: tuple[Stage, ...], changed: set[str]) -> tuple[str, ...]:
    """The names of the changed stages and of all that read, directly or not, from them, in order."""
    reached = set(changed)
    for stage in stages:
        if any(_reads(stage, other) for other in stages if other.name in reached):
            reached.add(stage.name)
    return tuple(stage.name for stage in stages if stage.name in reached)


def mermaid(stages: tuple[Stage, ...]) -> str:
    """The stages and the data they start from as a Mermaid flowchart, for the README; the shortest that says it all."""
    lines = [
        "flowchart LR",
        "    raw[(data/raw)] --> index_images",
        "    weights[(pretrained weights)] --> fetch_backbone",
    ]
    for stage in stages:
        sources = [other for other in stages if other != stage and _reads(stage, other)]
        implied = {name for source in sources for name in _upstream(stages, source)}
        lines += [f"    {source.name} --> {stage.name}" for source in sources if source.name not in implied]
    lines += [
        "    evaluate --> gate{gate}",
        "    gate -- better --> champion[(registry: champion)]",
        "    gate -. not better .-> refused[refused, with reasons]",
        "    champion --> serve([predict and serve])",
    ]
    return "\n".join(lines)


def _upstream(stages: tuple[Stage, ...], stage: Stage) -> set[str]:
    """The names of all stages that a stage reads from, directly or not."""
    sources = [other for other in stages if other != stage and _reads(stage, other)]
    return {source.name for source in sources}.union(*(_upstream(stages, source) for source in sources))


def _stage(name: str, spec: dict[str, Any]) -> Stage:
    written = [*spec.get("outs", ()), *spec.get("metrics", ()), *spec.get("plots", ())]
    return Stage(
        name=name,
        cmd=spec["cmd"],
        deps=tuple(spec.get("deps", ())),
        params=tuple(spec.get("params", ())),
        outs=tuple(_path(entry) for entry in written),
        uncached=tuple(_path(entry) for entry in written if not _is_cached(entry)),
    )


def _path(entry: str | dict[str, Any]) -> str:
    return entry if isinstance(entry, str) else next(iter(entry))


def _is_cached(entry: str | dict[str, Any]) -> bool:
    return isinstance(entry, str) or bool(entry[_path(entry)].get("cache", True))


def _reads(stage: Stage, other: Stage) -> bool:
    """Whether a dependency of ``stage`` is, lies in, or holds an output of ``other``."""
    return any(_overlap(dep, out) for dep in stage.deps for out in other.outs)


def _overlap(one: str, two: str) -> bool:
    return posixpath.commonpath([one, two]) in (posixpath.normpath(one), posixpath.normpath(two))
