"""A warm Python while one command runs: DVC and the stages start in it in a fraction of their time (tasks/warm.py)."""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows.workspace import environment
from tasks import warm
from tasks.layout import Layout
from tasks.params import load_params

# In the order of need. dvc by its own name, too: that is how others see that a process may run it (flows.dvc_files).
LIBRARIES = (
    *("dvc", "dvc.cli", "dvc.cli.parser", "dvc.repo", "dvc.repo.stage", "dvc.repo.metrics", "dvc.repo.params"),
    *("dvc.repo.plots", "dvc.repo.datasets", "dvc.repo.artifacts", "dvc.cachemgr", "dvc.data_cloud", "dvc.stage.run"),
    *("dvc.rwlock", "dvc.lock", "dvc.scm", "scmrepo.git", "dvc_data.index", "dvc_data.hashfile.status"),
    *("pydantic", "ruamel.yaml", "pandas", "pyarrow.parquet", "PIL.Image", "onnx", "scipy.optimize", "scipy.linalg"),
)
DRAWING = ("matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.font_manager")
GREAT_EXPECTATIONS = ("great_expectations",)
TORCH = ("torch", "torchvision")


@contextmanager
def warm_python(layout: Layout, stages: Collection[str] | None) -> Iterator[None]:
    """Keeps a warm process for what runs in this block and below.

    Elsewhere than on Linux libraries do not bear a fork, and all starts as ever.

    Args:
        layout: The workspace.
        stages: The stages that will run, so far as is known; None where all may.
    """
    if sys.platform != "linux":
        yield
        return
    with tempfile.TemporaryDirectory(prefix="tanuki-") as folder, socket.socket(socket.AF_UNIX) as door:
        address = str(Path(folder) / "warm")
        door.bind(address)
        door.listen()
        host = subprocess.Popen(
            [sys.executable, "-m", "tasks.warm", "--serve", str(door.fileno()), *_libraries(layout, stages)],
            cwd=layout.root,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[door.fileno()],
            env=environment(),
        )
        door.close()
        os.environ[warm.ADDRESS] = address
        try:
            yield
        finally:
            del os.environ[warm.ADDRESS]
            assert host.stdin is not None
            host.stdin.close()
            host.terminate()
            host.wait()


def _libraries(layout: Layout, stages: Collection[str] | None) -> tuple[str, ...]:
    """What the stages import that takes long; torch only where fine-tuning needs it: a head-only retrain never does."""
    validates = stages is None or "validate_data" in stages
    settings = load_params(layout.params).finetune
    finetunes = (stages is None or "finetune" in stages) and settings.enabled and bool(settings.stages)
    return (*LIBRARIES, *(GREAT_EXPECTATIONS if validates else ()), *DRAWING, *(TORCH if finetunes else ()))
