"""What runs on machines that no test has (containers, clusters, systemd), checked by those machines' own tools."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
from packaging.requirements import Requirement
from prefect.utilities.templating import apply_values
from ruamel.yaml import YAML

from tasks.layout import Layout
from tests.conftest import REPOSITORY

DEPLOY = REPOSITORY / "deploy"
DOCKERFILES = sorted((DEPLOY / "docker").glob("Dockerfile.*"))
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
KUBERNETES = "1.37"
LOCKS = {name: REPOSITORY / f"{name}.lock" for name in ("requirements", "requirements-serve")}


def read_yaml(path: Path) -> list[Any]:
    return list(YAML(typ="safe", pure=True).load_all(path.read_text()))


def locked(lock: Path) -> set[str]:
    """Name, version and marker of each package of a lock file."""
    return {line.split(" \\")[0] for line in lock.read_text().splitlines() if re.match(r"[a-z0-9]", line)}


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_accepts_a_dockerfile(dockerfile: Path) -> None:
    run = subprocess.run([Path(sys.executable).parent / "hadolint", dockerfile], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_worker_bears_a_user_without_a_name_and_a_read_only_disk() -> None:
    """Of a number alone, DVC and ssh know nothing and end; $USER is what DVC believes of any other number."""
    text = (DEPLOY / "docker" / "Dockerfile.train").read_text()
    (user,) = re.findall(r"^USER (\d+):\d+$", text, re.MULTILINE)
    assert f":x:{user}:" in text
    assert re.search(r"^ENV .* USER=\w+", text, re.MULTILINE)
    assert "DVC_SITE_CACHE_DIR=/tmp/" in text  # else DVC makes a folder in /var/tmp, which is read-only


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_copies_what_is_there_and_runs_without_rights(dockerfile: Path) -> None:
    lines = dockerfile.read_text().splitlines()
    ignored = [line.removeprefix("!") for line in (REPOSITORY / ".dockerignore").read_text().splitlines()]
    for words in (line.split()[1:] for line in lines if line.startswith("COPY") and "--from" not in line):
        for source in words[:-1]:
            assert (REPOSITORY / source).exists(), source
            assert source in ignored, source
    assert "USER 65532:65532" in lines


def test_the_serving_image_holds_what_was_tested_and_no_more() -> None:
    serve, all_of_it = (locked(LOCKS[name]) for name in ("requirements-serve", "requirements"))
    versions = {(each.name, str(each.specifier)) for each in map(Requirement, all_of_it)}
    mine = {(each.name, str(each.specifier)) for each in map(Requirement, serve)}
    assert mine <= versions
    names = {name for name, _ in mine}
    assert names.isdisjoint({"torch", "prefect", "dvc", "great-expectations", "pandas", "scikit-learn", "onnx"})
    assert {"onnxruntime", "starlette", "pyarrow", "grpcio"} <= names


def test_compose_has_what_it_names_and_no_secret(tmp_path: Path) -> None:
    path = DEPLOY / "docker" / "compose.yaml"
    (compose,) = read_yaml(path)
    told = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", json.dumps(compose))  # as compose itself would fill it in
    compose_spec.PyCompose.from_json(told).validate()
    for name, service in compose["services"].items():
        assert name == "postgres" or service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        for source in (volume.split(":")[0] for volume in service.get("volumes", ())):
            is_ours = source.startswith("..")
            assert (
                source in compose["volumes"]
                or (is_ours and (path.parent / source).resolve().exists())
                or (source.startswith("../../data/"))
            ), source
        if "build" in service:
            assert (path.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        secrets = {key: value for key, value in service.get("environment", {}).items() if "PASSWORD" in key}
        assert all(re.fullmatch(r"\$\{\w+:\?\}", value) for value in secrets.values()), name


def test_compose_makes_the_folders_that_it_mounts_before_docker_does_so_for_root() -> None:
    (compose,) = read_yaml(DEPLOY / "docker" / "compose.yaml")
    services = compose["services"]
    maker = services["folders"]
    assert maker["entrypoint"] == ["mkdir", "-p"]
    assert maker["user"] == services["model"]["user"] == services["worker"]["user"]
    mounted = {
        name: {volume.split(":")[0].removeprefix("../../") for volume in each.get("volumes", ()) if "/data/" in volume}
        for name, each in services.items()
    }
    assert mounted["model"] == {"data/registry", "data/captures"}
    for name, folders in mounted.items():
        assert folders <= set(maker["command"])
        if folders:
            assert services[name]["depends_on"]["folders"] == {"condition": "service_completed_successfully"}


def test_a_run_in_kubernetes_promotes_where_the_model_server_looks() -> None:
    documents = {each["kind"]: each for each in read_yaml(DEPLOY / "kubernetes" / "serving.yaml")}
    claim = documents["PersistentVolumeClaim"]["metadata"]["name"]
    template = json.loads((DEPLOY / "kubernetes" / "work-pool.json").read_text())
    assert template["variables"]["properties"]["registry_claim"]["default"] == claim
    pod = template["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]
    (volume,) = (each for each in pod["volumes"] if "registry_claim" in json.dumps(each))
    places = {each["name"]: each["mountPath"] for each in pod["containers"][0]["volumeMounts"]}
    workspace = Layout(Path(places["workspace"]))
    assert places[volume["name"]] == str(workspace.registry_dir)


def test_no_annotation_promises_metrics_that_want_a_token() -> None:
    """Prometheus has none for pods that it finds by annotations: it would be told 401 for ever."""
    for file in sorted((DEPLOY / "kubernetes").glob("*.yaml")):
        text = file.read_text()
        assert not ("--token-file" in text and "prometheus.io/scrape" in text), file.name


@pytest.mark.parametrize("name", ["serving.yaml"])
def test_kubernetes_accepts_the_manifests(name: str) -> None:
    documents = read_yaml(DEPLOY / "kubernetes" / name)
    assert len(documents) >= 5
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def test_kservs_manifest_is_a_pod_that_kubernetes_accepts() -> None:
    """KServe's own part has no schema that can be installed here."""
    (service,) = read_yaml(DEPLOY / "kubernetes" / "inference-service.yaml")
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    scaling = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget"}
    predictor = service["spec"]["predictor"]
    pod = {key: value for key, value in predictor.items() if key not in scaling}
    assert scaling <= set(predictor)
    as_pod = {"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": pod}
    kubernetes_validate.validate(as_pod, KUBERNETES, strict=True)


def test_the_work_pools_job_is_one_that_kubernetes_accepts() -> None:
    template = json.loads((DEPLOY / "kubernetes" / "work-pool.json").read_text())
    properties = template["variables"]["properties"]
    named = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert named == set(properties)
    values = {name: facts["default"] for name, facts in properties.items() if facts.get("default") is not None}
    given = {"name": "retrain", "command": ["python", "-m", "prefect.engine"], "env": [], "labels": {"app": "tanuki"}}
    job = apply_values(template["job_configuration"]["job_manifest"], {**values, **given}, remove_notset=True)
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian: systemd)")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_accepts_a_unit(unit: Path, tmp_path: Path) -> None:
    """With this machine's paths, since it looks for the programs."""
    scripts = Path(sys.executable).parent
    text = unit.read_text().replace("/srv/tanuki/.venv/bin", str(scripts)).replace("User=tanuki", "User=daemon")
    (tmp_path / unit.name).write_text(text)
    run = subprocess.run(["systemd-analyze", "verify", tmp_path / unit.name], capture_output=True, text=True)
    ours = [line for line in (run.stdout + run.stderr).splitlines() if unit.name in line]
    assert not ours
    assert run.returncode == 0, run.stderr


def test_the_options_in_the_files_are_those_of_the_server() -> None:
    from deploy.serving.settings import parse_settings

    (compose,) = read_yaml(DEPLOY / "docker" / "compose.yaml")
    (kserve,) = read_yaml(DEPLOY / "kubernetes" / "inference-service.yaml")
    deployment = next(
        each for each in read_yaml(DEPLOY / "kubernetes" / "serving.yaml") if each["kind"] == "Deployment"
    )
    entry = json.loads(re.search(r"^ENTRYPOINT (.*)$", DOCKERFILES[0].read_text(), re.M)[1])
    given = [
        compose["services"]["model"]["command"],
        kserve["spec"]["predictor"]["containers"][0]["args"],
        deployment["spec"]["template"]["spec"]["containers"][0]["args"],
    ]
    for arguments in given:
        assert parse_settings([*entry[3:], *arguments]).host == "0.0.0.0"
