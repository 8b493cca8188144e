"""The OpenAPI document names every route, and answers are as it says."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from deploy.serving.openapi import document
from tests.deploy.serving.running import Running
from tests.deploy.tiny_bundle import colour_image, encoded

INFER = {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}]}
BODIES: dict[str, dict[str, Any]] = {
    "/predict": {"content": encoded(colour_image("blau"))},
    "/v2/models/{model}/infer": {"json": INFER},
    "/v2/models/{model}/versions/{version}/infer": {"json": INFER},
}
OPERATIONS = [
    (path, method)
    for path, operations in document()["paths"].items()
    for method in operations
    if method != "parameters"
]


def check(answer: Any, schema: dict[str, Any]) -> None:
    Draft202012Validator({**schema, "components": document()["components"]}).validate(answer)


def test_every_schema_is_one() -> None:
    for schema in document()["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    check(INFER, {"$ref": "#/components/schemas/InferRequest"})


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_answers_are_as_the_document_says(running: Running, path: str, method: str) -> None:
    url = path.format(model="m", version="1")
    answer = running.client.request(method, url, **BODIES.get(path, {}))
    described = document()["paths"][path][method]["responses"]
    told = described["200" if answer.status_code == 200 else "default"].get("content", {})
    assert (answer.status_code == 200) == (not path.endswith("/unload"))
    for content_type, media in told.items():
        if answer.headers["content-type"].startswith(content_type):
            check(answer.json() if content_type == "application/json" else answer.text, media["schema"])
            return
    assert not told
    assert answer.content == b""


def test_mistakes_have_one_form(running: Running) -> None:
    for path, method in OPERATIONS:
        wrong = running.client.request("DELETE", path.format(model="m", version="1"))
        assert wrong.status_code == 405
        assert method.upper() in wrong.headers["allow"]
        check(wrong.json(), {"$ref": "#/components/schemas/Error"})
        if "{" in path:
            unknown = running.client.request(method, path.format(model="other", version="1"))
            assert 400 <= unknown.status_code < 500
            check(unknown.json(), {"$ref": "#/components/schemas/Error"})


@pytest.mark.slow
def test_no_request_made_from_the_document_gets_an_answer_that_it_does_not_name(
    running: Running, tmp_path: Path
) -> None:
    """Schemathesis: no 5xx, and what is wrong by the document is refused. What the document cannot say is excluded:

    which inputs a model has, and that unload is always refused (positive_data_acceptance).
    """
    st = Path(sys.executable).with_name("st")
    options = (
        "--max-time 30 -n 30 --seed 1 --exclude-checks positive_data_acceptance --generation-database none --no-color"
    )
    command = [st, "run", f"{running.url}/openapi.json", *options.split()]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    tested = re.search(r"(\d+) generated", run.stdout)
    assert tested is not None
    assert int(tested[1]) > 200


def test_every_route_is_in_the_document(running: Running) -> None:
    assert running.client.get("/openapi.json").json() == document()
    from deploy.serving.server import Application
    from deploy.serving.service import Service
    from deploy.serving.settings import parse_settings

    application = Application(Service(parse_settings(["--registry", "any"])))
    assert {route.path for route in application.routes} == set(document()["paths"])
