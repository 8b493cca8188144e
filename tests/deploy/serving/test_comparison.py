"""A second version beside the champion: compared picture by picture, and never in the way."""

import asyncio
import random
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.errors import ImageError
from deploy.predictor import Predictor
from deploy.registry import Registry
from deploy.serving.batcher import MAX_ASIDE, Answer, Batcher
from deploy.serving.comparison import Challenge, Comparison, distance_of, reports_of
from deploy.serving.errors import RequestError
from deploy.serving.live_model import LiveModel
from deploy.serving.models import Models
from deploy.serving.settings import Second, parse_settings
from tests.deploy.serving.running import Running, add_version, eventually, make_champion, serving
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded, seal, write_colour_bundle

PICTURE = encoded(colour_image("blau"), "JPEG")
WHITE = encoded(np.full((30, 40, 3), 255, np.uint8))
TURNS = 300_000  # half a second or more
HUGE = np.full((4000, 4000, 3), 7, np.uint8)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry of two versions, the first of which is the champion."""
    folder = tmp_path_factory.mktemp("comparison")
    add_version(folder / "registry", folder)
    add_version(folder / "registry", folder, sharpness=0.5, promote=False)
    return folder / "registry"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveModel, LiveModel]]:
    folder = tmp_path_factory.mktemp("models")
    bundles = [write_colour_bundle(folder / str(sharpness), sharpness=sharpness) for sharpness in (8.0, 0.5)]
    with Predictor(bundles[0], threads=1) as one, Predictor(bundles[1], threads=1) as other:
        yield LiveModel(1, bundles[0], one, {}, None), LiveModel(2, bundles[1], other, {}, None)


def said(*probabilities: float) -> Answer:
    return Answer(np.array(probabilities, np.float32), np.zeros(3, np.float32))


def compared(running: Running) -> float:
    return running.metric('tanuki_compared_total{challenger="2",champion="1",fate="same"}')


def test_sums_become_shares_and_add_up_over_processes(models: tuple[LiveModel, LiveModel]) -> None:
    first, second = Comparison(), Comparison()
    first.add(*models, said(0.7, 0.2, 0.1), said(0.6, 0.3, 0.1))
    first.add(*models, said(0.7, 0.2, 0.1), said(0.1, 0.8, 0.1))
    second.add(*models, said(0.7, 0.2, 0.1), ImageError("broken"))
    assert second.add(*models, ImageError("broken"), RequestError(500, "failed")) is None
    second.fates["dropped"] += 3
    found = [[{"champion": 1, "challenger": 2, **vars(each), "pairs": [[*pair, n] for pair, n in each.pairs.items()]}]
             for each in (first, second)]  # fmt: skip
    (report,) = reports_of(found)
    assert (report["champion"], report["challenger"], report["pictures"]) == ("1", "2", 2)
    assert (report["same_label"], report["failed"], report["dropped"]) == (0.5, 1, 3)
    assert report["mean_distance"] == pytest.approx((0.1 + 0.6) / 2)
    assert report["champion_confidence"] == pytest.approx(0.7)
    assert report["challenger_confidence"] == pytest.approx(0.7)
    assert report["other_labels"] == [{"champion": LABELS[0], "challenger": LABELS[1], "pictures": 1}]


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3), st.lists(st.integers(1, 9), min_size=3, max_size=3))
def test_the_distance_is_one_and_follows_labels_not_places(one: list[int], other: list[int]) -> None:
    left, right = (np.array(each, np.float32) / sum(each) for each in (one, other))
    labels = ("a", "b", "c")
    distance = distance_of(left, right, labels, labels)
    assert 0 <= distance < 1
    assert distance == pytest.approx(distance_of(right, left, labels, labels))
    turned = distance_of(left, right[[2, 0, 1]], labels, ("c", "a", "b"))
    assert turned == pytest.approx(distance, abs=1e-6)
    assert distance_of(left, right, labels, ("x", "y", "z")) == pytest.approx(1)


def test_what_nobody_waits_for_comes_last_and_leaves_a_thread_free(models: tuple[LiveModel, LiveModel]) -> None:
    champion, challenger = models
    ended: list[str] = []

    async def run() -> None:
        batcher = Batcher(2, 1000, 10_000, lambda _: None)

        async def ask(name: str, model: LiveModel, image: np.ndarray, *, is_aside: bool = False) -> None:
            await batcher.answer(model, [image], timeout_s=None if is_aside else 30, is_aside=is_aside)
            ended.append(name)

        try:
            aside = [asyncio.create_task(ask("aside", challenger, HUGE, is_aside=True)) for _ in range(3)]
            await asyncio.sleep(0.05)
            await ask("asked", champion, colour_image("blau"))  # two threads: one of them is not for the others
            assert ended == ["asked"]
            await asyncio.gather(*aside)
            with pytest.raises(RequestError, match="no time"):
                await batcher.answer(challenger, [HUGE] * (MAX_ASIDE + 1), timeout_s=None, is_aside=True)
            assert (batcher.waiting, batcher.waiting_aside) == (0, 0)
        finally:
            await asyncio.to_thread(batcher.close)

    asyncio.run(run())
    assert ended == ["asked", "aside", "aside", "aside"]


def test_a_shadow_is_asked_and_never_answers(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, "--shadow", "2", "--watch-s", "1000") as running:
        for _ in range(10):
            assert running.client.post("/predict", content=PICTURE).json()["version"] == "1"
        assert running.client.post("/predict", content=b"no picture").status_code == 400
        eventually(lambda: compared(running) == 10)
        assert running.client.post("/predict?version=2", content=PICTURE).json()["version"] == "2"
        (report,) = running.client.get("/model").json()["comparisons"]
        assert (report["champion"], report["challenger"], report["pictures"]) == ("1", "2", 10)
        assert report["same_label"] == 1
        assert report["challenger_confidence"] < report["champion_confidence"]
        assert 0 < report["mean_distance"] < 1
        assert running.metric("tanuki_compared_distance_count") == 10
        assert running.metric("tanuki_waiting_pictures") == 0

        make_champion(root, 2)  # there is nothing to compare with itself
        assert running.client.post("/v2/repository/models/tanuki/load").status_code == 200
        assert running.client.post("/predict", content=PICTURE).json()["version"] == "2"
        assert compared(running) == 10
        assert running.stop() == 0
    make_champion(root, 1)


def test_a_canary_answers_its_share_and_is_compared(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, "--canary", "2=.5") as running:
        versions = [running.client.post("/predict", content=PICTURE).json()["version"] for _ in range(60)]
        assert 10 <= versions.count("2") <= 50
        eventually(lambda: compared(running) == versions.count("2"))
        named = running.client.post("/v2/models/tanuki/versions/1/infer", content=b"{}")
        assert named.status_code == 400  # about its body: version 1 it is
        assert {running.client.post("/predict?version=1", content=PICTURE).json()["version"] for _ in range(9)} == {"1"}


def wince(directory: Path, *nodes: onnx.NodeProto) -> None:
    """Lets a bundle's network do more about a white picture, and only there, and makes every digest fit.

    Args:
        directory: The bundle's.
        nodes: Make `more`, which is added to the probabilities, from `is_white`, an int64 of shape (1,).
    """
    for name in ("back.onnx", "model.onnx"):
        model = onnx.load(directory / name)
        graph = model.graph
        softmax = next(node for node in graph.node if node.op_type == "Softmax")
        softmax.output[0] = "sure"
        bit = np.array([0.05], np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(bit, "bit"))
        graph.node.append(onnx.helper.make_node("ReduceMin", ["embedding"], ["darkest"], keepdims=0))
        graph.node.append(onnx.helper.make_node("Add", ["darkest", "bit"], ["above"]))
        graph.node.append(onnx.helper.make_node("Cast", ["above"], ["is_white"], to=onnx.TensorProto.INT64))
        graph.node.extend(nodes)
        graph.node.append(onnx.helper.make_node("Add", ["sure", "more"], ["probabilities"]))
        (directory / name).chmod(0o644)
        onnx.save(model, directory / name)
    (directory / "bundle.json").chmod(0o644)
    seal(directory)


def make_fragile(directory: Path) -> None:
    """Lets it fail: there is no second row."""
    row = onnx.helper.make_node("Constant", [], ["row"], value_floats=[0.0])
    wince(directory, row, onnx.helper.make_node("Gather", ["row", "is_white"], ["more"]))


def make_slow(directory: Path, *, turns: int) -> None:
    """Lets it go round in a loop."""
    value = onnx.helper.make_tensor_value_info
    kinds = onnx.TensorProto
    body = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Identity", ["go_on"], ["goes_on"]),
            onnx.helper.make_node("Neg", ["nothing"], ["still_nothing"]),
        ],
        "turn",
        [value("turn", kinds.INT64, []), value("go_on", kinds.BOOL, []), value("nothing", kinds.FLOAT, [1])],
        [value("goes_on", kinds.BOOL, []), value("still_nothing", kinds.FLOAT, [1])],
    )
    wince(
        directory,
        onnx.helper.make_node("Constant", [], ["turns"], value_int=turns),
        onnx.helper.make_node("Constant", [], ["zero"], value_floats=[0.0]),
        onnx.helper.make_node("Mul", ["turns", "is_white"], ["how_often"]),
        onnx.helper.make_node("Loop", ["how_often", "", "zero"], ["more"], body=body),
    )


@pytest.mark.parametrize(("option", "status"), [("--canary", 500), ("--shadow", 200)])
def test_a_second_version_that_fails_too_often_is_stopped(tmp_path: Path, option: str, status: int) -> None:
    add_version(tmp_path / "registry", tmp_path)
    fragile = write_colour_bundle(tmp_path / "fragile", sharpness=4.0)
    make_fragile(fragile.directory)
    Registry(tmp_path / "registry").register(fragile.directory, {})
    with serving(tmp_path / "registry", tmp_path, option, "2=1", "--second-failures", "0.3") as running:
        for _ in range(10):
            assert running.client.post("/predict", content=PICTURE).status_code == 200
        eventually(lambda: running.metric("tanuki_compared_total") == 10)
        told = []
        for number in range(6):
            told.append(running.client.post("/predict", content=WHITE).status_code)
            if number < 5:  # 5 of 15 are more than .3, 4 of 14 are not
                eventually(lambda number=number: running.metric("tanuki_compared_total") == 11 + number)
        assert told == [status] * 5 + [200]
        assert running.metric('tanuki_second_stopped_total{version="2"}') == 1
        assert running.client.post("/predict", content=WHITE).json()["version"] == "1"
        (report,) = running.client.get("/model").json()["comparisons"]
        assert report["stopped"] == "it failed on 5 of its last 15 pictures, 30% may"
        assert any("version 2 is stopped" in line["message"] for line in running.lines())
        assert running.metric("tanuki_compared_total") == 15


@pytest.mark.parametrize("who_waits", ["the server", "the client"])
def test_a_canary_that_is_too_slow_is_stopped(tmp_path: Path, who_waits: str) -> None:
    add_version(tmp_path / "registry", tmp_path)
    slow = write_colour_bundle(tmp_path / "slow", sharpness=4.0)
    make_slow(slow.directory, turns=TURNS)
    Registry(tmp_path / "registry").register(slow.directory, {})
    limit = {"the server": 0.1, "the client": 30}[who_waits]
    with serving(tmp_path / "registry", tmp_path, "--canary", "2=1", f"--timeout-s={limit}") as running:
        assert running.client.post("/predict", content=PICTURE).json()["version"] == "2"

        def is_stopped() -> bool:
            with suppress(httpx.ReadTimeout):
                told = running.client.post("/predict", content=WHITE, timeout=10 if who_waits == "the server" else 0.1)
                assert told.status_code == 504 or told.json()["version"] == "1"
            return running.metric('tanuki_second_stopped_total{version="2"}') == 1

        eventually(is_stopped)
        (report,) = running.client.get("/model").json()["comparisons"]
        assert report["stopped"].startswith("it failed on 5 of its last ")
        eventually(lambda: running.metric("tanuki_waiting_pictures") == 0)  # of those that nobody waits for any more
        assert running.client.post("/predict", content=WHITE, timeout=10).json()["version"] == "1"


def test_a_canary_may_be_as_slow_as_the_champion(tmp_path: Path) -> None:
    for version, sharpness in enumerate((8.0, 4.0), start=1):
        slow = write_colour_bundle(tmp_path / str(version), sharpness=sharpness)
        make_slow(slow.directory, turns=TURNS)
        Registry(tmp_path / "registry").register(slow.directory, {})
    make_champion(tmp_path / "registry", 1)
    with serving(tmp_path / "registry", tmp_path, "--canary", "2=1", "--timeout-s=0.1") as running:
        for version in (1, 2):
            given_up = 0
            while given_up < 6:  # at work on it, because nothing else waited
                eventually(lambda: running.metric("tanuki_waiting_pictures") == 0)
                given_up += running.client.post(f"/predict?version={version}", content=WHITE).status_code == 504
        assert running.metric("tanuki_second_stopped_total") == 0
        assert running.client.post("/predict", content=PICTURE).json()["version"] == "2"


def test_a_second_version_that_is_given_up_as_often_as_the_champion_goes_on(root: Path) -> None:
    models = Models(Registry(root), name="m", keep=0, on_reload=lambda _: None)
    models.refresh()
    models.add_challenger(2)
    both = [models.champion, models.challenger]

    async def stopped(seed: int, batcher: Batcher) -> tuple[list[int], list[int]]:
        told: list[int] = []
        second = Second(2, 1e-9, answers=False)  # what is answered is judged, and hardly ever compared
        challenge = Challenge(
            second, models, batcher, on_compared=lambda *_: None, max_failures=0.05, on_stopped=told.append
        )
        chance = random.Random(seed)
        for _ in range(2000):
            asked = chance.choice(both)
            if chance.random() < 0.2:
                challenge.given_up(asked)
            else:
                challenge.offer(asked, [PICTURE], [said(1, 0, 0)])
        before = list(told)
        for _ in range(200):
            challenge.given_up(models.challenger)
        await challenge.stop()
        return before, told

    async def run() -> None:
        batcher = Batcher(1, 1000, 10_000, lambda _: None)
        try:
            assert [await stopped(seed, batcher) for seed in range(10)] == [([], [2])] * 10
        finally:
            await asyncio.to_thread(batcher.close)

    asyncio.run(run())


def test_a_second_version_that_is_not_there_is_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="version 9 cannot be compared"), serving(root, tmp_path, "--shadow", "9"):
        pass


@pytest.mark.parametrize(
    ("options", "second"),
    [
        (["--shadow", "7"], Second(7, 1.0, answers=False)),
        (["--shadow", "7=0.25"], Second(7, 0.25, answers=False)),
        (["--canary", "7=.1"], Second(7, 0.1, answers=True)),
        (["--canary", "12=1"], Second(12, 1.0, answers=True)),
        ([], None),
    ],
)
def test_how_a_second_version_is_named(options: list[str], second: Second | None) -> None:
    assert parse_settings(["--registry", "r", *options]).second == second


@pytest.mark.parametrize(
    "options",
    [["--canary", "7"], ["--canary", "7=0"], ["--canary", "7=1.5"], ["--shadow", "seven"], ["--shadow", "7="],
     ["--shadow", "7", "--canary", "7=.1"]],
)  # fmt: skip
def test_how_it_cannot_be_named(options: list[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse_settings(["--registry", "r", *options])
    assert left.value.code == 2
