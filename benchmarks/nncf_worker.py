"""Weight compression of NNCF with mixed widths, as a process in an environment of its own.

``python nncf_worker.py MODEL.onnx SEEN.npz UNSEEN.npz OUT.npz MODE RATIO METRIC`` imports nothing
of this project. Arrays of the inputs are called ``NAME/INDEX``, one sequence each. It writes the
first output of every unseen sequence and ``bytes``, those of all constants.
"""

from __future__ import annotations

import contextlib
import sys

import numpy as np

NARROW = {"u2": 2, "i2": 2, "u3": 3, "u4": 4, "i4": 4, "u6": 6}


def main() -> None:
    """Compress, run, write."""
    path, seen, unseen, out, mode, ratio, metric = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        model = compressed(path, rows(seen), mode, float(ratio), metric)
        found = run(model, rows(unseen))
    np.savez(out, bytes=np.array(constant_bytes(model)), **found)


def rows(path: str) -> list[dict[str, np.ndarray]]:
    """The sequences of a file."""
    data = np.load(path)
    names = sorted({name.split("/")[0] for name in data.files})
    count = len(data.files) // len(names)
    return [{name: data[f"{name}/{index}"] for name in names} for index in range(count)]


def compressed(path, seen, mode, ratio, metric):  # noqa: ANN001, ANN201  (foreign classes)
    """The model with compressed weights."""
    import nncf
    import openvino

    return nncf.compress_weights(
        openvino.Core().read_model(path),
        mode=getattr(nncf.CompressWeightsMode, mode),
        ratio=ratio,
        group_size=32,
        all_layers=True,
        dataset=nncf.Dataset(seen),
        subset_size=len(seen),
        sensitivity_metric=getattr(nncf.SensitivityMetric, metric),
        backup_mode=nncf.BackupMode.INT8_SYM,
    )


def run(model, unseen):  # noqa: ANN001, ANN201
    """The first output of each sequence; activations stay in float32."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return {f"out/{i}": request.infer(row)[0].copy() for i, row in enumerate(unseen)}


def constant_bytes(model) -> int:  # noqa: ANN001
    """Bytes of all constants, each in the width of its type."""
    total = 0.0
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant":
            kind = node.get_element_type()
            bits = NARROW.get(kind.get_type_name(), 8 * kind.size)
            total += np.prod(list(node.shape), dtype=np.float64) * bits / 8
    return int(total)


if __name__ == "__main__":
    main()
