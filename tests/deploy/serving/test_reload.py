"""Promotions and rollbacks while the server answers: never a lost request, never an answer of a version not named."""

import json
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import onnx
import pytest

from deploy.bundle import Bundle, read_bundle
from deploy.errors import BundleError, RegistryError, TanukiError
from deploy.images import decode_image
from deploy.predictor import Predictor
from deploy.registry import Registry, open_registry
from deploy.serving.models import load
from deploy.signing import generate_keys, sign_bundle
from tests.deploy.serving.running import Running, add_version, eventually, make_champion, serving
from tests.deploy.tiny_bundle import colour_image, encoded, seal, write_colour_bundle
from tests.object_stores import BUCKET, s3_on_loopback

PICTURE = encoded(colour_image("blau"), "JPEG")
QUICK = ("--watch-s", "0.02")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A registry of three versions, the first of which is the champion."""
    root = tmp_path / "registry"
    for sharpness in (8.0, 4.0, 2.0):
        add_version(root, tmp_path, sharpness=sharpness, promote=sharpness == 8.0)
    return root


def answers_of(root: Path) -> dict[str, float]:
    """What each version says of the picture."""
    answers = {}
    for version in Registry(root).versions():
        with Predictor(Registry(root).bundle(version.id), threads=1) as predictor:
            probabilities = predictor.predict([decode_image(PICTURE)]).probabilities[0]
        answers[str(version.id)] = float(probabilities.max())
    return answers


def answering(running: Running) -> str:
    return running.client.post("/predict", content=PICTURE).json()["version"]


@contextmanager
def load_on(running: Running, expected: dict[str, float], *, clients: int = 4) -> Iterator[Counter[str]]:
    """Asks all the time from several clients; counts the answers of each version, and whatever else came back."""
    counts: Counter[str] = Counter()
    over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=running.url, timeout=30) as client:
            while not over.is_set():
                try:
                    answer = client.post("/predict", content=PICTURE).json()
                    told = answer["predictions"][0]["probability"]
                    right = abs(told - expected[answer["version"]]) < 1e-4
                    counts[answer["version"] if right else f"wrong: {answer}"] += 1
                except Exception as error:  # noqa: BLE001  every failure counts
                    counts[f"failed: {error!r}"] += 1

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        over.set()
        for thread in threads:
            thread.join()


def move_about(running: Running, root: Path, moves: int) -> None:
    """Promotes and rolls back in turns, each once the server has followed."""
    registry = Registry(root)
    for move in range(moves):
        if move % 3 == 2:
            registry.rollback("a test")
        else:
            make_champion(root, 1 + (registry.require_champion().id + 1) % 3)
        champion = str(registry.require_champion().id)
        eventually(lambda champion=champion: answering(running) == champion)


def test_promotions_and_rollbacks_under_load_cost_no_request(root: Path, tmp_path: Path) -> None:
    expected = answers_of(root)
    assert len({round(value, 3) for value in expected.values()}) == 3
    with serving(root, tmp_path, *QUICK, "--keep", "1") as running:
        with load_on(running, expected) as counts:
            move_about(running, root, 6)
        assert set(counts) <= set(expected), counts
        assert len(counts) >= 2
        assert running.metric("tanuki_reloads_total") >= 7
        assert running.stop() == 0


@pytest.mark.slow
def test_a_hundred_of_them_leave_memory_as_it_was(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, *QUICK, "--keep", "0") as running:
        with load_on(running, answers_of(root), clients=8) as counts:
            move_about(running, root, 20)
            before = running.metric("process_resident_memory_bytes")
            move_about(running, root, 80)
            after = running.metric("process_resident_memory_bytes")
        assert set(counts) <= {"1", "2", "3"}, counts
        assert after - before < 5e6, (before, after)


def test_earlier_versions_have_their_paths_while_they_are_kept(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, *QUICK, "--keep", "1") as running:
        assert running.client.get("/v2/models/tanuki/versions/2/ready").status_code == 400
        make_champion(root, 2)
        eventually(lambda: answering(running) == "2")
        assert running.client.post("/predict?version=1", content=PICTURE).json()["version"] == "1"
        assert running.client.get("/v2/models/tanuki").json()["versions"] == ["1", "2"]
        make_champion(root, 3)
        eventually(lambda: answering(running) == "3")
        assert running.client.get("/v2/models/tanuki/versions/2/ready").status_code == 200
        gone = running.client.post("/v2/models/tanuki/versions/1/infer", content=b"{}")
        assert gone.status_code == 404
        assert gone.json() == {"error": "Request for unknown model: 'tanuki' version 1 is not found"}
        index = running.client.post("/v2/repository/index").json()
        assert [(each["version"], each["state"]) for each in index] == [("2", "READY"), ("3", "READY")]


def test_a_damaged_champion_is_refused_and_the_old_one_goes_on(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, *QUICK) as running:
        running.process.send_signal(signal.SIGSTOP)  # so that it does not see version 2 whole
        make_champion(root, 2)
        graph = root / "versions" / "2" / "back.onnx"
        graph.chmod(0o644)
        graph.write_bytes(graph.read_bytes()[:-1] + b"\x00")
        running.process.send_signal(signal.SIGCONT)
        eventually(lambda: running.metric('tanuki_reloads_total{outcome="refused"}') == 1)
        assert answering(running) == "1"
        assert running.client.get("/v2/health/ready").status_code == 200
        (line,) = [line for line in running.lines() if line["level"] == "error"]
        assert "version 1 goes on answering" in line["message"]
        assert "back.onnx was changed" in line["message"]
        told = running.client.post("/v2/repository/models/tanuki/load")
        assert told.status_code == 400
        assert "damaged" in told.json()["error"]
        make_champion(root, 3)
        eventually(lambda: answering(running) == "3")


class ExchangedMeanwhile(Registry):
    """A registry on a disk where somebody exchanges a file once it was found whole."""

    def bundle(self, id_: int) -> Bundle:
        bundle = super().bundle(id_)
        bundle.back_path.chmod(0o644)
        bundle.back_path.write_bytes(super().bundle(3).back_path.read_bytes())
        return bundle


class WhollyExchangedMeanwhile(Registry):
    """The same where it is a whole version, which then says of itself that it is the one that was there."""

    def bundle(self, id_: int) -> Bundle:
        bundle = super().bundle(id_)
        there, other = bundle.directory, bundle.directory.parent / "3"
        if other.is_dir():
            there.rename(there.parent / "before")
            other.rename(there)
            lineage = json.loads((there / "lineage.json").read_bytes())
            (there / "lineage.json").chmod(0o644)
            (there / "lineage.json").write_text(json.dumps({**lineage, "version": id_}))
        return bundle


def test_a_bundle_that_is_exchanged_while_it_is_loaded_is_not_believed(root: Path) -> None:
    registry = ExchangedMeanwhile(root)
    with pytest.raises(TanukiError, match=r"back\.onnx was changed|does not answer as it did"):
        load(registry, registry.version(2))


def test_a_version_that_is_exchanged_as_a_whole_while_it_is_loaded_is_not_believed(root: Path) -> None:
    registry = WhollyExchangedMeanwhile(root)
    with pytest.raises(RegistryError, match="was exchanged while it was loaded"):
        load(registry, registry.version(2))


def test_a_champion_that_nobody_can_read_is_told_of_and_tried_again(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, "--watch-s", "1000") as running:
        card = root / "versions" / "2" / "model_card.md"
        card.chmod(0o644)
        card.write_bytes("Größe".encode("latin-1"))
        make_champion(root, 2)
        for _ in range(2):
            told = running.client.post("/v2/repository/models/tanuki/load")
            assert (told.status_code, answering(running)) == (400, "1")
            assert "can't decode byte" in told.json()["error"]
        card.write_text("Größe", encoding="utf-8")
        assert running.client.post("/v2/repository/models/tanuki/load").status_code == 200
        assert answering(running) == "2"


def test_a_bundle_without_an_embedding_is_refused_and_the_old_one_goes_on(root: Path, tmp_path: Path) -> None:
    """Its files were put in place by hand, and every digest made to fit."""
    with serving(root, tmp_path, "--watch-s", "1000") as running:
        directory = root / "versions" / "2"
        for name in ("back.onnx", "model.onnx"):
            graph = onnx.load(directory / name)
            del graph.graph.output[1]
            (directory / name).chmod(0o644)
            onnx.save(graph, directory / name)
        (directory / "bundle.json").chmod(0o644)
        seal(directory)
        with pytest.raises(TanukiError):
            make_champion(root, 2)
        assert running.client.post("/v2/repository/models/tanuki/load").status_code == 200
        assert answering(running) == "1"
        with pytest.raises(BundleError, match="embedding"):
            Predictor(read_bundle(directory))


def test_where_a_signature_is_required_only_a_signed_version_takes_over(root: Path, tmp_path: Path) -> None:
    registry, key = Registry(root), tmp_path / "release.key"
    public = generate_keys(key)
    sign_bundle(registry.bundle(1), key)
    with serving(root, tmp_path, "--watch-s", "1000", "--public-key", str(public)) as running:
        make_champion(root, 2)
        told = running.client.post("/v2/repository/models/tanuki/load")
        assert (told.status_code, answering(running)) == (400, "1")
        assert "is not signed" in told.json()["error"]
        sign_bundle(registry.bundle(2), key)
        assert running.client.post("/v2/repository/models/tanuki/load").status_code == 200
        assert answering(running) == "2"


def test_a_registry_that_vanishes_and_comes_back_costs_nothing(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, *QUICK) as running:
        root.rename(tmp_path / "away")
        eventually(lambda: running.metric('tanuki_reloads_total{outcome="refused"}') >= 1)
        assert answering(running) == "1"
        (tmp_path / "away").rename(root)
        make_champion(root, 2)
        eventually(lambda: answering(running) == "2")


def test_asked_to_load_it_looks_at_the_registry_at_once(root: Path, tmp_path: Path) -> None:
    with serving(root, tmp_path, "--watch-s", "1000") as running:
        make_champion(root, 3)
        assert answering(running) == "1"
        assert running.client.post("/v2/repository/models/tanuki/load").status_code == 200
        assert answering(running) == "3"
        assert running.stop() == 0  # and does not sleep on until the next look


@pytest.mark.slow
def test_a_registry_in_a_bucket_is_followed_and_an_outage_costs_nothing(tmp_path: Path) -> None:
    url = f"s3://{BUCKET}/production"
    with ExitStack() as stack:
        environment = stack.enter_context(s3_on_loopback())
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in {**environment, "XDG_CACHE_HOME": str(tmp_path / "trainer")}.items():
            patch.setenv(name, value)
        registry = open_registry(url)
        for sharpness in (8.0, 4.0):
            registry.register(write_colour_bundle(tmp_path / str(sharpness), sharpness=sharpness).directory, {})
        registry.promote(1, reason="first", expected=None)
        copy = tmp_path / "copy"
        with serving(url, tmp_path, *QUICK, "--registry-copy", str(copy)) as running:
            assert answering(running) == "1"
            assert not (copy / "versions" / "2" / "model.onnx").exists()
            registry.promote(2, reason="better", expected=1)
            eventually(lambda: answering(running) == "2")
            registry.rollback("bad")
            eventually(lambda: answering(running) == "1")
            stack.close()  # the bucket is gone
            eventually(lambda: any("going on with what was last seen" in line["message"] for line in running.lines()))
            assert answering(running) == "1"
        with serving(url, tmp_path, *QUICK, "--registry-copy", str(copy), **environment) as running:
            assert answering(running) == "1"  # and one that starts meanwhile answers out of its copy
