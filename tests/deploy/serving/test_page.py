"""The page for people, as far as it can be told without a browser."""

import base64
import hashlib
import re
from pathlib import Path

from deploy.serving.page_routes import PAGE
from tests.deploy.serving.running import CARD, Running, add_version, serving
from tests.deploy.tiny_bundle import LABELS


def test_it_asks_nothing_of_anybody_else(running: Running) -> None:
    answer = running.client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(https?:)?//", answer.text)
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = answer.headers["content-security-policy"]
    assert f"script-src 'sha256-{digest}';" in policy
    assert "default-src 'none'" in policy
    assert "innerHTML" not in script  # what a label or a card says is text, never markup


def test_it_can_be_used_by_keyboard_and_screen_reader() -> None:
    html = PAGE.read_text()
    for needed in (
        '<html lang="en">',
        'role="status"',
        'role="alert"',
        "<main>",
        "<h1>",
        'name="viewport"',
        "aria-label=",
    ):
        assert needed in html
    assert re.search(r'<label id="drop" for="files">.*type="file"', html, re.S)


def test_what_it_shows_of_the_model(running: Running) -> None:
    said = running.client.get("/model").json()
    assert (said["name"], said["version"], said["labels"]) == ("m", "1", list(LABELS))
    assert said["card"] == CARD
    assert said["lineage"] == {"git": "abc123"}
    assert said["problem"] is None


def test_with_tokens_it_opens_but_shows_nothing_of_the_model(tmp_path: Path) -> None:
    add_version(tmp_path / "registry", tmp_path)
    (tmp_path / "tokens").write_text("secret\n")
    with serving(tmp_path / "registry", tmp_path, "--token-file", "tokens") as running:
        assert running.client.get("/").status_code == 200
        assert running.client.get("/model").status_code == 401
        assert running.client.get("/model", headers={"Authorization": "Bearer secret"}).json()["version"] == "1"
