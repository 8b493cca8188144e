"""onnxruntime sessions, opened one way everywhere: caching, evaluation and serving run on the same settings.

Since 1.29 onnxruntime's wheels for Linux tell Microsoft of every session: names and hashes of the graph, the processor
and an id of the machine, kept in ~/.cache/Microsoft until they are sent. Only a variable that is there before the first
import prevents it (`disable_telemetry_events` comes too late: tried), so whoever else imports onnxruntime does it after
this module.
"""

import os
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from deploy.errors import BundleError


def open_session(model: Path | bytes, *, threads: int = 1) -> ort.InferenceSession:
    """Opens a session on the CPU.

    One thread inside a session and several threads calling ``run`` on it uses the cores best (a session is stateless),
    and makes a result independent of the number of cores.

    Args:
        model: An ONNX file, or its bytes.
        threads: Threads inside one ``run``.

    Raises:
        BundleError: If it is no graph that onnxruntime can run.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_mem_pattern = False  # else a plan of memory is kept for each size of batch; it saves no time
    options.log_severity_level = 3
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise BundleError(
            f"{'the graph' if isinstance(model, bytes) else model} is no ONNX graph that runs: {error}"
        ) from error
