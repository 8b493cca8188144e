"""One server for all tests that only ask it something."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.serving.running import Running, add_version, serving


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of version 1, with small limits; nobody may promote anything there."""
    folder = tmp_path_factory.mktemp("serving")
    add_version(folder / "registry", folder)
    options = ("--name", "m", "--max-pictures", "8", "--max-megapixels", "1", "--max-body-mb", "4")
    with serving(
        folder / "registry", folder, *options, "--max-json-mb", "1", "--body-timeout-s", "1.5", "--grpc-port", "0"
    ) as running:
        yield running


@pytest.fixture(scope="session")
def recorded(material: Path) -> dict[str, dict[str, Any]]:
    """What Triton answered, by the names of the requests."""
    return {each["case"]: each for each in json.loads((material / "triton_golden.json").read_text())}
