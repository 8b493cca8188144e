"""A stage as several processes of this machine, its workers: torchrun's launcher, called in the stage's own process.

torchrun as a process in between outlives a stage that is killed, and its workers outlive both; and of a mistake each
worker tells, and torchrun, too. Here workers end with the stage, and what one of them meets is told once, by the stage,
as it would be by one process. Called by tasks/__main__.py, in the stage and in its workers, which have torchrun's
environment: they find each other by it (tasks/training/processes.py).
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from deploy.files import write_json
from tasks.errors import TrainingError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

RUN_ID = "TORCHELASTIC_RUN_ID"
STAGE = "tanuki-stage-"
"""Before a stage's process id, what its workers know the run by."""

LOOK_S = 0.1
WATCH_S = 0.5
CONSEQUENCE_S = 2.0
"""A worker's failure that only follows from another's is not told of: within this time the launcher has ended it."""


def run_together(arguments: Sequence[str], num_processes: int) -> int:
    """Runs ``python ARGUMENTS`` in so many workers and waits for them.

    Ends all with the first that fails, or that a signal tells this process to end.

    Returns:
        The exit code: 0, or that of the first that failed, after what it met has been told.

    Raises:
        TrainingError: If one was killed.
        RuntimeError: If one ended and said nothing.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun does so, too
    launcher_log = logging.getLogger("torch.distributed.elastic")
    launcher_log.addHandler(logging.NullHandler())
    launcher_log.propagate = False  # what it warns of is told below
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    ends = [number.name for number, handler in before.items() if handler is not signal.SIG_IGN]
    with tempfile.TemporaryDirectory(prefix="tanuki-workers-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            logs_specs=DefaultLogsSpecs(folder, local_ranks_filter={0}),  # the others would say the same
            run_id=f"{STAGE}{os.getpid()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            monitor_interval=LOOK_S,
            signals_to_handle=",".join(ends),  # Ctrl-C is Python's: the launcher ends its workers on any exception
        )
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as failed:
            return _told(failed)
        except SignalException as end:
            ended_by = end.sigval
        else:
            return 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    os.kill(os.getpid(), ended_by)  # as it would have ended without workers
    return 128 + ended_by


def _told(failed: "ChildFailedError") -> int:
    """Tells what the first worker that failed met; its exit code."""
    _, first = failed.get_first_failure()
    if Path(first.error_file).is_file():
        print(first.message, file=sys.stderr)
        return first.exitcode
    if first.exitcode != -signal.SIGKILL:
        raise RuntimeError(f"one of the processes that train together ended with exit code {first.exitcode}") from None
    raise TrainingError(
        "One of the processes that train together was killed. Where nobody did that, memory ran out: the system's log "
        "says so. Lower finetune.batch_size or finetune.num_processes, or free memory; run again and it goes on."
    ) from None


def is_worker() -> bool:
    """Whether a stage has started this process with `run_together`."""
    return os.environ.get(RUN_ID, "").startswith(STAGE)


def take_part() -> None:
    """In a worker: ends it with its stage from now on, and leaves it to the stage to tell of a bug."""
    threading.Thread(target=_end_with_stage, daemon=True).start()
    sys.excepthook = _tell_of_bug


def _end_with_stage() -> None:
    """Ends this process as soon as the stage is not its parent any more."""
    while os.environ[RUN_ID] == f"{STAGE}{os.getppid()}":
        time.sleep(WATCH_S)
    os._exit(1)


def _tell_of_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Where another worker's end is what broke this one, the launcher ends it in the meantime."""
    time.sleep(CONSEQUENCE_S)
    process = f"in process {int(os.environ['RANK']) + 1} of {os.environ['WORLD_SIZE']}"
    end_with(f"{process}:\n{''.join(traceback.format_exception(kind, error, trace)).rstrip()}", 1)


def end_with(text: str, code: int) -> int:
    """Tells why this process ends and gives its exit code; a worker leaves the telling to its stage and ends at once.

    At once, because its partners break where they wait for it while it takes itself apart.
    """
    if not is_worker():
        print(text, file=sys.stderr)
        return code
    write_json(Path(os.environ["TORCHELASTIC_ERROR_FILE"]), {"message": text, "timestamp": int(time.time())})
    os._exit(code)
