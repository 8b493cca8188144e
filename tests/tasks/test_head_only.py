"""A retrain that moves only the head: no stage of it imports torch, nor anything else that takes seconds to import."""

import json
import subprocess
import sys
from pathlib import Path

from ruamel.yaml import YAML

from tasks.layout import Layout
from tests.tasks.evaluate_workspace import write_backbone, write_digits

STAGES = ("cache_features", "train_head", "finetune", "export_onnx", "evaluate")
TAKES_SECONDS = ("torch", "torchvision", "onnxscript", "sklearn", "prefect", "dvc", "great_expectations")
SCRIPT = """
import json, sys
from tasks.__main__ import main
root, stages, heavy = sys.argv[1], *map(json.loads, sys.argv[2:])
for stage in stages:
    sys.argv = ["tasks", stage, "--root", root]
    assert main() == 0, stage
    assert not set(heavy) & set(sys.modules), stage
"""


def test_a_head_only_retrain_imports_no_torch(repository: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path)
    write_digits(layout, 120)
    write_backbone(layout)
    yaml = YAML()
    params = yaml.load((repository / "params.yaml").read_text())
    params["finetune"]["enabled"] = False
    params["finetune"]["num_processes"] = 2  # of which there is no need
    yaml.dump(params, layout.params)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), json.dumps(STAGES), json.dumps(TAKES_SECONDS)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no fine-tuning: ") == 1
    assert json.loads(layout.report("export_onnx").read_text())["path"] == "head"
    assert json.loads(layout.report("evaluate").read_text())["finetuned"] is None
