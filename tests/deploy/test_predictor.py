"""The predictor: one answer per picture, whatever its size, its neighbours and the number of cores."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.bundle import read_bundle
from deploy.errors import ImageError
from deploy.latency import measure_latency
from deploy.predictor import CHUNK_SIZE, Predictor
from tests.deploy.tiny_bundle import COLOURS, LABELS, colour_image, encoded, write_colour_bundle


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_colour_bundle(tmp_path_factory.mktemp("predictor") / "bundle").directory


@pytest.fixture(scope="module")
def predictor(directory: Path) -> Iterator[Predictor]:
    with Predictor(read_bundle(directory)) as predictor:
        yield predictor


def test_pictures_of_different_sizes_are_answered_together_in_order(predictor: Predictor) -> None:
    asked = [LABELS[index % 3] for index in range(20)]
    images = [colour_image(label, size=(10 + 7 * index, 90 - 4 * index)) for index, label in enumerate(asked)]
    answers = predictor.predict(images)
    assert answers.probabilities.shape == (20, 3)
    assert answers.embeddings.shape == (20, 3)
    assert answers.probabilities.dtype == answers.embeddings.dtype == np.float32
    np.testing.assert_allclose(answers.probabilities.sum(axis=1), 1, atol=1e-6)
    assert [predictor.labels[index] for index in answers.probabilities.argmax(axis=1)] == asked


@settings(max_examples=25)
@given(sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=20))
def test_neighbours_in_a_batch_do_not_change_an_answer(predictor: Predictor, sizes: list[tuple[int, int]]) -> None:
    images = [colour_image(LABELS[seed % 3], size=size, seed=seed) for seed, size in enumerate(sizes)]
    together = predictor.predict(images)
    alone = [predictor.predict([image]) for image in images]
    np.testing.assert_allclose(
        together.probabilities, np.concatenate([each.probabilities for each in alone]), atol=1e-6
    )


def test_an_answer_does_not_depend_on_the_number_of_threads(directory: Path) -> None:
    images = [colour_image(LABELS[seed % 3], size=(20 + seed, 33), seed=seed) for seed in range(30)]
    answers = []
    for threads in (1, 3):
        with Predictor(read_bundle(directory), threads=threads) as predictor:
            answers.append(predictor.predict(images))
    np.testing.assert_array_equal(answers[0].probabilities, answers[1].probabilities)
    np.testing.assert_array_equal(answers[0].embeddings, answers[1].embeddings)


def test_many_threads_may_ask_at_once(predictor: Predictor) -> None:
    images = [colour_image(LABELS[seed % 3], seed=seed) for seed in range(12)]
    expected = predictor.predict(images).probabilities
    with ThreadPoolExecutor(6) as pool:
        for found in pool.map(lambda _: predictor.predict(images).probabilities, range(24)):
            np.testing.assert_array_equal(found, expected)


def test_no_pictures_give_empty_answers(predictor: Predictor) -> None:
    answers = predictor.predict([])
    assert answers.probabilities.shape == (0, 3)
    assert answers.embeddings.shape == (0, 3)
    assert predictor.predict_files([]) == []


def test_a_bad_file_is_named_and_the_rest_still_answered(predictor: Predictor, tmp_path: Path) -> None:
    paths = []
    for index in range(CHUNK_SIZE + 5):
        paths.append(tmp_path / f"{index:03d}.png")
        paths[-1].write_bytes(encoded(colour_image(LABELS[index % 3], seed=index)))
    paths[1].write_bytes(paths[1].read_bytes()[:60])
    paths[CHUNK_SIZE].unlink()
    answers = predictor.predict_files(paths, top_k=2)
    assert [answer.source for answer in answers] == [str(path) for path in paths]
    bad = {index for index, answer in enumerate(answers) if answer.error}
    assert bad == {1, CHUNK_SIZE}
    for index in bad:
        assert isinstance(answers[index].error, ImageError)
        assert str(paths[index]) in str(answers[index].error)
        assert answers[index].label is None
    for index in set(range(len(paths))) - bad:
        answer = answers[index]
        assert answer.label == LABELS[index % 3] == answer.top[0][0]
        assert answer.probability == answer.top[0][1] >= answer.top[1][1]
        assert len(answer.top) == 2


def test_awkward_files_get_an_answer_or_a_reason(predictor: Predictor, material: Path) -> None:
    paths = sorted(path for path in (material / "dirt_pack").iterdir() if path.suffix != ".tsv")
    answers = predictor.predict_files(paths)
    assert [answer.source for answer in answers] == [str(path) for path in paths]
    assert all((answer.label is None) == (answer.error is not None) for answer in answers)
    by_name = {path.name: answer for path, answer in zip(paths, answers, strict=True)}
    assert by_name["pillow_hopper.webp"].label is not None
    assert by_name["pillow_pil_sample_cmyk.jpg"].label is not None
    assert by_name["pillow_truncated_jpeg.jpg"].error is not None


def test_bytes_are_answered_under_their_name(predictor: Predictor) -> None:
    good, bad = predictor.predict_bytes([("upload 1", encoded(colour_image("grün"), "JPEG")), ("upload 2", b"")])
    assert (good.source, good.label) == ("upload 1", "grün")
    assert len(good.top) == len(LABELS)
    assert bad.error is not None
    assert "upload 2" in str(bad.error)


def test_scoring_names_every_file_that_cannot_be_read(predictor: Predictor, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(encoded(colour_image("blau")))
    assert predictor.score_files(iter([good] * 70)).probabilities.argmax(axis=1).tolist() == [0] * 70
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"2 images cannot be read: .*empty\.png.*gone\.png"):
        predictor.score_files([good, tmp_path / "empty.png", good, tmp_path / "gone.png"])


def test_latency_is_measured_for_each_predictor(predictor: Predictor, directory: Path) -> None:
    with Predictor(read_bundle(directory), threads=1) as other:
        latencies = measure_latency([predictor, other], [encoded(colour_image("blau"))], runs=5)
    assert len(latencies) == 2
    assert all(0 < latency.p50_s <= latency.p95_s < 5 and latency.runs == 5 for latency in latencies)


def test_answering_imports_neither_torch_nor_a_training_package(directory: Path, repository: Path) -> None:
    script = f"""
import sys
from pathlib import Path
from deploy.bundle import verify_bundle
from deploy.predictor import Predictor
from deploy.registry import Registry
Predictor(verify_bundle(Path({str(directory)!r}))).predict_files([])
heavy = {{"torch", "torchvision", "onnx", "pandas", "pyarrow", "scipy", "sklearn", "tasks", "flows", "prefect", "dvc"}}
print(sorted(heavy & set(sys.modules)))
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=repository, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_the_colours_are_apart() -> None:
    assert set(COLOURS) == set(LABELS)
