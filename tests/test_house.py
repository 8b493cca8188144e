"""What holds of the whole house: directions, one word per step, one place per path and number, a README that runs."""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import grimp
import pytest
from typer.testing import CliRunner

from flows.graph import mermaid, read_stages
from tasks.__main__ import STAGES
from tasks.layout import Layout
from tasks.params import Params, Section, load_params

ROOMS = ("flows", "tasks", "deploy")


@pytest.fixture(scope="module")
def stages(repository: Path):
    return {stage.name: stage for stage in read_stages(repository / "dvc.yaml")}


@pytest.fixture(scope="module")
def imports():
    return grimp.build_graph(*ROOMS, exclude_type_checking_imports=True, cache_dir=None)


def module_file(repository: Path, module: str) -> str:
    path = Path(*module.split("."))
    return str(path / "__init__.py" if (repository / path).is_dir() else path.with_suffix(".py"))


def code_of(repository: Path, imports, module: str) -> set[str]:
    """The files a module's code lies in, its imports' included; empty packages left out."""
    files = {module_file(repository, each) for each in imports.find_upstream_modules(module) | {module}}
    return {file for file in files if not file.endswith("__init__.py")}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_code_it_imports(repository: Path, stages, imports, stage: str) -> None:
    code = {dep for dep in stages[stage].deps if dep.endswith(".py")}
    assert code == code_of(repository, imports, f"tasks.{stage}")


def test_packages_hold_no_code_of_their_own(repository: Path) -> None:
    """Stages leave __init__.py out of their deps, so nothing may happen there."""
    for room in ROOMS:
        for file in (repository / room).rglob("__init__.py"):
            body = ast.parse(file.read_text()).body
            assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), file


def test_imports_go_one_way(repository: Path) -> None:
    run = subprocess.run([Path(sys.executable).parent / "lint-imports"], cwd=repository, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_flows_use_of_tasks_only_what_needs_no_torch(imports) -> None:
    allowed = {
        "tasks",
        "tasks.params",
        "tasks.layout",
        "tasks.errors",
        "tasks.gate",
        "tasks.progress",
        "tasks.parallel",
        "tasks.warm",
    }
    allowed |= {"tasks.data.image_files"}  # which folders are splits and which are labels
    allowed |= {"tasks.data.image_store"}  # where the bytes of an image lie
    allowed |= {"tasks.evaluation.robustness"}  # the champion is shown what evaluate showed the challenger
    allowed |= {"tasks.evaluation.page"}  # the gate's decision as HTML
    # which stored features something needs (flows.garbage)
    allowed |= {"tasks.data.feature_store", "tasks.data.manifest", "tasks.models.backbone_card"}
    # what production sees beside the test images (flows.drift_check), and what of it to label
    allowed |= {"tasks.drift.compare", "tasks.drift.page", "tasks.drift.selection", "tasks.data.contact_sheet"}
    flows = {module for module in imports.modules if module.startswith("flows")}
    used = {
        to for module in flows for to in imports.find_modules_directly_imported_by(module) if to.startswith("tasks")
    }
    assert used <= allowed


def test_the_flow_runs_the_stages_in_the_order_of_dvc_yaml(repository: Path) -> None:
    tree = ast.parse((repository / "flows" / "retrain.py").read_text())
    flow = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "retrain")
    names = [node for node in ast.walk(flow) if isinstance(node, ast.Name) and node.id in STAGES]
    chain = [node.id for node in sorted(names, key=lambda node: (node.lineno, node.col_offset))]
    assert chain == [stage.name for stage in read_stages(repository / "dvc.yaml")] == list(STAGES)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_one_word_everywhere(repository: Path, stages, stage: str) -> None:
    assert stages[stage].cmd == f"python -m tasks {stage}"
    assert (repository / "tasks" / f"{stage}.py").is_file()
    assert f"data/reports/{stage}.json" in stages[stage].outs


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_signature_names_the_params_that_dvc_watches(stages, stage: str) -> None:
    names = list(inspect.signature(importlib.import_module(f"tasks.{stage}").run).parameters)
    assert names[0] == "layout"
    assert {param.split(".")[0] for param in stages[stage].params} == set(names[1:])


def test_params_yaml_holds_every_section_and_no_code_holds_defaults(repository: Path) -> None:
    params = load_params(repository / "params.yaml")
    for section in (Params, *(type(getattr(params, name)) for name in Params.model_fields)):
        if isinstance(section, type) and issubclass(section, Section):
            assert all(field.is_required() for field in section.model_fields.values()), section


def test_dvc_watches_only_params_that_exist(repository: Path, stages) -> None:
    params = load_params(repository / "params.yaml")
    for stage in stages.values():
        for name in stage.params:
            value = params
            for part in name.split("."):
                value = getattr(value, part)


def test_every_path_of_dvc_yaml_is_named_in_the_layout(repository: Path, stages) -> None:
    layout = Layout(repository)
    paths = [getattr(layout, name) for name, value in vars(Layout).items() if isinstance(value, property)]
    named = {path.relative_to(repository).as_posix() for path in paths}
    named |= {layout.report(stage).relative_to(repository).as_posix() for stage in STAGES}
    named |= {layout.times(stage).relative_to(repository).as_posix() for stage in ("train_head", "finetune")}
    evaluation = layout.evaluation_dir.relative_to(repository).as_posix()
    written = {out for stage in stages.values() for out in stage.outs}
    assert {out for out in written if not out.startswith(f"{evaluation}/")} <= named


def test_no_code_but_the_layout_spells_a_path_under_data(repository: Path) -> None:
    for room in ROOMS:
        for file in (repository / room).rglob("*.py"):
            if file.name in ("layout.py",):
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Path":
                    values = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
                    assert not any(str(value).startswith("data/") for value in values), (file, values)


def test_the_readmes_picture_is_the_pipeline(repository: Path) -> None:
    readme = (repository / "README.md").read_text()
    drawn = re.search(r"```mermaid\n(.*?)\n```", readme, re.S)
    assert drawn is not None
    assert drawn.group(1) == mermaid(read_stages(repository / "dvc.yaml"))


def commands_of(readme: str) -> list[list[str]]:
    """Every line of the README's blocks for a shell that calls tanuki, as words."""
    blocks = re.findall(r"```(?:sh|shell|bash)\n(.*?)```", readme, re.S)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("tanuki ")]


def test_every_tanuki_command_in_the_readme_parses(repository: Path) -> None:
    from flows.cli import app

    commands = commands_of((repository / "README.md").read_text())
    assert commands
    for _, *words in commands:
        options = [word for word in words if word.startswith("--")]
        told = CliRunner().invoke(app, [words[0], "--help"])
        assert told.exit_code == 0, words
        assert all(option in told.output for option in options), (words, told.output)


def test_every_make_target_in_the_readme_exists(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (repository / "README.md").read_text(), re.M))
    assert named
    assert named <= targets


def test_whoever_imports_onnxruntime_has_turned_its_telemetry_off(repository: Path) -> None:
    """That is done by deploy.runtime, or by importing what imports it first; type checking imports nothing."""
    for room in ROOMS:
        for file in (repository / room).rglob("*.py"):
            imported = [
                node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                for node in ast.parse(file.read_text()).body
                if isinstance(node, ast.ImportFrom | ast.Import)
            ]
            ours = [at for at, name in enumerate(imported) if name in ("deploy.runtime", "deploy.predictor")]
            theirs = [at for at, name in enumerate(imported) if name and name.split(".")[0] == "onnxruntime"]
            turns_it_off = 'os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")' in file.read_text()
            assert turns_it_off or not theirs or (ours and ours[0] < theirs[0]), file


def test_nothing_is_ever_unpickled(repository: Path) -> None:
    forbidden = re.compile(
        r"\b(import pickle|from pickle|joblib|cloudpickle|weights_only\s*=\s*False|allow_pickle\s*=\s*True)\b"
    )
    for room in (*ROOMS, "benchmarks"):
        for file in (repository / room).rglob("*.py"):
            assert not forbidden.search(file.read_text()), file
