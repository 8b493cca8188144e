"""Triton out of the wheel nvidia-pytriton, with a bundle's graphs, in an environment of its own.

    python -m venv ENV && ENV/bin/pip install nvidia-pytriton onnxruntime
    ENV/bin/python benchmarks/triton_server.py BUNDLE HTTP_PORT     # or --triton-python of benchmarks.serving

The wheel has no backend for ONNX graphs: two instances of its Python backend call onnxruntime, one thread each. It
listens on loopback only: this Triton is two years old, and has known holes in that very backend.
"""

import signal
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

SIZE_PX = 224
LOOPBACK = "127.0.0.1"


def main(bundle: Path, port: int) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    front, back = (
        ort.InferenceSession(str(bundle / name), options, providers=["CPUExecutionProvider"])
        for name in ("front.onnx", "back.onnx")
    )
    widths = {output.name: output.shape[-1] for output in back.get_outputs()}

    @batch
    def infer(images: np.ndarray) -> dict[str, np.ndarray]:
        pixels = np.concatenate([front.run(["pixels"], {"images": image[None]})[0] for image in images])
        return dict(zip(widths, back.run(list(widths), {"pixels": pixels}), strict=True))

    config = TritonConfig(
        http_address=LOOPBACK,
        grpc_address=LOOPBACK,
        metrics_address=LOOPBACK,
        http_port=port,
        grpc_port=port + 1,
        metrics_port=port + 2,
    )
    with Triton(config=config) as triton:
        triton.bind(
            "tanuki",
            [infer, infer],
            inputs=[Tensor(name="images", dtype=np.uint8, shape=(SIZE_PX, SIZE_PX, 3))],
            outputs=[Tensor(name=name, dtype=np.float32, shape=(width,)) for name, width in widths.items()],
            config=ModelConfig(max_batch_size=4, batcher=DynamicBatcher(max_queue_delay_microseconds=0)),
        )
        triton.run()
        print("READY", flush=True)
        signal.sigwait([signal.SIGTERM, signal.SIGINT])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
