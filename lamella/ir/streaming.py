"""Running a graph whose weights are not in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx
from torch.fx import Node
from torch.fx.node import map_arg


class Streaming(fx.Interpreter):
    """Runs a graph whose weights are read when they are needed and forgotten at once."""

    def __init__(self, module: fx.GraphModule, read: Callable[[Node], Tensor]) -> None:
        """Run `module`; `read` gives the data of the weight that a node stands for."""
        super().__init__(module)
        self._read = read

    def run_node(self, n: Node) -> Any:
        """Run one node; a weight is read by its first reader, not at the top of the graph."""
        if n.op == "get_attr":
            return None
        return super().run_node(n)

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[Any, Any]:
        """The arguments of `n`, with its weights freshly read."""

        def value_of(node: Node) -> Any:
            return self._read(node) if node.op == "get_attr" else self.env[node]

        args = map_arg(n.args, value_of)
        return args, map_arg(n.kwargs, value_of)
