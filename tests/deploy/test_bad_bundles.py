"""Bundles whose digests all fit and which are still not to be loaded: foreign, forged or damaged before sealing."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from deploy import runtime
from deploy.bundle import read_bundle, verify_bundle
from deploy.errors import BundleError
from deploy.predictor import Predictor
from tests.deploy.tiny_bundle import LABELS, colour_graphs, seal, write_colour_bundle


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_colour_bundle(tmp_path / "bundle").directory


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object, **__: object) -> None:
        raise AssertionError("a session was opened")

    monkeypatch.setattr(runtime.ort, "InferenceSession", loaded)


def with_external_data(model: onnx.ModelProto) -> None:
    """The first weight's values lie in a file outside the bundle."""
    weight = model.graph.initializer[-1]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../etc/passwd")


def with_a_custom_operator(model: onnx.ModelProto) -> None:
    model.graph.node[-1].domain = "org.evil"
    model.opset_import.append(helper.make_opsetid("org.evil", 1))


def with_other_labels(model: onnx.ModelProto) -> None:
    helper.set_model_props(model, {"labels": json.dumps(LABELS[::-1])})


def with_garbled_labels(model: onnx.ModelProto) -> None:
    helper.set_model_props(model, {"labels": "[" * 100_000})


@pytest.mark.parametrize("name", ["model.onnx", "back.onnx"])
@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (with_external_data, "keeps 1 tensors in other files"),
        (with_a_custom_operator, "operators outside the ONNX standard, org.evil:Softmax"),
        (with_other_labels, "tells of other labels"),
        (with_garbled_labels, "recursion"),
    ],
)
def test_a_graph_that_needs_more_than_itself_or_tells_of_another_model_is_never_loaded(
    directory: Path, nothing_loads: None, name: str, spoil: Callable[[onnx.ModelProto], None], found: str
) -> None:
    model = onnx.load_model_from_string((directory / name).read_bytes())
    spoil(model)
    (directory / name).write_bytes(model.SerializeToString())
    seal(directory)
    with pytest.raises(BundleError, match=rf"{name}.*{found}"):
        verify_bundle(directory)


def test_a_gigantic_graph_is_told_from_its_size_alone(directory: Path, nothing_loads: None) -> None:
    """A hole of 3 GiB: reading it to the end would take this test a minute and its memory."""
    os.truncate(directory / "model.onnx", 3 * 2**30)
    with pytest.raises(BundleError, match=r"model\.onnx is gigantic: 3221225472 bytes"):
        read_bundle(directory)


def test_a_gigantic_index_is_not_read(directory: Path) -> None:
    os.truncate(directory / "bundle.json", 2**30)
    with pytest.raises(BundleError, match="no tanuki wrote it"):
        read_bundle(directory)


def test_labels_that_do_not_match_the_outputs_are_never_loaded(directory: Path, nothing_loads: None) -> None:
    seal(directory, labels=list(LABELS[:2]))
    with pytest.raises(BundleError, match="2 labels for 3 probabilities"):
        read_bundle(directory)


def test_outputs_that_are_not_those_of_the_index_are_found_before_an_answer(directory: Path) -> None:
    """Index, labels and digests say two classes, the graph has three."""
    index = json.loads((directory / "bundle.json").read_text())
    index["signature"]["outputs"][0]["shape"][1] = 2
    seal(directory, labels=list(LABELS[:2]), signature=index["signature"])
    with pytest.raises(BundleError, match=r"back\.onnx gives .*'probabilities': 3.* the bundle has 2 labels"):
        Predictor(read_bundle(directory))


def test_a_whole_graph_that_is_not_its_halves_is_found(directory: Path) -> None:
    (directory / "model.onnx").write_bytes(colour_graphs(sharpness=5.0)[0])
    seal(directory)
    with pytest.raises(BundleError, match=r"off by .* in its probabilities \(whole\)"):
        verify_bundle(directory)


def test_bytes_that_are_no_graph_are_told_as_such(directory: Path) -> None:
    (directory / "model.onnx").write_bytes(b"\x0a\x03abc")
    seal(directory)
    with pytest.raises(BundleError, match=r"model\.onnx is no ONNX graph that runs"):
        verify_bundle(directory)


@pytest.mark.parametrize(
    "golden",
    [
        "[]",
        "{}",
        "7",
        "[" * 100_000,
        '[{"file": "../../bundle.json", "probabilities": [1], "embedding": [1]}]',
        '[{"file": "image-00.png", "probabilities": [[1]], "embedding": [1]}]',
        '[{"file": "image-00.png", "probabilities": ["a"], "embedding": [1]}]',
        '[{"file": "image-00.png"}]',
    ],
)
def test_golden_answers_that_are_none_are_told_as_such(directory: Path, golden: str) -> None:
    (directory / "golden" / "golden.json").write_text(golden)
    seal(directory)
    with pytest.raises(BundleError, match="no golden answers"):
        verify_bundle(directory)


def test_golden_answers_of_another_width_are_off(directory: Path) -> None:
    (directory / "golden" / "golden.json").write_text(
        '[{"file": "image-00.png", "probabilities": [0.5, 0.5], "embedding": [1]}]'
    )
    seal(directory)
    with pytest.raises(BundleError, match=r"image-00\.png is off by inf"):
        verify_bundle(directory)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"labels": "abc"}, "labels is no list"),
        ({"labels": [1, 2, 3]}, "a label is no text"),
        ({"labels": ["a", "a", "b"]}, "two labels are the same"),
        ({"precision": None}, "precision is no str"),
        ({"precision": "int4"}, "precision is 'int4', not fp32, int8"),
        ({"precision": "int8"}, r"digests do not name back\.int8\.onnx"),
        ({"digests": {"model.onnx": 3}}, "digests are not names and digests"),
        ({"digests": {"\0": "x"}}, "digests are not names and digests"),
        ({"digests": {}}, "digests do not name model.onnx"),
        ({"signature": {}}, "the signature has not two outputs"),
        ({"signature": {"outputs": [{"shape": ["batch", "n"]}] * 2}}, "the outputs have no width"),
        ({"format_version": [2]}, r"format version \[2\]"),
        ({"format_version": None}, "format version None"),
        ({"format_version": 99}, "this tanuki reads 1, 2"),
    ],
)
def test_an_index_that_does_not_say_what_a_bundle_says_is_refused(
    directory: Path, nothing_loads: None, changes: dict[str, object], found: str
) -> None:
    seal(directory, **changes)
    with pytest.raises(BundleError, match=found):
        read_bundle(directory)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "golden/" + "x" * 300])
def test_a_file_outside_the_bundle_or_of_no_possible_name_is_refused(directory: Path, name: str) -> None:
    digests = json.loads((directory / "bundle.json").read_text())["digests"]
    seal(directory, digests={**digests, name: "0" * 64})
    with pytest.raises(BundleError):
        read_bundle(directory)


def test_a_link_that_points_to_itself_is_refused(directory: Path) -> None:
    (directory / "back.onnx").unlink()
    (directory / "back.onnx").symlink_to("back.onnx")
    with pytest.raises(BundleError, match=r"back\.onnx|cannot be read"):
        read_bundle(directory)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(["labels", "signature", "preprocessing", "lineage", "digests", "precision", "format_version"]),
    value=json_values,
)
def test_no_value_in_the_index_ends_in_anything_but_a_bundle_or_a_clear_error(
    directory: Path, key: str, value: object
) -> None:
    index = (directory / "bundle.json").read_bytes()
    seal(directory, **{key: value})
    with suppress(BundleError):
        read_bundle(directory)
    (directory / "bundle.json").write_bytes(index)


@pytest.mark.parametrize("text", [r'{"labels": "\ud800"}', '{"a": ' + "[" * 100_000])
def test_text_that_is_no_text_and_brackets_without_end_are_no_json(directory: Path, text: str) -> None:
    (directory / "bundle.json").write_text(text)
    with pytest.raises(BundleError, match="is no JSON"):
        read_bundle(directory)
