"""Signatures: only the key's owner makes one, and it holds for one bundle in one state."""

import json
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from deploy.bundle import SIGNATURE, Bundle, read_bundle
from deploy.errors import BundleError, KeyFileError
from deploy.registry import Registry
from deploy.signing import CONTEXT, generate_keys, key_id, require_signature, sign_bundle
from tests.deploy.tiny_bundle import LABELS, seal, write_colour_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_colour_bundle(tmp_path / "bundle")


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "release.key", generate_keys(tmp_path / "release.key")


def test_a_signed_bundle_is_the_same_bundle_and_its_signer_is_known(bundle: Bundle, keys: tuple[Path, Path]) -> None:
    private, public = keys
    signed_by = sign_bundle(bundle, private)
    again = read_bundle(bundle.directory)
    assert again.digest == bundle.digest
    assert require_signature(again, public) == signed_by == key_id(public)


def test_a_bundle_without_a_signature_or_with_another_keys_is_refused(
    bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = keys
    with pytest.raises(BundleError, match="is not signed"):
        require_signature(bundle, public)
    sign_bundle(bundle, private)
    other = generate_keys(tmp_path / "other.key")
    with pytest.raises(BundleError, match=f"by the key {key_id(public)}, not {key_id(other)}"):
        require_signature(bundle, other)


def test_a_forger_who_seals_again_cannot_sign_again(bundle: Bundle, keys: tuple[Path, Path]) -> None:
    private, public = keys
    sign_bundle(bundle, private)
    seal(bundle.directory, labels=list(LABELS[::-1]))
    with pytest.raises(BundleError, match="in another state than it is in now"):
        require_signature(read_bundle(bundle.directory), public)


def test_a_signature_of_another_bundle_does_not_fit(bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    other = write_colour_bundle(tmp_path / "other", sharpness=9.0)
    sign_bundle(other, private)
    shutil.copy(other.directory / SIGNATURE, bundle.directory)
    with pytest.raises(BundleError, match="in another state"):
        require_signature(bundle, public)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"key": 1, "signature": "zz"}', '{"key": "a", "signature": 3}'])
def test_a_garbled_signature_is_no_signature(bundle: Bundle, keys: tuple[Path, Path], content: str) -> None:
    (bundle.directory / SIGNATURE).write_text(content)
    with pytest.raises(BundleError, match="is no signature"):
        require_signature(bundle, keys[1])


def test_a_registered_bundle_keeps_its_signature(bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    sign_bundle(bundle, private)
    registry = Registry(tmp_path / "registry")
    version = registry.register(bundle.directory, {})
    assert require_signature(registry.bundle(version.id), public) == key_id(public)


def test_a_key_that_cannot_sign_stops_a_rollback_before_anything_moves(keys: tuple[Path, Path], tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    for number in (1, 2):
        registry.register(write_colour_bundle(tmp_path / str(number), sharpness=8.0 + number).directory, {})
        registry.promote(number, reason="better", expected=number - 1 or None)
    with pytest.raises(KeyFileError, match="tanuki keygen"):
        registry.rollback("bad", private_key=keys[1])
    assert registry.champion_id() == 2
    assert registry.rollback("bad", private_key=keys[0]).id == 1
    assert require_signature(registry.bundle(1), keys[1]) == key_id(keys[1])


def test_a_private_key_is_its_owners_alone_and_never_overwritten(keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert stat.S_IMODE(private.stat().st_mode) == 0o600
    before = private.read_bytes(), public.read_bytes()
    with pytest.raises(KeyFileError, match="exists already"):
        generate_keys(private)
    private.unlink()
    with pytest.raises(KeyFileError, match=r"release\.key\.pub exists already"):
        generate_keys(private)
    assert public.read_bytes() == before[1]


def test_files_that_are_no_such_keys_are_told_as_such(bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    (tmp_path / "none").write_text("no key")
    foreign = ec.generate_private_key(ec.SECP256R1())
    pem, pkcs8, spki = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.PublicFormat.SubjectPublicKeyInfo,
    )
    (tmp_path / "ec").write_bytes(foreign.private_bytes(pem, pkcs8, serialization.NoEncryption()))
    (tmp_path / "ec.pub").write_bytes(foreign.public_key().public_bytes(pem, spki))
    locked = ed25519.Ed25519PrivateKey.generate().private_bytes(
        pem, pkcs8, serialization.BestAvailableEncryption(b"secret")
    )
    (tmp_path / "locked").write_bytes(locked)
    for name in ("none", "gone", "ec", "locked", public.name):
        with pytest.raises(KeyFileError, match="tanuki keygen"):
            sign_bundle(bundle, tmp_path / name)
    for name in ("none", "gone", "ec.pub", private.name):
        with pytest.raises(KeyFileError, match="tanuki keygen"):
            require_signature(bundle, tmp_path / name)
    assert not (bundle.directory / SIGNATURE).exists()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_openssl_finds_the_signature_good(bundle: Bundle, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    sign_bundle(bundle, private)
    told = json.loads((bundle.directory / SIGNATURE).read_text())
    (tmp_path / "message").write_bytes(CONTEXT + bundle.digest.encode())
    (tmp_path / "signature").write_bytes(bytes.fromhex(told["signature"]))
    command = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"]
    command += ["-in", tmp_path / "message", "-sigfile", tmp_path / "signature"]
    assert "Success" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_without_the_extra_it_says_what_to_install(repository: Path) -> None:
    code = (
        "import sys\nsys.modules['cryptography'] = None\nfrom deploy.errors import KeyFileError\n"
        "try:\n    import deploy.signing\nexcept KeyFileError as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert "the extra `sign`" in run.stdout
