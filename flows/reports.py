"""What a person is told: the summary of a retrain, the standing of a workspace, and both as Prefect artifacts."""

import json
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from deploy.registry import Registry, Version
from flows.decision_page import OUTCOMES
from flows.promotion import Verdict, read_reports
from flows.registries import registry_of
from flows.workspace import StageRun, data_version, holder, stale_stages
from tasks.layout import Layout

WIDTH = 100


@dataclass(frozen=True)
class Summary:
    """What a retrain came to, for a person and for a script.

    Args:
        reports: The report of each stage.
        stages: What ran; empty where nothing had changed.
        verdict: What the gate said; None where nothing had changed.
        champion: The version in production, or None.
    """

    reports: dict[str, Any]
    stages: tuple[StageRun, ...]
    verdict: Verdict | None
    champion: Version | None

    def as_dict(self) -> dict[str, Any]:
        """The same facts for JSON."""
        return {
            "images": self.reports["validate_data"]["num_accepted"],
            "classes": self.reports["validate_data"]["num_classes"],
            "stages": [asdict(run) for run in self.stages],
            "accuracy": accuracies(self.reports),
            "parity": self.reports["export_onnx"],
            "decision": None if self.verdict is None else asdict(self.verdict),
            "champion": _version_facts(self.champion),
        }

    def text(self) -> str:
        """The same facts for a terminal."""
        if self.verdict is None:
            return "\n".join([_nothing_changed(self.champion), "", *self._accuracy_lines(), "", *_next_commands(None)])
        return "\n".join(
            [
                "",
                *self._data_lines(),
                "",
                *self._stage_lines(),
                "",
                *self._accuracy_lines(),
                "",
                *_verdict_lines(self.verdict),
                "",
                *_next_commands(self.verdict),
            ]
        )

    def markdown(self) -> str:
        """The same facts as a Prefect artifact."""
        return f"```\n{self.text().strip()}\n```"

    def _data_lines(self) -> list[str]:
        data = self.reports["validate_data"]
        splits = ", ".join(f"{number} {split}" for split, number in data["images_per_split"].items())
        lines = [f"Data         {data['num_accepted']} images of {data['num_classes']} classes ({splits})"]
        if data["num_quarantined"]:
            lines.append(f"             {data['num_quarantined']} left out: data/manifest/quarantine.csv says why")
        return lines + [_wrapped("             ", f"warning: {warning}") for warning in data["warnings"]]

    def _stage_lines(self) -> list[str]:
        heads = ["Stages       ", *["             "] * (len(self.stages) - 1)]
        lines = [
            f"{head}{run.stage:<15} {run.outcome:<11} {run.seconds:6.1f} s"
            for head, run in zip(heads, self.stages, strict=True)
        ]
        return [*lines, f"{'':13}{'':27} {sum(run.seconds for run in self.stages):6.1f} s"]

    def _accuracy_lines(self) -> list[str]:
        names = {"class_prototypes": "class prototypes", "linear_probe": "linear probe", "finetuned": "fine-tuned"}
        found = accuracies(self.reports)
        num_test = self.reports["evaluate"]["num_test"]
        lines = []
        for key, name in names.items():
            share = found[key]
            if share is None:
                lines.append(_wrapped(f"             {name:<17} ", f"none: {_why_not_finetuned(self.reports)}"))
            else:
                interval = f"{share['accuracy_low']:.4f} to {share['accuracy_high']:.4f}"
                lines.append(f"             {name:<17} {share['accuracy']:.4f}  ({interval})")
        confidence = self.reports["evaluate"]["confidence"]
        export = self.reports["export_onnx"]
        return [
            f"Accuracy     on {num_test} test images, with {confidence:.0%} intervals",
            *lines,
            *_chance_lines(self.reports["train_head"]),
            f"ONNX parity  largest difference {export['max_probability_difference']:.1e} in a probability, "
            f"{export['top1_agreement']:.0%} the same label",
            *_int8_lines(export.get("int8")),
        ]


@dataclass(frozen=True)
class Standing:
    """Where a workspace stands.

    Args:
        champion: The version in production, or None.
        accuracy: The champion's on the test images of its time, or None.
        data_version: DVC's hash of data/raw as it was last added, or None.
        holder: Who is at work in the workspace right now, or None.
        would_run: The stages that a retrain would run, each with the reasons; not looked at while somebody is at work.
    """

    champion: Version | None
    accuracy: float | None
    data_version: str | None
    holder: str | None
    would_run: dict[str, list[str]]

    def as_dict(self) -> dict[str, Any]:
        """The same facts for JSON."""
        return {
            "champion": _version_facts(self.champion),
            "accuracy": self.accuracy,
            "data_version": self.data_version,
            "busy": self.holder,
            "would_run": self.would_run,
        }

    def text(self) -> str:
        """The same facts for a terminal."""
        champion = "none yet"
        if self.champion is not None:
            accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.4f} when it was measured"
            champion = f"version {self.champion.id}, registered {_minute(self.champion)} UTC{accuracy}"
        lines = [f"Champion  {champion}", f"Data      {self.data_version or 'not under DVC yet'}"]
        if self.holder is not None:
            return "\n".join([*lines, f"Stages    {self.holder} is at work"])
        if not self.would_run:
            return "\n".join([*lines, "Stages    all up to date"])
        lines.append("Stages    a retrain would run:")
        for stage, reasons in self.would_run.items():
            more = f" and {len(reasons) - 2} more" if len(reasons) > 2 else ""
            lines.append(f"          {stage:<15} {'; '.join(reasons[:2])}{more}")
        return "\n".join(lines)


def summarise(layout: Layout, *, stages: Sequence[StageRun], verdict: Verdict | None) -> Summary:
    """What a retrain came to; no stages and no verdict where nothing had changed."""
    return Summary(read_reports(layout), tuple(stages), verdict, registry_of(layout).champion())


def standing(layout: Layout) -> Standing:
    """Where a workspace stands."""
    registry = registry_of(layout)
    champion = registry.champion()
    accuracy = None if champion is None else _accuracy(registry, champion)
    busy = holder(layout)
    return Standing(champion, accuracy, data_version(layout), busy, {} if busy else stale_stages(layout))


def version_rows(layout: Layout) -> list[dict[str, Any]]:
    """One row a version, oldest first: what it is, how good it was, and what was last said of it."""
    registry = registry_of(layout)
    champion = registry.champion_id()
    said = {event.version: event for event in registry.events()}
    return [
        {
            **(_version_facts(version) or {}),
            "champion": champion == version.id,
            "accuracy": _accuracy(registry, version),
            "decision": said[version.id].kind,
            "reason": said[version.id].reason,
        }
        for version in registry.versions()
    ]


def live_at(layout: Layout, when: datetime) -> dict[str, Any]:
    """Which version was in production at a time, since when and why; and whether the clock can be believed there."""
    registry = registry_of(layout)
    move = registry.live_at(when)
    doubtful = [
        f"the clock went back from {one.time} to {other.time}, so times between these are uncertain"
        for one, other in registry.clock_went_back()
        if datetime.fromisoformat(other.time) <= when <= datetime.fromisoformat(one.time)
    ]
    return {
        "at": when.isoformat(),
        "version": None if move is None else move.version,
        "since": None if move is None else move.time,
        "how": None if move is None else move.kind,
        "reason": None if move is None else move.reason,
        "warnings": doubtful,
    }


def version_lineage(layout: Layout, version: int) -> dict[str, Any]:
    """Where a version comes from and what happened to it: all that the registry holds of it."""
    registry = registry_of(layout)
    told = registry.lineage(registry.version(version).id)
    decisions = [event["decision"] for event in told["events"] if event["decision"]]
    facts = {name: value for name, value in told.items() if name not in ("lineage", "events")}
    return {**facts, **told["lineage"], "decision": decisions[-1] if decisions else None, "events": told["events"]}


def accuracies(reports: dict[str, Any]) -> dict[str, dict[str, float] | None]:
    """Accuracy with its interval of the baseline, the probe, the fine-tuned model and the bundle that ships."""
    told = reports["evaluate"]
    bundle = {name: told[name] for name in ("accuracy", "accuracy_low", "accuracy_high")}
    return {**{name: told[name] for name in ("class_prototypes", "linear_probe", "finetuned")}, "bundle": bundle}


def publish(layout: Layout, stages: Sequence[StageRun], verdict: Verdict) -> None:
    """Puts the summary and the stages into the Prefect run as artifacts."""
    from prefect.artifacts import create_markdown_artifact, create_table_artifact

    summary = summarise(layout, stages=stages, verdict=verdict)
    create_markdown_artifact(summary.markdown(), key="retrain-summary", description="What this retrain came to")
    create_table_artifact([asdict(run) for run in stages], key="retrain-stages", description="What ran")
    create_markdown_artifact(
        f"```json\n{json.dumps(asdict(verdict), indent=2)}\n```",
        key="retrain-decision",
        description="What the gate said",
    )


def _version_facts(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    return {
        "id": version.id,
        "digest": version.digest,
        "registered": _minute(version),
        "directory": str(version.directory),
    }


def _chance_lines(head: dict[str, Any]) -> list[str]:
    """A warning where the probe knows no more than which class is the largest."""
    if not head["is_at_chance"]:
        return []
    told = (
        f"warning: the probe is at chance, {head['out_of_fold_accuracy']:.1%} of held-out images where always naming "
        f"the largest class gives {head['chance_accuracy']:.1%}: are the labels right (`tanuki suspects`)?"
    )
    return [_wrapped("             ", told)]


def _int8_lines(told: dict[str, Any] | None) -> list[str]:
    """What became of an int8 variant, where one was asked for."""
    if told is None:
        return []
    return [_wrapped("             ", f"int8 {'answers' if told['chosen'] else 'is not taken'}: {told['reason']}")]


def _why_not_finetuned(reports: dict[str, Any]) -> str:
    """What the validation images said of the first stage that was tried, or why none was."""
    tried = [stage for stage in reports["finetune"]["stages"] if stage["val_nll_after"] is not None]
    if not tried:
        return str(reports["evaluate"]["finetuned_reason"])
    before, after = tried[0]["val_nll_before"], tried[0]["val_nll_after"]
    return f"stage {tried[0]['name']} was dropped, validation NLL {before:.4f} before and {after:.4f} after"


def _minute(version: Version) -> str:
    return version.registered_at[:16].replace("T", " ")


def _accuracy(registry: Registry, version: Version) -> float | None:
    metrics = registry.registered_lineage(version.id).get("metrics", {})
    accuracy = metrics.get("evaluate", {}).get("accuracy")
    return None if accuracy is None else float(accuracy)


def _nothing_changed(champion: Version | None) -> str:
    now = "there is no champion" if champion is None else f"version {champion.id} stays champion"
    return f"Nothing changed: every stage is up to date and the model was judged already; {now}."


def _verdict_lines(verdict: Verdict) -> list[str]:
    lines = [f"Gate         version {verdict.version} {OUTCOMES[verdict.outcome]}"]
    lines += [_wrapped("             ", reason) for reason in verdict.reasons]
    lines += [_wrapped("             ", f"warning: {warning}") for warning in verdict.warnings]
    if uses := verdict.numbers.get("num_uses"):
        lines.append(f"             these test images have been used for {uses} verdict{'s' * (uses > 1)} before")
    champion = "none" if verdict.champion is None else f"version {verdict.champion}"
    return [*lines, f"Champion     {champion}"]


def _next_commands(verdict: Verdict | None) -> Iterable[str]:
    lines = ["Next         tanuki predict FILE...              classify pictures with the champion"]
    if verdict is not None:
        lines += [
            f"             tanuki lineage {verdict.version:<21}where this version comes from",
            "             tanuki add FOLDER --replace         your own photos, a folder a class, instead of the sample",
            "             git add data/raw.dvc dvc.lock       keep this version of data and model, then git commit",
        ]
    if verdict is not None and verdict.champion != verdict.version:
        lines.append(f"             tanuki promote {verdict.version} --reason WHY       overrule the gate")
    return [
        *lines,
        "Look at      data/reports/evaluation/index.html  worst mistakes, confusion, classes, slices; works offline",
        *(["             data/reports/gate/index.html        why the gate said so"] if verdict else []),
    ]


def _wrapped(indent: str, text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent))
