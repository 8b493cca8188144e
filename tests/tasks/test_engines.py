"""Which engine the frozen trunk runs on, and that all of them compute what onnxruntime computes."""

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from deploy.files import sha256_file, write_bytes
from tasks import cache_features
from tasks.errors import BackboneError, ParamsError
from tasks.export.graph import to_bytes
from tasks.export.network import export_network
from tasks.layout import Layout
from tasks.models.architectures import build_network
from tasks.models.backbone_card import BackboneCard
from tasks.models.engines import (
    FLOAT32_TOLERANCE,
    HALF_TOLERANCE,
    EngineName,
    Machine,
    choose_engine,
    onnxruntime_forward,
    open_engine,
    openvino_forward,
    this_machine,
    torch_forward,
)
from tests.tasks.feature_workspaces import AUGMENT, FEATURES, make_workspace

SIZE_PX = 32
PIXELS = np.random.default_rng(0).standard_normal((9, 3, SIZE_PX, SIZE_PX), dtype=np.float32)
with_openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the optional extra openvino is not installed"
)
with_cuda = pytest.mark.skipif(not this_machine().has_cuda, reason="there is no CUDA device")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, BackboneCard]:
    """A real network with random weights: its weights, its graph and its card."""
    layout = Layout(tmp_path_factory.mktemp("backbone"))
    torch.manual_seed(0)
    network = build_network("mobilenet_v3_small", depths=2)
    write_bytes(layout.trunk_onnx, to_bytes(export_network(network, size_px=SIZE_PX, opset=20, exporters=["legacy"])))
    save_file({name: tensor.contiguous() for name, tensor in network.trunk_state().items()}, layout.backbone_weights)
    card = BackboneCard(
        source="file:test",
        architecture="mobilenet_v3_small",
        weights_sha256=sha256_file(layout.backbone_weights),
        licence=None,
        size_px=SIZE_PX,
        crop_fraction=1.0,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        depths=2,
        feature_dim=network.feature_dim,
        labels=None,
        preprocessing_sha256="0" * 64,
        trunk_sha256=sha256_file(layout.trunk_onnx),
        notes=(),
    )
    return layout, card


def relative_difference(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest over rows of ``|found - expected| / |expected|``."""
    return float((np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())


@pytest.mark.parametrize(
    ("machine", "engine", "reason"),
    [
        (Machine(has_cuda=True, openvino_bfloat16=True), "torch", "there is a CUDA device"),
        (Machine(has_cuda=False, openvino_bfloat16=True), "openvino", "computes in bfloat16"),
        (Machine(has_cuda=False, openvino_bfloat16=False), "onnxruntime", "the CPU has no bfloat16"),
        (Machine(has_cuda=False, openvino_bfloat16=None), "onnxruntime", "OpenVINO is not installed"),
    ],
)
def test_auto_follows_the_machine_and_says_why(machine: Machine, engine: EngineName, reason: str) -> None:
    chosen, why = choose_engine("auto", machine)
    assert chosen == engine
    assert reason in why


def test_what_is_named_is_taken_or_refused() -> None:
    bare = Machine(has_cuda=False, openvino_bfloat16=None)
    assert choose_engine("onnxruntime", Machine(True, True)) == ("onnxruntime", "features.engine names it")
    with pytest.raises(ParamsError, match=r"no CUDA device.*Set it to auto"):
        choose_engine("torch", bare)
    with pytest.raises(ParamsError, match=r"not installed.*tanuki\[openvino\]"):
        choose_engine("openvino", bare)


def test_looking_at_the_machine_imports_no_torch(repository: Path) -> None:
    code = (
        "import sys; from tasks.models.engines import this_machine; this_machine(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True)


def test_torch_computes_what_onnxruntime_computes(backbone: tuple[Layout, BackboneCard]) -> None:
    layout, card = backbone
    forward, precision = torch_forward(layout.backbone_weights, card, device="cpu", place=0)
    expected = onnxruntime_forward(layout.trunk_onnx)(PIXELS)
    assert precision == "float32"
    assert relative_difference(forward(PIXELS), expected) < FLOAT32_TOLERANCE / 10
    with pytest.raises(BackboneError, match="not what the backbone's card speaks of"):
        torch_forward(layout.trunk_onnx, card, device="cpu", place=0)


@with_cuda
def test_torch_on_a_gpu_computes_what_onnxruntime_computes(backbone: tuple[Layout, BackboneCard]) -> None:
    layout, card = backbone
    engine = open_engine("torch", trunk=layout.trunk_onnx, weights=layout.backbone_weights, card=card, place=0)
    assert engine.name in ("torch-cuda-bfloat16", "torch-cuda-float16")
    expected = onnxruntime_forward(layout.trunk_onnx)(PIXELS)
    assert relative_difference(engine.forward(PIXELS), expected) < HALF_TOLERANCE


@with_openvino
def test_openvino_computes_what_onnxruntime_computes_from_several_threads(
    backbone: tuple[Layout, BackboneCard],
) -> None:
    layout, _ = backbone
    expected = onnxruntime_forward(layout.trunk_onnx)(PIXELS)
    forward = openvino_forward(layout.trunk_onnx, "float32")
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda row: forward(PIXELS[row : row + 1]), list(range(9)) * 4))
    assert relative_difference(np.concatenate(parts), np.tile(expected, (4, 1))) < FLOAT32_TOLERANCE / 10


@with_openvino
def test_features_of_openvino_are_kept_apart_and_recheck_as_they_were(tmp_path: Path) -> None:
    layout = make_workspace(tmp_path, {"ant": 5, "bee": 5})
    for engine, extracted in (("onnxruntime", 16), ("openvino", 16), ("openvino", 0), ("onnxruntime", 0)):
        report = cache_features.run(layout, features=FEATURES.model_copy(update={"engine": engine}), augment=AUGMENT)
        assert (report.extracted, report.stale, report.engine.split("-")[0]) == (extracted, 0, engine)


@with_openvino
def test_openvino_names_a_graph_that_it_cannot_run(tmp_path: Path) -> None:
    (tmp_path / "trunk.onnx").write_bytes(b"no graph")
    with pytest.raises(BackboneError, match=r"OpenVINO cannot run .*trunk\.onnx.*features\.engine"):
        openvino_forward(tmp_path / "trunk.onnx", "float32")


@pytest.mark.parametrize(("size_px", "pictures"), [(16, 784), (64, 49), (224, 4), (384, 1)])
def test_a_batch_on_a_cpu_holds_fewer_pictures_the_larger_they_are(
    backbone: tuple[Layout, BackboneCard], size_px: int, pictures: int
) -> None:
    layout, card = backbone
    card = replace(card, size_px=size_px)
    engine = open_engine("onnxruntime", trunk=layout.trunk_onnx, weights=layout.backbone_weights, card=card, place=0)
    assert engine.batch_size == pictures


def test_the_name_of_an_engine_tells_device_and_precision(backbone: tuple[Layout, BackboneCard]) -> None:
    layout, card = backbone
    engine = open_engine("onnxruntime", trunk=layout.trunk_onnx, weights=layout.backbone_weights, card=card, place=0)
    assert (engine.name, engine.reason) == ("onnxruntime-cpu-float32", "features.engine names it")
    assert engine.forward(PIXELS).shape == (9, card.feature_dim)
