"""The bundle: whole, checkable, the same bytes for the same model."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deploy.bundle import Bundle, bundle_files, read_bundle, verify_bundle, write_bundle
from deploy.errors import BundleError, ImageError
from deploy.files import write_json
from deploy.golden import golden_pictures
from deploy.predictor import Predictor
from tests.deploy.tiny_bundle import (
    LABELS,
    colour_facts,
    colour_graphs,
    colour_image,
    encoded,
    seal,
    write_colour_bundle,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_colour_bundle(tmp_path / "bundle", git="abc")
    return tmp_path / "bundle"


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_bundle_reads_back_what_was_written(directory: Path) -> None:
    bundle = verify_bundle(directory)
    assert bundle.labels == LABELS
    assert bundle.lineage == {"git": "abc"}
    assert bundle.preprocessing["size_px"] == 16
    assert "central square of 90 %" in bundle.preprocessing["words"]
    (images,) = bundle.signature["inputs"]
    assert images == {"name": "images", "dtype": "uint8", "shape": ["batch", "height", "width", 3]}
    assert [port["name"] for port in bundle.signature["outputs"]] == ["probabilities", "embedding"]
    assert bundle.signature["seam"]["shape"] == ["batch", 3, 16, 16]
    assert bundle.size_bytes == bundle.model_path.stat().st_size


def test_the_same_model_makes_the_same_bytes_and_another_one_another_digest(tmp_path: Path) -> None:
    one = write_colour_bundle(tmp_path / "one")
    again = write_colour_bundle(tmp_path / "again")
    other = write_colour_bundle(tmp_path / "other", sharpness=9.0)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "again")
    assert one.digest == again.digest != other.digest


def test_the_golden_pictures_keep_their_format(directory: Path) -> None:
    names = {path.name for path in (directory / "golden").iterdir()}
    assert names == {"image-00.png", "image-01.jpeg", "image-02.jpeg", "golden.json"}


def test_writing_again_replaces_the_whole_folder_and_sweeps_what_a_kill_left(directory: Path) -> None:
    (directory / "stale.txt").write_text("of yesterday")
    leftover = directory.parent / ".bundle.killed.tmp"
    leftover.mkdir()
    write_colour_bundle(directory, sharpness=9.0)
    assert not (directory / "stale.txt").exists()
    assert [path.name for path in directory.parent.iterdir()] == ["bundle"]


def test_a_bundle_that_cannot_be_written_leaves_the_old_one(directory: Path) -> None:
    before = files_of(directory)
    model, front, back = colour_graphs()
    with pytest.raises(ImageError, match="no picture"):
        write_bundle(directory, model=model, front=front, back=back, facts=colour_facts(), golden=[b"no image"])
    assert files_of(directory) == before
    assert [path.name for path in directory.parent.iterdir()] == ["bundle"]


FILES = (
    "model.onnx",
    "front.onnx",
    "back.onnx",
    "bundle.json",
    "golden/golden.json",
    "golden/image-00.png",
    "golden/image-01.jpeg",
    "golden/image-02.jpeg",
)


def test_the_files_of_a_bundle_are_these(directory: Path) -> None:
    assert set(files_of(directory)) == set(FILES) == set(bundle_files(read_bundle(directory)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_flipped_byte_in_any_file_is_found_before_anything_is_loaded(
    directory: Path, name: str, share: float
) -> None:
    data = bytearray((directory / name).read_bytes())
    data[int(share * len(data))] ^= 1
    (directory / name).write_bytes(data)
    found = f"{name} was changed" if name != "bundle.json" else "bundle.json"
    with pytest.raises(BundleError, match=re.escape(found)):
        read_bundle(directory)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(directory: Path, name: str) -> None:
    (directory / name).unlink()
    with pytest.raises(BundleError, match=re.escape(name)):
        read_bundle(directory)


def test_all_mistakes_are_named_at_once(directory: Path) -> None:
    (directory / "front.onnx").unlink()
    (directory / "golden" / "image-00.png").unlink()
    (directory / "smuggled.onnx").write_bytes(b"")
    with pytest.raises(BundleError) as caught:
        read_bundle(directory)
    for part in ("front.onnx is missing", "golden/image-00.png is missing", "smuggled.onnx does not belong"):
        assert part in str(caught.value)
    assert "dvc repro export_onnx" in str(caught.value)


def test_edited_labels_are_found(directory: Path) -> None:
    index = json.loads((directory / "bundle.json").read_text())
    write_json(directory / "bundle.json", index | {"labels": list(reversed(LABELS))})
    with pytest.raises(BundleError, match=r"bundle\.json was edited"):
        read_bundle(directory)


def test_an_unknown_format_version_says_which_ones_are_read(directory: Path) -> None:
    index = json.loads((directory / "bundle.json").read_text())
    write_json(directory / "bundle.json", index | {"format_version": 7})
    with pytest.raises(BundleError, match="format version 7; this tanuki reads 1, 2"):
        read_bundle(directory)


@pytest.mark.parametrize("content", [None, b"", b"[1]", b"{", b"\xff\xfe"])
def test_a_folder_without_a_readable_index_is_no_bundle(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError):
        read_bundle(tmp_path)


def test_labels_must_fit_the_graph(tmp_path: Path) -> None:
    model, front, back = colour_graphs()
    golden = [encoded(colour_image("blau"))]
    for labels, found in ((LABELS[:2], "shape .* for 2 labels"), (("a", "a", "b"), "two labels are the same")):
        with pytest.raises(BundleError, match=found):
            write_bundle(
                tmp_path / "bundle", model=model, front=front, back=back, facts=colour_facts(labels), golden=golden
            )
    assert not (tmp_path / "bundle").exists()


def test_graphs_in_the_wrong_place_are_refused(tmp_path: Path) -> None:
    model, front, back = colour_graphs()
    golden = [encoded(colour_image("blau"))]
    with pytest.raises(BundleError, match=r"front\.onnx maps"):
        write_bundle(tmp_path / "b", model=model, front=back, back=front, facts=colour_facts(), golden=golden)
    with pytest.raises(BundleError, match=r"model\.onnx: it is no whole ONNX file"):
        write_bundle(tmp_path / "b", model=b"x", front=front, back=back, facts=colour_facts(), golden=golden)
    with pytest.raises(BundleError, match="golden"):
        write_bundle(tmp_path / "b", model=model, front=front, back=back, facts=colour_facts(), golden=[])


def test_verification_finds_a_graph_that_answers_otherwise(directory: Path) -> None:
    """As another onnxruntime or processor might: every digest fits, the answers do not."""
    golden = json.loads((directory / "golden" / "golden.json").read_text())
    golden[1]["probabilities"] = [1 / 3] * 3
    golden[2]["embedding"][0] += 0.1
    write_json(directory / "golden" / "golden.json", golden)
    seal(directory)
    read_bundle(directory)
    with pytest.raises(BundleError, match=r"image-01.jpeg is off by .* in its probabilities .*image-02.jpeg is off"):
        verify_bundle(directory)


@pytest.fixture
def quantised(tmp_path: Path) -> Bundle:
    """A bundle whose "int8" half is a little less sharp than fp32."""
    model, front, back = colour_graphs()
    golden = [encoded(colour_image(label)) for label in LABELS]
    int8 = colour_graphs(sharpness=7.0)[2]
    return write_bundle(
        tmp_path / "int8", model=model, front=front, back=back, facts=colour_facts(), golden=golden, int8=int8
    )


def test_a_bundle_in_int8_answers_with_that_half_and_is_golden_in_both(quantised: Bundle) -> None:
    assert (quantised.precision, quantised.back_path.name) == ("int8", "back.int8.onnx")
    assert {"back.onnx", "back.int8.onnx", "golden/golden.whole.json"} <= set(bundle_files(quantised))
    verify_bundle(quantised.directory)
    halves, whole = (
        json.loads((quantised.directory / "golden" / name).read_text())[0]["probabilities"]
        for name in ("golden.json", "golden.whole.json")
    )
    assert max(halves) < max(whole) - 0.02
    with Predictor(quantised) as predictor:
        found = predictor.predict([colour_image("blau")]).probabilities[0]
    np.testing.assert_allclose(found, halves, atol=1e-6)


def test_the_golden_pictures_are_pictures_whatever_answers_lie_beside_them(quantised: Bundle) -> None:
    assert golden_pictures(quantised) == [encoded(colour_image(label)) for label in LABELS]


def test_an_int8_half_is_checked_like_the_others(quantised: Bundle) -> None:
    quantised.back_path.write_bytes(colour_graphs(sharpness=5.0)[2])
    with pytest.raises(BundleError, match=r"back\.int8\.onnx was changed"):
        read_bundle(quantised.directory)
    seal(quantised.directory)
    with pytest.raises(BundleError, match=r"off by .* \(halves\)"):
        verify_bundle(quantised.directory)
    whole = quantised.directory / "golden" / "golden.whole.json"
    write_json(whole, json.loads(whole.read_text())[1:])
    seal(quantised.directory)
    with pytest.raises(BundleError, match="about different pictures"):
        verify_bundle(quantised.directory)
    seal(quantised.directory, precision="fp32")
    quantised.back_path.unlink()
    with pytest.raises(BundleError, match=r"back\.int8\.onnx is missing"):
        read_bundle(quantised.directory)


def test_an_int8_half_of_other_classes_makes_no_bundle(tmp_path: Path) -> None:
    model, front, back = colour_graphs()
    other = colour_graphs(labels=("blau", "grün"))[2]
    with pytest.raises(BundleError, match="the half in int8 maps"):
        write_bundle(
            tmp_path / "b",
            model=model,
            front=front,
            back=back,
            facts=colour_facts(),
            golden=[encoded(colour_image("blau"))],
            int8=other,
        )


def test_the_halves_answer_as_the_whole(directory: Path) -> None:
    import onnxruntime as ort

    bundle = read_bundle(directory)
    images = np.stack([colour_image(label, seed=seed) for seed, label in enumerate(LABELS * 4)])
    whole = ort.InferenceSession(str(bundle.model_path), providers=["CPUExecutionProvider"])
    probabilities, embeddings = whole.run(["probabilities", "embedding"], {"images": images})
    with Predictor(bundle) as predictor:
        answers = predictor.predict(list(images))
    np.testing.assert_allclose(answers.probabilities, probabilities, atol=1e-6)
    np.testing.assert_allclose(answers.embeddings, embeddings, atol=1e-6)


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_step_of_writing_leaves_the_old_bundle_or_the_new_one(
    tmp_path: Path, repository: Path, stride: int
) -> None:
    command = [sys.executable, "-m", "tests.deploy.kill_everywhere", "bundle", str(tmp_path), str(stride)]
    run = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[0]) > 20 // stride
