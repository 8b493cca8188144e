"""Known vulnerabilities of pinned packages, without a network: `make audit ADVISORIES=FOLDER`.

The folder holds advisories in the OSV format as JSON, such as the unpacked dump that osv.dev offers for PyPI, carried
here by whatever means. Exit code 0: none; 1: some; 2: nothing to compare with.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from deploy.sbom import Pin, read_pins


@dataclass(frozen=True)
class Finding:
    """A pinned package that an advisory speaks of.

    Args:
        package: Its name.
        version: The pinned one.
        advisory: The advisory's id.
        fixed_in: Versions that mend it.
        summary: In its words.
    """

    package: str
    version: str
    advisory: str
    fixed_in: tuple[str, ...]
    summary: str


def read_advisories(folder: Path) -> list[dict[str, Any]]:
    """All advisories of a folder about packages of PyPI that were not withdrawn."""
    told = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json")))
    return [each for each in told if "affected" in each and "withdrawn" not in each]


def findings(pins: Sequence[Pin], advisories: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """What the advisories say of the pinned packages."""
    by_name: dict[str, list[Pin]] = {}
    for pin in pins:
        by_name.setdefault(pin.name, []).append(pin)
    for advisory in advisories:
        for affected in advisory["affected"]:
            package = affected.get("package", {})
            if package.get("ecosystem") != "PyPI":
                continue
            for pin in by_name.get(re.sub(r"[-_.]+", "-", package["name"]).lower(), ()):
                if _is_affected(pin.version, affected):
                    yield Finding(pin.name, pin.version, advisory["id"], _fixes(affected), advisory.get("summary", ""))


def _is_affected(version: str, affected: Mapping[str, Any]) -> bool:
    if version in affected.get("versions", ()):
        return True
    ranges = [each["events"] for each in affected.get("ranges", ()) if each.get("type") == "ECOSYSTEM"]
    return any(_is_within(Version(version), events) for events in ranges)


def _is_within(version: Version, events: Sequence[Mapping[str, str]]) -> bool:
    """OSV's rule: the last event at or before the version says whether it is affected."""
    affected = False
    for kind, at in sorted(((kind, at) for event in events for kind, at in event.items()), key=_order):
        if kind == "introduced" and (at == "0" or version >= Version(at)):
            affected = True
        elif (kind == "fixed" and version >= Version(at)) or (kind == "last_affected" and version > Version(at)):
            affected = False
    return affected


def _order(event: tuple[str, str]) -> Version:
    try:
        return Version(event[1])
    except InvalidVersion:
        return Version("0")


def _fixes(affected: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(
        event["fixed"]
        for each in affected.get("ranges", ())
        if each.get("type") == "ECOSYSTEM"
        for event in each["events"]
        if "fixed" in event
    )


def main() -> int:
    """Prints what it finds."""
    folder, *locks = map(Path, sys.argv[1:])
    advisories = read_advisories(folder)
    if not advisories:
        print(f"{folder} holds no advisories in the OSV format (JSON): nothing was compared.", file=sys.stderr)
        return 2
    pins = list(dict.fromkeys(pin for lock in locks for pin in read_pins(lock)))
    found = list(dict.fromkeys(findings(pins, advisories)))
    for each in found:
        mended = f"; mended in {', '.join(each.fixed_in)}" if each.fixed_in else ""
        print(f"{each.package} {each.version}: {each.advisory}{mended}. {each.summary}".rstrip())
    print(f"{len(found)} findings: {len(pins)} packages, {len(advisories)} advisories")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
