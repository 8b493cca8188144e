"""What Prometheus is told and what Grafana shows of it: each name in a dashboard or an alarm is one that is told."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel
from prometheus_client.parser import text_string_to_metric_families
from ruamel.yaml import YAML

from deploy.registry import Registry
from flows.drift_check import DriftReport
from flows.lease import SupersededError
from flows.run_metrics import record_drift, recorded
from flows.workspace import BusyError
from tasks.layout import Layout
from tests.conftest import REPOSITORY
from tests.deploy.serving.running import Running, add_version, eventually, serving
from tests.deploy.tiny_bundle import LABELS, colour_image, encoded

DEPLOY = REPOSITORY / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
NAME = re.compile(r"\b((?:tanuki|process)_[a-z_]+)")


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A registry, and what a retrain and a look for drift left to tell."""
    layout = Layout(tmp_path_factory.mktemp("observed"))
    with recorded(layout):
        add_version(layout.registry_dir, layout.root)
        add_version(layout.registry_dir, layout.root, sharpness=4.0, promote=False)
        layout.report("validate_data").parent.mkdir(parents=True)
        layout.report("validate_data").write_text('{"num_accepted": 77}')
        layout.raw_pointer.write_text("outs:\n- md5: abc.dir\n  path: raw\n")
    test = {"statistic": 0.9, "expected": 0.5, "p_value": 0.001, "adjusted_p_value": 0.003}
    report = DriftReport(
        "drift", 1, "d", "2026-11-25T00:00:00+00:00", "", 60, 0, 60, 90, 0.01, {"pictures": test}, {}, 0.9, 0.8
    )
    record_drift(layout, report)
    return layout


@pytest.fixture(scope="module")
def observed(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    captures = tmp_path_factory.mktemp("captures")
    options = ("--capture-dir", str(captures), "--capture-fraction", "1", "--shadow", "2")
    with serving(layout.registry_dir, layout.root, *options) as running:
        for _ in range(3):
            running.client.post("/predict", content=encoded(colour_image(LABELS[0])))
        yield running


def values(text: str) -> dict[str, float]:
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}


def expressions() -> dict[str, str]:
    """Every PromQL expression of dashboards and alarms, by where it stands."""
    found = {}
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                found[f"{path.stem}/{panel['title']}/{target['refId']}"] = target["expr"]
    rules = YAML(typ="safe").load(DEPLOY / "prometheus" / "rules.yml")
    found |= {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}
    return found


def test_every_name_in_a_dashboard_or_an_alarm_is_told(observed: Running) -> None:
    told = {
        name
        for line in observed.client.get("/metrics").text.splitlines()
        for name in ([line.split()[2]] if line.startswith("# TYPE") else [re.split(r"[{ ]", line)[0]])
    }
    used = {where: set(NAME.findall(expression)) for where, expression in expressions().items()}
    assert len(used) > 20
    assert {where: names - told for where, names in used.items() if names - told} == {}


def test_the_server_tells_of_runs_too(layout: Layout, observed: Running) -> None:
    told = values(observed.client.get("/metrics").text)
    assert told["tanuki_champion_version"] == told["tanuki_model_version"] == 1
    assert told["tanuki_data_images"] == 77
    assert told["tanuki_retrain_succeeded"] == 1
    assert told["tanuki_drift_found"] == 1
    assert abs(time.time() - told["tanuki_champion_since_timestamp_seconds"]) < 3600


def test_a_failed_retrain_keeps_the_time_of_the_last_good_one(layout: Layout) -> None:
    path = layout.run_metrics_dir / "retrain.prom"
    before = values(path.read_text())

    with pytest.raises(OSError, match="disk full"), recorded(layout):
        raise OSError("disk full")
    after = values(path.read_text())
    last = "tanuki_retrain_last_success_timestamp_seconds"
    assert (after["tanuki_retrain_succeeded"], after[last]) == (0, before[last])
    assert after["tanuki_data_since_timestamp_seconds"] == before["tanuki_data_since_timestamp_seconds"]
    layout.raw_pointer.write_text("outs:\n- md5: def.dir\n  path: raw\n")
    with recorded(layout):
        pass
    changed = values(path.read_text())
    assert changed["tanuki_data_since_timestamp_seconds"] > before["tanuki_data_since_timestamp_seconds"]
    assert Registry(layout.registry_dir).champion_id() == 1  # the registry does not mind the folder in it


@pytest.mark.parametrize("other", [SupersededError("a later one"), BusyError("at work")])
def test_a_retrain_that_gives_way_to_another_is_neither_good_nor_failed(layout: Layout, other: Exception) -> None:
    before = (layout.run_metrics_dir / "retrain.prom").read_bytes()
    with pytest.raises(type(other)), recorded(layout):
        raise other
    assert (layout.run_metrics_dir / "retrain.prom").read_bytes() == before


def test_runs_are_told_of_where_the_server_of_another_registry_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(tmp_path / "workspace")
    monkeypatch.setenv("TANUKI_REGISTRY", str(tmp_path / "elsewhere"))
    with recorded(layout):
        pass
    assert "tanuki_retrain_succeeded 1.0" in (tmp_path / "elsewhere" / "metrics" / "retrain.prom").read_text()
    assert not layout.run_metrics_dir.exists()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_one(path: Path) -> None:
    board = json.loads(path.read_text())
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    (source,) = board["templating"]["list"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["datasource"]["uid"] == f"${{{source['name']}}}"
        assert panel["type"] in ("stat", "timeseries")
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken
        taken |= cells


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_is_loaded_whole_by_grafanas_own_model(path: Path) -> None:
    """No Grafana can be had from a package registry; what its makers publish of its schema drops what it does not know.

    References:
        grafana-foundation-sdk, generated from Grafana's own schemas.
    """
    register_default_plugins()
    board = json.loads(path.read_text())
    model = Dashboard.from_json(board)
    assert not lost(board, json.loads(JSONEncoder().encode(model)))
    for panel in model.panels or []:
        assert isinstance(panel, Panel)
        assert type(panel.options).__module__.endswith(f".models.{panel.type_val}")  # a plugin's own, no mere mapping
        assert {type(target).__module__ for target in panel.targets or []} == {
            "grafana_foundation_sdk.models.prometheus"
        }


def lost(before: Any, after: Any, where: str = "") -> list[str]:
    """What of a JSON value is missing from another one, or otherwise there."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [each for key, value in before.items() for each in lost(value, after.get(key), f"{where}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [each for number, pair in pairs for each in lost(*pair, f"{where}[{number}]")]
    return [] if before == after else [f"{where}: {before!r}, then {after!r}"]


def test_a_dashboard_with_a_misspelt_field_is_noticed() -> None:
    register_default_plugins()
    board = json.loads(DASHBOARDS[0].read_text())
    board["panels"][0]["fieldConfig"]["defaults"]["unitt"] = "s"
    found = lost(board, json.loads(JSONEncoder().encode(Dashboard.from_json(board))))
    assert found == [".panels[0].fieldConfig.defaults.unitt: 's', then None"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: prometheus)")
def test_promtool_accepts_the_configuration() -> None:
    run = subprocess.run(
        ["promtool", "check", "config", DEPLOY / "prometheus" / "prometheus.yml"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian: prometheus)")
def test_prometheus_answers_what_the_dashboards_ask(observed: Running, tmp_path: Path) -> None:
    config: dict[str, Any] = YAML(typ="safe").load(DEPLOY / "prometheus" / "prometheus.yml")
    config["global"] = {"scrape_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{observed.port}"]}]
    YAML().dump(config, tmp_path / "prometheus.yml")
    shutil.copy(DEPLOY / "prometheus" / "rules.yml", tmp_path)
    from tests.end_to_end.test_remotes import free_port

    port = free_port()
    options = ("--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address=127.0.0.1:{port}")
    with subprocess.Popen(["prometheus", *options], cwd=tmp_path, stderr=subprocess.DEVNULL) as prometheus:
        try:

            def asked(expression: str) -> list[Any]:
                answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": expression}).json()
                assert answer["status"] == "success", answer
                return answer["data"]["result"]

            def is_scraped() -> bool:
                try:
                    return len(asked("rate(process_cpu_seconds_total[5m])")) == 1
                except (httpx.HTTPError, ValueError, AssertionError):
                    return False

            eventually(is_scraped)
            empty = {where for where, expression in expressions().items() if not asked(expression)}
            alarms = {where for where in empty if "/" not in where}
            assert empty - alarms == set()
            assert alarms >= {"TanukiDown", "TanukiFails", "TanukiNoModel"}  # nothing is wrong
        finally:
            prometheus.terminate()
