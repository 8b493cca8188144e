"""The registry: immutable versions, one champion, a log that tells all, and no kill or edit that goes unnoticed."""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deploy.errors import BundleError, RegistryError
from deploy.event_log import Event, append_event, read_events
from deploy.registry import Registry
from tests.deploy.tiny_bundle import write_colour_bundle

START = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """One minute passes between two looks at it."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return [write_colour_bundle(folder / str(number), sharpness=8.0 + number).directory for number in range(4)]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry", clock=Clock())


@pytest.fixture
def filled(registry: Registry, bundles: list[Path]) -> Registry:
    """Versions 1 to 3, each promoted in turn."""
    for number, bundle in enumerate(bundles[:3], start=1):
        registry.register(bundle, {"git": f"commit {number}"})
        registry.promote(number, reason=f"better {number}", expected=number - 1 or None)
    return registry


def champion_of(registry: Registry) -> int | None:
    champion = registry.champion()
    pointer = registry.root / "champion.json"
    if champion is not None:
        assert json.loads(pointer.read_text())["version"] == champion.id
        assert json.loads(pointer.read_text())["digest"] == champion.digest
    return champion.id if champion else None


def test_an_empty_registry_has_nothing_and_creates_nothing(registry: Registry) -> None:
    assert registry.champion() is None
    assert registry.versions() == []
    assert registry.events() == []
    assert registry.previous_champion() is None
    assert not registry.root.exists()
    with pytest.raises(RegistryError, match="no version 1; it has none"):
        registry.version(1)


def test_a_registered_bundle_is_copied_whole_and_not_yet_champion(registry: Registry, bundles: list[Path]) -> None:
    card = bundles[0].parent / "card.md"
    card.write_text("# A card")
    version = registry.register(bundles[0], {"git": "abc", "params": {"seed": 0}}, card=card)
    assert version.id == 1
    assert registry.champion() is None
    assert registry.bundle(1).digest == version.digest
    assert not any(path.stat().st_mode & 0o222 for path in version.directory.rglob("*") if path.is_file())
    lineage = registry.lineage(1)
    assert lineage["lineage"] == {"git": "abc", "params": {"seed": 0}}
    assert Path(lineage["card"]).read_text() == "# A card"
    assert [event["kind"] for event in lineage["events"]] == ["registered"]


def test_the_same_bundle_is_registered_once(registry: Registry, bundles: list[Path], tmp_path: Path) -> None:
    first = registry.register(bundles[0], {"git": "abc"})
    shutil.copytree(bundles[0], tmp_path / "elsewhere")
    assert registry.register(tmp_path / "elsewhere", {"git": "def"}) == first
    assert len(registry.events()) == 1
    assert registry.register(bundles[1], {}).id == 2


def test_a_broken_bundle_never_enters(registry: Registry, bundles: list[Path], tmp_path: Path) -> None:
    shutil.copytree(bundles[0], tmp_path / "broken")
    (tmp_path / "broken" / "back.onnx").write_bytes(b"")
    with pytest.raises(BundleError, match=r"back\.onnx was changed"):
        registry.register(tmp_path / "broken", {})
    assert registry.versions() == []
    assert list((registry.root / "versions").iterdir()) == []


def test_promotion_moves_the_pointer_and_is_logged(filled: Registry) -> None:
    assert champion_of(filled) == 3
    kinds = [(event.kind, event.version, event.champion) for event in filled.events()]
    assert kinds == [
        ("registered", 1, None),
        ("promoted", 1, 1),
        ("registered", 2, 1),
        ("promoted", 2, 2),
        ("registered", 3, 2),
        ("promoted", 3, 3),
    ]
    assert [event.reason for event in filled.events() if event.kind == "promoted"] == [f"better {n}" for n in (1, 2, 3)]


def test_promoting_the_champion_again_changes_nothing(filled: Registry) -> None:
    before = filled.events()
    assert filled.promote(3, reason="again", expected=1).id == 3
    assert filled.events() == before


def test_of_two_promotions_at_once_the_second_fails(registry: Registry, bundles: list[Path]) -> None:
    for bundle in bundles[:3]:
        registry.register(bundle, {})
    registry.promote(1, reason="first", expected=None)
    outcomes: list[object] = []

    def promote(id_: int) -> None:
        try:
            outcomes.append(Registry(registry.root).promote(id_, reason="better than 1", expected=1).id)
        except RegistryError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=promote, args=(id_,)) for id_ in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (won,) = [outcome for outcome in outcomes if isinstance(outcome, int)]
    (lost,) = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert champion_of(registry) == won
    assert f"the champion is version {won} by now, not 1" in lost


def test_a_forced_promotion_is_told_apart(filled: Registry) -> None:
    filled.promote(1, reason="the customer insists", expected=3, forced=True)
    assert filled.events()[-1].kind == "forced"
    assert champion_of(filled) == 1


def test_refusals_and_undecided_verdicts_are_kept_with_their_decision(filled: Registry, bundles: list[Path]) -> None:
    filled.register(bundles[3], {})
    filled.refuse(4, "worse", decision={"test_digest": "t1", "numbers": {"difference": -0.02}})
    filled.refuse(4, "too close to call", undecided=True, decision={"test_digest": "t1"})
    assert [event.kind for event in filled.events()[-2:]] == ["refused", "undecided"]
    assert filled.events()[-2].decision == {"test_digest": "t1", "numbers": {"difference": -0.02}}
    assert champion_of(filled) == 3
    assert filled.gate_uses("t1") == 2
    assert filled.gate_uses("t2") == 0
    with pytest.raises(RegistryError, match="no version 9; it has 1, 2, 3, 4"):
        filled.refuse(9, "unknown")


def test_rolling_back_goes_back_one_champion_at_a_time(filled: Registry) -> None:
    assert filled.previous_champion() == 2
    assert filled.rollback("bad in the field").id == 2
    assert champion_of(filled) == 2
    assert filled.rollback("also bad").id == 1
    with pytest.raises(RegistryError, match="version 1 is the first champion"):
        filled.rollback("bad as well")
    filled.promote(3, reason="mended", expected=1)
    assert filled.rollback("no").id == 1
    assert [event.kind for event in filled.events()].count("rolled_back") == 3


def test_nothing_to_roll_back_to_is_said(registry: Registry) -> None:
    with pytest.raises(RegistryError, match="there is no champion"):
        registry.rollback("why not")


def test_a_damaged_version_is_never_put_into_production(filled: Registry) -> None:
    damaged = filled.root / "versions" / "2" / "back.onnx"
    damaged.chmod(0o644)
    damaged.write_bytes(b"rotten")
    with pytest.raises(RegistryError, match=r"version 2 cannot go into production.*back\.onnx was changed"):
        filled.rollback("bad")
    with pytest.raises(RegistryError, match="or promote another version"):
        filled.promote(2, reason="please", expected=3)
    with pytest.raises(RegistryError, match="version 2 is damaged"):
        filled.bundle(2)
    assert champion_of(filled) == 3


def test_it_tells_who_was_live_when(filled: Registry) -> None:
    times = [datetime.fromisoformat(event.time) for event in filled.events() if event.kind == "promoted"]
    assert live_at(filled, START) is None
    assert [live_at(filled, time) for time in times] == [1, 2, 3]
    assert live_at(filled, times[1] - timedelta(seconds=1)) == 1
    assert live_at(filled, times[2] + timedelta(days=900)) == 3
    move = filled.live_at(times[1])
    assert move is not None
    assert (move.kind, move.reason) == ("promoted", "better 2")


def live_at(registry: Registry, when: datetime) -> int | None:
    move = registry.live_at(when)
    return move.version if move else None


def test_a_clock_that_goes_back_is_told_and_the_order_of_the_log_holds(
    filled: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """It ran a year ahead until it was put right: what happened since is believed, now and from then on."""
    ahead, right = START + timedelta(days=365), START + timedelta(days=1)
    Registry(filled.root, clock=lambda: ahead).rollback("bad")
    assert filled.clock_went_back() == []
    now = Registry(filled.root, clock=lambda: right)
    now.rollback("also bad")
    assert "the clock went back" in caplog.text
    assert champion_of(now) == 1
    assert live_at(now, right + timedelta(hours=1)) == 1
    assert live_at(now, START + timedelta(hours=1)) == 3
    ((one, other),) = now.clock_went_back()
    assert (one.reason, other.reason) == ("bad", "also bad")


# What is removed.


def test_what_was_ever_live_and_the_last_ones_stay(registry: Registry, bundles: list[Path]) -> None:
    for number, bundle in enumerate(bundles, start=1):
        registry.register(bundle, {"git": f"commit {number}"})
        registry.refuse(number, "worse")
    registry.promote(1, reason="first", expected=None)
    registry.promote(3, reason="better", expected=1)
    assert registry.sweepable(keep_last=3) == []
    assert registry.sweepable(keep_last=1) == registry.sweep(keep_last=1) == [2]
    assert [version.id for version in registry.versions()] == [1, 3, 4]
    assert [(event.kind, event.champion) for event in registry.events() if event.version == 2] == [
        ("registered", None),
        ("refused", None),
        ("removed", 3),
    ]
    with pytest.raises(RegistryError, match="no version 2; it has 1, 3, 4"):
        registry.promote(2, reason="no", expected=3)
    assert registry.rollback("bad").id == 1
    assert registry.sweep(keep_last=0) == [4]
    assert registry.register(bundles[1], {}).id == 5  # a number is never given twice
    assert registry.champion() == registry.version(1)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(promoted=st.lists(st.integers(1, 4), max_size=4), keep_last=st.integers(0, 5))
def test_sweeping_never_takes_what_a_rollback_may_need(
    bundles: list[Path], tmp_path_factory: pytest.TempPathFactory, promoted: list[int], keep_last: int
) -> None:
    registry = Registry(tmp_path_factory.mktemp("sweep") / "registry", clock=Clock())
    for bundle in bundles:
        registry.register(bundle, {})
    for id_ in promoted:
        registry.promote(id_, reason="better", expected=registry.champion_id())
    removed = registry.sweep(keep_last=keep_last)
    assert set(removed) == {1, 2, 3, 4} - set(promoted) - set(range(5 - keep_last, 5))
    while (previous := registry.previous_champion()) is not None:
        assert registry.rollback("bad").id == previous


# What becomes of it elsewhere: gone, damaged, read-only, full.


@pytest.mark.parametrize("damage", ["gone", "lineage"])
def test_a_champion_that_is_gone_is_told_and_can_be_replaced(
    filled: Registry, bundles: list[Path], damage: str
) -> None:
    champion = filled.root / "versions" / "3"
    if damage == "gone":
        shutil.rmtree(champion)
    else:
        (champion / "lineage.json").chmod(0o644)
        (champion / "lineage.json").write_text("{")
    told = "version 3 is the champion, but .* is gone" if damage == "gone" else "is no JSON"
    with pytest.raises(RegistryError, match=rf"{told}.*(tanuki rollback|promote another)"):
        filled.champion()
    assert filled.champion_id() == 3
    assert filled.register(bundles[3], {}).id == 4
    filled.promote(4, reason="the champion was lost", expected=3, forced=True)
    assert champion_of(filled) == 4
    filled.promote(1, reason="back", expected=4)
    assert champion_of(filled) == 1


def test_a_lost_champion_can_be_rolled_back_from(filled: Registry) -> None:
    shutil.rmtree(filled.root / "versions" / "3")
    assert filled.rollback("lost").id == 2
    assert champion_of(filled) == 2


AS_NOBODY = """
import os, resource, sys
from pathlib import Path
from deploy.errors import RegistryError
from deploy.registry import Registry
registry, how = Registry(Path(sys.argv[1])), sys.argv[2]
assert registry.bundle(2).labels  # what it needs is imported by now
if how == "read-only" and os.geteuid() == 0:
    os.setuid(65534)  # root may write anywhere
if how == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
assert registry.champion().id == 3
for change in (lambda: registry.rollback("bad"), lambda: registry.register(Path(sys.argv[3]), {})):
    try:
        change()
    except RegistryError as error:
        print(error)
"""


@pytest.mark.parametrize(("how", "told"), [("read-only", "Permission denied"), ("full", "File too large")])
def test_a_registry_that_cannot_be_written_still_reads_and_says_why(
    filled: Registry, bundles: list[Path], repository: Path, how: str, told: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        root, bundle = Path(folder) / "registry", Path(folder) / "bundle"
        shutil.copytree(filled.root, root)
        shutil.copytree(bundles[3], bundle)
        before = (root / "events.jsonl").read_bytes()
        if how == "read-only":
            for path in (root, *root.rglob("*")):
                path.chmod(path.stat().st_mode & ~0o222)
        command = [sys.executable, "-c", AS_NOBODY, root, how, bundle]
        run = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        for line in run.stdout.splitlines():
            assert f"{root} cannot be changed: " in line
            assert told in line
        assert len(run.stdout.splitlines()) == 2
        assert (root / "events.jsonl").read_bytes() == before
        for path in (root, *root.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
        again = Registry(root)
        assert [version.id for version in again.versions()] == [1, 2, 3]
        assert again.rollback("bad").id == 2
        assert again.register(bundle, {}).id == 4


def test_an_unfinished_last_line_is_passed_over_and_then_cut_off(filled: Registry) -> None:
    before = filled.events()
    log = filled.root / "events.jsonl"
    with log.open("ab") as file:
        file.write(b'{"sequence": 7, "kind": "promo')
    assert filled.events() == before
    assert champion_of(filled) == 3
    filled.refuse(1, "worse")
    assert [event.sequence for event in filled.events()] == list(range(1, 8))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"sequence": 3', '"sequence": 4'),
        ('"kind": "promoted"', '"kind": "celebrated"'),
        ('+00:00"', '"'),
        ('"version": 2', '"version": "two"'),
        ('"champion": 2, "decision": null, "files": null, "kind": "promoted"', '"champion": 1, "kind": "promoted"'),
        ("{", "["),
    ],
)
def test_an_edited_log_is_refused_with_its_line(filled: Registry, old: str, new: str) -> None:
    log = filled.root / "events.jsonl"
    log.write_text(log.read_text().replace(old, new))
    with pytest.raises(RegistryError, match=r"events\.jsonl, line \d is no event"):
        filled.champion()


def test_a_log_that_lost_its_end_is_noticed(filled: Registry) -> None:
    log = filled.root / "events.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(RegistryError, match="the log lost its end"):
        filled.champion()
    with pytest.raises(RegistryError, match="the log lost its end"):
        filled.rollback("bad")
    (filled.root / "champion.json").unlink()
    filled.repair()
    assert champion_of(filled) == 2


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 1}', '{"version": 1, "sequence": 6}', '{"version": 3, "sequence": 0}']
)
def test_an_edited_pointer_is_refused_and_mended_from_the_log(filled: Registry, content: str) -> None:
    pointer = filled.root / "champion.json"
    pointer.write_text(content)
    with pytest.raises(RegistryError, match="Delete it"):
        filled.champion()
    with pytest.raises(RegistryError, match="Delete it"):
        filled.rollback("bad")
    pointer.unlink()
    assert filled.champion() == filled.version(3)
    filled.repair()
    assert champion_of(filled) == 3


def test_a_pointer_behind_the_log_is_brought_up(filled: Registry) -> None:
    """As a kill between the two steps of a promotion leaves it."""
    pointer = filled.root / "champion.json"
    old = pointer.read_bytes()
    filled.rollback("bad")
    pointer.write_bytes(old)
    assert filled.champion() == filled.version(2)
    filled.repair()
    assert champion_of(filled) == 2


def test_an_edited_lineage_is_noticed(filled: Registry) -> None:
    path = filled.root / "versions" / "2" / "lineage.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("commit 2", "commit 9"))
    with pytest.raises(RegistryError, match=r"lineage\.json is not the file that was registered"):
        filled.lineage(2)
    path.write_text("{")
    with pytest.raises(RegistryError, match="is no JSON"):
        filled.versions()


def test_ids_are_never_used_twice(filled: Registry, bundles: list[Path]) -> None:
    filled.rollback("bad")
    shutil.rmtree(filled.root / "versions" / "3")
    assert filled.register(bundles[3], {}).id == 4


def test_a_full_disk_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "events.jsonl"
    event = Event(1, START.isoformat(), "registered", 1, None, "ein Grund mit Umlaut: ä")
    append_event(log, event)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space"):
            append_event(log, Event(2, START.isoformat(), "promoted", 1, 1, "better"))
    assert read_events(log) == [event]


def test_a_second_writer_waits_and_then_says_so(filled: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    monkeypatch.setattr("deploy.registry.LOCK_TIMEOUT_S", 0.2)
    with (filled.root / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(RegistryError, match="another process has been changing"):
            filled.rollback("bad")
        assert champion_of(filled) == 3


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(["promote 1", "promote 2", "promote 3", "rollback", "refuse"]), max_size=8))
def test_champion_history_and_rollback_agree_with_a_plain_stack(
    bundles: list[Path], tmp_path_factory: pytest.TempPathFactory, steps: list[str]
) -> None:
    registry = Registry(tmp_path_factory.mktemp("stack") / "registry", clock=Clock())
    for bundle in bundles[:3]:
        registry.register(bundle, {})
    stack: list[int] = []
    for step in steps:
        current = stack[-1] if stack else None
        if step == "refuse":
            registry.refuse(1, "worse")
        elif step == "rollback":
            if len(stack) < 2:
                continue
            stack.pop()
            registry.rollback("bad")
        elif (id_ := int(step[-1])) != current:
            stack.append(id_)
            registry.promote(id_, reason="better", expected=current)
        assert champion_of(registry) == (stack[-1] if stack else None)
        assert registry.previous_champion() == (stack[-2] if len(stack) > 1 else None)


@pytest.mark.parametrize("stride", [15, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_step_leaves_it_readable_and_the_change_can_be_made_again(
    tmp_path: Path, repository: Path, stride: int
) -> None:
    command = [sys.executable, "-m", "tests.deploy.kill_everywhere", "registry", str(tmp_path), str(stride)]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) > 40 // stride


def test_the_clock_is_utc(registry: Registry, bundles: list[Path]) -> None:
    real = Registry(registry.root)
    real.register(bundles[0], {})
    assert real.events()[0].time.endswith("+00:00")
