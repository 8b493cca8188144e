"""NVIDIA's own client, unmodified, against this server: every call of it that applies."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.deploy.serving.running import Running
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded

http = pytest.importorskip("tritonclient.http")
errors = pytest.importorskip("tritonclient.utils")


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator["http.InferenceServerClient"]:
    client = http.InferenceServerClient(f"127.0.0.1:{running.port}")
    yield client
    client.close()


def images_input(*, binary: bool = True, count: int = 1) -> "http.InferInput":
    images = np.stack([colour_image(LABELS[index % 3]) for index in range(count)])
    asked = http.InferInput("images", images.shape, "UINT8")
    asked.set_data_from_numpy(images, binary_data=binary)
    return asked


def encoded_input(*labels: str) -> "http.InferInput":
    asked = http.InferInput("encoded", [len(labels)], "BYTES")
    asked.set_data_from_numpy(np.array([encoded(colour_image(label), "JPEG") for label in labels], dtype=np.object_))
    return asked


def test_what_it_asks_of_the_server(client: "http.InferenceServerClient") -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m")
    assert client.is_model_ready("m", "1")
    assert not client.is_model_ready("m", "7")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "tanuki"
    assert client.get_model_metadata("m")["inputs"][0]["name"] == "images"
    assert client.get_model_metadata("m", "1")["versions"] == ["1"]
    assert client.get_model_config("m")["max_batch_size"] == 8
    assert client.get_model_repository_index() == [{"name": "m", "version": "1", "state": "READY"}]
    client.load_model("m")


def test_what_is_not_offered_is_an_error_it_understands(client: "http.InferenceServerClient") -> None:
    for call in (
        lambda: client.get_model_metadata("other"),
        lambda: client.get_model_metadata("m", "7"),
        lambda: client.load_model("other"),
        lambda: client.unload_model("m"),
        lambda: client.infer("other", [images_input()]),
        lambda: client.get_system_shared_memory_status(),
        lambda: client.get_trace_settings(),
        lambda: client.get_log_settings(),
    ):
        with pytest.raises(errors.InferenceServerException):
            call()


@pytest.mark.parametrize("is_binary", [True, False])
@pytest.mark.parametrize("wants_binary", [True, False, None])
def test_infer(client: "http.InferenceServerClient", is_binary: bool, wants_binary: bool | None) -> None:
    wanted = None
    if wants_binary is not None:
        wanted = [http.InferRequestedOutput(name, binary_data=wants_binary) for name in ("probabilities", "embedding")]
    result = client.infer("m", [images_input(binary=is_binary, count=5)], outputs=wanted, request_id="mine")
    assert result.get_response()["id"] == "mine"
    assert result.as_numpy("probabilities").argmax(axis=1).tolist() == [0, 1, 2, 0, 1]
    assert result.as_numpy("embedding").shape == (5, 3)
    assert result.get_output("probabilities")["datatype"] == "FP32"


@pytest.mark.parametrize("how", ["gzip", "deflate"])
def test_infer_compressed(client: "http.InferenceServerClient", how: str) -> None:
    result = client.infer(
        "m", [images_input()], request_compression_algorithm=how, response_compression_algorithm=how, model_version="1"
    )
    assert result.as_numpy("probabilities").shape == (1, 3)


def test_infer_encoded_pictures_and_their_classes(client: "http.InferenceServerClient") -> None:
    wanted = [http.InferRequestedOutput("probabilities", class_count=2)]
    result = client.infer("m", [encoded_input("grün", "blau")], outputs=wanted)
    names = [row[0].decode().split(":", 2)[2] for row in result.as_numpy("probabilities")]
    assert names == ["grün", "blau"]


def test_infer_from_another_thread_of_control(client: "http.InferenceServerClient") -> None:
    asked = [client.async_infer("m", [encoded_input(label)]) for label in LABELS]
    found = [each.get_result().as_numpy("probabilities").argmax() for each in asked]
    assert found == [0, 1, 2]


def test_statistics_count_what_was_asked(client: "http.InferenceServerClient") -> None:
    before = client.get_inference_statistics("m")["model_stats"][0]
    client.infer("m", [images_input(count=3)])
    after = client.get_inference_statistics("m", "1")["model_stats"][0]
    assert after["inference_count"] == before["inference_count"] + 3
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert after["last_inference"] >= before["last_inference"]
    assert client.get_inference_statistics()["model_stats"][0]["name"] == "m"


def test_a_request_and_an_answer_made_by_hand(client: "http.InferenceServerClient", running: Running) -> None:
    body, length = http.InferenceServerClient.generate_request_body([images_input()])
    headers = {"Inference-Header-Content-Length": str(length)}
    answer = running.client.post("/v2/models/m/infer", content=bytes(body), headers=headers)
    told = int(answer.headers.get("Inference-Header-Content-Length", 0)) or None
    result = http.InferenceServerClient.parse_response_body(answer.content, header_length=told)
    assert result.as_numpy("probabilities").shape == (1, 3)
