"""A version as others serve it: a model repository that Triton reads as it is, and KServe's manifest for it.

    NAME/config.pbtxt       inputs, outputs and labels, in Triton's terms
    NAME/labels.txt         a label a line, for Triton's classification
    NAME/VERSION/model.onnx the whole graph, the same bytes as in the bundle
    inference_service.json  KServe's InferenceService, where the repository's address is given

Clients of this project's own server work there unchanged, as far as they send pixels: Triton decodes no pictures.
"""

import json
import shutil
from pathlib import Path

from deploy.bundle import Bundle
from deploy.errors import BundleError
from deploy.files import write_json, write_text

MAX_BATCH = 64  # what this project's server allows in a request

CONFIG = """\
name: {name}
backend: "onnxruntime"
max_batch_size: {max_batch}
input [
  {{ name: "images" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] }}
]
output [
  {{ name: "probabilities" data_type: TYPE_FP32 dims: [ {num_classes} ] label_filename: "labels.txt" }},
  {{ name: "embedding" data_type: TYPE_FP32 dims: [ {width} ] }}
]
dynamic_batching {{ }}
parameters {{ key: "intra_op_thread_count" value: {{ string_value: "1" }} }}
"""


def write_triton_repository(
    root: Path, bundle: Bundle, *, name: str, version: int, storage_uri: str | None = None
) -> Path:
    """Writes, or adds to, a model repository.

    Args:
        root: The repository's folder; other models and versions in it stay.
        bundle: A bundle that was found whole.
        name: The model's name in the protocol.
        version: Its version there.
        storage_uri: Where KServe will find the repository; no manifest without it.

    Returns:
        The model's folder.

    Raises:
        BundleError: If a label cannot stand in a line of its own, or the name is no folder's.
    """
    if broken := [label for label in bundle.labels if not label or label.splitlines() != [label]]:
        raise BundleError(
            f"labels that are empty or span lines cannot be given to Triton: {broken}. Rename the classes."
        )
    if name in ("", ".", "..") or "/" in name:
        raise BundleError(f"{name!r} cannot name a model: Triton takes it for a folder. Choose another with --name.")
    model = root / name
    (_, embedding) = bundle.signature["outputs"]
    graph = model / str(version) / "model.onnx"
    graph.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(bundle.model_path, graph)
    write_text(model / "labels.txt", "".join(f"{label}\n" for label in bundle.labels))
    config = CONFIG.format(
        name=json.dumps(name), max_batch=MAX_BATCH, num_classes=len(bundle.labels), width=embedding["shape"][1]
    )
    write_text(model / "config.pbtxt", config)
    if storage_uri is not None:
        write_json(root / "inference_service.json", _inference_service(name, storage_uri))
    return model


def _inference_service(name: str, storage_uri: str) -> dict[str, object]:
    model = {"modelFormat": {"name": "triton"}, "protocolVersion": "v2", "storageUri": storage_uri}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {"predictor": {"model": model}},
    }
