"""A decoder in OpenVINO with weights of 4 bits, as a process that another one drives.

``python openvino_decoder.py MODEL.onnx THREADS BLOCK PAST=PRESENT…`` runs in an environment of its
own with ``openvino`` and ``nncf``; it imports nothing of this project. It compresses the weights,
keeps the caches inside, then obeys lines on its standard input and answers each with ``done``:
``decode PAST STEPS`` and ``prefill TOKENS`` say what ``run`` does from then on.
"""

from __future__ import annotations

import contextlib
import sys

import numpy as np


def main() -> None:
    """Compress, then obey."""
    path, threads, block, *pairs = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        request = compressed(path, int(threads), int(block), dict(p.split("=") for p in pairs))
    past, new, steps = 0, 1, 1
    print("done", flush=True)
    for line in sys.stdin:
        match line.split():
            case ["decode", before, times]:
                past, new, steps = int(before), 1, int(times)
                empty(request)
                infer(request, 0, past)
            case ["prefill", tokens]:
                past, new, steps = 0, int(tokens), 1
            case _:
                if not past:
                    empty(request)
                for step in range(steps):
                    infer(request, past + step, new)
                if past:
                    cut(request, past)
        print("done", flush=True)


def compressed(path: str, threads: int, block: int, pairs: dict[str, str]):  # noqa: ANN201
    """A request of the stateful model with symmetric 4-bit weights in blocks."""
    import nncf
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    core = openvino.Core()
    model = core.read_model(path)
    apply_make_stateful_transformation(model, pairs)
    mode = nncf.CompressWeightsMode.INT4_SYM
    model = nncf.compress_weights(model, mode=mode, group_size=block, ratio=1.0, all_layers=True)
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    return core.compile_model(model, "CPU", settings).create_infer_request()


def infer(request, past: int, new: int) -> None:  # noqa: ANN001
    """Read `new` tokens behind `past`."""
    given = {
        "input_ids": np.ones((1, new), np.int64),
        "attention_mask": np.ones((1, past + new), np.int64),
        "position_ids": np.arange(past, past + new, dtype=np.int64)[None],
    }
    names = {name for port in request.model_inputs for name in port.get_names()}
    request.infer({name: value for name, value in given.items() if name in names})


def empty(request) -> None:  # noqa: ANN001
    """Caches of one sequence without tokens."""
    import openvino

    for state in request.query_state():
        _, heads, _, width = state.state.shape
        state.state = openvino.Tensor(np.zeros((1, heads, 0, width), np.float32))


def cut(request, length: int) -> None:  # noqa: ANN001
    """Forget all but the first `length` tokens."""
    import openvino

    for state in request.query_state():
        kept = np.ascontiguousarray(state.state.data[:, :, :length])
        state.state = openvino.Tensor(kept)


if __name__ == "__main__":
    main()
