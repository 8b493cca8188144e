"""The OpenAPI document of everything that is served over HTTP."""

from functools import partial
from importlib.metadata import version as package_version
from typing import Any

from starlette.routing import BaseRoute, Route

from deploy.serving.endpoint import Call, Endpoint, Reply, json_reply
from deploy.serving.service import Service

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
COUNT: Schema = {"type": "integer", "minimum": 0}
SHARE: Schema = {"type": "number", "minimum": 0, "maximum": 1}
BYTES: Schema = {"type": "string", "format": "binary"}


def openapi_routes(service: Service) -> list[BaseRoute]:
    """/openapi.json."""
    return [Route("/openapi.json", Endpoint(service, "openapi", get=partial(_reply, json_reply(document()))))]


async def _reply(reply: Reply, call: Call) -> Reply:  # noqa: ARG001
    return reply


def document() -> Schema:
    """The document, OpenAPI 3.1."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "tanuki",
            "version": package_version("tanuki"),
            "description": "Picture classification by the registry's champion; /v2 is the Open Inference Protocol.",
        },
        "security": [{}, {"bearer": []}],
        "paths": {**_people(), **_protocol_of_server(), **_protocol_of_model()},
        "components": {
            "schemas": _schemas(),
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
    }


def _people() -> Schema:
    top = _parameter("top", "query", {"type": "integer", "minimum": 1, "maximum": 100}, "labels for each picture")
    version = _parameter("version", "query", {"type": "string", "pattern": "^[0-9]+$"}, "a loaded version")
    pictures = {
        "image/*": {"schema": BYTES},
        "application/octet-stream": {"schema": BYTES},
        "multipart/form-data": {"schema": {"type": "object", "additionalProperties": BYTES}},
    }
    return {
        "/predict": {
            "post": {
                **_operation("Classify one picture (the body) or several (a form's files)", _ref("Predictions")),
                "parameters": [top, version],
                "requestBody": {"required": True, "content": pictures},
            }
        },
        "/model": {"get": _operation("The champion's labels, model card and lineage", _ref("Model"))},
        "/metrics": {"get": _operation("For Prometheus", TEXT, "text/plain")},
        "/": {"get": _operation("A page to drop pictures on", TEXT, "text/html")},
        "/openapi.json": {"get": _operation("This document", {"type": "object"})},
    }


def _protocol_of_server() -> Schema:
    index = {"type": "array", "items": _ref("IndexEntry")}
    path = "/v2/repository/models/{model}"
    return {
        "/v2": {"get": _operation("What this server can do", _ref("Server"))},
        "/v2/health/live": {"get": _operation("Whether the process is worth keeping")},
        "/v2/health/ready": {"get": _operation("Whether new requests are welcome")},
        "/v2/models/stats": {"get": _operation("What each loaded version did", _ref("Statistics"))},
        "/v2/repository/index": {"post": _operation("The versions that answer", index)},
        f"{path}/load": {"post": _operation("Look at the registry now"), "parameters": [_path("model")]},
        f"{path}/unload": {"post": _operation("Refused: the registry decides"), "parameters": [_path("model")]},
    }


def _protocol_of_model() -> Schema:
    length = _parameter("Inference-Header-Content-Length", "header", COUNT, "length of the JSON, if tensors follow it")
    infer = {
        **_operation("Answer pictures", _ref("InferAnswer")),
        "parameters": [length],
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": _ref("InferRequest")},
                "application/octet-stream": {"schema": BYTES},
            },
        },
    }
    infer["responses"]["200"]["content"]["application/octet-stream"] = {"schema": BYTES}
    operations = {
        "": {"get": _operation("Inputs, outputs and versions", _ref("ModelMetadata"))},
        "/ready": {"get": _operation("Whether it answers")},
        "/config": {"get": _operation("Its configuration, in Triton's terms", {"type": "object"})},
        "/stats": {"get": _operation("What it did", _ref("Statistics"))},
        "/infer": {"post": infer},
    }
    paths = {"/v2/models/{model}": [_path("model")]}
    paths["/v2/models/{model}/versions/{version}"] = [_path("model"), _path("version")]
    return {
        f"{path}{end}": {**operation, "parameters": parameters}
        for path, parameters in paths.items()
        for end, operation in operations.items()
    }


def _schemas() -> Schema:
    port = _object({"name": TEXT, "datatype": TEXT, "shape": _list({"type": "integer", "minimum": -1})})
    tensor = _object(
        {"name": TEXT, "datatype": TEXT, "shape": _list(COUNT), "data": {"type": "array"}, "parameters": _object()},
        required=("name", "datatype", "shape"),
    )
    ranked = _object({"label": TEXT, "probability": SHARE})
    prediction = _object(
        {"name": TEXT, "label": TEXT, "probability": SHARE, "top": _list(ranked), "error": TEXT}, required=("name",)
    )
    share = {"type": ["number", "null"], "minimum": 0, "maximum": 1.000001}
    wanted = _object({"name": TEXT, "parameters": _object()}, required=("name",))
    return {
        "Error": _object({"error": TEXT}),
        "Predictions": _object({"request_id": TEXT, "model": TEXT, "version": TEXT, "predictions": _list(prediction)}),
        "Model": _object(
            {"name": TEXT, "version": TEXT, "versions": _list(TEXT), "digest": TEXT, "labels": _list(TEXT),
             "card": {"type": ["string", "null"]}, "lineage": _object(), "problem": {"type": ["string", "null"]},
             "comparisons": _list(_ref("Comparison"))}
        ),
        "Comparison": _object(
            {"champion": TEXT, "challenger": TEXT, "pictures": COUNT, "same_label": share, "mean_distance": share,
             "champion_confidence": share, "challenger_confidence": share, "failed": COUNT, "dropped": COUNT,
             "stopped": {"type": ["string", "null"]},
             "other_labels": _list(_object({"champion": TEXT, "challenger": TEXT, "pictures": COUNT}))}
        ),
        "Server": _object({"name": TEXT, "version": TEXT, "extensions": _list(TEXT)}),
        "IndexEntry": _object({"name": TEXT, "version": TEXT, "state": TEXT}),
        "ModelMetadata": _object(
            {"name": TEXT, "versions": _list(TEXT), "platform": TEXT, "inputs": _list(port), "outputs": _list(port)}
        ),
        "Statistics": _object({"model_stats": _list(_object())}),
        "InferRequest": _object(
            {"id": TEXT, "inputs": _list(tensor), "outputs": _list(wanted), "parameters": _object()},
            required=("inputs",),
        ),
        "InferAnswer": _object(
            {"id": TEXT, "model_name": TEXT, "model_version": TEXT, "outputs": _list(tensor)},
            required=("model_name", "model_version", "outputs"),
        ),
    }  # fmt: skip


def _operation(summary: str, schema: Schema | None = None, content_type: str = "application/json") -> Schema:
    """An operation with its answer; all others are errors of one form."""
    answer: Schema = {"description": summary}
    if schema is not None:
        answer["content"] = {content_type: {"schema": schema}}
    wrong = {"description": "What is wrong", "content": {"application/json": {"schema": _ref("Error")}}}
    return {"summary": summary, "responses": {"200": answer, "default": wrong}}


def _object(properties: Schema | None = None, *, required: tuple[str, ...] | None = None) -> Schema:
    if properties is None:
        return {"type": "object"}
    return {"type": "object", "properties": properties, "required": list(properties if required is None else required)}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _path(name: str) -> Schema:
    return _parameter(name, "path", TEXT, f"the {name}")


def _parameter(name: str, place: str, schema: Schema, description: str) -> Schema:
    return {"name": name, "in": place, "required": place == "path", "schema": schema, "description": description}
