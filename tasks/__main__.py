"""Runs one stage: `python -m tasks STAGE`. DVC calls this, and so may you.

A stage is a module of this package with ``run(layout, *, seed, SECTION...) -> report``: its keyword names are sections
of params.yaml, and the report, a small frozen record, becomes data/reports/STAGE.json.
"""

import argparse
import dataclasses
import importlib
import inspect
import logging
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.files import write_json
from tasks import together, warm
from tasks.errors import NetworkError, TanukiError
from tasks.layout import Layout

if TYPE_CHECKING:
    from tasks.data.feature_store import Part
    from tasks.params import Params

STAGES = (
    "fetch_backbone",
    "index_images",
    "validate_data",
    "cache_features",
    "train_head",
    "finetune",
    "export_onnx",
    "evaluate",
)

RECIPES = ("pretrain", "suspects", "export_pretrained", "compare", "attack", "withstand")
"""Run the same way, but no stage of the pipeline."""

TEMPORARY_FAILURE = 75
"""EX_TEMPFAIL of sysexits.h: trying again may help."""

logger = logging.getLogger("tasks")


def main() -> int:
    """Runs the stage named on the command line; 0 done, 1 a user's mistake, 2 usage, 75 may pass."""
    elsewhere = warm.hand_over("tasks", sys.argv[1:])
    return _main() if elsewhere is None else elsewhere


def _main() -> int:
    from tasks.params import load_params  # here, because a process that hands over has no need of it

    parser = argparse.ArgumentParser(prog="python -m tasks", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=(*STAGES, *RECIPES))
    parser.add_argument("--root", type=Path, default=Path(), help="the workspace (default: here)")
    parser.add_argument(
        "--part", type=_part, metavar="I/N", help="cache_features only: the I-th of N shares of the images"
    )
    arguments = parser.parse_args()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when a stage imports onnxruntime
    if arguments.part and arguments.stage != "cache_features":
        parser.error("--part is for cache_features")
    _configure_logging()
    if together.is_worker():
        together.take_part()
    layout = Layout(arguments.root.resolve())
    try:
        params = load_params(layout.params)
        if arguments.part:
            run_part(layout, arguments.part, params)
        elif arguments.stage == "finetune" and _needs_workers(layout, params):
            return together.run_together(("-m", "tasks", *sys.argv[1:]), params.finetune.num_processes)
        else:
            run_stage(arguments.stage, layout, params)
    except TanukiError as error:
        code = TEMPORARY_FAILURE if isinstance(error, NetworkError) else 1
        return together.end_with(f"{arguments.stage}: {error}", code)
    except OSError as error:
        advice = "Nothing was lost; free space or mend it, and run again."
        return together.end_with(f"{arguments.stage}: {error}. {advice}", 1)
    except KeyboardInterrupt:
        print(f"{arguments.stage}: interrupted; run it again to go on.", file=sys.stderr)
        return 130
    return 0


def run_part(layout: Layout, part: "Part", params: "Params") -> None:
    """Runs cache_features on a part of the images; the report comes with the stage itself, which finds them stored."""
    from tasks import cache_features

    _end_with_who_reads()
    cache_features.run_part(layout, part, features=params.features, augment=params.augment)


def _end_with_who_reads() -> None:
    """Ends this process as soon as nobody is left to read its output: a worker that is lost takes its part along.

    The part is done again elsewhere, and what would go on here would store its rows a second time.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(1, 0)
        if any(event & select.POLLERR for _, event in poll.poll()):
            os._exit(128 + signal.SIGPIPE)

    threading.Thread(target=watch, daemon=True).start()


def _needs_workers(layout: Layout, params: "Params") -> bool:
    """Whether several processes are asked for, are not here yet, and would find something to train."""
    from tasks import finetune

    is_asked = params.finetune.num_processes > 1 and "WORLD_SIZE" not in os.environ
    return is_asked and finetune.is_due(layout, params.finetune)


def _part(text: str) -> "Part":
    """``2/4`` as a record."""
    from tasks.data.feature_store import Part

    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 2/4, from 1/4 to 4/4")
    return Part(int(index), int(count))


def _configure_logging() -> None:
    """Our own lines, and the warnings of others."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for room in ("tasks", "deploy"):
        logging.getLogger(room).setLevel(logging.INFO)


def run_stage(stage: str, layout: Layout, params: "Params") -> None:
    """Runs a stage and writes its report."""
    run = importlib.import_module(f"tasks.{stage}").run
    sections = [name for name in inspect.signature(run).parameters if name != "layout"]
    logger.info("%s starts", stage)
    start = time.perf_counter()
    report = run(layout, **{name: getattr(params, name) for name in sections})
    write_json(layout.report(stage), dataclasses.asdict(report))
    logger.info("%s done in %.1f s", stage, time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(main())
