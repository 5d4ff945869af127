"""Weights rounded by other tools, as a process in an environment of its own.

``python weights_worker.py WEIGHTS.npz OUT.npz TOOL METHOD BITS BLOCK [INPUTS.npz]`` imports
nothing of this project. It writes every weight ``[out, in]`` as the tool reads it back, and
``bytes``: codes, two bytes for each scale, and what zeros take.
"""

from __future__ import annotations

import contextlib
import sys

import numpy as np

SYMMETRIC = {
    "onnxruntime": ("rtn-symmetric", "gptq"),
    "torchao": ("rtn-symmetric",),
}


def main() -> None:
    """Round, read back, write."""
    weights, out, tool, method, bits, block, *inputs = sys.argv[1:]
    data, shown = np.load(weights), np.load(inputs[0]) if inputs else {}
    tools = {"onnxruntime": onnxruntime, "torchao": torchao}
    found, total = {}, 0.0
    with contextlib.redirect_stdout(sys.stderr):
        for name in data.files:
            weight, layer = data[name], shown.get(name)
            how = method if method != "gptq" or layer is not None else "rtn-symmetric"
            found[name] = tools[tool](weight, how, int(bits), int(block), layer)
            total += stored(weight.shape, int(bits), int(block), zeros_of(tool, how, int(bits)))
    np.savez(out, **found, bytes=np.array(round(total)))


def zeros_of(tool: str, method: str, bits: int) -> float:
    """Bits of a zero point: a code, or a number of 16 bits."""
    if method in SYMMETRIC[tool]:
        return 0.0
    return 16.0 if method == "hqq" else float(bits)


def stored(shape: tuple[int, ...], bits: int, block: int, zero: float) -> float:
    """Bytes of a weight."""
    blocks = shape[0] * -(-shape[1] // block)
    return blocks * (block * bits + 16 + zero) / 8


def onnxruntime(weight, method, bits, block, shown):  # noqa: ANN001, ANN201  (arrays)
    """What ``MatMulNBits`` makes of the identity, for the quantizer of ONNX Runtime."""
    import onnx
    import onnxruntime as ort
    from onnxruntime.quantization import matmul_nbits_quantizer as q

    model = product(weight)
    configs = {
        "hqq": lambda: q.HQQWeightOnlyQuantConfig(block_size=block, bits=bits),
        "k_quant": lambda: q.KQuantWeightOnlyQuantConfig(
            customized_weight_config={"product": {"bits": bits}}
        ),
        "gptq": lambda: q.GPTQWeightOnlyQuantConfig(Rows(shown), block_size=block),
    }
    symmetric = method in SYMMETRIC["onnxruntime"]
    config = configs[method]() if method in configs else None
    made = q.MatMulNBitsQuantizer(
        model, bits=bits, block_size=block, is_symmetric=symmetric, algo_config=config
    )
    made.process()
    session = ort.InferenceSession(
        onnx.ModelProto.SerializeToString(made.model.model), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": np.eye(weight.shape[1], dtype=np.float32)})[0].T


class Rows:
    """Inputs of a layer, as calibration data that is read once."""

    def __init__(self, rows) -> None:  # noqa: ANN001
        self.rows = [{"x": rows}]

    def __iter__(self):  # noqa: ANN204
        return iter(self.rows)


def product(weight):  # noqa: ANN001, ANN201
    """A model of one product."""
    from onnx import TensorProto, helper, numpy_helper

    value = numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    kinds = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size])
        for name, size in (("x", weight.shape[1]), ("y", weight.shape[0]))
    ]
    graph = helper.make_graph([node], "product", kinds[:1], kinds[1:], [value])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def torchao(weight, method, bits, block, shown):  # noqa: ANN001, ANN201
    """The weight of a linear layer after ``quantize_``, groupwise."""
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

    kind = MappingType.SYMMETRIC if method == "rtn-symmetric" else MappingType.ASYMMETRIC
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(torch.from_numpy(weight), requires_grad=False)
    quantize_(
        layer,
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(block),
            mapping_type=kind,
        ),
    )
    return layer.weight.dequantize().float().numpy()


if __name__ == "__main__":
    main()
