"""What was pushed to a remote, a fresh clone gets back and can answer with: a folder, SSH and S3, each real."""

import getpass
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from deploy.registry import open_registry
from tests.conftest import Workspace
from tests.deploy.tiny_bundle import colour_image, encoded, write_colour_bundle
from tests.object_stores import BUCKET, s3_on_loopback

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Remote:
    """Where to push.

    Args:
        url: As `dvc remote add` wants it.
        options: What `dvc remote modify` sets.
        environment: What a client needs besides.
        restart: Makes it answer again.
    """

    url: str
    options: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@pytest.fixture
def folder_remote(tmp_path: Path) -> Remote:
    return Remote(str(tmp_path / "storage"))


@pytest.fixture
def ssh_remote(tmp_path: Path) -> Iterator[Remote]:
    """An OpenSSH server of this test's own, with its own host key, on loopback."""
    sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")
    if sshd is None or importlib.util.find_spec("dvc_ssh") is None:
        pytest.skip("needs OpenSSH's sshd and the package dvc-ssh")
    home = tmp_path / "ssh"
    home.mkdir(mode=0o700)
    for key in ("host_key", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / key], check=True)
    shutil.copy(home / "key.pub", home / "authorized_keys")
    port = free_port()
    (home / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host_key\nAuthorizedKeysFile {home}/authorized_keys\n"
        f"PidFile none\nStrictModes no\nPasswordAuthentication no\nUsePAM no\nPermitRootLogin prohibit-password\n"
        "Subsystem sftp internal-sftp\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it shuts itself in before a login
    with running([sshd, "-D", "-e", "-f", str(home / "config")], port, home / "log"):
        url = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{tmp_path}/storage"
        yield Remote(url, {"keyfile": str(home / "key"), "allow_agent": "false"})


@pytest.fixture
def s3_remote(tmp_path: Path) -> Iterator[Remote]:
    """moto's S3 on loopback: the protocol, without Amazon."""
    if importlib.util.find_spec("dvc_s3") is None:
        pytest.skip("needs the package dvc-s3")
    with s3_on_loopback() as environment:
        endpoint = environment.pop("AWS_ENDPOINT_URL")
        yield Remote(f"s3://{BUCKET}/tanuki", {"endpointurl": endpoint}, environment)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[None]:
    """A server, from when it answers on its port."""
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as process:
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            else:
                pytest.fail(f"{command} does not answer: {log.read_text()}")
            yield
        finally:
            process.terminate()


class Client(Workspace):
    """A workspace whose commands see what a remote needs."""

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **self.extra}

    extra: dict[str, str]


def client(root: Path, prefect_home: Path, extra: dict[str, str]) -> Workspace:
    made = Client(root, prefect_home)
    object.__setattr__(made, "extra", extra)
    return made


@pytest.mark.parametrize("kind", ["folder", "ssh", "s3"])
def test_a_fresh_clone_pulls_and_predicts(
    lived_in: Workspace,
    retrained: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    prefect_home: Path,
    digits: Path,
    kind: str,
) -> None:
    remote: Remote = request.getfixturevalue(f"{kind}_remote")
    first = client(tmp_path / "first", prefect_home, remote.environment)
    shutil.copytree(retrained, first.root, symlinks=True)
    assert "no default" in finding(first)["text"]
    first.dvc("remote", "add", "--force", "--default", "storage", remote.url)
    for name, value in remote.options.items():
        first.dvc("remote", "modify", "storage", name, value)
    assert "files of data/raw. Run `dvc push`" in finding(first)["text"]
    first.dvc("push")
    assert finding(first)["level"] == "ok"
    first.run("git", "add", "data/raw.dvc", "dvc.lock", ".dvc/config")
    first.run("git", "commit", "--quiet", "--message", "Version 1")

    first.run("git", "clone", "--quiet", first.root, tmp_path / "second")
    second = client(tmp_path / "second", prefect_home, remote.environment)
    second.dvc("pull")
    pictures = sorted((digits / "3").iterdir())[:2]
    told = second.tanuki("predict", "--json", *pictures)
    assert "data/bundle answers" in told.stderr
    expected = json.loads(lived_in.tanuki("predict", "--json", "--version", "1", *pictures).stdout)
    assert json.loads(told.stdout) == [{**answer, "version": None} for answer in expected]


def finding(workspace: Workspace) -> dict[str, str]:
    """What the doctor says of the remote."""
    findings = json.loads(workspace.tanuki("doctor", "--json", check=False).stdout)
    return next(each for each in findings if each["subject"] == "DVC remote")


@pytest.mark.parametrize("kind", ["ssh", "s3"])
def test_a_remote_that_does_not_answer_is_a_finding(
    workspace: Workspace, request: pytest.FixtureRequest, tmp_path: Path, prefect_home: Path, digits: Path, kind: str
) -> None:
    remote: Remote = request.getfixturevalue(f"{kind}_remote")
    if kind == "ssh":
        cut_off = replace(remote, url="ssh://127.0.0.1:1/storage")
    else:
        cut_off = replace(remote, options={"endpointurl": "http://127.0.0.1:1"})
    mine = client(workspace.root, prefect_home, remote.environment)
    mine.tanuki("add", digits)
    mine.dvc("remote", "add", "--default", "storage", cut_off.url)
    for name, value in cut_off.options.items():
        mine.dvc("remote", "modify", "storage", name, value)
    assert finding(mine)["level"] == "warning"
    assert "storage does not answer" in finding(mine)["text"]


def test_an_inbox_in_a_bucket_is_taken_in(
    workspace: Workspace, s3_remote: Remote, tmp_path: Path, prefect_home: Path, digits: Path
) -> None:
    import fsspec

    keys = {"key": "test", "secret": "test", "endpoint_url": s3_remote.options["endpointurl"]}
    bucket = fsspec.filesystem("s3", **keys)
    picture = next((digits / "3").iterdir())
    bucket.pipe({"storage/in/three/a.png": picture.read_bytes(), "storage/in/three/b.png": b"text"})
    mine = client(
        workspace.root, prefect_home, {**s3_remote.environment, "AWS_ENDPOINT_URL": s3_remote.options["endpointurl"]}
    )
    told = json.loads(mine.tanuki("ingest", "s3://storage/in", "--settle", "0", "--json").stdout)
    assert (told["added"]["added"], told["emptied"]) == (1, 1)
    bucket.invalidate_cache()
    assert bucket.find("storage/in") == ["storage/in/three/b.png"]


def test_every_command_works_with_a_registry_in_a_bucket(
    workspace: Workspace, s3_remote: Remote, tmp_path: Path, prefect_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{BUCKET}/registry"
    environment = {**s3_remote.environment, "AWS_ENDPOINT_URL": s3_remote.options["endpointurl"]}
    for name, value in {**environment, "XDG_CACHE_HOME": str(tmp_path / "trainer")}.items():
        monkeypatch.setenv(name, value)
    registry = open_registry(url)
    for sharpness in (8.0, 4.0):
        registry.register(write_colour_bundle(tmp_path / str(sharpness), sharpness=sharpness).directory, {})
    picture = tmp_path / "blue.png"
    picture.write_bytes(encoded(colour_image("blau")))
    mine = client(
        workspace.root, prefect_home, {**environment, "TANUKI_REGISTRY": url, "XDG_CACHE_HOME": str(tmp_path)}
    )
    mine.tanuki("promote", "1", "--reason", "first")
    mine.tanuki("keygen", tmp_path / "key")
    mine.tanuki("promote", "2", "--reason", "second", "--key", tmp_path / "key")
    assert "signed by the key" in mine.tanuki("verify", "2", "--public-key", tmp_path / "key.pub").stdout
    assert json.loads(mine.tanuki("predict", "--json", picture).stdout)[0]["version"] == 2
    told = mine.tanuki("rollback", "--reason", "bad", "--key", tmp_path / "key").stdout
    assert "Version 1 is champion again" in told
    assert "signed by the key" in mine.tanuki("verify", "1", "--public-key", tmp_path / "key.pub").stdout
    told = json.loads(mine.tanuki("versions", "--json").stdout)
    assert [(row["id"], row["champion"], row["decision"]) for row in told] == [
        (1, True, "rolled_back"),
        (2, False, "forced"),
    ]
    kinds = [event["kind"] for event in json.loads(mine.tanuki("lineage", "1").stdout)["events"]]
    assert kinds == ["registered", "forced", "rolled_back"]
    elsewhere = client(workspace.root, prefect_home, {**environment, "XDG_CACHE_HOME": str(tmp_path / "b")})
    assert json.loads(elsewhere.tanuki("--registry", url, "versions", "--json").stdout)[0]["champion"]
    assert "never published" in mine.tanuki("publish").stderr
    assert not (workspace.root / "data" / "registry").exists()
