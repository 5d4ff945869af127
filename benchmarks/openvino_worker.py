"""OpenVINO in 8 bits, as a process that another one drives.

``python openvino_worker.py MODEL.onnx CALIBRATION.npz THREADS`` runs in an environment of its own
with ``openvino`` and ``nncf``; it imports nothing of this project. It quantizes the model after
training, for transformers, then obeys lines on its standard input and answers each with ``done``:
``load INPUTS.npz``, ``run TIMES``, and ``save OUTPUT.npy`` for the first output of the last run.
"""

from __future__ import annotations

import contextlib
import sys

import numpy as np


def main() -> None:
    """Quantize, then obey."""
    path, calibration, threads = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        request = quantized(path, calibration, int(threads))
    inputs, output = {}, None
    print("done", flush=True)
    for line in sys.stdin:
        order, _, name = line.strip().partition(" ")
        if order == "load":
            inputs = dict(np.load(name))
        elif order == "run":
            for _ in range(int(name)):
                output = request.infer(inputs)[0]
        elif order == "save":
            np.save(name, output)
        print("done", flush=True)


def quantized(path: str, calibration: str, threads: int):  # noqa: ANN201  (a foreign class)
    """A request of the quantized model."""
    import nncf
    import openvino

    core = openvino.Core()
    samples = np.load(calibration)
    count = len(next(iter(samples.values())))
    rows = [{name: samples[name][i : i + 1] for name in samples.files} for i in range(count)]
    model = nncf.quantize(
        core.read_model(path),
        nncf.Dataset(rows),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=count,
    )
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(model, "CPU", settings).create_infer_request()


if __name__ == "__main__":
    main()
