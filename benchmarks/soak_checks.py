"""What must hold after benchmarks/soak.py's month, looked at from outside: in files, in git, in Prefect."""

import csv
import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq
from ruamel.yaml import YAML

from benchmarks.box import FINAL
from benchmarks.month import AT_THE_DOOR, Bad
from deploy.bundle import read_bundle
from deploy.event_log import MOVES, Event
from flows.graph import read_stages
from flows.workspace import git, is_held
from tasks.layout import Layout

if TYPE_CHECKING:
    from benchmarks.soak import World

# Budgets, of the sample set. After the first night there were 98 MB and 7 MB; a night of seven runs with a new version
# took 17 MB, until `tanuki gc` comes, and 1.3 MB, until Prefect's vacuum comes after 90 days.
DISK_FIRST_BYTES, DISK_NIGHT_BYTES = 150_000_000, 20_000_000
DATABASE_FIRST_BYTES, DATABASE_NIGHT_BYTES = 10_000_000, 2_000_000


@dataclass(frozen=True)
class Check:
    """One thing that must hold.

    Args:
        name: What.
        holds: Whether it does.
        text: What was looked at, or the first that is wrong.
    """

    name: str
    holds: bool
    text: str


def checked(world: "World", *, nights: int) -> list[Check]:
    """All of them; ``nights`` there should have been."""
    looks: dict[str, Callable[[World], tuple[list[str], str]]] = {
        "every bad image is kept out, with its reason": bad_images,
        "every promotion has a decision that justifies it": promotions,
        "every commit that was published names only bytes that the remote has": published_bytes,
        "the champion in git is the registry's, and a fresh clone gets it": published_champion,
        "nothing is half done": half_done,
        "no image was lost": lost_images,
        "the champion answered every morning, verified": served,
        "no client was ever turned away": clients,
        "drift was told of when it was there": drift,
        "the disk holds no more than its budget": disk,
        "Prefect's database holds no more than its budget": database,
    }
    lived = len(world.nights)
    checks = [Check("the month was lived to its end in time", lived == nights, f"{lived} of {nights} nights")]
    for name, look in looks.items():
        wrong, text = look(world)
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        checks.append(Check(name, not wrong, wrong[0] + more if wrong else text))
    return checks


def bad_images(world: "World") -> tuple[list[str], str]:
    """Refused ones still lie in the inbox, and a run's log says why; others are quarantined. None was trained on."""
    with world.layout.quarantine.open(encoding="utf-8", newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    trained = set(pq.read_table(world.layout.accepted).column("path").to_pylist())
    logged = _log_of(world, "ingest")
    wrong = [text for bad in world.bad if (text := _not_kept_out(world.layout, bad, reasons, trained, logged))]
    unexpected = set(reasons) - {bad.path for bad in world.bad}
    wrong += [f"{path} is quarantined and was a good image: {reasons[path]}" for path in sorted(unexpected)]
    where = Counter(bad.where for bad in world.bad)
    return wrong, f"{len(world.bad)} bad images: " + ", ".join(f"{number} {name}" for name, number in where.items())


def _not_kept_out(layout: Layout, bad: Bad, reasons: dict[str, str], trained: set[str], logged: str) -> str | None:
    if bad.path in trained:
        return f"{bad.path} was accepted"
    if bad.where != AT_THE_DOOR:
        said = reasons.get(bad.path, "no reason")
        return None if re.search(bad.reason, said) else f"{bad.path}: {said}; expected: {bad.reason}"
    if not (layout.inbox / bad.path).is_file():
        return f"{bad.path} is gone from the inbox"
    line = re.search(rf"{re.escape(bad.path)}.*", logged)
    return None if line and re.search(bad.reason, line[0]) else f"{bad.path}: the log of ingest does not say why"


def _log_of(world: "World", deployment: str) -> str:
    """All lines of the logs of a deployment's runs."""
    lines: list[str] = []
    for run in world.box.runs(deployment):
        found = world.box.api("/logs/filter", {"logs": {"flow_run_id": {"any_": [run["id"]]}}, "limit": 200})
        lines += [each["message"] for each in found]
    return "\n".join(lines)


def promotions(world: "World") -> tuple[list[str], str]:
    """By the log: each new champion was put before the gate against the last one, and the numbers say what it said."""
    before: Event | None = None
    wrong, moves = [], [event for event in world.registry.events() if event.kind in MOVES]
    for event in moves:
        decision: Any = event.decision or {}
        numbers = decision.get("numbers", {})
        same = decision.get("compared_with") == (None if before is None else before.champion)
        is_first = before is None and decision.get("outcome") == "first"
        is_better = (
            decision.get("outcome") == "promote"
            and numbers["difference"] >= 0
            and numbers["lower_bound"] > -numbers["margin"]
            and numbers["wins"] > 0
        )
        if event.kind != "promoted" or not same or not (is_first or is_better):
            wrong.append(f"version {event.version}: {event.kind}, {decision or 'no decision'}")
        before = event
    refused = sum(event.kind in ("refused", "undecided") for event in world.registry.events())
    return wrong, f"{len(moves)} promotions, {refused} refusals"


def published_bytes(world: "World") -> tuple[list[str], str]:
    """Every hash in data/raw.dvc and dvc.lock of every commit of the upstream, its folders' files included."""
    seen: dict[str, bool] = {}
    wrong, commits = [], _commits(world)
    for commit in commits:
        lost = [md5 for md5 in _named(world, commit) if not _is_whole(world.remote, md5, seen)]
        wrong += [f"commit {commit[:8]} names {md5}, which the remote does not have whole" for md5 in lost]
    return wrong, f"{len(commits)} commits, {len(seen):,} files in the remote, each read and hashed"


def _commits(world: "World") -> list[str]:
    """Of the month, in the upstream."""
    first = git(world.layout, "rev-list", "--max-count=1", "--grep=A month begins", "HEAD")
    return git(world.layout, "--git-dir", str(world.upstream), "rev-list", f"{first}..main").split()


def _named(world: "World", commit: str) -> Iterator[str]:
    """Hashes of what DVC keeps."""
    uncached = {name for stage in read_stages(world.layout.pipeline) for name in stage.uncached}
    for name in ("data/raw.dvc", "dvc.lock"):
        if not git(world.layout, "ls-tree", commit, "--", name):
            continue
        told = YAML(typ="safe", pure=True).load(git(world.layout, "show", f"{commit}:{name}"))
        outs = told.get("outs", []) + [out for stage in told.get("stages", {}).values() for out in stage["outs"]]
        yield from (out["md5"] for out in outs if out["path"] not in uncached)


def _is_whole(remote: Path, md5: str, seen: dict[str, bool]) -> bool:
    """Whether the remote's file has the bytes that its name says, and a folder's listing names only such."""
    if md5 not in seen:
        file = remote / "files" / "md5" / md5[:2] / md5[2:]
        data = file.read_bytes() if file.is_file() else b""
        seen[md5] = file.is_file() and hashlib.md5(data).hexdigest() == md5.removesuffix(".dir")
        if seen[md5] and md5.endswith(".dir"):
            seen[md5] = all(_is_whole(remote, each["md5"], seen) for each in json.loads(data))
    return seen[md5]


def published_champion(world: "World") -> tuple[list[str], str]:
    """What somebody elsewhere gets who asks git for what is in production."""
    champion = world.registry.require_champion()
    clone = Layout(world.folder / "elsewhere")
    git(world.layout, "clone", "--quiet", str(world.upstream), str(clone.root))
    tags = git(clone, "tag", "--list", "tanuki#prod#*", "--sort=-version:refname").split()
    moves = sum(event.kind in MOVES for event in world.registry.events())
    if len(tags) != moves:
        return [f"{len(tags)} tags of {moves} promotions"], ""
    git(clone, "checkout", "--quiet", tags[0])
    from benchmarks.soak import command

    command(clone.root, "-m", "dvc", "pull", "--quiet", str(clone.bundle_dir.relative_to(clone.root)))
    digest = read_bundle(clone.bundle_dir).digest
    shutil.rmtree(clone.root)
    if digest != champion.digest:
        return [f"{tags[0]} gives {digest[:12]}, the champion, version {champion.id}, is {champion.digest[:12]}"], ""
    return [], f"{tags[0]} gives version {champion.id}, {digest[:12]}"


def half_done(world: "World") -> tuple[list[str], str]:
    """Nobody works any more, so nothing may look as if somebody did."""
    layout = world.layout
    wrong = []
    for deployment in ("ingest", "drift", "retrain"):
        wrong += [
            f"{run['name']} is {run['state']['name']}"
            for run in world.box.runs(deployment)
            if run["state"]["type"] not in FINAL
        ]
    strange = [each.name for each in (layout.registry_dir / "versions").iterdir() if not each.name.isdigit()]
    wrong += [f"the registry has {name} among its versions" for name in strange]
    pointer = json.loads((layout.registry_dir / "champion.json").read_bytes())
    if pointer["version"] != world.registry.events()[-1].champion:
        wrong.append("pointer and log of the registry name two champions")
    locks = [layout.lock, *layout.clones_dir.glob("*.lock")]
    wrong += [f"{lock} is held" for lock in locks if is_held(lock)]
    wrong += [f"{each} lies there" for each in layout.root.rglob("*.tmp") if ".git" not in each.parts]
    wrong += [f"{each} lies there" for each in layout.raw.rglob(".tanuki-add-*")]
    if stale := json.loads(world.tanuki("status", "--json"))["would_run"]:
        wrong.append(f"{', '.join(stale)} would run again")
    unpushed = git(layout, "rev-list", "@{upstream}..HEAD").split()
    wrong += [f"commit {commit[:8]} was not pushed" for commit in unpushed]
    return wrong, "runs, registry, clones, locks, stages and git are at rest"


def lost_images(world: "World") -> tuple[list[str], str]:
    """Every good image that ever lay in the inbox is in data/raw."""
    expected = world.pictures.num_given
    found = sum(1 for each in world.layout.raw.rglob("digit-*.png"))
    waiting = sum(1 for each in world.layout.inbox.rglob("digit-*.png"))
    wrong = (
        [] if (found, waiting) == (expected, 0) else [f"of {expected} images {found} are in data/raw, {waiting} wait"]
    )
    return wrong, f"{found:,} images, none left waiting"


def served(world: "World") -> tuple[list[str], str]:
    wrong = [f"not after night {night.number}" for night in world.nights if not night.is_served]
    return wrong, f"{len(world.nights)} mornings, {len({night.champion for night in world.nights})} champions"


def clients(world: "World") -> tuple[list[str], str]:
    return world.client.failures, f"{world.client.asked:,} requests, one after another, day and night"


def drift(world: "World") -> tuple[list[str], str]:
    """On the drifted night; a look without drift may cry wolf, at the level of params.yaml."""
    drifted = [night for night in world.nights if "drifted" in night.events]
    wrong = [f"night {night.number}: {night.drift}" for night in drifted if not night.drift.startswith("Drift")]
    alarms = [night.number for night in world.nights if night.drift.startswith("Drift")]
    return wrong, f"told of on night(s) {', '.join(map(str, alarms)) or 'none'}; it was there from night(s) " + (
        ", ".join(str(night.number) for night in drifted) or "none"
    )


def disk(world: "World") -> tuple[list[str], str]:
    return _within(
        max(night.disk_bytes for night in world.nights), DISK_FIRST_BYTES + len(world.nights) * DISK_NIGHT_BYTES
    )


def database(world: "World") -> tuple[list[str], str]:
    budget = DATABASE_FIRST_BYTES + len(world.nights) * DATABASE_NIGHT_BYTES
    return _within(world.nights[-1].database_bytes, budget)


def _within(used: int, budget: int) -> tuple[list[str], str]:
    text = f"{used / 1e6:,.1f} MB of {budget / 1e6:,.0f} MB"
    return [text] if used > budget else [], text
