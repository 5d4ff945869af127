"""Max pooling that keeps its winners for the sweep, so that the windows are compared once."""

from __future__ import annotations

import operator

from lamella.ir.graph import Graph
from lamella.ir.ops import argument_names, aten, bind


def keep_winners(graph: Graph) -> dict[str, str]:
    """Let every max pooling of `graph` give its indices too, in place.

    Returns:
        Name of the node that went -> name of the node of the same value.
    """
    replaced: dict[str, str] = {}
    for node in graph.find(aten.max_pool2d.default):
        bound = bind(node)
        arguments = [bound[name] for name in argument_names(node.target)]
        both = graph.call(aten.max_pool2d_with_indices.default, *arguments, before=node)
        values = graph.call(operator.getitem, both, 0, before=node, like=node)
        graph.replace(node, values)
        replaced[node.name] = values.name
    if replaced:
        graph.prune()
    return replaced
