"""params.yaml as records."""

from pathlib import Path

import pytest

from tasks.errors import ParamsError
from tasks.params import load_params


@pytest.fixture
def params_text(repository: Path) -> str:
    return (repository / "params.yaml").read_text()


def load(tmp_path: Path, text: str):
    path = tmp_path / "params.yaml"
    path.write_text(text)
    return load_params(path)


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path, params_text: str) -> None:
    text = params_text.replace("max_probability_difference: 1.0e-3", "max_probability_difference: 1e-3")
    assert load(tmp_path, text).export_onnx.max_probability_difference == 0.001


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed: 0", "sed: 0", "sed: no such key"),
        ("seed: 0", "seed: zero", "seed: "),
        ("seed: 0", "seed: true", "seed: "),
        ("layout: folders", "layout: zip", "data.layout"),
        ("hflip: false", "hflip: 'no'", "augment.hflip"),
        ("batch_size: auto", "batch_size: 0", "features.batch_size"),
        ("views: auto", "views: many", "features.views"),
        ("stages: [top, rest]", "stages: [top, bottom]", "finetune.stages: .*'bottom'.*top, rest"),
        ("device: auto", "device: tpu", "finetune.device"),
        ("precision: auto", "precision: float16", "finetune.precision"),
        ("mean: null", "mean: [0.5, 0.5]", "backbone.mean"),
    ],
)
def test_a_mistake_is_named_by_its_key(tmp_path: Path, params_text: str, old: str, new: str, said: str) -> None:
    assert old in params_text
    with pytest.raises(ParamsError, match=said):
        load(tmp_path, params_text.replace(old, new, 1))


def test_all_mistakes_are_told_at_once(tmp_path: Path, params_text: str) -> None:
    broken = params_text.replace("seed: 0", "seed: -1").replace("opset: 20", "opset: 3").replace("draws:", "drawz:")
    with pytest.raises(ParamsError) as caught:
        load(tmp_path, broken)
    assert all(key in str(caught.value) for key in ("seed", "export_onnx.opset", "gate.drawz", "gate.draws"))


@pytest.mark.parametrize("text", ["", "seed: [", "- a list", "seed: 0\nseed: 1"])
def test_what_is_no_params_file_is_told_so(tmp_path: Path, text: str) -> None:
    with pytest.raises(ParamsError):
        load(tmp_path, text)


def test_a_missing_file_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="is missing"):
        load_params(tmp_path / "params.yaml")
