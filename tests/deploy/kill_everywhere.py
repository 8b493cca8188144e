"""Kills a change at each of its steps in turn, then lets somebody else look and the change be made again.

Run as a program (``python -m tests.deploy.kill_everywhere WHAT FOLDER STRIDE``): the changes happen in forked children
of a process that has no threads, which costs milliseconds instead of a start of Python each. Every STRIDE-th step is
tried.
"""

import itertools
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from deploy.bundle import read_bundle
from deploy.registry import Registry
from tests.deploy.tiny_bundle import colour_graphs, write_colour_bundle

STEPS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "fcntl.flock")


def main(what: str, folder: Path, stride: int) -> None:
    colour_graphs()
    children = {"bundle": kill_bundle, "registry": kill_registry}[what](folder, stride)
    print(f"{children} children killed")


def kill_bundle(folder: Path, stride: int) -> int:
    in_child(lambda: write_colour_bundle(folder / "new", sharpness=9.0))
    in_child(lambda: write_colour_bundle(folder / "old"))
    either = {read_bundle(folder / name).digest for name in ("old", "new")}

    def prepare() -> Path:
        target = folder / "run" / "bundle"
        shutil.rmtree(target.parent, ignore_errors=True)
        shutil.copytree(folder / "old", target)
        return target

    def check(target: Path) -> None:
        if target.exists():  # not so between the two renames, where DVC has removed a stage's outputs anyway
            assert read_bundle(target).digest in either
        in_child(lambda: write_colour_bundle(target, sharpness=9.0))
        assert read_bundle(target).digest == read_bundle(folder / "new").digest
        assert [path.name for path in target.parent.iterdir()] == ["bundle"]

    return kill_at_each_step(prepare, lambda target: write_colour_bundle(target, sharpness=9.0), check, stride)


def kill_registry(folder: Path, stride: int) -> int:
    bundles = [folder / f"bundle-{number}" for number in range(4)]
    for number, path in enumerate(bundles):
        in_child(lambda path=path, number=number: write_colour_bundle(path, sharpness=8.0 + number))
    in_child(lambda: fill(Registry(folder / "base"), bundles))
    register = lambda registry: registry.register(bundles[2], {"git": "c"}, card=bundles[2] / "bundle.json")  # noqa: E731
    promote = lambda registry: registry.promote(1, reason="again", expected=2)  # noqa: E731
    rollback = lambda registry: registry.rollback("bad") if registry.champion().id == 2 else registry.repair()  # noqa: E731
    sweep = lambda registry: registry.sweep(keep_last=0)  # noqa: E731
    children = 0
    for change, champions in ((register, {2}), (promote, {2, 1}), (rollback, {2, 1}), (sweep, {2})):
        children += kill_registry_change(folder, change, champions, stride)
    return children


def fill(registry: Registry, bundles: list[Path]) -> None:
    for number in (0, 1):
        version = registry.register(bundles[number], {"git": "ab"[number]})
        registry.promote(version.id, reason="better", expected=version.id - 1 or None)
    registry.refuse(registry.register(bundles[3], {}).id, "worse")


def kill_registry_change(folder: Path, change: Callable[[Registry], object], champions: set[int], stride: int) -> int:
    def prepare() -> Path:
        target = folder / "run"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / "base", target)
        return target

    def look(root: Path) -> tuple[int, int]:
        registry = Registry(root)
        champion = registry.champion()
        assert champion is not None
        assert champion.id in champions
        assert registry.bundle(champion.id).digest == champion.digest
        assert [event.sequence for event in registry.events()] == list(range(1, len(registry.events()) + 1))
        for version in registry.versions():
            registry.lineage(version.id)
        return champion.id, len(registry.versions())

    in_child(lambda: change(Registry(prepare())))
    whole, num_events = look(folder / "run"), len(Registry(folder / "run").events())

    def check(root: Path) -> None:
        look(root)
        in_child(lambda: change(Registry(root)))
        assert look(root) == whole
        assert len(Registry(root).events()) == num_events
        assert not list((root / "versions").glob(".*"))
        pointer = Registry(root)._read_pointer()
        assert pointer is not None
        assert pointer["version"] == whole[0]

    return kill_at_each_step(prepare, lambda root: change(Registry(root)), check, stride)


def kill_at_each_step(
    prepare: Callable[[], Path], change: Callable[[Path], object], check: Callable[[Path], None], stride: int
) -> int:
    """Runs the change in a child that kills itself at step 0, STRIDE... until one comes through; checks after each."""
    for killed in itertools.count():
        target, step = prepare(), killed * stride
        status = in_child(lambda target=target, step=step: (trap(step), change(target)), may_die=True)
        check(target)
        if status == 0:
            return killed
    raise AssertionError


def trap(steps: int) -> None:
    left = steps

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in STEPS or writes:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def in_child(work: Callable[[], object], *, may_die: bool = False) -> int:
    """Does the work in a forked child; its status, -9 if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
            sys.stdout.flush()
            os._exit(0)
        except BaseException:  # noqa: BLE001  a child must not go on as its parent would
            traceback.print_exc()
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0 or (may_die and status == -signal.SIGKILL), status
    return status


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
