"""The page as people meet it, in a real Chromium, where one is installed: wide and narrow, by keyboard, read aloud."""

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.deploy.serving.running import Running, eventually
from tests.deploy.tiny_bundle import colour_image, encoded

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Tab:
    """A tab, asked over the DevTools protocol."""

    def __init__(self, line: ClientConnection) -> None:
        self._line = line
        self._numbers = itertools.count(1)
        self.problems: list[str] = []

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._line.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._line.recv(timeout=30))
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(str(message["params"]))
            if message.get("id") == number:
                return message["result"]

    def value(self, expression: str) -> Any:
        return self.do("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode={"Tab": 9}[key])

    def choose(self, *files: Path) -> None:
        root = self.do("DOM.getDocument")["root"]["nodeId"]
        node = self.do("DOM.querySelector", nodeId=root, selector="#files")["nodeId"]
        self.do("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in files])

    def read_aloud(self) -> list[tuple[str, str]]:
        """Role and name of all that a screen reader meets."""
        nodes = self.do("Accessibility.getFullAXTree")["nodes"]
        return [(each["role"]["value"], each.get("name", {}).get("value", "")) for each in nodes if not each["ignored"]]


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "about:blank")
    browser = subprocess.Popen([CHROMIUM, f"--user-data-dir={tmp_path}/profile", *options], stderr=subprocess.DEVNULL)
    try:
        where = tmp_path / "profile" / "DevToolsActivePort"
        eventually(lambda: where.is_file() and where.read_text().count("\n") > 0)
        time.sleep(0.5)
        tabs = httpx.get(f"http://127.0.0.1:{where.read_text().split()[0]}/json").json()
        address = next(each["webSocketDebuggerUrl"] for each in tabs if each["type"] == "page")
        with connect(address, max_size=2**26) as line:
            made = Tab(line)
            for domain in ("Page", "Runtime", "DOM", "Accessibility"):
                made.do(f"{domain}.enable")
            yield made
    finally:
        browser.terminate()
        browser.wait(30)


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (375, 800)])
def test_pictures_are_chosen_by_keyboard_and_answers_are_read_aloud(
    running: Running, tab: Tab, tmp_path: Path, width: int, height: int
) -> None:
    files = [tmp_path / "a.jpg", tmp_path / "b.png", tmp_path / "bad.jpg"]
    files[0].write_bytes(encoded(colour_image("blau", size=(400, 300)), "JPEG"))
    files[1].write_bytes(encoded(colour_image("grün", size=(200, 300))))
    files[2].write_bytes(b"no picture")
    tab.do("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
    tab.do("Page.navigate", url=f"{running.url}/")
    eventually(lambda: "version 1" in str(tab.value("document.title")))
    tab.press("Tab")
    assert tab.value("document.activeElement.id") == "files"

    tab.choose(*files)
    eventually(lambda: "bad.jpg was not classified" in str(tab.value("document.getElementById('status').textContent")))
    tab.value("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert tab.value("document.documentElement.scrollWidth") <= width
    said = tab.read_aloud()
    assert ("button", "Choose pictures or drop them anywhere, or paste one") in said
    headings = [name for role, name in said if role == "heading"]
    assert headings[0] == "What is in the picture?"
    assert any(name.startswith("blau, ") for name in headings)
    assert any(name.startswith("grün, ") for name in headings)
    assert {"banner", "main", "status", "list", "term", "definition"} <= {role for role, _ in said}
    assert tab.problems == []
