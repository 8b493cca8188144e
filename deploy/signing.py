"""Ed25519 signatures of bundles: whose model it is, where digests only tell that it is whole.

A signature is over the bundle's digest, which is over the digest of every file; it lies beside them in bundle.sig, so
that signing changes nothing. Keys are PEM files, as openssl reads them. Needs the extra `sign`: who may do without
imports this where a key is named, and only there.
"""

import json
import os
from pathlib import Path

from deploy.bundle import SIGNATURE, Bundle
from deploy.errors import BundleError, KeyFileError
from deploy.files import sha256_bytes, write_bytes, write_json

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
        PublicFormat,
        load_pem_private_key,
        load_pem_public_key,
    )
except ImportError as error:
    raise KeyFileError("Signatures need the package cryptography: install tanuki with the extra `sign`.") from error

CONTEXT = b"tanuki bundle, format of signature 1\n"  # a signature of this key over something else is none of a bundle
ALGORITHM = "ed25519"


def generate_keys(private_key: Path) -> Path:
    """Writes a private key that only its owner may read, and beside it the public key, which everybody may.

    Returns:
        The public key's file, ``NAME.pub``.

    Raises:
        KeyFileError: If one of the files is there already; a key is never overwritten.
    """
    public_key = private_key.with_name(f"{private_key.name}.pub")
    if there := [str(path) for path in (private_key, public_key) if path.exists()]:
        raise KeyFileError(f"{' and '.join(there)} exists already. Move it away, or choose another name.")
    key = Ed25519PrivateKey.generate()
    private_key.parent.mkdir(parents=True, exist_ok=True)
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with os.fdopen(os.open(private_key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(secret)
    write_bytes(public_key, key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return public_key


def key_id(public_key: Path) -> str:
    """A short name of a key, to compare by eye.

    Raises:
        KeyFileError: If the file is no Ed25519 public key.
    """
    return _id(_read_public(public_key))


def check_private_key(private_key: Path) -> None:
    """Sees to it that a file can sign.

    Raises:
        KeyFileError: If it is no Ed25519 private key without a password.
    """
    _read_private(private_key)


def sign_bundle(bundle: Bundle, private_key: Path) -> str:
    """Signs a bundle that was read and found whole; in place of an earlier signature.

    Returns:
        The id of the key.

    Raises:
        KeyFileError: If the file is no Ed25519 private key without a password.
    """
    key = _read_private(private_key)
    signed_by = _id(key.public_key())
    told = {"algorithm": ALGORITHM, "key": signed_by, "signature": key.sign(_message(bundle)).hex()}
    write_json(bundle.directory / SIGNATURE, told)
    return signed_by


def require_signature(bundle: Bundle, public_key: Path) -> str:
    """Sees to it that a bundle was signed by the owner of a key.

    Returns:
        The id of the key.

    Raises:
        BundleError: If it is not signed, by another key, or the signature is of another bundle.
        KeyFileError: If the file is no Ed25519 public key.
    """
    key = _read_public(public_key)
    path = bundle.directory / SIGNATURE
    try:
        told = json.loads(path.read_bytes())
        signed_by, signature = str(told["key"]), bytes.fromhex(told["signature"])
    except FileNotFoundError as error:
        raise BundleError(f"{bundle.directory} is not signed. Sign it: `tanuki sign`.") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BundleError(f"{path} is no signature ({error!r}). Sign the bundle again: `tanuki sign`.") from error
    try:
        key.verify(signature, _message(bundle))
    except InvalidSignature as error:
        wanted = _id(key)
        why = f"by the key {signed_by}, not {wanted}" if signed_by != wanted else "in another state than it is in now"
        raise BundleError(f"{bundle.directory} was signed {why}. Do not serve it; ask who made it.") from error
    return _id(key)


def _message(bundle: Bundle) -> bytes:
    return CONTEXT + bundle.digest.encode()


def _read_private(path: Path) -> Ed25519PrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise KeyFileError(
            f"{path} cannot be read as a private key: {error}. Make one: `tanuki keygen FILE`."
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path} is a key, but no Ed25519 one. Make one: `tanuki keygen FILE`.")
    return key


def _read_public(path: Path) -> Ed25519PublicKey:
    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError) as error:
        raise KeyFileError(
            f"{path} cannot be read as a public key: {error}. It is the .pub of `tanuki keygen`."
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise KeyFileError(f"{path} is a key, but no Ed25519 one. It is the .pub of `tanuki keygen`.")
    return key


def _id(key: Ed25519PublicKey) -> str:
    return sha256_bytes(key.public_bytes_raw())[:16]
