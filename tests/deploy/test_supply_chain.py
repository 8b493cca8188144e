"""What the serving image is made of, and what advisories say of it, without a network."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from deploy.advisories import findings
from deploy.sbom import Pin, bill_of_materials, read_pins
from tests.conftest import REPOSITORY

LOCK = REPOSITORY / "requirements-serve.lock"

ADVISORY = {
    "id": "OSV-TEST-1",
    "summary": "A picture that runs code.",
    "affected": [
        {
            "package": {"ecosystem": "PyPI", "name": "Pillow"},
            "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "10.3.0"}]}],
        },
        {
            "package": {"ecosystem": "PyPI", "name": "pillow"},
            "ranges": [
                {"type": "ECOSYSTEM", "events": [{"introduced": "12.0"}, {"last_affected": "12.2"}]},
                {"type": "GIT", "events": [{"introduced": "0"}]},
            ],
            "versions": ["13.0.5"],
        },
    ],
}


def test_the_bill_of_materials_is_cyclonedx_and_names_every_package() -> None:
    bill = bill_of_materials(LOCK, name="tanuki-serve", version="0.1.0")
    text = json.dumps(bill)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    names = {(each["name"], each["version"]) for each in bill["components"]}
    assert names == {tuple(line.split(" ")[0].split("==")) for line in LOCK.read_text().splitlines() if "==" in line}
    assert all(pin.digests for pin in read_pins(LOCK))
    assert text == json.dumps(bill_of_materials(LOCK, name="tanuki-serve", version="0.1.0"))


@pytest.mark.parametrize(
    ("version", "is_affected"),
    [("9.0", True), ("10.3.0", False), ("11.9", False), ("12.2", True), ("12.2.1", False), ("13.0.5", True)],
)
def test_an_advisorys_ranges_are_read_as_osv_says(version: str, is_affected: bool) -> None:
    found = list(findings([Pin("pillow", version, None, ())], [ADVISORY]))
    assert bool(found) == is_affected


def test_the_audit_names_the_package_and_what_mends_it(tmp_path: Path) -> None:
    lock, advisories = tmp_path / "some.lock", tmp_path / "advisories"
    lock.write_text(f"pillow==9.5.0 \\\n    --hash=sha256:{'a' * 64}\nnumpy==2.4.6 ; python_full_version < '3.12'\n")
    advisories.mkdir()

    def audit() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "deploy.advisories", str(advisories), str(lock)]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)

    assert audit().returncode == 2
    (advisories / "one.json").write_text(json.dumps({**ADVISORY, "id": "OSV-OLD", "withdrawn": "2026-01-01"}))
    (advisories / "two.json").write_text(json.dumps(ADVISORY))
    told = audit()
    assert told.returncode == 1
    assert told.stdout.splitlines() == [
        "pillow 9.5.0: OSV-TEST-1; mended in 10.3.0. A picture that runs code.",
        "1 findings: 2 packages, 1 advisories",
    ]
