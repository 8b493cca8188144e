"""The plain way in: pictures as files, labels as JSON."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.routing import BaseRoute, Route

from deploy.serving.batcher import Answer, Outcome
from deploy.serving.endpoint import Call, Endpoint, Reply, json_reply
from deploy.serving.errors import BAD_REQUEST, RequestError
from deploy.serving.live_model import LiveModel
from deploy.serving.metrics import CONTENT_TYPE
from deploy.serving.service import Service

MAX_TOP = 100
DEFAULT_TOP = 5
MAX_HEADERS = 16  # of a form's part


def predict_routes(service: Service) -> list[BaseRoute]:
    """What is not the protocol's."""
    made = partial(Endpoint, service)
    return [
        Route("/predict", made("predict", post=predict)),
        Route("/metrics", made("metrics", get=metrics)),
    ]


async def predict(call: Call) -> Reply:
    """Classifies one picture (the body itself) or several (a form's files)."""
    service = call.service
    version = call.query("version")
    if version == "":
        raise RequestError(BAD_REQUEST, "version must be a number, or not be there for the champion")
    model = service.choose(service.models.name, version)
    top = _top(call.query("top"))
    service.batcher.check_room()
    pictures = await _pictures(call, await call.body())
    if not pictures:
        raise RequestError(BAD_REQUEST, "no picture: send one as the body, or several as files of a multipart form")
    outcomes = await call.unless_left(service.answer(model, [data for _, data in pictures], request_id=call.id))
    named = zip((name for name, _ in pictures), outcomes, strict=True)
    answer: dict[str, Any] = {
        "request_id": call.id,
        "model": service.models.name,
        "version": str(model.version),
        "predictions": [_prediction(name, outcome, model, top) for name, outcome in named],
    }
    status = _status(outcomes)
    if status != 200:
        answer["error"] = answer["predictions"][0]["error"]  # where errors are looked for
    return json_reply(answer, status)


async def metrics(call: Call) -> Reply:
    """For Prometheus."""
    return Reply(await call.service.metrics_text(), content_type=CONTENT_TYPE.encode())


def _prediction(name: str, outcome: Outcome, model: LiveModel, top: int) -> dict[str, Any]:
    """A picture's labels, most probable first; or why there are none."""
    if not isinstance(outcome, Answer):
        return {"name": name, "error": str(outcome)}
    order = np.argsort(-outcome.probabilities, kind="stable")[:top]
    ranked = [{"label": model.labels[i], "probability": round(float(outcome.probabilities[i]), 6)} for i in order]
    return {"name": name, **ranked[0], "top": ranked}


def _status(outcomes: Sequence[Outcome]) -> int:
    """200 if any picture has an answer."""
    if any(isinstance(outcome, Answer) for outcome in outcomes):
        return 200
    return max(outcome.status if isinstance(outcome, RequestError) else BAD_REQUEST for outcome in outcomes)


def _top(asked: str | None) -> int:
    if asked is None:
        return DEFAULT_TOP
    if not asked.isascii() or not asked.isdecimal() or len(asked) > 3 or not 1 <= int(asked) <= MAX_TOP:
        raise RequestError(BAD_REQUEST, f"top must be a whole number of 1 to {MAX_TOP}")
    return int(asked)


async def _pictures(call: Call, body: bytes) -> list[tuple[str, bytes]]:
    """Name and bytes of each picture."""
    kind, options = parse_options_header(call.headers.get(b"content-type", b""))
    if kind == b"multipart/form-data":
        limit = call.service.settings.max_pictures
        return await call.aside(_files, body, options.get(b"boundary", b""), limit)
    return [("picture", body)] if body else []


def _files(body: bytes, boundary: bytes, limit: int) -> list[tuple[str, bytes]]:
    """The parts of a form, each as one picture; it stops where there are too many, as that takes long to find out."""
    parts: list[tuple[dict[bytes, bytearray], bytearray]] = []
    name, value = bytearray(), bytearray()

    def begin() -> None:
        if len(parts) == limit:
            raise RequestError(BAD_REQUEST, f"more than {limit} pictures")
        parts.append(({}, bytearray()))

    def end_header() -> None:
        if len(parts[-1][0]) == MAX_HEADERS or bytes(name).lower() in parts[-1][0]:
            raise RequestError(BAD_REQUEST, "the form cannot be read: too many headers of a part")
        parts[-1][0][bytes(name).lower()] = bytearray(value)
        name.clear()
        value.clear()

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": begin,
                "on_part_data": lambda data, start, end: parts[-1][1].extend(data[start:end]),
                "on_header_field": lambda data, start, end: name.extend(data[start:end]),
                "on_header_value": lambda data, start, end: value.extend(data[start:end]),
                "on_header_end": end_header,
            },
        )
        parser.write(body)
        parser.finalize()
    except FormParserError as error:
        raise RequestError(BAD_REQUEST, f"the form cannot be read: {error}") from error
    return [(_name(headers, number), bytes(data)) for number, (headers, data) in enumerate(parts, start=1)]


def _name(headers: dict[bytes, bytearray], number: int) -> str:
    """The file's name, as the client says."""
    _, options = parse_options_header(bytes(headers.get(b"content-disposition", b"")))
    return options.get(b"filename", b"").decode("utf-8", "replace")[:200] or f"picture {number}"
