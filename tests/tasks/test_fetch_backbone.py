"""Weights of every source become one folder; nothing is unpickled; every mistake is one clear message."""

import dataclasses
import datetime
import http.server
import io
import ipaddress
import json
import os
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file

from deploy.files import sha256_bytes, sha256_file
from deploy.runtime import open_session
from tasks import fetch_backbone
from tasks.errors import BackboneError
from tasks.layout import Layout
from tasks.models.architectures import build_network
from tasks.models.backbone_card import read_card
from tasks.models.weights import EMBEDDED_DIR, read_weights
from tasks.params import Params, load_params

ARCHITECTURE = "squeezenet1_1"  # few operators, so that it exports fast


@pytest.fixture(scope="module")
def params(repository: Path) -> Params:
    return load_params(repository / "params.yaml")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeezenet.safetensors"
    save_file(torchvision.models.squeezenet1_1(weights=None, num_classes=7).state_dict(), path)
    return path


def fetch(root: Path, params: Params, source: str, **backbone: Any) -> fetch_backbone.FetchBackboneReport:
    changes = {"source": source, "architecture": ARCHITECTURE, "size_px": 32, **backbone}
    return fetch_backbone.run(
        Layout(root),
        backbone=params.backbone.model_copy(update=changes),
        features=params.features,
        export_onnx=params.export_onnx,
    )


@pytest.fixture(scope="module")
def fetched(
    tmp_path_factory: pytest.TempPathFactory, params: Params, weights_file: Path
) -> tuple[Layout, fetch_backbone.FetchBackboneReport]:
    root = tmp_path_factory.mktemp("workspace")
    return Layout(root), fetch(root, params, f"file:{weights_file}", licence="MIT")


def read(source: str, sha256: str | None = None) -> Any:
    return read_weights(source, root=Path(), sha256=sha256)


def test_the_folder_holds_weights_graphs_and_a_card_that_names_their_digests(
    fetched: tuple[Layout, fetch_backbone.FetchBackboneReport],
) -> None:
    layout, report = fetched
    card = read_card(layout.backbone_card)
    assert card.weights_sha256 == sha256_file(layout.backbone_weights)
    assert card.preprocessing_sha256 == sha256_file(layout.preprocess_onnx)
    assert card.trunk_sha256 == sha256_file(layout.trunk_onnx) == report.trunk_sha256
    assert (card.architecture, card.licence, card.size_px, card.crop_fraction) == (ARCHITECTURE, "MIT", 32, 0.875)
    assert (card.depths, card.feature_dim, card.labels) == (4, report.feature_dim, None)
    assert report.largest_difference < 1e-4
    assert load_file(layout.backbone_weights)["classifier.1.weight"].shape[0] == 7  # the classifier is kept


def test_the_trunk_computes_what_the_network_does(
    fetched: tuple[Layout, fetch_backbone.FetchBackboneReport],
) -> None:
    layout, _ = fetched
    card = read_card(layout.backbone_card)
    network = build_network(card.architecture, depths=card.depths)
    network.load_trunk(load_file(layout.backbone_weights))
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    pixels = open_session(layout.preprocess_onnx).run(["pixels"], {"images": images})[0]
    embedding = open_session(layout.trunk_onnx).run(["embedding"], {"pixels": pixels})[0]
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels)).numpy()
    np.testing.assert_allclose(embedding, expected, rtol=1e-4, atol=1e-5)


def test_another_clone_gets_the_same_bytes_and_no_file_tells_where_it_was_made(
    fetched: tuple[Layout, fetch_backbone.FetchBackboneReport], params: Params, weights_file: Path, tmp_path: Path
) -> None:
    layout, report = fetched
    again = fetch(tmp_path / "elsewhere", params, f"file:{weights_file}", licence="MIT")
    assert dataclasses.asdict(again) == dataclasses.asdict(report)
    for path in layout.backbone_dir.iterdir():
        assert path.read_bytes() == (tmp_path / "elsewhere/data/backbone" / path.name).read_bytes()
    graph = layout.trunk_onnx.read_bytes()
    assert b".py" not in graph
    assert os.fsencode(Path(torch.__file__).parent) not in graph
    assert onnx.load_model_from_string(graph).graph.node[0].metadata_props == []


def test_a_failed_fetch_leaves_the_folder_as_it_was(
    fetched: tuple[Layout, fetch_backbone.FetchBackboneReport], params: Params, weights_file: Path
) -> None:
    layout, report = fetched
    with pytest.raises(BackboneError, match="do not fit"):
        fetch(layout.root, params, f"file:{weights_file}", architecture="resnet18")
    assert sha256_file(layout.trunk_onnx) == report.trunk_sha256


def test_the_architecture_must_be_known_and_undisputed(params: Params, weights_file: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"backbone\.architecture is missing"):
        fetch(tmp_path, params, f"file:{weights_file}", architecture=None)
    copy = tmp_path / "glyphs.safetensors"
    copy.write_bytes(weights_file.read_bytes())
    copy.with_suffix(".json").write_text(json.dumps({"architecture": "mobilenet_v2"}))
    with pytest.raises(BackboneError, match=r"is squeezenet1_1, but .* is mobilenet_v2"):
        fetch(tmp_path, params, "file:glyphs.safetensors")
    with pytest.raises(BackboneError, match="above 0"):
        fetch(tmp_path, params, f"file:{weights_file}", std=(0.5, 0.0, 0.5))


@pytest.mark.slow
def test_a_vision_transformer_refuses_another_picture_size(params: Params, tmp_path: Path) -> None:
    save_file(build_network("vit_b_32", depths=1).trunk_state(), tmp_path / "vit.safetensors")
    with pytest.raises(BackboneError, match="224 px only"):
        fetch(tmp_path, params, "file:vit.safetensors", architecture="vit_b_32", size_px=64)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    ],
    ids=["plain", "state_dict", "model of a parallel run"],
)
def test_a_pth_is_read_without_unpickling_and_unwrapped(wrap: Any, weights_file: Path, tmp_path: Path) -> None:
    state = load_file(weights_file)
    torch.save(wrap(state), tmp_path / "weights.pth")
    found = read(f"file:{tmp_path / 'weights.pth'}").state
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


class Hostile:
    """Runs code where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_hostile_pth_is_refused_and_does_not_run(zipped: bool, tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.pth", tmp_path / "it ran"
    torch.save({"state_dict": Hostile(mark)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BackboneError, match="not unpickled"):
        read(f"file:{path}")
    assert not mark.exists()


def _pth(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (b"GIF89a no weights at all", "neither a whole safetensors file nor"),
        (b"PK\x03\x04 no archive", "damaged"),
        (_pth([1, 2]), "holds a list"),
        (_pth({"epoch": 3}), "holds no tensor"),
        (_pth({"a": torch.tensor([float("nan")])}), "not finite in a"),
    ],
    ids=["empty", "foreign", "broken archive", "a list", "no tensor", "not finite"],
)
def test_a_file_that_is_no_weights_is_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(data)
    with pytest.raises(BackboneError, match=reason):
        read(f"file:{tmp_path / 'weights.bin'}")


def test_a_truncated_file_and_a_missing_one_are_refused(weights_file: Path, tmp_path: Path) -> None:
    (tmp_path / "half.safetensors").write_bytes(weights_file.read_bytes()[:100_000])
    with pytest.raises(BackboneError, match=r"half\.safetensors is neither"):
        read(f"file:{tmp_path / 'half.safetensors'}")
    with pytest.raises(BackboneError, match="cannot be read: No such file"):
        read("file:nowhere.safetensors")


def test_weights_with_another_digest_are_refused(weights_file: Path) -> None:
    assert read(f"file:{weights_file}", sha256_file(weights_file).upper()).state
    with pytest.raises(BackboneError, match=r"backbone\.sha256 is 0000"):
        read(f"file:{weights_file}", "0" * 64)


@pytest.mark.parametrize("source", ["mobilenet_v2", "http://example.org/weights.pth", "s3://bucket/weights"])
def test_an_unknown_kind_of_source_names_the_known_ones(source: str) -> None:
    with pytest.raises(BackboneError, match="embedded:NAME, torchvision:ARCH/WEIGHTS"):
        read(source)


def test_an_embedded_backbone_that_is_not_there_is_named() -> None:
    with pytest.raises(BackboneError, match="no embedded backbone 'nothing'"):
        read("embedded:nothing")


def test_every_embedded_backbone_fits_its_architecture() -> None:
    names = sorted(path.stem for path in EMBEDDED_DIR.glob("*.safetensors"))
    assert "glyphs_mobilenet_v3_small" in names
    for name in names:
        weights = read(f"embedded:{name}")
        build_network(weights.architecture, depths=1).load_trunk(weights.state)
        assert weights.licence


def test_the_card_beside_a_file_gives_its_preprocessing(weights_file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "own.safetensors"
    copy.write_bytes(weights_file.read_bytes())
    card = {"architecture": ARCHITECTURE, "size_px": 64, "mean": [0.5] * 3, "std": [0.5] * 3, "licence": "Apache-2.0"}
    copy.with_suffix(".json").write_text(json.dumps(card | {"seed": 0}))
    weights = read(f"file:{copy}")
    assert (weights.architecture, weights.size_px, weights.crop_fraction) == (ARCHITECTURE, 64, 1.0)
    assert (weights.mean, weights.licence) == ((0.5, 0.5, 0.5), "Apache-2.0")
    copy.with_suffix(".json").write_text(json.dumps(card | {"sha256": "0" * 64}))
    with pytest.raises(BackboneError, match="card of weights with sha256 0000"):
        read(f"file:{copy}")
    copy.with_suffix(".json").write_text("{")
    with pytest.raises(BackboneError, match="card beside the weights"):
        read(f"file:{copy}")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache and no way out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # the discard port: refused at once
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "torch/hub/checkpoints"


def test_torchvision_weights_come_with_their_own_preprocessing_and_labels(hub: Path) -> None:
    enum = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    hub.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), hub / enum.url.rsplit("/", 1)[1])
    weights = read("torchvision:squeezenet1_1/IMAGENET1K_V1")
    assert (weights.architecture, weights.size_px, weights.crop_fraction) == (ARCHITECTURE, 224, 0.875)
    assert weights.labels is not None
    assert weights.labels[0] == "tench"
    with pytest.raises(BackboneError, match="other weights"):
        read("torchvision:squeezenet1_1/DEFAULT", "0" * 64)


def test_torchvision_without_a_network_says_where_to_put_the_file(hub: Path) -> None:
    with pytest.raises(BackboneError, match=r"squeezenet1_1-b8a52dc0\.pth into .*checkpoints"):
        read("torchvision:squeezenet1_1/DEFAULT")
    assert not list(hub.glob("*"))


def test_a_torchvision_name_that_does_not_exist_is_told_with_those_that_do() -> None:
    with pytest.raises(BackboneError, match="no classification architecture 'resnet19'"):
        read("torchvision:resnet19/DEFAULT")
    with pytest.raises(BackboneError, match=r"has no weights ''.*IMAGENET1K_V1, IMAGENET1K_V2"):
        read("torchvision:resnet50")


def test_timm_without_a_network_is_a_clear_message(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm", reason="the optional extra timm is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BackboneError, match="timm:no_such_model cannot be had"):
        read("timm:no_such_model")
    with pytest.raises(BackboneError, match="cannot be checked for timm"):
        read("timm:test_efficientnet", "0" * 64)


@pytest.fixture
def server(weights_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real https server on loopback whose certificate this process trusts."""
    certificate = self_signed(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(weights_file.parent))

        def log_message(self, *arguments: Any) -> None:
            """Silent."""

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as loopback:
        loopback.socket = context.wrap_socket(loopback.socket, server_side=True)
        thread = threading.Thread(target=loopback.serve_forever)
        thread.start()
        yield f"https://127.0.0.1:{loopback.server_port}"
        loopback.shutdown()
        thread.join()


def self_signed(folder: Path) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file."""
    x509 = pytest.importorskip("cryptography.x509", reason="comes with dvc")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "loopback")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    path = folder / "certificate.pem"
    path.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + certificate.public_bytes(pem)
    )
    return path


def test_an_address_is_downloaded_once_and_checked(server: str, weights_file: Path, tmp_path: Path) -> None:
    address, digest = f"{server}/{weights_file.name}", sha256_file(weights_file)
    assert read(address, digest).state.keys() == load_file(weights_file).keys()
    assert read(f"{server}/gone", digest).state  # from the cache: its digest is its name
    assert [path.name for path in (tmp_path / "torch/hub/checkpoints").iterdir()] == [f"tanuki-{digest}"]


def test_an_address_with_other_bytes_or_no_answer_leaves_nothing_behind(
    server: str, weights_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(BackboneError, match="other weights"):
        read(f"{server}/{weights_file.name}", sha256_bytes(b"other"))
    with pytest.raises(BackboneError, match="cannot be had: File not found"):
        read(f"{server}/gone", sha256_bytes(b"other"))
    assert not list((tmp_path / "torch/hub/checkpoints").iterdir())


def test_an_address_without_a_digest_is_not_trusted() -> None:
    with pytest.raises(BackboneError, match=r"backbone\.sha256 is missing"):
        read("https://example.org/weights.pth")
    with pytest.raises(BackboneError, match="64 hexadecimal digits"):
        read("https://example.org/weights.pth", "abc")
