"""Retrains by hand and by schedule take turns: who read older data is not judged once a later one was."""

import shutil
import sys
from pathlib import Path

import pytest

from deploy.files import write_json
from deploy.registry import Registry
from flows.lease import SupersededError, take_lease
from flows.scheduled_retrain import scheduled_retrain
from flows.workspace import find_workspace
from tests.conftest import Workspace, write_digits

pytestmark = pytest.mark.slow

BY_SCHEDULE = """
import sys
from pathlib import Path
from flows.server import prefect_server
from tasks.layout import Layout
with prefect_server(Layout(Path(sys.argv[1]))):
    from flows.scheduled_retrain import scheduled_retrain
    state = scheduled_retrain(sys.argv[1], return_state=True)
    print(state.name, state.message)
"""


@pytest.fixture
def stale(retrained: Path, tmp_path: Path, prefect_home: Path) -> Workspace:
    """A retrained workspace whose last stage must run again, over a version that nobody promoted."""
    shutil.copytree(retrained, tmp_path / "workspace", symlinks=True)
    workspace = Workspace(tmp_path / "workspace", prefect_home)
    workspace.set_param("evaluate.confidence", 0.9)
    shutil.rmtree(workspace.root / "data" / "registry")
    return workspace


def test_a_retrain_by_hand_bars_a_scheduled_one_that_read_its_data_before(stale: Workspace) -> None:
    layout = find_workspace(stale.root)
    scheduled = take_lease(layout)
    stale.tanuki("retrain")
    assert Registry(layout.registry_dir).champion_id() == 1
    with pytest.raises(SupersededError), scheduled.at_the_gate():
        pytest.fail("it was let in")


def test_a_scheduled_retrain_that_a_later_one_overtook_is_not_judged(stale: Workspace) -> None:
    layout = find_workspace(stale.root)
    write_json(layout.fence, {"given": 0, "admitted": 2})
    told = stale.run(sys.executable, "-c", BY_SCHEDULE, stale.root)
    assert told.stdout.splitlines()[-1].startswith("Superseded"), told.stdout + told.stderr
    assert Registry(layout.registry_dir).champion_id() is None
    assert not (layout.run_metrics_dir / "retrain.prom").exists()  # neither good nor a failure


def test_a_scheduled_retrain_that_fails_before_its_first_stage_is_told_of(
    workspace: Workspace,
) -> None:
    write_digits(workspace.root / "data" / "raw", 0, 1)
    shutil.rmtree(workspace.root / ".git")
    workspace.run("git", "init", "--quiet")  # without a commit there is nothing to clone
    assert scheduled_retrain.fn(str(workspace.root)).name == "Failed"
    assert (
        "tanuki_retrain_succeeded 0.0" in (find_workspace(workspace.root).run_metrics_dir / "retrain.prom").read_text()
    )
