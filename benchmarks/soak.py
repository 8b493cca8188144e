"""A month of nights on the sample's digits, with all that goes wrong in one, and whether the house still stands.

    python -m benchmarks.soak                  # 30 nights; root only: it mounts a disk of its own, which gets full

Everything is real: a workspace on a file system of its own, `tanuki up` with Prefect's server, worker and a model
server that captures what it is asked, a git upstream and a DVC remote. Each day new digits lie in the inbox and clients
ask the server, which a client does at night as well; each night the deployments `ingest`, `drift` and `retrain` run and
publish; every seventh, `tanuki gc`. On some nights more happens (benchmarks/month.py), a seed says when and what. At
the end, what must hold of all that is left (benchmarks/soak_checks.py). Exit code 1 where something does not.
"""

import argparse
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ruamel.yaml import YAML

from benchmarks import month
from benchmarks.box import FINAL, Box
from benchmarks.month import Bad, Pictures
from deploy.errors import TanukiError
from deploy.registry import Registry
from flows.clones import Snapshot, scratch_copy
from flows.up.parts import runs
from flows.workspace import git
from tasks.layout import Layout

DISK = "3g"
ROOM_BYTES = 300_000  # left on a full disk
LIE_FILES = 2
ASK_EVERY_S = 0.2
CAPTURES_NIGHTS = 7  # `drift.window_days`, of nights that last less than a minute
KILL_WITHIN_S = 25.0
FULL_S = 45.0  # until somebody makes room
GC_NIGHTS = 7
IDENTITY = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Soak"), ("EMAIL", "soak@example.org"))
}


@dataclass
class Night:
    """What a night came to.

    Args:
        number: 1 for the first.
        events: What happened.
        new: Images in the inbox, good ones.
        bad: Bad ones.
        ingest: State and message of that run, or of those.
        drift: The same.
        retrain: State of each retrain of this night.
        champion: After it.
        is_served: Whether the server answers with the champion, verified (`is_served`).
        seconds: It took.
        disk_bytes: Of the workspace's disk.
        database_bytes: Of Prefect's database.
    """

    number: int
    events: frozenset[str]
    new: int = 0
    bad: int = 0
    ingest: list[str] = field(default_factory=list)
    drift: str = ""
    retrain: list[str] = field(default_factory=list)
    champion: int | None = None
    is_served: bool = False
    seconds: float = 0.0
    disk_bytes: int = 0
    database_bytes: int = 0

    def row(self) -> str:
        """A line of the table."""
        cells = (
            self.number,
            ", ".join(sorted(self.events)) or "",
            self.new,
            self.bad,
            "; ".join(each.split(":")[0] for each in self.ingest),
            self.drift.split(":")[0],
            ", ".join(self.retrain),
            self.champion or "none",
            "yes" if self.is_served else "NO",
            f"{self.seconds:.0f}",
            f"{self.disk_bytes / 1e6:.0f}",
            f"{self.database_bytes / 1e6:.1f}",
        )
        return f"| {' | '.join(map(str, cells))} |"


HEADER = "| night | what happened | new | bad | ingest | drift | retrain | champion | served | s | disk MB | runs' MB |"


@dataclass
class World:
    """The box and what is around it.

    Args:
        folder: Holds all of it.
        layout: The workspace, on a disk of its own.
        box: Its `tanuki up`.
        pictures: What comes in and what is asked.
        generator: Of what is left to chance.
        client: Asks the server all along.
    """

    folder: Path
    layout: Layout
    box: Box
    pictures: Pictures
    generator: np.random.Generator
    client: "Client"
    names: dict[str, str] = field(default_factory=dict)
    bad: list[Bad] = field(default_factory=list)
    nights: list[Night] = field(default_factory=list)

    @property
    def upstream(self) -> Path:
        return self.folder / "upstream.git"

    @property
    def remote(self) -> Path:
        return self.folder / "storage"

    @property
    def registry(self) -> Registry:
        return Registry(self.layout.registry_dir)

    def tanuki(self, *arguments: str | Path) -> str:
        """Runs a command as a person would; what it printed."""
        return command(self.layout.root, "-m", "flows.cli", *arguments)


class Client(threading.Thread):
    """Asks the server for one picture again and again, as soon as there is a champion, and counts what went wrong."""

    def __init__(self, box: Box, picture: bytes) -> None:
        super().__init__(name="client", daemon=True)
        self.asked = 0
        self.failures: list[str] = []
        self.is_over = threading.Event()
        self._box, self._picture = box, picture

    def run(self) -> None:
        while not self.is_over.wait(ASK_EVERY_S):
            self.asked += 1
            try:
                self._box.model("/predict", self._picture)
            except (OSError, urllib.error.URLError) as error:
                self.failures.append(f"{time.strftime('%H:%M:%S')} {error}")


def environment() -> dict[str, str]:
    """Of everything that this benchmark starts."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "TANUKI_"))}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    return {**kept, **IDENTITY, "PATH": path, "DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1", "COLUMNS": "200"}


def command(root: Path, *arguments: str | Path) -> str:
    """Runs Python in a workspace; what it printed."""
    words = [sys.executable, *map(str, arguments)]
    run = subprocess.run(words, cwd=root, env=environment(), capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(words)} ended with {run.returncode}:\n{run.stdout}{run.stderr}")
    return run.stdout


@contextmanager
def disk(folder: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def lay_out(folder: Path, root: Path, *, finetune: bool) -> Layout:
    """A clone of this repository as it stands, with an upstream, a remote, and schedules that leave the clock to us."""
    here, layout = Layout(Path.cwd()), Layout(root)
    head = git(here, "rev-parse", "HEAD")
    scratch_copy(here, layout, Snapshot(head, git(here, "stash", "create") or head, None))
    yaml = YAML()
    params = yaml.load(layout.params)
    params["finetune"]["enabled"] = finetune
    yaml.dump(params, layout.params)
    schedules = yaml.load(layout.schedules)
    for deployment in schedules["deployments"]:
        for schedule in deployment["schedules"]:
            schedule["active"] = False
        if "publish" in deployment["parameters"]:
            deployment["parameters"]["publish"] = True
        if "settle_s" in deployment["parameters"]:
            deployment["parameters"]["settle_s"] = 0
    yaml.dump(schedules, layout.schedules)
    for words in (
        ("init", "--quiet", "--bare", "--initial-branch", "main", str(folder / "upstream.git")),
        ("checkout", "--quiet", "-B", "main"),
        ("config", "user.name", "Soak"),
        ("config", "user.email", "soak@example.org"),
        ("remote", "set-url", "origin", str(folder / "upstream.git")),
    ):
        git(layout, *words)
    (folder / "storage").mkdir()
    command(root, "-m", "dvc", "remote", "add", "--default", "storage", folder / "storage")
    git(layout, "add", "--all")
    git(layout, "commit", "--quiet", "--message", "A month begins")
    git(layout, "push", "--quiet", "--set-upstream", "origin", "main")
    return layout


# --- what happens -----------------------------------------------------------------------------------------------------


def day(world: World, night: Night) -> None:
    """Images come, some of them bad; a class may get another name; clients ask."""
    if "relabelled" in night.events:
        relabel(world)
    if "none" not in night.events:
        new = world.pictures.day(world.names)
        night.new = len(new)
        month.write(world.layout.inbox, new)
    if "bad" in night.events:
        bad = world.pictures.bad(night.number, len(world.bad))
        night.bad = len(bad)
        world.bad += bad
        month.write(world.layout.inbox, {each.path: each.data for each in bad})
    if world.registry.champion_id() is not None:
        before = set(world.layout.captures_dir.glob("*.parquet"))
        for picture in world.pictures.asked(drifted="drifted" in night.events):
            world.box.model("/predict", picture)
        if "drifted" in night.events:  # a file is closed after a minute
            world.box.until(lambda: set(world.layout.captures_dir.glob("*.parquet")) - before)


def relabel(world: World) -> None:
    """One class gets another name, of all its images; new ones come under that name."""
    world.names[month.OLD_NAME] = month.NEW_NAME
    rows = [(f"{month.OLD_NAME}/{file.name}", month.NEW_NAME) for file in (world.layout.raw / month.OLD_NAME).iterdir()]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("path", "label"), *rows])
    table = world.folder / "relabel.csv"
    table.write_text(buffer.getvalue())
    world.tanuki("relabel", "--from", table, "--reason", "what the shop calls it now")


def evening(world: World, night: Night) -> None:
    """The inbox is taken in; the remote may lie, and a person then does what the message says."""
    if "lying" in night.events:
        with lying(world.remote) as listings:
            night.ingest.append(told(world.box.run("ingest")))
        for listing in listings:
            listing.unlink(missing_ok=True)
    night.ingest.append(told(world.box.run("ingest")))
    while night.ingest[-1].startswith("Skipped"):  # a retrain was at work in the workspace; by the clock it comes again
        night.ingest.append(told(world.box.run("ingest")))
    night.drift = told(world.box.run("drift"))


def retrain(world: World, night: Night) -> None:
    """The nightly retrain, with what may befall it; and whatever else of retrains was asked for meanwhile."""
    before = {run["id"] for run in world.box.runs("retrain") if run["state"]["type"] in FINAL}
    asked = world.box.ask("retrain")
    if "full" in night.events:
        # Somebody makes room after a while: until then Prefect's own database may not be able to tell of the end.
        with full(world.layout.root):
            soon(lambda: world.box.has_ended("retrain", asked), FULL_S)
    if "killed" in night.events:
        kill(world, float(world.generator.uniform(0, KILL_WITHIN_S)))
    world.box.end_of("retrain", asked)
    if {run["id"] for run in world.box.ended("retrain", "Crashed")} - before:
        # The trigger has a cool-down: after a crash too many the next night goes on.
        soon(
            lambda: any(
                "after a crash" in run["name"] and run["id"] not in before for run in world.box.runs("retrain")
            ),
            120,
        )
    world.box.until(lambda: all(run["state"]["type"] in FINAL for run in world.box.runs("retrain")))
    night.retrain = [run["state"]["name"] for run in world.box.runs("retrain") if run["id"] not in before]


@contextmanager
def full(root: Path) -> Iterator[None]:
    """The disk is full but for a little."""
    usage = shutil.disk_usage(root)
    ballast = root.parent / "ballast"
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, usage.free - ROOM_BYTES)
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def lying(remote: Path) -> Iterator[list[Path]]:
    """The remote loses some of the files that it has just taken; which listings of versions it has taken meanwhile."""
    listings: list[Path] = []
    is_over = threading.Event()
    before = set(remote.rglob("*.dir"))

    def lie() -> None:
        while not is_over.wait(0.02):
            for listing in set(remote.rglob("*.dir")) - before - set(listings):
                listings.append(listing)
                files = [file for file in remote.rglob("*") if file.is_file() and file.suffix != ".dir"]
                for file in sorted(files, key=lambda each: each.stat().st_mtime_ns)[-LIE_FILES:]:
                    file.unlink()

    liar = threading.Thread(target=lie, daemon=True)
    liar.start()
    try:
        yield listings
    finally:
        is_over.set()
        liar.join()


def kill(world: World, after_s: float) -> None:
    """Kills a run and all that it started, so long after its process is there."""
    (engine, *_) = world.box.until(lambda: runs(world.layout))
    time.sleep(after_s)
    with suppress(psutil.NoSuchProcess):
        for process in [*engine.children(recursive=True), engine]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def told(run: Mapping[str, Any]) -> str:
    """A run's state and message."""
    return f"{run['state']['name']}: {run['state']['message']}"


def morning(world: World, night: Night, start: float) -> None:
    """Who answers now, and what it all takes up."""
    if not world.client.is_alive() and world.registry.champion_id() is not None:
        world.box.until(lambda: is_served(world))  # the server looks twice a second
        world.client.start()
    night.champion = world.registry.champion_id()
    with suppress(TanukiError, OSError):
        night.is_served = bool(soon(lambda: is_served(world)))
    if night.number % GC_NIGHTS == 0:
        world.tanuki("gc", "--keep-last", "5", "--no-runs")
    # Nights last less than a minute, so time cannot tell which answers are of the last week.
    for file in sorted(world.layout.captures_dir.glob("*.parquet"))[:-CAPTURES_NIGHTS]:
        file.unlink()
    usage = shutil.disk_usage(world.layout.root)
    night.disk_bytes = usage.used
    night.database_bytes = sum(each.stat().st_size for each in world.layout.prefect_home.glob("prefect.db*"))
    night.seconds = time.monotonic() - start


def soon(condition: Any, timeout_s: float = 10.0) -> Any:
    """What a condition gives as soon as it holds, or at the end."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


def is_served(world: World) -> bool:
    """Whether the server answers with the champion, by its own word and the registry's, and that one is whole."""
    champion = world.registry.require_champion()
    bundle = world.registry.bundle(champion.id)  # checks digests
    shown = world.box.model("/model")
    answered = world.box.model("/predict", world.pictures.asked(drifted=False)[0])
    return (
        {shown["version"], answered["version"]} == {str(champion.id)}
        and shown["digest"] == bundle.digest == champion.digest
        and shown["problem"] is None
    )


# --- the month --------------------------------------------------------------------------------------------------------


@contextmanager
def begun(folder: Path, seed: int, *, finetune: bool) -> Iterator[World]:
    """A world in the evening before the first day."""
    generator = np.random.default_rng(seed)
    pictures = Pictures(generator)
    with disk(folder / "disk") as place:
        layout = lay_out(folder, place / "workspace", finetune=finetune)
        options = ["--capture-dir", str(layout.captures_dir), "--capture-fraction", "1"]
        box = Box(layout.root, environment(), options)
        client = Client(box, pictures.asked(drifted=False)[0])
        world = World(folder, layout, box, pictures, generator, client)
        pictures.first(folder / "first")
        world.tanuki("add", folder / "first")
        try:
            box.start()
            yield world
        finally:
            client.is_over.set()
            box.kill()


def live(world: World, plan: list[frozenset[str]], until: float) -> None:
    """Night after night, none of which begins after a time; each prints its line."""
    print(f"{HEADER}\n|{'---|' * HEADER.count(' | ')}---|", flush=True)
    for number, events in enumerate(plan, start=1):
        night, start = Night(number, events), time.monotonic()
        if start > until:
            return
        world.nights.append(night)
        day(world, night)
        evening(world, night)
        retrain(world, night)
        morning(world, night, start)
        print(night.row(), flush=True)
        for text in (*night.ingest, night.drift):
            if text.startswith(("Failed", "Crashed", "Drift")):
                print(f"    {text}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nights", type=int, default=30)
    parser.add_argument("--events", nargs="*", choices=list(month.EVENTS), default=list(month.EVENTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=30, help="no night begins after so many")
    parser.add_argument("--finetune", action="store_true", help="fine-tune as well, which takes most of a night")
    parser.add_argument("--folder", type=Path, help="where to leave what Prefect and the parts had to say")
    arguments = parser.parse_args()
    plan = month.planned(arguments.nights, arguments.events, np.random.default_rng(arguments.seed))
    from benchmarks.soak_checks import checked

    start = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the disk is unmounted, and all processes end
    with (
        tempfile.TemporaryDirectory(prefix="tanuki-soak-") as folder,
        begun(Path(folder), arguments.seed, finetune=arguments.finetune) as world,
    ):
        try:
            live(world, plan, start + 60 * arguments.minutes)
            checks = checked(world, nights=len(plan))
        finally:
            if arguments.folder:
                shutil.copytree(world.layout.logs_dir, arguments.folder / "logs", dirs_exist_ok=True)
                shutil.copy(world.folder / "disk" / "up.out", arguments.folder)
    minutes = (time.monotonic() - start) / 60
    print(f"\n{len(world.nights)} nights in {minutes:.1f} min; seed {arguments.seed}\n")
    print("| what must hold | holds | |\n|---|---|---|")
    for check in checks:
        print(f"| {check.name} | {'yes' if check.holds else 'NO'} | {check.text} |")
    sys.exit(not all(check.holds for check in checks))


if __name__ == "__main__":
    main()
