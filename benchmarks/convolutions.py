"""The trained convolutional network in 8-bit integers: ways of rounding, beside ONNX Runtime's.

``python -m benchmarks.convolutions [--record]``: weights, inputs and outputs of convolutions and of
the last layer hold codes of 8 bits, with ranges that calibration images fix; sessions of ONNX
Runtime run on images of the test split.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor

import lamella
from benchmarks.record import Result
from benchmarks.zoo.digits import digits, digits_cnn
from lamella.faithfulness.intervals import bootstrap
from lamella.ir.reducers import divergence

BATCH = 16
INPUT = "pixel_values"
LAST = "quantize-weights bits=8 activations=int8-tensor min_size=0"
WAYS: Mapping[str, str] = {
    f"lamella, {method}": f"quantize-convolutions method={method}"
    for method in ("rtn", "gptq", "quantease")
}
Run = Callable[[Tensor], Tensor]


class Images(CalibrationDataReader):
    """The calibration images for ONNX Runtime's quantizer."""

    def __init__(self, images: Tensor) -> None:
        """One batch after the other."""
        self._batches = iter(images.split(BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def saved(passes: list[str], images: Tensor, folder: Path) -> Path:
    """The ONNX file of the network after some passes."""
    samples = [{INPUT: batch} for batch in images.split(BATCH)]
    compiled = lamella.compile(digits_cnn(), passes=passes, inputs=samples[0], samples=samples)
    compiled.save(folder)
    return next(folder.rglob("*.onnx"))


def peer(plain: Path, images: Tensor, folder: Path, *, per_channel: bool) -> Path:
    """What ONNX Runtime's static quantizer makes of the network in float32."""
    prepared, target = folder / "prepared.onnx", folder / "quantized.onnx"
    folder.mkdir()
    quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(target),
        Images(images),
        quant_format=QuantFormat.QDQ,
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
        activation_type=QuantType.QUInt8,
    )
    return target


def logits(path: Path, images: Tensor) -> Tensor:
    """What a file says of all images."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [session.run(None, {INPUT: batch.numpy()})[0] for batch in images.split(BATCH)]
    return torch.from_numpy(np.concatenate(found))


def files(shown: Tensor, place: Path) -> dict[str, Path]:
    """Label -> the ONNX file of each way."""
    plain = saved([], shown, place / "plain")
    found = {"float32": plain}
    for number, (label, passes) in enumerate(WAYS.items()):
        found[label] = saved([passes, LAST], shown, place / str(number))
    found["onnxruntime static"] = peer(plain, shown, place / "tensor", per_channel=False)
    label = "onnxruntime static per channel"
    found[label] = peer(plain, shown, place / "channel", per_channel=True)
    return found


def main() -> None:
    """Quantize, run, publish."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="keep the table as JSON")
    record = parser.parse_args().record
    shown, (images, labels) = digits("calibration")[0], digits("test")
    with tempfile.TemporaryDirectory() as folder:
        made = files(shown, Path(folder))
        said = {label: logits(path, images) for label, path in made.items()}
        sizes = {label: path.stat().st_size / 1e6 for label, path in made.items()}
    rows = [
        (label, f"{sizes[label]:.3f}", lost(said["float32"], one), right(one, labels))
        for label, one in said.items()
    ]
    result = Result(
        "convolutions",
        "A ResNet trained on digits, convolutions and the last layer in 8-bit integers",
        ("what runs", "MB", "KL", "accuracy"),
        rows,
        (
            f"{len(shown)} images for calibration; KL from the network in float32 and accuracy on "
            f"{len(images)} others, [95 % of them drawn with replacement]. Convolutions have "
            "kernels of 8 bits only.",
        ),
    )
    result.publish() if record else result.show()


def lost(reference: Tensor, value: Tensor) -> str:
    """The mean divergence of images from the network in float32."""
    found = bootstrap(divergence(reference, value))
    return f"{found.mean:.2g} [{found.low:.2g}, {found.high:.2g}]"


def right(value: Tensor, labels: Tensor) -> str:
    """The share of right labels."""
    return f"{float((value.argmax(-1) == labels).double().mean()):.4f}"


if __name__ == "__main__":
    main()
