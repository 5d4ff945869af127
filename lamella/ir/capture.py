"""From a PyTorch module or an exported program to a graph.

The graph is traced by `torch.export` without decomposition, so that `linear`, `layer_norm` and
`scaled_dot_product_attention` stay whole. It is *not* canonical yet: `rewrite.canonicalize` does
that.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen

from lamella.errors import CaptureError
from lamella.ir.graph import Graph
from lamella.ir.scan import traceable_scans
from lamella.ir.signature import Signature
from lamella.ir.storage import set_tensor
from lamella.ir.torch_private import (
    FakeTensor,
    TreeSpec,
    settled,
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)
from lamella.ir.weights import Origin

Inputs = Mapping[str, Any] | Sequence[Any]


def capture_module(
    model: nn.Module,
    inputs: Inputs,
    *,
    dynamic: bool | Mapping[str, Sequence[int]] = True,
    origin: Origin | None = None,
) -> Graph:
    """Trace `model` as called with `inputs` into a graph.

    The weights are shared with the model. The model is traced in inference mode and left as it
    was (training flag, config).

    Args:
        model: Any module that `torch.export` can trace.
        inputs: Sample inputs: a mapping of keywords, or a sequence of positional arguments.
            Batch and sequence must be larger than 1 to stay dynamic.
        dynamic: True lets the batch of every input vary, and every other axis of inputs with
            up to three axes (sequences); images keep their size. A mapping names the dynamic
            axes of each input. False fixes all shapes.
        origin: What is known about where the model came from.

    Raises:
        CaptureError: The model can't be traced; the message of PyTorch is attached.
    """
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    shapes = _dynamic_shapes(args, kwargs, dynamic)
    with _inference(model), traceable_scans(), torch.no_grad():
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} can't be traced by torch.export "
                f"({type(error).__name__}: {_first_line(error)}); the sample inputs were "
                f"{_describe(args, kwargs)}"
            ) from error
    return capture_program(program, origin=origin or Origin(architecture=type(model).__name__))


def capture_program(program: ExportedProgram, *, origin: Origin | None = None) -> Graph:
    """A graph of an exported program (in training IR, as `torch.export.export` gives it)."""
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    if in_spec is None or out_spec is None:
        raise CaptureError("the exported program has no record of its inputs and outputs")
    traced = program.module(check_guards=False)
    _flatten_calls(traced.graph)
    module, aliases = _with_weights_only(traced)
    for node in module.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = tree_map(settled, node.meta["val"])
    signature = Signature(_input_names(module), _output_names(out_spec), in_spec, out_spec)
    origin = origin or Origin(kind="exported-program")
    origin = dataclasses.replace(origin, aliases=aliases, constants=_constants(program))
    return Graph(module, signature, origin=origin)


def _constants(program: ExportedProgram) -> frozenset[str]:
    """Buffers that a checkpoint doesn't store, and tensors written into the code."""
    signature = program.graph_signature
    lifted = signature.inputs_to_lifted_tensor_constants.values()
    return frozenset((*signature.non_persistent_buffers, *lifted))


def _flatten_calls(graph: fx.Graph) -> None:
    """Flat placeholders, a flat tuple of outputs, no calls of submodules (guards)."""
    graph.set_codegen(CodeGen())
    output = graph.output_node()
    output.args = (tuple(tree_leaves(output.args[0])),)
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users:
            graph.erase_node(node)


def _with_weights_only(
    traced: fx.GraphModule,
) -> tuple[fx.GraphModule, tuple[tuple[str, str], ...]]:
    """A module without hooks that holds each weight once, and the other names of tied ones."""
    root = nn.Module()
    first: dict[object, fx.Node] = {}
    aliases: list[tuple[str, str]] = []
    for node in list(traced.graph.nodes):
        if node.op != "get_attr":
            continue
        name, value = str(node.target), _attribute(traced, str(node.target))
        node.meta.setdefault("val", value)
        reader = first.setdefault(_identity(value), node)
        if reader is node:
            set_tensor(root, name, _without_fake_data(value.detach()))
        else:
            aliases.append((name, str(reader.target)))
            node.replace_all_uses_with(reader)
            traced.graph.erase_node(node)
    return fx.GraphModule(root, traced.graph), tuple(aliases)


def _without_fake_data(value: Tensor) -> Tensor:
    """`value`, or a tensor on the meta device for a weight of a model that has no data."""
    if not isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _identity(value: Tensor) -> object:
    """Equal for two names of the same memory."""
    if value.device.type == "meta" or value.numel() == 0 or isinstance(value, FakeTensor):
        return id(value)
    place = (value.untyped_storage().data_ptr(), value.storage_offset())
    return (*place, value.dtype, tuple(value.shape), value.stride())


def _attribute(module: nn.Module, name: str) -> Any:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _input_names(module: fx.GraphModule) -> tuple[str, ...]:
    """The name of every placeholder; for a tensor passed by keyword it is the keyword."""
    return tuple(str(node.target) for node in module.graph.nodes if node.op == "placeholder")


def _output_names(spec: TreeSpec) -> tuple[str, ...]:
    """``logits``, ``hidden_states.0``, …: the dotted path of every leaf of what is returned."""
    leaves = list(range(spec.num_leaves))
    paths, _ = tree_flatten_with_path(tree_unflatten(leaves, spec))
    return tuple(".".join(_key(part) for part in path) or "output" for path, _ in paths)


def _key(part: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(part, attribute):
            return str(getattr(part, attribute))
    return str(part)


def _dynamic_shapes(
    args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: bool | Mapping[str, Sequence[int]]
) -> Any:
    if dynamic is False:
        return None
    if dynamic is True:
        shapes = tree_map(_auto_axes, (args, kwargs))
        # A module whose forward takes *args or **kwargs wants the structure of the call.
        return shapes[1] if not args else (shapes[0] if not kwargs else None)
    return {
        name: dict.fromkeys(dynamic.get(name, ()), Dim.AUTO) if isinstance(v, Tensor) else None
        for name, v in kwargs.items()
    }


def _auto_axes(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor):
        return None
    axes = range(value.ndim) if value.ndim <= 3 else range(1)
    return dict.fromkeys(axes, Dim.AUTO)


@contextlib.contextmanager
def _inference(model: nn.Module) -> Generator[None]:
    """Eval mode, and no cache in the outputs of a Hugging Face model, while the block runs."""
    training = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    configs = [config, getattr(config, "text_config", None), getattr(config, "decoder", None)]
    cached: list[Any] = [c for c in configs if getattr(c, "use_cache", False)]
    model.eval()
    for c in cached:
        c.use_cache = False
    try:
        yield
    finally:
        for c in cached:
            c.use_cache = True
        for module, flag in training.items():
            module.training = flag


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else "no message"


def _describe(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    def shape(value: Any) -> str:
        return str(list(value.shape)) if isinstance(value, Tensor) else repr(value)

    values, _ = tree_flatten((args, kwargs))
    names = list(kwargs) if len(kwargs) == len(values) else [str(i) for i in range(len(values))]
    return ", ".join(f"{name} {shape(value)}" for name, value in zip(names, values, strict=True))
