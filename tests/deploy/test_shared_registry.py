"""A registry behind a URL, on S3's protocol: no promotion crosses another, and every machine sees the same."""

import json
import multiprocessing
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from deploy.errors import RegistryError
from deploy.registry import Registry, open_registry, utc_now
from deploy.shared_registry import SharedRegistry
from tests.deploy.killed_writer import CHANGES, change_until_killed
from tests.deploy.test_registry import Clock
from tests.deploy.tiny_bundle import write_colour_bundle
from tests.object_stores import BUCKET, kill_after, s3_on_loopback


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("bundles")
    return [write_colour_bundle(folder / str(number), sharpness=8.0 + number).directory for number in range(4)]


@pytest.fixture(scope="module")
def s3() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, s3_on_loopback() as environment:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


only_s3 = pytest.mark.parametrize("store", ["s3"], indirect=True)
also_s3 = pytest.mark.parametrize("store", ["memory", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture
def store(request: pytest.FixtureRequest) -> str:
    """Where the registry lies: in fsspec's store in memory, where a request costs nothing, or in an S3 on loopback."""
    return getattr(request, "param", "memory")


@pytest.fixture
def url(store: str, request: pytest.FixtureRequest) -> str:
    """A place there that is this test's own."""
    if store == "s3":
        request.getfixturevalue("s3")
        return f"s3://{BUCKET}/{uuid.uuid4().hex}"
    return f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def machine(url: str, tmp_path: Path) -> Callable[..., SharedRegistry]:
    """The same registry seen from a machine of that name."""
    return lambda name="a", **options: SharedRegistry(url, tmp_path / name, **options)


@pytest.fixture
def filled(machine: Callable[..., SharedRegistry], bundles: list[Path]) -> SharedRegistry:
    """Versions 1 and 2, of which 1 is champion."""
    registry = machine(clock=Clock())
    for number, bundle in enumerate(bundles[:2], start=1):
        registry.register(bundle, {"git": f"commit {number}"})
    registry.promote(1, reason="first", expected=None)
    return registry


def objects(registry: SharedRegistry) -> dict[str, bytes]:
    """All that lies in the store."""
    fs, root = registry._store._fs, registry._store._root
    fs.invalidate_cache()
    return {path[len(root) + 1 :]: fs.cat_file(path) for path in fs.find(root)}


def put(registry: SharedRegistry, name: str, data: bytes) -> None:
    """Somebody edits the store by hand."""
    registry._store._fs.pipe_file(f"{registry._store._root}/{name}", data)


def pointed_to(registry: SharedRegistry) -> int:
    return int(json.loads(objects(registry)["champion.json"])["version"])


@only_s3
def test_what_one_machine_does_every_other_sees(filled, machine, bundles: list[Path], tmp_path: Path) -> None:
    other = machine("b")
    assert other.champion() is not None
    assert other.champion().digest == filled.champion().digest
    assert not (tmp_path / "b" / "versions" / "1" / "model.onnx").exists()  # until somebody asks
    assert other.bundle(1).digest == other.champion().digest
    assert other.lineage(2)["lineage"] == {"git": "commit 2"}
    other.promote(2, reason="better", expected=1)
    assert filled.stamp() != other.stamp()
    assert (filled.champion_id(), pointed_to(filled)) == (2, 2)
    assert filled.rollback("bad").id == 1
    assert machine("c").events() == filled.events()
    assert machine("c").previous_champion() is None
    assert filled.register(bundles[0], {}).id == 1
    assert machine("b").register(bundles[1], {}).id == 2


def test_a_promotion_that_rests_on_a_champion_of_before_is_refused(filled, machine, bundles: list[Path]) -> None:
    other = machine("b")
    other.promote(2, reason="better", expected=1)
    with pytest.raises(RegistryError, match="the champion is version 2 by now, not 1"):
        filled.promote(filled.register(bundles[2], {}).id, reason="better too", expected=1)
    assert filled.champion_id() == pointed_to(filled) == 2


@also_s3
@pytest.mark.parametrize("change", ["promote", "rollback", "sweep"])
def test_of_two_changes_that_cross_the_second_is_refused(filled, machine, bundles: list[Path], change: str) -> None:
    """The other machine acts after this one has looked, and before it writes: that is when the clock is asked."""
    other = machine("b")
    other.promote(other.register(bundles[2], {}).id, reason="meanwhile", expected=1)
    meanwhile = {
        "promote": lambda: other.rollback("meanwhile"),
        "rollback": lambda: other.promote(2, reason="meanwhile", expected=3),
        "sweep": lambda: other.promote(2, reason="meanwhile", expected=3),
    }[change]
    late = machine("late", clock=crossing(meanwhile))
    changes: dict[str, Callable[[], Any]] = {
        "promote": lambda: late.promote(2, reason="late", expected=3),
        "rollback": lambda: late.rollback("late"),
        "sweep": lambda: late.sweep(keep_last=0),
    }
    with pytest.raises(RegistryError, match=r"somebody else changed .*://.* meanwhile"):
        changes[change]()
    assert all(event.reason != "late" and event.kind != "removed" for event in machine("c").events())
    assert late.champion_id() == other.champion_id() == pointed_to(other)
    assert other.bundle(2)


def crossing(meanwhile: Callable[[], object]) -> Callable[[], datetime]:
    """A clock during whose first look somebody else acts."""
    acts = [meanwhile]

    def clock() -> datetime:
        if acts:
            acts.pop()()
        return utc_now()

    return clock


def test_what_does_not_rest_on_the_champion_is_written_after_what_crossed_it(filled, machine) -> None:
    other = machine("b")
    late = machine("late", clock=crossing(lambda: other.promote(2, reason="meanwhile", expected=1)))
    late.refuse(2, "worse than 1")
    assert [(event.sequence, event.kind, event.champion) for event in late.events()[-2:]] == [
        (4, "promoted", 2),
        (5, "refused", 2),
    ]


@also_s3
def test_two_registrations_at_once_get_numbers_of_their_own(filled, machine, bundles: list[Path]) -> None:
    other = machine("b")
    late = machine("late", clock=crossing(lambda: other.register(bundles[2], {"git": "other"})))
    assert late.register(bundles[3], {"git": "late"}).id == 4
    assert other.stamp() is not None
    assert other.version(3).digest != other.version(4).digest
    assert {id_: late.lineage(id_)["lineage"]["git"] for id_ in (3, 4)} == {3: "other", 4: "late"}
    again = machine("again", clock=crossing(lambda: None))
    assert again.register(bundles[3], {}).id == 4


@also_s3
def test_versions_and_events_are_never_written_twice(filled, machine, bundles: list[Path]) -> None:
    before = objects(filled)
    other = machine("b")
    other.promote(2, reason="better", expected=1)
    other.register(bundles[2], {})
    after = objects(filled)
    assert {name for name, data in before.items() if after[name] != data} == {"champion.json"}


class KilledError(BaseException):
    """As SIGKILL would: nothing after it is done."""


class Mortal:
    """A file system whose client dies before its n-th change."""

    def __init__(self, fs: Any, changes: int) -> None:
        self._fs, self._left = fs, changes

    def __getattr__(self, name: str) -> Any:
        if name in ("pipe_file", "rm", "rm_file"):
            self._left -= 1
            if self._left < 0:
                raise KilledError
        return getattr(self._fs, name)


def kill(registry: SharedRegistry, change: Callable[[SharedRegistry], object], after: int) -> bool:
    """Whether the change was killed before it was through."""
    registry._store._fs = Mortal(registry._store._fs, after)
    registry._store._is_proven = True
    try:
        change(registry)
    except KilledError:
        return True
    return False


def registry_to_change(machine: Callable[..., SharedRegistry], bundles: list[Path], change: str) -> SharedRegistry:
    """Versions 1 and 2; version 2 is champion where a rollback is to come, else version 1."""
    (bundles[2].parent / "card.md").write_text("# A card")
    base: SharedRegistry = machine("base", clock=Clock())
    for bundle in bundles[:2]:
        base.register(bundle, {})
    base.promote(1, reason="first", expected=None)
    if change == "rollback":
        base.promote(2, reason="better", expected=1)
    return base


def reset(base: SharedRegistry, start: dict[str, bytes], tmp_path: Path) -> None:
    """The store as it was before, and machines that have never seen it."""
    base._store._fs.rm(base._store._root, recursive=True)
    for name, data in start.items():
        put(base, name, data)
    for copy in ("victim", "fresh"):
        shutil.rmtree(tmp_path / copy, ignore_errors=True)


def look_and_finish(
    base: SharedRegistry, machine: Callable[..., SharedRegistry], change: str, bundle: Path
) -> tuple[int | None, list[str]]:
    """What the killed machine and another one see is whole; the other one makes the change again."""
    for copy in ("fresh", "victim"):
        seen = machine(copy)
        assert seen.bundle(seen.require_champion().id)
        for version in seen.versions():
            seen.lineage(version.id)
    CHANGES[change](machine("fresh"), bundle)
    assert pointed_to(base) == machine("victim").champion_id() == machine("fresh").champion_id()
    assert machine("victim").events() == machine("fresh").events()
    names = [name for name in objects(base) if not name.startswith(".probe-")]  # of the killed one; nobody reads them
    return machine("fresh").champion_id(), sorted(names)


@pytest.mark.parametrize(
    ("change", "stride"),
    [
        ("register", 5),
        *[pytest.param(change, 1, marks=pytest.mark.slow) for change in ("register", "promote", "rollback", "sweep")],
    ],
)
def test_a_kill_before_any_write_leaves_it_whole_and_any_machine_finishes(
    machine, bundles: list[Path], tmp_path: Path, change: str, stride: int
) -> None:
    base = registry_to_change(machine, bundles, change)
    start, finished = objects(base), []
    for after in range(0, 100, stride):
        reset(base, start, tmp_path)
        was_killed = kill(machine("victim"), lambda registry: CHANGES[change](registry, bundles[2]), after)
        finished.append(look_and_finish(base, machine, change, bundles[2]))
        if not was_killed:
            break
    assert len(finished) > 1
    assert all(each == finished[-1] for each in finished)


@pytest.mark.slow
@only_s3
@pytest.mark.parametrize(("change", "stride"), [("register", 5), ("promote", 1), ("sweep", 2)])
def test_a_process_that_is_killed_after_any_write_leaves_it_whole_and_any_machine_finishes(
    machine, bundles: list[Path], tmp_path: Path, url: str, change: str, stride: int
) -> None:
    """`kill -9`, after the S3 did a write and before it says so: every STRIDE-th, once the store is proven."""
    base = registry_to_change(machine, bundles, change)
    start, finished = objects(base), []
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.deploy.killed_writer"])
    for writes in range(3, 100, stride):
        reset(base, start, tmp_path)
        arguments = (change, url, tmp_path / "victim", bundles[2], environment, writes)
        victim = context.Process(target=change_until_killed, args=arguments)
        victim.start()
        victim.join()
        kill_after(0, process=0)
        finished.append(look_and_finish(base, machine, change, bundles[2]))
        if victim.exitcode == 0:
            break
        assert victim.exitcode == -signal.SIGKILL
    assert len(finished) > 2
    assert all(each == finished[-1] for each in finished)


def test_a_store_that_is_away_can_be_read_as_it_was_and_not_changed(
    machine, bundles: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    class Away:
        protocol = ("s3",)

        def __getattr__(self, name: str) -> Any:
            raise ConnectionError("no route to host")

    registry = machine(clock=Clock())
    registry.register(bundles[0], {})
    registry.promote(1, reason="first", expected=None)
    before, registry._store._fs = registry._store._fs, Away()
    stamp = registry.stamp()
    assert registry.require_champion().id == 1
    assert registry.bundle(1)
    assert stamp == registry.stamp()
    (registry.root / "versions" / "1" / "model.onnx").unlink()
    with pytest.raises(RegistryError, match=r"does not answer, and .* lacks 1 files of version 1, model\.onnx"):
        registry.bundle(1)
    assert caplog.text.count("going on with what was last seen there") == 1
    with pytest.raises(RegistryError, match=r"memory://.* cannot be changed: .*no route to host"):
        registry.rollback("bad")
    unseen = machine("unseen")
    unseen._store._fs = Away()
    with pytest.raises(RegistryError, match=r"cannot be read: .*no route to host.*AWS_ENDPOINT_URL"):
        unseen.champion()
    registry._store._fs = unseen._store._fs = before
    assert unseen.require_champion().id == 1
    registry.repair()


def test_damage_of_the_copy_is_mended_and_damage_of_the_store_told(filled, machine, tmp_path: Path) -> None:
    filled.bundle(1)
    for name in ("model.onnx", "bundle.json"):
        here = tmp_path / "a" / "versions" / "1" / name
        here.chmod(0o644)
        here.write_bytes(b"rotten")
        assert filled.bundle(1).digest == filled.version(1).digest
    put(filled, "versions/2/back.onnx", b"rotten")
    put(filled, "versions/1/lineage.json", objects(filled)["versions/1/lineage.json"].replace(b"commit 1", b"commit 9"))
    other = machine("b")
    with pytest.raises(RegistryError, match=r"version 2 is damaged: .*back\.onnx was changed.*Restore memory://"):
        other.bundle(2)
    with pytest.raises(RegistryError, match="version 2 cannot go into production"):
        other.promote(2, reason="please", expected=1)
    with pytest.raises(RegistryError, match=r"lineage\.json is not the file that was registered"):
        other.lineage(1)


def test_a_log_that_was_edited_or_replaced_is_noticed(filled, machine, bundles: list[Path], url: str) -> None:
    fresh = objects(filled)["events/00000003.json"]
    put(filled, "events/00000003.json", fresh.replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(RegistryError, match=r"events/00000003\.json is no event of number 3"):
        machine("b").champion()
    with pytest.raises(RegistryError, match=r"is not the registry that .* is a copy of: event 3"):
        filled.stamp()
    put(filled, "events/00000003.json", fresh)
    put(filled, "champion.json", b'{"version": 2, "sequence": 3}')
    with pytest.raises(RegistryError, match=r"champion\.json says that version 2 is the champion.*Delete it"):
        filled.rollback("bad")
    filled._store._fs.rm_file(f"{filled._store._root}/champion.json")
    filled.repair()
    assert pointed_to(filled) == 1


@pytest.mark.slow
@only_s3
def test_a_slow_writer_never_puts_an_old_champion_over_a_new_one(filled, machine) -> None:
    old = objects(filled)["champion.json"]
    slow = machine("slow")
    slow.champion()
    real_replace = slow._store._replace

    def late(name: str, data: bytes, tag: str | None) -> bool:
        if filled.champion_id() == 1:
            filled.promote(2, reason="meanwhile", expected=1)
        return real_replace(name, data, tag)

    slow._store._replace = late
    slow._store.advance(
        "champion.json", old.replace(b'"sequence": 3', b'"sequence": 3 '), is_newer=lambda there: there == old
    )
    assert pointed_to(filled) == 2


def test_what_is_swept_is_gone_everywhere_and_a_number_never_comes_again(filled, machine, bundles, url: str) -> None:
    other = machine("b")
    other.bundle(2)
    taken = filled.register(bundles[2], {}).id
    put(filled, "versions/9/lineage.json", b'{"registered_at": "2020-01-01T00:00:00+00:00", "digest": "x"}')
    put(filled, "versions/8/lineage.json", json.dumps({"registered_at": Clock()().isoformat()}).encode())
    assert filled.sweep(keep_last=1) == [2]
    assert {name.split("/")[1] for name in objects(filled) if name.startswith("versions/")} == {"1", str(taken), "8"}
    assert other.stamp() is not None
    with pytest.raises(RegistryError, match="has no version 2; it has 1, 3"):
        other.bundle(2)
    assert not (other.root / "versions" / "2").exists()
    assert filled.register(bundles[1], {}).id == 4


def test_a_signature_reaches_other_machines(filled, machine, tmp_path: Path) -> None:
    from deploy.signing import generate_keys, require_signature

    public = generate_keys(tmp_path / "key")
    other = machine("b")
    assert other.bundle(1)
    signed_by = filled.sign(1, tmp_path / "key")
    assert require_signature(other.bundle(1), public) == signed_by
    assert require_signature(filled.bundle(1), public) == signed_by


def test_a_store_that_cannot_refuse_to_overwrite_is_refused(tmp_path: Path, bundles: list[Path]) -> None:
    registry = SharedRegistry("simplecache::memory://overwrites", tmp_path / "copy")
    with pytest.raises(RegistryError, match=r"cannot hold a registry.*two promotions could cross.*Use S3"):
        registry.register(bundles[0], {})


def test_a_url_needs_its_package_and_a_folder_none(tmp_path: Path) -> None:
    assert type(open_registry(tmp_path)) is Registry
    assert open_registry(f"file://{tmp_path}/r").root == tmp_path / "r"
    assert isinstance(open_registry("memory://r", copy=tmp_path), SharedRegistry)
    with pytest.raises(RegistryError, match=r"cannot be used: .*Name a folder, or a URL"):
        open_registry("nonsense://x")


def test_a_bucket_that_is_not_there_is_told(s3: None, tmp_path: Path, bundles: list[Path]) -> None:
    registry = SharedRegistry("s3://no-such-bucket/x", tmp_path / "copy")
    assert registry.versions() == []
    with pytest.raises(RegistryError, match="s3://no-such-bucket/x cannot be changed"):
        registry.register(bundles[0], {})


def test_it_does_what_a_registry_in_a_folder_does(filled, bundles: list[Path], tmp_path: Path) -> None:
    folder = Registry(tmp_path / "folder", clock=Clock())
    for number, bundle in enumerate(bundles[:2], start=1):
        folder.register(bundle, {"git": f"commit {number}"})
    folder.promote(1, reason="first", expected=None)
    for registry in (folder, filled):
        registry.promote(2, reason="better", expected=1)
        registry.rollback("bad")
        registry.note_look(2, "looks better", decision={"test_digest": "t", "compared_with": 1})
        registry.promote(2, reason="again", expected=1, forced=True, decision={"test_digest": "t", "compared_with": 1})
    told = [
        [(each.kind, each.version, each.champion, each.reason) for each in one.events()] for one in (folder, filled)
    ]
    assert told[0] == told[1]
    assert folder.gate_uses("t") == filled.gate_uses("t") == 1
    when = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=1)
    assert folder.live_at(when).version == filled.live_at(when).version == 2
