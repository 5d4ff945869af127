"""The invariants of a graph, checked all at once.

The checks that look at the structure take microseconds per node. Computing a fake value with
symbolic sizes takes milliseconds, but equal operators on operands of equal shapes have equal
results: each case is computed once for a graph and its copies (`lamella.ir.fake_values`), so that
the blocks of a network are checked at the price of one, and later checks cost what changed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from lamella.errors import VerificationError
from lamella.ir import fake_values, ops
from lamella.ir.graph import Graph
from lamella.ir.torch_private import FakeTensorMode, statically_known_true

_REFUSALS = (RuntimeError, TypeError, ValueError, LookupError)
_OPS = frozenset({"placeholder", "get_attr", "call_function", "output"})


def verify(graph: Graph, *, canonical: bool = True, shapes: bool = True) -> None:
    """Check every invariant of `graph`; nothing is changed.

    Checked are: definitions before uses and consistent users; arguments that fit the schema of
    their operator; canonical operators; weights that exist with the shape and dtype their
    readers expect, one reader for each, none unread; inputs and outputs that match the
    signature; fake values equal to what the operators compute from their operands.

    Args:
        graph: Any graph; finished, so that no unread weights are left.
        canonical: Whether only canonical operators may occur.
        shapes: Whether fake values are computed again.

    Raises:
        VerificationError: Something is violated; the message lists every violation.
    """
    found = violations(graph, canonical=canonical, shapes=shapes)
    if found:
        count = "1 violation" if len(found) == 1 else f"{len(found)} violations"
        raise VerificationError(f"the graph has {count}: {'; '.join(found)}")


def violations(graph: Graph, *, canonical: bool = True, shapes: bool = True) -> list[str]:
    """What `verify` complains about, one text for each violation, in the order of the nodes."""
    nodes = graph.nodes
    found = [*_topology(nodes), *_calls(nodes, canonical)]
    found += [*_weights(graph), *_signature(graph)]
    # Fake values are computed from operands: they must be sound before.
    if shapes and not found:
        found += _fake_values(nodes, graph.fake_mode())
    return found


def _topology(nodes: list[Node]) -> Iterator[str]:
    place = {node: index for index, node in enumerate(nodes)}
    for index, node in enumerate(nodes):
        if node.op not in _OPS:
            yield f"{node.name} is a {node.op}, a graph holds {', '.join(sorted(_OPS))}"
        for source in node.all_input_nodes:
            if source not in place:
                yield f"{node.name} reads {source.name}, which is not in the graph"
            elif place[source] >= index:
                yield f"{node.name} reads {source.name}, which comes after it"
            if node not in source.users:
                yield f"{node.name} reads {source.name}, which does not know it"
        for user in node.users:
            if user not in place or node not in user.all_input_nodes:
                yield f"{node.name} counts {user.name} as a reader, which it is not"


def _calls(nodes: list[Node], canonical: bool) -> Iterator[str]:
    strange = Counter(
        ops.op_name(node.target)
        for node in nodes
        if node.op == "call_function" and ops.facts(node.target) is None
    )
    if canonical and strange:
        names = ", ".join(f"{name} (x{count})" for name, count in sorted(strange.items()))
        yield f"not canonical: {names}"
    for node in nodes:
        if node.op == "call_function" and ops.argument_names(node.target):
            yield from _arity(node)
            yield from _dtypes(node)
        if node.op != "output" and "val" not in node.meta:
            yield f"{node.name} has no fake value"


def _arity(node: Node) -> Iterator[str]:
    """Arguments that are too many, doubled, unknown or missing."""
    names = ops.argument_names(node.target)
    label = f"{node.name} ({ops.op_name(node.target)})"
    if len(node.args) > len(names):
        yield f"{label} has {len(node.args)} arguments, its schema {len(names)}"
    given = names[: len(node.args)]
    for name in node.kwargs:
        if name not in names:
            yield f"{label} has an argument {name!r} that its schema has not"
        elif name in given:
            yield f"{label} has the argument {name!r} twice"
    missing = set(names) - set(given) - set(node.kwargs) - set(ops.argument_defaults(node.target))
    if missing:
        yield f"{label} lacks {', '.join(sorted(missing))}"


def _dtypes(node: Node) -> Iterator[str]:
    """Contractions of floats of two kinds: fake kernels let them pass, real ones don't."""
    found = ops.facts(node.target)
    if found is None or found.category not in {"contraction", "attention"}:
        return
    lam = torch.ops.lamella
    if node.target in (lam.linear_nbits.default, lam.linear_int8.default):
        return
    if node.target in (lam.linear_int8_static.default, lam.conv_int8.default):
        return
    values = [source.meta.get("val") for source in node.all_input_nodes]
    dtypes = {value.dtype for value in values if isinstance(value, Tensor)}
    floats = sorted(
        str(dtype).removeprefix("torch.") for dtype in dtypes if dtype.is_floating_point
    )
    if len(floats) > 1:
        yield f"{node.name} ({ops.op_name(node.target)}) mixes {' and '.join(floats)}"


def _weights(graph: Graph) -> Iterator[str]:
    module = graph.module
    held = dict(module.named_buffers(remove_duplicate=False))
    held |= dict(module.named_parameters(remove_duplicate=False))
    readers = Counter(str(node.target) for node in graph.weight_nodes())
    for node in graph.weight_nodes():
        name = str(node.target)
        fake, data = node.meta.get("val"), held.get(name)
        if data is None:
            yield f"{node.name} reads a weight {name!r} that does not exist"
        elif isinstance(fake, Tensor) and _described(fake) != _described(data):
            yield (f"weight {name!r} is {_described(data)}, its readers expect {_described(fake)}")
    for name, count in readers.items():
        if count > 1:
            yield f"weight {name!r} is read by {count} nodes instead of one"
    unread = [name for name in held if name not in readers]
    if unread:
        yield f"weights that nothing reads: {', '.join(unread)}"


def _signature(graph: Graph) -> Iterator[str]:
    signature = graph.signature
    inputs = tuple(str(node.target) for node in graph.inputs)
    # A name with dots can't be that of an argument in Python.
    if inputs not in (signature.inputs, tuple(n.replace(".", "_") for n in signature.inputs)):
        yield (
            f"the graph has the inputs {', '.join(inputs)}, its signature "
            f"{', '.join(signature.inputs)}"
        )
    outputs = len(graph.outputs)
    if outputs != len(signature.outputs) or outputs != signature.out_spec.num_leaves:
        yield (
            f"the graph has {outputs} outputs, its signature {len(signature.outputs)} names "
            f"and a tree of {signature.out_spec.num_leaves}"
        )


# ---- fake values --------------------------------------------------------------------------


def _fake_values(nodes: list[Node], mode: FakeTensorMode) -> Iterator[str]:
    for node in nodes:
        if node.op != "call_function" or fake_values.is_known(node, mode):
            continue
        try:
            computed = fake_values.value_of(node, mode)
        except _REFUSALS as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            yield (
                f"{node.name} ({ops.op_name(node.target)}) refuses its operands "
                f"({type(error).__name__}: {reason})"
            )
            continue
        if _agree(node.meta["val"], computed):
            fake_values.remember(node, mode)
        else:
            yield (
                f"{node.name} ({ops.op_name(node.target)}) is said to be "
                f"{_described(node.meta['val'])}, but computes {_described(computed)}"
            )


def _agree(claimed: Any, computed: Any) -> bool:
    if isinstance(claimed, Tensor) and isinstance(computed, Tensor):
        if claimed.dtype != computed.dtype or claimed.ndim != computed.ndim:
            return False
        return all(map(_equal, claimed.shape, computed.shape))
    if isinstance(claimed, list | tuple) and isinstance(computed, list | tuple):
        return len(claimed) == len(computed) and all(map(_agree, claimed, computed))
    if isinstance(claimed, Tensor) or isinstance(computed, Tensor):
        return False
    return _equal(claimed, computed)


def _equal(left: Any, right: Any) -> bool:
    """Whether two sizes are provably the same; those that depend on data are taken to be."""
    if left is right or free_unbacked_symbols([left, right]):
        return True
    return bool(statically_known_true(left == right))


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_described, value))})"
    return str(value)
