"""What is in the serving image, as CycloneDX 1.6: `python -m deploy.sbom requirements-serve.lock FILE`, or `make sbom`.

Read off the lock file that the image is made from, so it needs neither network nor image; names, versions, digests and
under which condition (Python, system) a package is taken. The serial number follows the content: same lock, same bytes.
"""

import re
import sys
import tomllib
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.files import sha256_bytes, write_json

PINNED = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]*)==(?P<version>[^ ;\\]+)(?: *; *(?P<marker>[^\\]+?))? *\\?$")
DIGEST = re.compile(r"--hash=sha256:(?P<digest>[0-9a-f]{64})")


@dataclass(frozen=True)
class Pin:
    """A package of a lock file.

    Args:
        name: As normalised there.
        version: The only one that is taken.
        marker: When it is taken; None for always.
        digests: sha256 of the files that may be installed.
    """

    name: str
    version: str
    marker: str | None
    digests: tuple[str, ...]


def read_pins(lock: Path) -> list[Pin]:
    """The packages of a lock file that uv or pip-tools wrote with hashes, in its order."""
    pins: list[Pin] = []
    for line in lock.read_text(encoding="utf-8").splitlines():
        if found := PINNED.match(line):
            pins.append(Pin(found["name"], found["version"], found["marker"], ()))
        elif (digest := DIGEST.search(line)) and pins:
            last = pins.pop()
            pins.append(Pin(last.name, last.version, last.marker, (*last.digests, digest["digest"])))
    return pins


def bill_of_materials(lock: Path, *, name: str, version: str) -> dict[str, Any]:
    """A CycloneDX document of a lock file's packages.

    Args:
        lock: The lock file.
        name: Of what is made of them.
        version: Of it.
    """
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.UUID(sha256_bytes(lock.read_bytes())[:32], version=4)}",
        "version": 1,
        "metadata": {"component": {"type": "application", "bom-ref": name, "name": name, "version": version}},
        "components": [_component(pin) for pin in read_pins(lock)],
    }


def _component(pin: Pin) -> dict[str, Any]:
    address = f"pkg:pypi/{pin.name}@{pin.version}"
    files = [{"name": "tanuki:sha256", "value": digest} for digest in pin.digests]
    condition = [{"name": "tanuki:marker", "value": pin.marker}] if pin.marker else []
    return {
        "type": "library",
        "bom-ref": address,
        "name": pin.name,
        "version": pin.version,
        "purl": address,
        "properties": [*condition, *files],
    }


def main() -> None:
    """Writes the document."""
    lock, output = map(Path, sys.argv[1:])
    project = tomllib.loads((lock.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bill = bill_of_materials(lock, name=f"{project['name']}-serve", version=project["version"])
    write_json(output, bill)
    print(f"{output}: {len(bill['components'])} packages")


if __name__ == "__main__":
    main()
