"""The Open Inference Protocol over HTTP, with the extensions that a client of Triton may call."""

from functools import partial
from importlib.metadata import version as package_version

import orjson
from starlette.routing import BaseRoute, Route

from deploy.serving.endpoint import Call, Endpoint, Reply, json_reply
from deploy.serving.errors import BAD_REQUEST, TOO_LARGE, RequestError, echo
from deploy.serving.infer_codec import json_length, parse_infer, render_infer
from deploy.serving.inference_protocol import (
    EXTENSIONS,
    InferRequest,
    bad,
    model_config,
    model_metadata,
    outputs_of,
)
from deploy.serving.service import Service

MODEL = "/v2/models/{model}"
VERSION = f"{MODEL}/versions/{{version}}"
INFER_PATH = f"{MODEL}/infer"
PLAIN = b"text/plain"
NOT_READY = "Model version not ready"
LARGE_JSON_BYTES = 32_768  # above it JSON is read off the event loop
HEADER_LENGTH = b"inference-header-content-length"


def protocol_routes(service: Service) -> list[BaseRoute]:
    """All routes under /v2; infer first, because routes are tried in their order."""
    made = partial(Endpoint, service)
    infer_endpoint = made("infer", post=infer)
    models: dict[str, Endpoint] = {
        "/ready": made("model_ready", get=model_ready),
        "/config": made("model_config", get=config),
        "/stats": made("model_statistics", get=statistics),
        "": made("model_metadata", get=metadata),
    }
    server = {
        "/v2/health/live": made("live", get=live, is_open=True),
        "/v2/health/ready": made("ready", get=ready, is_open=True),
        "/v2/models/stats": made("model_statistics", get=statistics),
        "/v2/repository/index": made("repository_index", post=repository_index),
        "/v2/repository/models/{model}/load": made("load", post=load),
        "/v2/repository/models/{model}/unload": made("unload", post=unload),
        "/v2": made("server_metadata", get=server_metadata),
    }
    of_model = {f"{MODEL}{end}": endpoint for end, endpoint in models.items()}
    of_version = {f"{VERSION}{end}": endpoint for end, endpoint in models.items()}
    first = {f"{path}/infer": infer_endpoint for path in (MODEL, VERSION)}
    return [Route(path, endpoint) for path, endpoint in {**first, **server, **of_model, **of_version}.items()]


async def infer(call: Call) -> Reply:
    """Answers a request's pictures."""
    service = call.service
    model = service.choose(str(call.path("model")), call.path("version"))
    service.batcher.check_room()
    body = await call.body()
    header = call.headers.get(HEADER_LENGTH)
    parse = partial(
        parse_infer,
        model=service.models.name,
        max_pictures=service.settings.max_pictures,
        max_json_bytes=service.settings.max_json_bytes,
    )
    is_small = json_length(header, len(body)) <= LARGE_JSON_BYTES
    request: InferRequest = parse(body, header) if is_small else await call.aside(parse, body, header)
    outcomes = await call.unless_left(
        service.answer(model, request.pictures, request_id=request.id or call.id, timeout_s=request.timeout_s)
    )
    answer, length = render_infer(request, outputs_of(request.outputs, outcomes, model), model, service.models.name)
    if length is None:
        return Reply(answer)
    return Reply(answer, 200, b"application/octet-stream", [(HEADER_LENGTH, b"%d" % length)])


async def live(call: Call) -> Reply:  # noqa: ARG001
    """Whether the process is worth keeping."""
    return Reply(content_type=PLAIN)


async def ready(call: Call) -> Reply:
    """Whether new requests are welcome."""
    return Reply(status=200 if call.service.is_ready else BAD_REQUEST, content_type=PLAIN)


async def model_ready(call: Call) -> Reply:
    """Whether a version answers."""
    try:
        call.service.models.resolve(str(call.path("model")), call.path("version"))
    except RequestError:
        raise RequestError(BAD_REQUEST, NOT_READY) from None
    return Reply(content_type=PLAIN)


async def server_metadata(call: Call) -> Reply:  # noqa: ARG001
    """What this server is and can do."""
    return json_reply({"name": "tanuki", "version": package_version("tanuki"), "extensions": EXTENSIONS})


async def metadata(call: Call) -> Reply:
    """Inputs, outputs and versions."""
    models = call.service.models
    model = models.resolve(str(call.path("model")), call.path("version"))
    versions = [model.version] if call.path("version") else [each.version for each in models.loaded]
    return json_reply(model_metadata(model, models.name, versions))


async def config(call: Call) -> Reply:
    """The configuration, in Triton's terms."""
    models = call.service.models
    model = models.resolve(str(call.path("model")), call.path("version"))
    return json_reply(model_config(model, models.name, max_pictures=call.service.settings.max_pictures))


async def statistics(call: Call) -> Reply:
    """What the versions did, in Triton's terms."""
    name, version = call.path("model"), call.path("version")
    if name:
        call.service.models.resolve(name, version)
    return json_reply({"model_stats": await call.service.statistics(version)})


async def repository_index(call: Call) -> Reply:
    """All versions that answer; those are all ready."""
    body = await call.body()
    if len(body) > LARGE_JSON_BYTES:
        raise RequestError(TOO_LARGE, f"{len(body)} bytes of JSON are more than {LARGE_JSON_BYTES}")
    try:
        asked = orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise bad(f"failed to parse the request JSON buffer: {error}") from error
    if not isinstance(asked, dict):
        raise bad("failed to parse the request JSON buffer: it holds no object")
    models = call.service.models
    return json_reply([{"name": models.name, "version": str(each.version), "state": "READY"} for each in models.loaded])


async def load(call: Call) -> Reply:
    """Looks at the registry now: which version answers is the registry's to say."""
    await call.service.look(str(call.path("model")))
    return Reply()


async def unload(call: Call) -> Reply:
    """Refused: which version answers is the registry's to say."""
    raise bad(f"failed to unload '{echo(str(call.path('model')))}': promote or roll back in the registry instead")
