"""The protocol over gRPC, asked by NVIDIA's own client, whose proto is another copy than ours."""

import json
import queue
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deploy.serving.grpc_messages import HEALTH, INFERENCE, message_classes
from tests.deploy.serving.running import Running, add_version, eventually, make_certificate, serving
from tests.deploy.serving.test_inference_protocol import LENGTH, REQUESTS
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded

grpc = pytest.importorskip("grpc")
pq = pytest.importorskip("pyarrow.parquet")
client_module = pytest.importorskip("tritonclient.grpc")
InferenceServerException = pytest.importorskip("tritonclient.utils").InferenceServerException

SERVICE = "inference.GRPCInferenceService"
OTHER_NAMES = {
    "Port": ("ModelMetadataResponse.TensorMetadata", "ModelInferResponse.InferOutputTensor"),
    "Value": ("InferParameter",),
    "Parameter": ("ModelInferRequest.ParametersEntry",),
    "Contents": ("InferTensorContents",),
    "Input": ("ModelInferRequest.InferInputTensor",),
    "Wanted": ("ModelInferRequest.InferRequestedOutputTensor",),
    "ModelIndex": ("RepositoryIndexResponse.ModelIndex",),
    "Duration": ("StatisticDuration",),
}


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[Any]:
    with client_module.InferenceServerClient(f"127.0.0.1:{running.grpc_port}") as client:
        yield client


def images_input(*labels: str) -> Any:
    images = np.stack([colour_image(label) for label in labels])
    asked = client_module.InferInput("images", images.shape, "UINT8")
    asked.set_data_from_numpy(images)
    return asked


def encoded_input(*labels: str) -> Any:
    asked = client_module.InferInput("encoded", [len(labels)], "BYTES")
    asked.set_data_from_numpy(np.array([encoded(colour_image(label)) for label in labels], dtype=np.object_))
    return asked


def kind_of(field: Any) -> str:
    """An enum is an int32 in bytes."""
    kinds = {field.TYPE_ENUM: field.TYPE_INT32}
    return f"{kinds.get(field.type, field.type)}{'*' if field.is_repeated else ''}"


def test_our_messages_are_those_of_the_public_proto() -> None:
    from tritonclient.grpc import model_config_pb2, service_pb2

    protos = (service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR)
    public = {name: message for proto in protos for name, message in proto.message_types_by_name.items()}
    for name, ours in message_classes("inference", INFERENCE).items():
        for other in OTHER_NAMES.get(name, (name,)):
            outer, _, inner = other.partition(".")
            theirs = public[outer].nested_types_by_name[inner] if inner else public[outer]
            for field in ours.DESCRIPTOR.fields:
                same = theirs.fields_by_name[field.name]
                assert (field.number, kind_of(field)) == (same.number, kind_of(same)), (name, field.name)


def test_what_it_asks_of_the_server(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("m")
    assert client.is_model_ready("m", "1")
    assert not client.is_model_ready("m", "7")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata(as_json=True)["name"] == "tanuki"
    assert client.get_model_metadata("m").inputs[0].name == "images"
    assert client.get_model_metadata("m", "1").versions == ["1"]
    config = client.get_model_config("m").config
    assert config.max_batch_size == 8
    assert [port.data_type for port in config.input] == [2, 13]  # TYPE_UINT8, TYPE_STRING
    (index,) = client.get_model_repository_index().models
    assert (index.name, index.version, index.state) == ("m", "1", "READY")
    client.load_model("m")


def test_infer(client: Any) -> None:
    result = client.infer("m", [images_input(*LABELS)], request_id="mine", model_version="1", client_timeout=20)
    assert result.get_response().id == "mine"
    assert result.as_numpy("probabilities").argmax(axis=1).tolist() == [0, 1, 2]
    assert result.as_numpy("embedding").shape == (3, 3)


def test_infer_encoded_pictures_and_their_classes(client: Any) -> None:
    wanted = [client_module.InferRequestedOutput("probabilities", class_count=1)]
    result = client.infer("m", [encoded_input("grün", "blau")], outputs=wanted)
    assert [row[0].decode().split(":", 2)[2] for row in result.as_numpy("probabilities")] == ["grün", "blau"]


def test_typed_contents_are_understood_as_well(running: Running) -> None:
    types = message_classes("inference", INFERENCE)
    image = colour_image("blau")
    inputs = [
        {
            "name": "images",
            "datatype": "UINT8",
            "shape": [1, *image.shape],
            "contents": {"uint_contents": image.ravel().tolist()},
        },
        {"name": "encoded", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [encoded(image)]}},
    ]
    with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=types["ModelInferRequest"].SerializeToString,
            response_deserializer=types["ModelInferResponse"].FromString,
        )
        answers = [call(types["ModelInferRequest"](model_name="m", inputs=[each])) for each in inputs]
        rows = [np.frombuffer(answer.raw_output_contents[0], np.float32) for answer in answers]
        np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
        with pytest.raises(grpc.RpcError) as refused:
            call(types["ModelInferRequest"](model_name="m", inputs=inputs))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


# What of the recorded requests is no call of gRPC's: JSON that is none, or binary data that its JSON tells wrongly of.
ONLY_HTTP = {
    "not json", "empty body", "no inputs", "json out of range", "header len too long", "header len garbage",
    "header len negative", "binary size short", "binary size long", "GET infer",
}  # fmt: skip
OVER_GRPC = {
    "wrong shape": "Expected [-1,-1,-1,3], got [1,3,10,10]",
    "neg shape": "Expected [-1,-1,-1,3], got [-1,224,224,3]",
    "zero batch": "batch-size must be >= 1",
    "truncated body": "input byte size mismatch for input 'images' for model 'm'. Expected 150528, got 100",
    "json data too few": "Shape does not match true shape of 'data' field",
}
STATUSES = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND"}


def as_message(case: str, path: str) -> dict[str, Any]:
    """A recorded HTTP request's counterpart as the fields of ModelInferRequest."""
    sent: list[httpx.Request] = []
    transport = httpx.MockTransport(lambda request: (sent.append(request), httpx.Response(200))[1])
    with httpx.Client(base_url="http://x", transport=transport) as client:
        REQUESTS[case](client)
    content = sent[0].content
    length = int(sent[0].headers.get(LENGTH, len(content)))
    said, (_, _, _, model, *version) = json.loads(content[:length]), path.split("/")[:-1]
    (entry,) = said["inputs"]
    entry.pop("parameters", None)
    data = entry.pop("data", None)
    if data is None:
        raw = {"raw_input_contents": [content[length:]]}
    else:
        raw, entry["contents"] = {}, {"uint_contents": np.ravel(data).tolist()}
    fields = {"inputs": said["inputs"], "outputs": said.get("outputs", []), "id": said.get("id", "")}
    return {"model_name": model, "model_version": version[-1] if version else "", **fields, **raw}


INFERS = [case for case in REQUESTS if not case.startswith(("GET", "repo", "load", "index")) and case not in ONLY_HTTP]


@pytest.mark.parametrize("case", INFERS)
def test_it_answers_the_recorded_requests_as_triton_does(
    running: Running, recorded: dict[str, dict[str, Any]], case: str
) -> None:
    triton = recorded[case]
    types = message_classes("inference", INFERENCE)
    with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=types["ModelInferRequest"].SerializeToString,
            response_deserializer=types["ModelInferResponse"].FromString,
        )
        message = types["ModelInferRequest"](**as_message(case, triton["path"]))
        if triton["status"] == 200:
            answer = call(message)
            theirs = json.JSONDecoder().raw_decode(triton["body"])[0]
            assert (answer.model_name, answer.model_version) == (theirs["model_name"], theirs["model_version"])
            assert answer.id == theirs.get("id", "")
            assert [each.name for each in answer.outputs] == ["probabilities", "embedding"]
            assert [len(raw) for raw in answer.raw_output_contents] == [4 * 3, 4 * 3]
            return
        with pytest.raises(grpc.RpcError) as refused:
            call(message)
    told = refused.value.details()
    if case in OVER_GRPC:
        assert refused.value.code().name == "INVALID_ARGUMENT"
        assert OVER_GRPC[case] in told
        return
    assert refused.value.code().name == STATUSES[triton["status"]]
    said = json.loads(triton["body"])["error"].replace("'input'", "'images'")
    assert re.sub(r"\d+", "#", told) == re.sub(r"\d+", "#", said)


def test_infer_by_callback_and_by_stream(client: Any, running: Running) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.async_infer("m", [images_input("rot no 1e-3")], lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=20)
    assert error is None
    assert result.as_numpy("probabilities").argmax() == 2
    client.start_stream(lambda result, error: answers.put((result, error)))
    client.async_stream_infer("m", [images_input("grün")])
    client.async_stream_infer("other", [images_input("grün")])
    client.async_stream_infer("m", [images_input("blau")])
    told = [answers.get(timeout=20) for _ in range(3)]
    client.stop_stream()
    assert [result.as_numpy("probabilities").argmax() for result, error in (told[0], told[2])] == [1, 0]
    assert "unknown model" in str(told[1][1])
    for code, num in (("200", 2), ("404", 1)):
        assert running.metric(f'tanuki_requests_total{{code="{code}",route="grpc_ModelStreamInfer"}}') == num


def test_mistakes_have_their_code_and_the_same_words(client: Any) -> None:
    wrong_shape = client_module.InferInput("images", [1, 3, 10, 10], "UINT8")
    wrong_shape.set_data_from_numpy(np.zeros((1, 3, 10, 10), np.uint8))
    wrong_type = client_module.InferInput("images", [1, 1, 1, 3], "FP32")
    wrong_type.set_data_from_numpy(np.zeros((1, 1, 1, 3), np.float32))
    twice = [client_module.InferRequestedOutput("embedding")] * 2
    shared_input, shared_output = images_input("blau"), client_module.InferRequestedOutput("embedding")
    shared_input.set_shared_memory("region", 100)
    shared_output.set_shared_memory("region", 100)
    for call, code, message in (
        (lambda: client.infer("other", [images_input("blau")]), "NOT_FOUND", "unknown model: 'other' is not found"),
        (lambda: client.infer("m", [images_input("blau")], "7"), "NOT_FOUND", "version 7 is not found"),
        (lambda: client.infer("m", [wrong_shape]), "INVALID_ARGUMENT", "Expected [-1,-1,-1,3], got [1,3,10,10]"),
        (lambda: client.infer("m", [wrong_type]), "INVALID_ARGUMENT", "data-type is 'FP32'"),
        (lambda: client.infer("m", [images_input(*["blau"] * 9)]), "INVALID_ARGUMENT", "must be <= 8"),
        (lambda: client.infer("m", [images_input("blau"), encoded_input("blau")]), "INVALID_ARGUMENT", "got 2 inputs"),
        (lambda: client.infer("m", [images_input("blau")], outputs=twice), "INVALID_ARGUMENT", "asked for twice"),
        (lambda: client.infer("m", [shared_input]), "INVALID_ARGUMENT", "not offered: input 'images' for model 'm'"),
        (
            lambda: client.infer("m", [images_input("blau")], outputs=[shared_output]),
            "INVALID_ARGUMENT",
            "not offered: output 'embedding' for model 'm'",
        ),
        (lambda: client.get_model_metadata("other"), "NOT_FOUND", "'other' is not found"),
        (lambda: client.unload_model("m"), "INVALID_ARGUMENT", "promote or roll back"),
        (lambda: client.infer("a" * 50_000, [images_input("blau")]), "NOT_FOUND", "aaa...' is not found"),
        (lambda: client.infer("m", [images_input("blau")], "7" * 50_000), "NOT_FOUND", "777... is not found"),
        (lambda: client.unload_model("a" * 50_000), "INVALID_ARGUMENT", "aaa...': promote"),
        (lambda: client.load_model("other"), "INVALID_ARGUMENT", "failed to load 'other'"),
        (lambda: client.get_system_shared_memory_status(), "UNIMPLEMENTED", ""),
    ):
        with pytest.raises(InferenceServerException) as told:
            call()
        assert told.value.status() == f"StatusCode.{code}"
        assert message in told.value.message()


def test_bytes_that_are_no_message_are_the_clients_mistake(running: Running) -> None:
    service = "/inference.GRPCInferenceService"
    with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
        for name in ("ModelInfer", "ServerMetadata"):
            with pytest.raises(grpc.RpcError) as told:
                channel.unary_unary(f"{service}/{name}")(b"\xff", timeout=10)
            assert told.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "failed to parse" in told.value.details()
        several = channel.stream_stream(f"{service}/ModelStreamInfer")(iter([b"\xff", b""]), timeout=10)
        first, second = several
        assert b"failed to parse" in first
        assert b"unknown model" in second
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff", timeout=10) == b"\x08\x01"
    assert "DecodeError" not in running.log.read_text()


def test_requests_are_found_again_in_logs_and_captures(tmp_path: Path) -> None:
    """By the metadata's name, the message's, or one made here, which comes back in metadata alone."""
    add_version(tmp_path / "registry", tmp_path)
    capture = ("--capture-dir", str(tmp_path / "spool"), "--capture-fraction", "1")
    options = ("--grpc-port", "0", "--log-requests", *capture)
    blue, named = [images_input("blau")], {"x-request-id": "by-metadata"}
    with serving(tmp_path / "registry", tmp_path, *options) as running:
        address = f"127.0.0.1:{running.grpc_port}"
        with client_module.InferenceServerClient(address) as client:
            assert client.infer("tanuki", blue, headers=named).get_response().id == ""
            assert client.infer("tanuki", blue, request_id="by-message").get_response().id == "by-message"
            assert client.infer("tanuki", blue, request_id="a b").get_response().id == "a b"
            assert client.infer("tanuki", blue).get_response().id == ""
            with pytest.raises(InferenceServerException):
                client.infer("tanuki", blue, "7", headers={"x-request-id": "wrong"})
            streamed: queue.Queue[Any] = queue.Queue()
            client.start_stream(lambda result, error: streamed.put((result, error)))
            for number, model in enumerate(("tanuki", "other")):
                client.async_stream_infer(model, blue, request_id=f"streamed-{number}")
            assert [streamed.get(timeout=20)[1] is None for _ in range(2)] == [True, False]
            client.stop_stream()
        with grpc.insecure_channel(address) as channel:
            _, call = channel.unary_unary("/inference.GRPCInferenceService/ServerMetadata").with_call(b"")
            (made,) = [value for key, value in call.trailing_metadata() if key == "x-request-id"]
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")(
                    b"", metadata=(("x-request-id", "mine"),)
                )
            assert ("x-request-id", "mine") in refused.value.trailing_metadata()
        assert running.stop() == 0
        logged = [line for line in running.lines() if line["message"].startswith("gRPC ")]
    calls = [line["message"].split()[1] for line in logged]
    assert calls == ["ModelInfer"] * 5 + ["ModelStreamInfer"] * 2 + ["ServerMetadata", "ModelMetadata"]
    ids = [line["request_id"] for line in logged]
    assert [*ids[:2], *ids[4:]] == ["by-metadata", "by-message", "wrong", "streamed-0", "streamed-1", made, "mine"]
    assert [line["status"] for line in logged] == [200, 200, 200, 200, 404, 200, 404, 200, 404]
    assert len(set(ids)) == len(ids)  # those that were made here too
    assert all(re.fullmatch("[0-9a-f]{24}", each) for each in (ids[2], ids[3], made))
    assert all(line["ms"] > 0 for line in logged)
    files = sorted((tmp_path / "spool").glob("*.parquet"))
    captured = [row["request_id"] for file in files for row in pq.read_table(file).to_pylist()]
    assert captured == ["by-metadata", "by-message", "a b", ids[3], "streamed-0"]


def test_statistics_count_what_was_asked(client: Any) -> None:
    before = client.get_inference_statistics("m").model_stats[0]
    client.infer("m", [images_input("blau", "grün")])
    after = client.get_inference_statistics("m", "1").model_stats[0]
    assert after.inference_count == before.inference_count + 2
    assert after.inference_stats.success.count == before.inference_stats.success.count + 1
    assert not client.get_inference_statistics("", "abc").model_stats


def test_the_usual_health_check(running: Running) -> None:
    types = message_classes("grpc.health.v1", HEALTH)
    with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=types["HealthCheckRequest"].SerializeToString,
            response_deserializer=types["HealthCheckResponse"].FromString,
        )
        assert check(types["HealthCheckRequest"]()).status == 1


def test_tokens_keep_others_out_and_sigterm_ends_it(tmp_path: Path) -> None:
    add_version(tmp_path / "registry", tmp_path)
    (tmp_path / "tokens").write_text("secret\n")
    options = ("--grpc-port", "0", "--token-file", "tokens", "--max-body-mb", "1")
    with serving(tmp_path / "registry", tmp_path, *options) as running:
        with client_module.InferenceServerClient(f"127.0.0.1:{running.grpc_port}") as client:
            assert client.is_server_live()
            for headers in ({}, {"authorization": "Bearer wrong"}):
                with pytest.raises(InferenceServerException) as refused:
                    client.infer("tanuki", [images_input("blau")], headers=headers)
                assert refused.value.status() == "StatusCode.UNAUTHENTICATED"
            told = client.infer("tanuki", [images_input("blau")], headers={"authorization": "Bearer secret"})
            assert told.as_numpy("probabilities").argmax() == 0
        with grpc.insecure_channel(f"127.0.0.1:{running.grpc_port}") as channel:
            infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")
            too_large = bytes(2_000_000)
            for ask in (
                lambda **more: infer(too_large, **more),
                lambda **more: next(stream(iter([too_large]), **more)),
            ):
                with pytest.raises(grpc.RpcError) as unread:
                    ask()
                assert unread.value.code() == grpc.StatusCode.UNAUTHENTICATED
                with pytest.raises(grpc.RpcError) as read:
                    ask(metadata=(("authorization", "Bearer secret"),))
                assert read.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        running.client.headers["authorization"] = "Bearer secret"
        for name, num in (("ModelInfer", 3), ("ModelStreamInfer", 1)):
            assert running.metric(f'tanuki_requests_total{{code="401",route="grpc_{name}"}}') == num
        assert running.stop() == 0


def test_a_second_sigterm_does_not_wait_for_open_streams(tmp_path: Path) -> None:
    add_version(tmp_path / "registry", tmp_path)
    with (
        serving(tmp_path / "registry", tmp_path, "--grpc-port", "0", "--grace-s", "50") as running,
        client_module.InferenceServerClient(f"127.0.0.1:{running.grpc_port}") as client,
    ):
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put((result, error)))
        client.async_stream_infer("tanuki", [images_input("blau")])
        assert answers.get(timeout=20)[1] is None
        running.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):  # it may go on within the grace
            running.process.wait(3)
        assert running.stop(20) == 0


def test_a_deadline_a_full_queue_and_who_hangs_up_are_told_apart(tmp_path: Path) -> None:
    """One thread is busy with eight large pictures, behind which others wait."""
    add_version(tmp_path / "registry", tmp_path)
    limits = ("--max-waiting", "16", "--max-pictures", "8", "--threads", "1", "--max-wait-s", "30")
    huge = np.full((8, 2000, 2000, 3), 7, np.uint8)
    slow = client_module.InferInput("images", huge.shape, "UINT8")
    slow.set_data_from_numpy(huge)
    small = images_input(*["blau"] * 8)
    with (
        serving(tmp_path / "registry", tmp_path, "--grpc-port", "0", "--max-body-mb", "200", *limits) as running,
        client_module.InferenceServerClient(f"127.0.0.1:{running.grpc_port}") as client,
    ):
        answers: queue.Queue[Any] = queue.Queue()

        def infer(tensor: Any) -> Any:
            return client.async_infer("tanuki", [tensor], lambda result, error: answers.put((result, error)))

        def waits_for(pictures: int) -> None:
            eventually(lambda: running.metric("tanuki_waiting_pictures") == pictures)

        def requests(code: int) -> float:
            return running.metric(f'tanuki_requests_total{{code="{code}",route="grpc_ModelInfer"}}')

        infer(slow)
        waits_for(8)
        hung_up = infer(small)
        waits_for(16)
        with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
            client.infer("tanuki", [images_input("blau")])
        hung_up.cancel()
        eventually(lambda: requests(499) == 1)
        assert {error is None for _, error in (answers.get(timeout=60), answers.get(timeout=60))} == {True, False}
        waits_for(0)
        assert running.metric("tanuki_pictures_total") == 8, "nothing was done for who hung up"
        infer(slow)
        waits_for(8)
        with pytest.raises(InferenceServerException, match=r"DEADLINE_EXCEEDED.*no answer within 0.01 s"):
            client.infer("tanuki", [images_input("blau")], timeout=10_000)  # microseconds
        eventually(lambda: (requests(429), requests(504)) == (1, 1))  # counted once the client was told
        assert answers.get(timeout=60)[1] is None
        assert client.infer("tanuki", [images_input("blau")]).as_numpy("probabilities").argmax() == 0
        assert "Traceback" not in running.log.read_text()


def test_messages_have_a_limit_together(tmp_path: Path) -> None:
    add_version(tmp_path / "registry", tmp_path)
    huge = np.full((8, 2000, 2000, 3), 7, np.uint8)
    slow = client_module.InferInput("images", huge.shape, "UINT8")
    slow.set_data_from_numpy(huge)
    large = client_module.InferInput("images", [1, 1000, 1000, 3], "UINT8")
    large.set_data_from_numpy(huge[:1, :1000, :1000])
    options = ("--grpc-port", "0", "--threads", "1", "--max-body-mb", "97", "--max-bodies-mb", "97")
    with (
        serving(tmp_path / "registry", tmp_path, *options) as running,
        client_module.InferenceServerClient(f"127.0.0.1:{running.grpc_port}") as client,
    ):
        answers: queue.Queue[Any] = queue.Queue()
        client.async_infer("tanuki", [slow], lambda result, error: answers.put((result, error)))
        eventually(lambda: running.metric("tanuki_waiting_pictures") == 8)
        with pytest.raises(InferenceServerException, match=r"UNAVAILABLE.*together are larger than 97000000"):
            client.infer("tanuki", [large])
        assert answers.get(timeout=60)[1] is None
        assert client.infer("tanuki", [large]).as_numpy("probabilities") is not None


def test_tls_by_setting(tmp_path: Path) -> None:
    add_version(tmp_path / "registry", tmp_path)
    certificate = make_certificate(tmp_path)
    options = ("--grpc-port", "0", "--tls-cert", "cert.pem", "--tls-key", "key.pem")
    with serving(tmp_path / "registry", tmp_path, *options) as running:
        address = f"127.0.0.1:{running.grpc_port}"
        with client_module.InferenceServerClient(address, ssl=True, root_certificates=str(certificate)) as client:
            assert client.infer("tanuki", [images_input("blau")]).as_numpy("probabilities").argmax() == 0
        with (
            client_module.InferenceServerClient(address) as client,
            pytest.raises(InferenceServerException, match="UNAVAILABLE"),
        ):
            client.is_server_live()


def test_a_port_in_use_is_told(running: Running, tmp_path: Path) -> None:
    add_version(tmp_path / "registry", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [sys.executable, "-m", "deploy.serving", "--registry", str(tmp_path / "registry"), "--port", "0"]
        port = str(taken.getsockname()[1])
        run = subprocess.run([*command, "--grpc-port", port], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "Choose with --grpc-port" in run.stderr
    assert "Traceback" not in run.stderr
