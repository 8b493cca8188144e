"""The Open Inference Protocol over gRPC: the same requests, the same words, on the same event loop."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version as package_version
from typing import Any

import grpc
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from deploy.serving.batcher import Picture
from deploy.serving.errors import (
    BAD_REQUEST,
    DEADLINE,
    NOT_FOUND,
    TOO_LARGE,
    TOO_MANY,
    UNAUTHORIZED,
    UNAVAILABLE,
    RequestError,
    ServingError,
    echo,
)
from deploy.serving.grpc_messages import HEALTH, INFERENCE, message_classes
from deploy.serving.inference_protocol import (
    ENCODED,
    EXTENSIONS,
    InferRequest,
    InputTensor,
    WantedOutput,
    all_outputs,
    bad,
    check_input,
    check_one_input,
    check_output,
    model_config,
    model_metadata,
    outputs_of,
    pack_bytes,
    pictures_of_json,
    pictures_of_raw,
    refuse_shared_memory,
    timeout_of,
)
from deploy.serving.request_ids import request_id
from deploy.serving.service import Service

CODES = {
    BAD_REQUEST: grpc.StatusCode.INVALID_ARGUMENT,
    UNAUTHORIZED: grpc.StatusCode.UNAUTHENTICATED,
    NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    TOO_LARGE: grpc.StatusCode.RESOURCE_EXHAUSTED,
    TOO_MANY: grpc.StatusCode.UNAVAILABLE,
    UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    DEADLINE: grpc.StatusCode.DEADLINE_EXCEEDED,
}
DATA_TYPES = {"TYPE_UINT8": 2, "TYPE_FP32": 11, "TYPE_STRING": 13}
SERVING, NOT_SERVING = 1, 2  # of the health check
STREAM = "ModelStreamInfer"
LEFT = 499  # who asked went away
NAME = "x-request-id"  # in the metadata of a call and, at its end, of its answer

Context = Any
Metadata = Iterable[tuple[str, str | bytes]] | None
Handler = Callable[["InferenceService", Any, "Call"], Awaitable[Any]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Call:
    """A request on its way.

    Args:
        id: The client's name for it (the metadata x-request-id, or its message's id), or one made here.
        context: gRPC's; of all that come on one stream the same.
        start: When it came, by the performance counter.
    """

    id: str
    context: Context
    start: float


def message_of(kind: Any, data: bytes) -> Any | None:
    """A request's message; None where the bytes are none, of which gRPC itself would make a traceback."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def understood(request: Any | None) -> Any:
    """The message.

    Raises:
        RequestError: If there is none.
    """
    if request is None:
        raise bad("failed to parse the request: its bytes are no message of this kind")
    return request


def call_of(request: Any | None, context: Context) -> Call:
    """Names a request; None for a stream, which has no message, and for bytes that are none."""
    asked = str(dict(context.invocation_metadata() or ()).get(NAME, "")).encode()
    return Call(request_id(asked, getattr(request, "id", "").encode()), context, time.perf_counter())


class InferenceService:
    """The calls of the service, each by its name in the proto."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.types = message_classes("inference", INFERENCE)

    async def server_live(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        return self.types["ServerLiveResponse"](live=True)

    async def server_ready(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        return self.types["ServerReadyResponse"](ready=self.service.is_ready)

    async def model_ready(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        try:
            self.service.models.resolve(request.name, request.version)
        except RequestError:
            return self.types["ModelReadyResponse"](ready=False)
        return self.types["ModelReadyResponse"](ready=True)

    async def server_metadata(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        version = package_version("tanuki")
        return self.types["ServerMetadataResponse"](name="tanuki", version=version, extensions=EXTENSIONS)

    async def model_metadata(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        models = self.service.models
        model = models.resolve(request.name, request.version)
        versions = [model.version] if request.version else [each.version for each in models.loaded]
        return self.types["ModelMetadataResponse"](**model_metadata(model, models.name, versions))

    async def model_config(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        models = self.service.models
        model = models.resolve(request.name, request.version)
        config = model_config(model, models.name, max_pictures=self.service.settings.max_pictures)
        for port in (*config["input"], *config["output"]):
            port["data_type"] = DATA_TYPES[port["data_type"]]
        return self.types["ModelConfigResponse"](config=config)

    async def model_statistics(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        models = self.service.models
        if request.name:
            models.resolve(request.name, request.version)
        statistics = await self.service.statistics(request.version)
        for each in statistics:
            del each["batch_stats"]
        return self.types["ModelStatisticsResponse"](model_stats=statistics)

    async def repository_index(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        models = self.service.models
        index = [{"name": models.name, "version": str(each.version), "state": "READY"} for each in models.loaded]
        return self.types["RepositoryIndexResponse"](models=index)

    async def repository_model_load(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        await self.service.look(request.model_name)
        return self.types["RepositoryModelLoadResponse"]()

    async def repository_model_unload(self, request: Any, call: Call) -> Any:  # noqa: ARG002
        raise bad(f"failed to unload '{echo(request.model_name)}': promote or roll back in the registry instead")

    async def model_infer(self, request: Any, call: Call) -> Any:
        models = self.service.models
        model = self.service.choose(request.model_name, request.model_version)
        asked = self._understood(request)
        limits = [limit for limit in (asked.timeout_s, call.context.time_remaining()) if limit is not None]
        outcomes = await self.service.answer(
            model, asked.pictures, request_id=asked.id or call.id, timeout_s=min(limits, default=None)
        )
        outputs = outputs_of(asked.outputs, outcomes, model)
        return self.types["ModelInferResponse"](
            model_name=models.name,
            model_version=str(model.version),
            id=asked.id,
            outputs=[{"name": each.name, "datatype": each.datatype, "shape": each.values.shape} for each in outputs],
            raw_output_contents=[each.raw() for each in outputs],
        )

    def _understood(self, request: Any) -> InferRequest:
        name, limit = self.service.models.name, self.service.settings.max_pictures
        check_one_input([each.name for each in request.inputs], model=name, request_id=request.id)
        (given,) = request.inputs
        refuse_shared_memory(_integers(given.parameters), f"input '{given.name}'", model=name)
        tensor = check_input(given.name, given.datatype, given.shape, model=name, request_id=request.id, max_n=limit)
        wanted: list[WantedOutput] = []
        for each in request.outputs:
            check_output(each.name, wanted, model=name)
            parameters = _integers(each.parameters)
            refuse_shared_memory(parameters, f"output '{each.name}'", model=name)
            wanted.append(WantedOutput(each.name, num_classes=max(0, parameters.get("classification", 0))))
        pictures = self._pictures(request, tensor)
        return InferRequest(
            request.id, pictures, tuple(wanted) or all_outputs(), timeout_of(_integers(request.parameters))
        )

    def _pictures(self, request: Any, tensor: InputTensor) -> list[Picture]:
        """From the raw contents, or from the typed ones."""
        name, raw, contents = self.service.models.name, request.raw_input_contents, request.inputs[0].contents
        if len(raw) > 1:
            raise bad(f"unexpected additional input data for model '{name}'")
        if raw:
            return pictures_of_raw(tensor, memoryview(raw[0]), model=name, request_id=request.id)
        if tensor.name == ENCODED:
            packed = pack_bytes(contents.bytes_contents)
            return pictures_of_raw(tensor, memoryview(packed), model=name, request_id=request.id)
        size, limit = contents.ByteSize(), self.service.settings.max_json_bytes
        if size > limit:  # a number at a time, as slow as JSON
            raise RequestError(TOO_LARGE, f"{size} bytes of typed contents are more than {limit}: send raw contents")
        return pictures_of_json(tensor, list(contents.uint_contents))


UNARY = {
    "ServerLive": InferenceService.server_live,
    "ServerReady": InferenceService.server_ready,
    "ModelReady": InferenceService.model_ready,
    "ServerMetadata": InferenceService.server_metadata,
    "ModelMetadata": InferenceService.model_metadata,
    "ModelConfig": InferenceService.model_config,
    "ModelStatistics": InferenceService.model_statistics,
    "RepositoryIndex": InferenceService.repository_index,
    "RepositoryModelLoad": InferenceService.repository_model_load,
    "RepositoryModelUnload": InferenceService.repository_model_unload,
    "ModelInfer": InferenceService.model_infer,
}
OPEN = ("ServerLive", "ServerReady")
SERVICE = "inference.GRPCInferenceService"


class AdmittingHandler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The calls of a service; one that brings no right token is refused before its message is read.

    Args:
        handlers: By the call's name.
        admits: Whether a call's metadata let it in.
        refuse: Makes of a call's name what ends it.
    """

    def __init__(
        self,
        handlers: Mapping[str, grpc.RpcMethodHandler],
        admits: Callable[[Metadata], bool],
        refuse: Callable[[str], grpc.RpcMethodHandler],
    ) -> None:
        self._handlers, self._admits, self._refuse = handlers, admits, refuse

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        service, _, name = handler_call_details.method.lstrip("/").partition("/")
        handler = self._handlers.get(name) if service == SERVICE else None
        if handler is None or name in OPEN or self._admits(handler_call_details.invocation_metadata):
            return handler
        return self._refuse(name)


class GrpcServer:
    """gRPC's server beside the HTTP one. Make it and use it on the event loop.

    Args:
        service: What answers.

    Raises:
        ServingError: If the port cannot be listened on.
    """

    def __init__(self, service: Service) -> None:
        settings = service.settings
        self._service = service
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", settings.max_body_bytes),
                ("grpc.max_concurrent_streams", settings.max_waiting),
                ("grpc.so_reuseport", int(service.has_peers)),  # a port in use should be told, not shared
            ]
        )
        self._server.add_generic_rpc_handlers([self._inference(), self._health()])
        self.port = self._listen()

    async def start(self) -> None:
        """Begins to answer."""
        await self._server.start()

    async def stop(self) -> None:
        """Takes no new calls, and waits for those under way."""
        await self._server.stop(self._service.settings.grace_s)

    async def abort(self) -> None:
        """Ends every call at once."""
        await self._server.stop(None)

    def _listen(self) -> int:
        settings = self._service.settings
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        address = f"{host}:{settings.grpc_port}"
        try:
            if settings.tls_cert is None or settings.tls_key is None:
                return int(self._server.add_insecure_port(address))
            pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
            return int(self._server.add_secure_port(address, grpc.ssl_server_credentials([pair])))
        except RuntimeError as error:
            raise ServingError(f"cannot listen on {address} for gRPC. Choose with --grpc-port.") from error

    def _inference(self) -> grpc.GenericRpcHandler:
        calls = InferenceService(self._service)
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(
                self._guarded(name, method, calls),
                response_serializer=calls.types[f"{name}Response"].SerializeToString,
            )
            for name, method in UNARY.items()
        }
        handlers[STREAM] = grpc.stream_stream_rpc_method_handler(
            self._guarded_stream(calls),
            response_serializer=calls.types["ModelStreamInferResponse"].SerializeToString,
        )
        return AdmittingHandler(handlers, self._admits, self._refused)

    def _admits(self, metadata: Metadata) -> bool:
        return self._service.admits(str(dict(metadata or ()).get("authorization", "")).encode())

    def _refused(self, name: str) -> grpc.RpcMethodHandler:
        async def refuse(_requests: AsyncIterator[bytes], context: Context) -> None:
            call, problem = call_of(None, context), "this server wants a bearer token"
            self._done(name, call, UNAUTHORIZED, problem)
            context.set_trailing_metadata(((NAME, call.id),))
            await context.abort(CODES[UNAUTHORIZED], problem)

        return grpc.stream_stream_rpc_method_handler(refuse)  # asks for no message by itself

    def _health(self) -> grpc.GenericRpcHandler:
        """The usual health check, which Kubernetes asks."""
        types = message_classes("grpc.health.v1", HEALTH)

        async def check(data: bytes, context: Context) -> Any:  # noqa: ARG001
            return types["HealthCheckResponse"](status=SERVING if self._service.is_ready else NOT_SERVING)

        handler = grpc.unary_unary_rpc_method_handler(
            check,
            response_serializer=types["HealthCheckResponse"].SerializeToString,
        )
        return grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": handler})

    def _guarded(
        self, name: str, method: Handler, calls: InferenceService
    ) -> Callable[[bytes, Context], Awaitable[Any]]:
        """A call that is admitted, counted, and ends in an answer or in the protocol's words for a mistake."""
        kind = calls.types[f"{name}Request"]

        async def answered(data: bytes, context: Context) -> Any:
            request = message_of(kind, data)
            call, status, problem = call_of(request, context), LEFT, None
            context.set_trailing_metadata(((NAME, call.id),))
            try:
                self._service.hold(len(data))
                answer = await method(calls, understood(request), call)
                status = 200
            except RequestError as error:
                status, problem = error.status, error.message
                if error.retry_after_s is not None:
                    after = str(max(1, error.retry_after_s))
                    context.set_trailing_metadata(((NAME, call.id), ("retry-after", after)))
                await context.abort(CODES.get(status, grpc.StatusCode.INTERNAL), problem)
            except asyncio.CancelledError:
                raise
            except Exception:
                status, problem = 500, "see above"
                logger.exception("request %s failed", call.id)
                await context.abort(grpc.StatusCode.INTERNAL, f"the server failed on request {call.id}")
            finally:
                self._service.release(len(data))
                self._done(name, call, status, problem)
            return answer

        return answered

    def _guarded_stream(self, calls: InferenceService) -> Callable[[AsyncIterator[bytes], Context], AsyncIterator[Any]]:
        """Answers one after the other, each named and counted; a mistake ends nothing but its own request."""
        kind = calls.types["ModelInferRequest"]

        async def answered(data: bytes, context: Context) -> Any:
            request = message_of(kind, data)
            call, status, problem = call_of(request, context), LEFT, None
            try:
                self._service.hold(len(data))
                answer = await calls.model_infer(understood(request), call)
                status = 200
                return calls.types["ModelStreamInferResponse"](infer_response=answer)
            except RequestError as error:
                status, problem = error.status, error.message
                message = problem
            except Exception:
                status, problem, message = 500, "see above", f"the server failed on request {call.id}"
                logger.exception("request %s failed", call.id)
            finally:
                self._service.release(len(data))
                self._done(STREAM, call, status, problem)
            failed = calls.types["ModelInferResponse"](id=getattr(request, "id", ""))
            return calls.types["ModelStreamInferResponse"](error_message=message, infer_response=failed)

        async def stream(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async for request in requests:
                yield await answered(request, context)

        return stream

    def _done(self, name: str, call: Call, status: int, problem: str | None) -> None:
        """Counts a request that is over, and logs it as HTTP's are (deploy/serving/endpoint.py)."""
        seconds = time.perf_counter() - call.start
        self._service.metrics.request(f"grpc_{name}", status, seconds)
        if status != LEFT and (problem is not None or self._service.settings.log_requests):
            facts = {"request_id": call.id, "status": status, "ms": round(seconds * 1e3, 2)}
            logger.info("gRPC %s %s", name, problem or "answered", extra=facts)


def _integers(parameters: Iterable[Any]) -> dict[str, int]:
    """The whole numbers among parameters."""
    return {each.key: each.value.int64_param or each.value.uint64_param for each in parameters}
