"""The one representation of a model: a flat ATen graph whose edits are counted.

`Graph` is the only class that writes to an fx graph after capture. It keeps the fake value
of every node (``node.meta["val"]``: shape with symbols, dtype, device), knows which pass made
which node, and shares the storage of its weights with the model that was captured: a weight is
replaced, never written into.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from lamella.errors import GraphError
from lamella.ir import fake_values, ops
from lamella.ir.cache import CacheLayout
from lamella.ir.edits import Edit, StopEditing
from lamella.ir.plan import Plan
from lamella.ir.quantize import Format
from lamella.ir.signature import Signature
from lamella.ir.storage import set_tensor, tensor_at
from lamella.ir.stream import Block, Stream, find_stream
from lamella.ir.streaming import Streaming
from lamella.ir.text import Listing, text_of
from lamella.ir.torch_private import FakeTensorMode
from lamella.ir.weights import Origin, WeightSource, not_loaded


class Graph:
    """A trained network as a flat graph of canonical operators.

    Calling a graph runs it: the same inputs and the same output type as the captured model.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        signature: Signature,
        *,
        origin: Origin | None = None,
        source: WeightSource | None = None,
    ) -> None:
        """Take over `module`: placeholders in the order of `signature`, one flat output tuple."""
        self._module = module
        self.signature = signature
        self.origin = origin or Origin()
        self.source = source
        # What weights are to be stored in is a wish: no value depends on it, so it is no edit.
        self.plan: Mapping[str, Format] = {}
        self.plan_made: Plan | None = None
        self._edits = 0
        self._compiled = 0
        self._stream: tuple[int, Stream] | None = None
        self._last_edit: Edit | None = None
        self._edit_limit: int | None = None
        self._author = "capture"
        # What the graph keeps between calls, if it continues from a cache.
        self.cache: CacheLayout | None = None
        self._fake_mode: FakeTensorMode | None = None

    # ---- looking ------------------------------------------------------------------------

    @property
    def edits(self) -> int:
        """How often the graph was edited; the key of everything computed from it."""
        return self._edits

    @property
    def last_edit(self) -> Edit | None:
        """What was done last, where and by whom; None before the first edit."""
        return self._last_edit

    @property
    def module(self) -> fx.GraphModule:
        """The fx module, to run and to look at; edit through the methods of `Graph`."""
        return self._module

    @property
    def nodes(self) -> list[Node]:
        """All nodes in topological order."""
        return list(self._module.graph.nodes)

    @property
    def inputs(self) -> list[Node]:
        """The placeholders, in the order of ``signature.inputs``."""
        return [node for node in self._module.graph.nodes if node.op == "placeholder"]

    @property
    def output(self) -> Node:
        """The output node; its first argument is the tuple of flat outputs."""
        return self._module.graph.output_node()

    @property
    def outputs(self) -> list[Any]:
        """The flat outputs, in the order of ``signature.outputs`` (nodes or constants)."""
        flat: Any = self.output.args[0]
        return list(flat)

    @property
    def stream(self) -> Stream:
        """The residual stream; found again after an edit."""
        if self._stream is None or self._stream[0] != self._edits:
            self._stream = (self._edits, find_stream(self.nodes))
        return self._stream[1]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the residual stream, each with its sublayers."""
        return self.stream.blocks

    def find(self, *targets: Callable[..., Any]) -> list[Node]:
        """The nodes that call one of `targets`, in topological order."""
        wanted = set(targets)
        return [
            node
            for node in self._module.graph.nodes
            if node.op == "call_function" and node.target in wanted
        ]

    def operand(self, node: Node, name: str) -> Any:
        """The argument of `node` called `name` in the schema of its operator, or its default.

        Raises:
            GraphError: The operator has no argument of that name.
        """
        bound = ops.bind(node)
        if name in bound:
            return bound[name]
        known = ops.argument_names(node.target)
        if name not in known:
            raise GraphError(
                f"{ops.op_name(node.target)} has no argument {name!r}; it has {', '.join(known)}"
            )
        return None

    # ---- weights ------------------------------------------------------------------------

    def weight_nodes(self) -> list[Node]:
        """The nodes that read a weight or a buffer."""
        return [node for node in self._module.graph.nodes if node.op == "get_attr"]

    def weight_node(self, name: str) -> Node:
        """The node that reads the weight `name`.

        Raises:
            GraphError: No node reads it.
        """
        for node in self.weight_nodes():
            if node.target == name:
                return node
        raise GraphError(f"no node reads a weight called {name!r}")

    def weight(self, node: Node | str) -> Tensor:
        """The data of a weight; never write into it. Not kept in memory if it was not there.

        Raises:
            GraphError: `node` doesn't read a weight, or there is no data to read.
        """
        name = self._weight_name(node)
        tensor = self._tensor(name)
        if tensor.device.type != "meta":
            return tensor
        if self.source is None or name not in self.source.names():
            raise not_loaded(name)
        stored = self.source.read(name)
        return stored.mT if name in self.origin.transposed else stored

    def is_loaded(self, node: Node | str) -> bool:
        """Whether the data of a weight is in memory."""
        return self._tensor(self._weight_name(node)).device.type != "meta"

    def set_weight(self, node: Node, value: Tensor) -> None:
        """Replace the weight that `node` reads; every reader of the weight sees the new value."""
        name = self._weight_name(node)
        set_tensor(self._module, name, value.detach())
        node.meta["val"] = self._fake(value.detach())
        self._touch("set_weight", node)

    def add_weight(self, name: str, value: Tensor) -> Node:
        """A new weight; the node that reads it stands at the top of the graph.

        Raises:
            GraphError: The name is taken.
        """
        if tensor_at(self._module, name) is not None:
            raise GraphError(f"a weight called {name!r} exists already")
        set_tensor(self._module, name, value.detach())
        graph = self._module.graph
        first = next(iter(graph.nodes))
        with graph.inserting_before(first):
            node = graph.create_node("get_attr", name)
        node.meta["val"] = self._fake(value.detach())
        node.meta["author"] = self._author
        self._touch("add_weight", node)
        return node

    def weight_bytes(self) -> int:
        """Bytes of the weights that some node reads; a tied weight counts once."""
        sizes = {node.target: _nbytes(node.meta["val"]) for node in self.weight_nodes()}
        return sum(sizes.values())

    # ---- edits --------------------------------------------------------------------------

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        before: Node | None = None,
        after: Node | None = None,
        name: str | None = None,
        like: Node | None = None,
        **kwargs: Any,
    ) -> Node:
        """A new node that calls `target`, placed before or after a node (exactly one is given).

        The fake value of the result is computed at once, so that a wrong shape fails here;
        where `like` is given, a node whose value is the same, its fake value is taken over
        (computing one with symbolic sizes takes milliseconds).

        Raises:
            GraphError: Neither or both of `before` and `after` are given.
            RuntimeError: The operator refuses its arguments (or what else it raises then).
        """
        if (before is None) == (after is None):
            raise GraphError("place a new node with either before= or after=")
        graph = self._module.graph
        spot = graph.inserting_before(before) if before else graph.inserting_after(after)
        with spot:
            node = graph.create_node("call_function", target, args, kwargs, name=name)
        if like is not None:
            node.meta["val"] = like.meta["val"]
        else:
            self._propagate_new(node)
        node.meta["author"] = self._author
        self._touch("call", node)
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Let every reader of `old` but `new` itself read `new`; `old` stays until `finish`.

        Raises:
            GraphError: `old` and `new` differ in shape rank or dtype.
        """
        was, now = old.meta.get("val"), new.meta.get("val")
        if isinstance(was, Tensor) and isinstance(now, Tensor) and _kind(was) != _kind(now):
            raise GraphError(
                f"{new.name} ({_kind(now)}) can't replace {old.name} ({_kind(was)}): dtype and "
                f"number of dims must be the same"
            )
        if new.op == "call_function" and "nn_module_stack" in old.meta:
            new.meta.setdefault("nn_module_stack", old.meta["nn_module_stack"])
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._touch("replace", old)

    def set_operand(self, node: Node, name: str, value: Any) -> None:
        """Give `node` another argument, by schema name; fake values downstream are kept.

        Raises:
            GraphError: The operator has no argument of that name.
        """
        names = ops.argument_names(node.target)
        if name not in names:
            self.operand(node, name)
        position = names.index(name)
        if position < len(node.args):
            node.update_arg(position, value)
        else:
            node.update_kwarg(name, value)
        self._touch("set_operand", node)

    def reread(self, node: Node, old: Node, new: Node) -> None:
        """Let `node` read `new` wherever it read `old`; fake values downstream are kept."""
        node.replace_input_with(old, new)
        self._touch("reread", node)

    def set_outputs(self, outputs: Iterable[Any], signature: Signature) -> None:
        """Replace the flat outputs, and the signature that names them."""
        self.output.args = (tuple(outputs),)
        self.signature = signature
        self._touch("set_outputs", self.output)

    def add_input(self, name: str, value: Tensor) -> Node:
        """A new placeholder after the others; `value` is fake. Then `set_outputs` names it.

        Raises:
            GraphError: The name is taken.
        """
        if any(str(node.target) == name for node in self.inputs):
            raise GraphError(f"the graph has an input called {name!r} already")
        last = self.inputs[-1]
        with self._module.graph.inserting_after(last):
            node = self._module.graph.create_node("placeholder", name)
        node.meta.update(val=value, author=self._author)
        self._touch("add_input", node)
        return node

    def set_value(self, node: Node, value: Any) -> None:
        """Give an input another fake value; `refresh` what depends on it."""
        node.meta["val"] = value
        self._touch("set_value", node)

    def remove_input(self, node: Node, signature: Signature) -> None:
        """Remove a placeholder that nothing reads, and give the signature without it.

        Raises:
            GraphError: Something reads it.
        """
        if node.users:
            readers = ", ".join(map(str, node.users))
            raise GraphError(f"input {node.name} is still read by {readers}")
        self._module.graph.erase_node(node)
        self.signature = signature
        self._touch("remove_input")

    def erase(self, nodes: Iterable[Node]) -> None:
        """Remove nodes that nothing reads, last first.

        Raises:
            GraphError: Something outside of `nodes` reads one of them.
        """
        order = {node: place for place, node in enumerate(self._module.graph.nodes)}
        for node in sorted(nodes, key=order.__getitem__, reverse=True):
            if node.users:
                raise GraphError(f"{node.name} is still read by {', '.join(map(str, node.users))}")
            self._module.graph.erase_node(node)
        self._touch("erase")

    def refresh(self, nodes: Iterable[Node] | None = None) -> None:
        """Compute fake values again, of `nodes` or of the whole graph, in order."""
        wanted = None if nodes is None else set(nodes)
        for node in self._module.graph.nodes:
            if node.op == "call_function" and (wanted is None or node in wanted):
                self._propagate(node)

    def finish(self) -> int:
        """Remove dead code and unread weights, check the fx graph, recompile.

        Returns:
            How many nodes went.
        """
        removed = self.prune()
        if self._unregister_unread() and not removed:
            self._touch("finish")
        self._module.graph.lint()
        self._recompile()
        return removed

    def prune(self) -> int:
        """Remove dead code only, as often as one likes while editing; then `finish`.

        Returns:
            How many nodes went.
        """
        graph = self._module.graph
        before = len(graph.nodes)
        for node in reversed(list(graph.nodes)):
            if not node.users and (ops.is_assert(node.target) or ops.is_pure(node)):
                graph.erase_node(node)
        removed = before - len(graph.nodes)
        if removed:
            self._touch("finish")
        return removed

    @contextlib.contextmanager
    def author(self, name: str) -> Generator[None]:
        """While the block runs, new nodes are signed by `name` (see ``node.meta["author"]``)."""
        previous, self._author = self._author, name
        try:
            yield
        finally:
            self._author = previous

    @contextlib.contextmanager
    def stop_after(self, edits: int) -> Generator[None]:
        """Leave the block after so many more edits (at least one); what was done stays done."""
        self._edit_limit = self._edits + edits
        try:
            with contextlib.suppress(StopEditing):
                yield
        finally:
            self._edit_limit = None

    # ---- whole graphs -------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph as the model would be called, without gradients."""
        values = self.signature.flatten(args, kwargs)
        with torch.no_grad():
            return self.signature.unflatten(self.run(values))

    def run(self, values: Iterable[Any]) -> tuple[Any, ...]:
        """Run on flat inputs and give the flat outputs; weights not in memory are streamed."""
        if self._compiled != self._edits:
            self._recompile()
        if all(self.is_loaded(node) for node in self.weight_nodes()):
            return tuple(self._module(*values))
        return tuple(Streaming(self._module, self.weight).run(*values))

    def copy(self) -> Graph:
        """An independent graph that shares the storage of the weights (but no edit)."""
        root = torch.nn.Module()
        twin = fx.Graph()
        mapping: dict[Node, Node] = {}
        for node in self._module.graph.nodes:
            copied = twin.node_copy(node, mapping.__getitem__)
            copied.meta = dict(node.meta)
            mapping[node] = copied
        for node in self.weight_nodes():
            set_tensor(root, str(node.target), self._tensor(str(node.target)))
        module = fx.GraphModule(root, twin)
        graph = Graph(module, self.signature, origin=self.origin, source=self.source)
        graph.plan, graph.plan_made, graph.cache = self.plan, self.plan_made, self.cache
        graph._fake_mode = self._fake_mode
        graph._edits = graph._compiled = self._edits
        return graph

    def restore(self, saved: Graph) -> None:
        """Become `saved` (a copy made before): the way back after a failed edit."""
        twin = saved.copy()
        self._module = twin._module
        self.signature, self.origin, self.source = twin.signature, twin.origin, twin.source
        self.plan, self.plan_made, self.cache = twin.plan, twin.plan_made, twin.cache
        self._touch("restore")

    def __str__(self) -> str:
        name, outputs = self.origin.architecture or "graph", self.signature.outputs
        return text_of(Listing(name, outputs, self.weight_bytes(), self.nodes, self.blocks))

    # ---- inside -------------------------------------------------------------------------

    def fake_mode(self) -> FakeTensorMode:
        """The fake mode that the values of the graph live in."""
        if self._fake_mode is None:
            self._fake_mode = fake_values.mode_of(self._module.graph.nodes)
        return self._fake_mode

    def _propagate(self, node: Node) -> None:
        node.meta["val"] = fake_values.value_of(node, self.fake_mode())
        fake_values.remember(node, self.fake_mode())

    def _propagate_new(self, node: Node) -> None:
        try:
            self._propagate(node)
        except Exception as error:
            self._module.graph.erase_node(node)
            error.add_note(f"while adding {ops.op_name(node.target)} to the graph")
            raise

    def _fake(self, value: Tensor) -> Tensor:
        return fake_values.fake_of(value, self.fake_mode())

    def _recompile(self) -> None:
        # fx runs the code it generated last, whatever was edited since.
        self._module.recompile()
        self._compiled = self._edits

    def _touch(self, action: str, node: Node | None = None) -> None:
        self._edits += 1
        self._last_edit = Edit.of(self._edits, action, node, self._author)
        if self._edits == self._edit_limit:
            raise StopEditing

    def _weight_name(self, node: Node | str) -> str:
        if isinstance(node, str):
            return node
        if node.op != "get_attr":
            raise GraphError(f"{node.name} is not a weight ({node.op})")
        return str(node.target)

    def _tensor(self, name: str) -> Tensor:
        found = tensor_at(self._module, name)
        if found is None:
            raise GraphError(f"the graph has no weight called {name!r}")
        return found

    def _unregister_unread(self) -> int:
        read = {str(node.target) for node in self.weight_nodes()}
        held = [name for name, _ in self._module.named_parameters(remove_duplicate=False)]
        held += [name for name, _ in self._module.named_buffers(remove_duplicate=False)]
        unread = [name for name in held if name not in read]
        for name in unread:
            owner, _, leaf = name.rpartition(".")
            delattr(self._module.get_submodule(owner), leaf)
        return len(unread)


def _kind(value: Tensor) -> str:
    return f"{value.dtype}, {value.ndim} dims"


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.element_size()
