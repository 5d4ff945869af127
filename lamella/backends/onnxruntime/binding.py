"""Whether the caches of a graph can be buffers that are bound once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from lamella.backends.onnxruntime.emission import Call
from lamella.backends.onnxruntime.emit.rotary_tables import rotated_alike, rows_of, table_of
from lamella.errors import ArtifactError
from lamella.ir.cache import CacheLayout
from lamella.ir.graph import Graph

lam = torch.ops.lamella

Padding = Literal["compact", "given", "general"]


@dataclass(frozen=True)
class Binding:
    """What a decoder over buffers must know of its graph.

    Attributes:
        padding: What a mask that hides tokens asks for. ``"compact"``: leave the hidden tokens
            out, so that the rows of a sequence have no gaps. ``"given"``: nothing, the graph
            takes the mask as it is. ``"general"``: the graph over tensors that grow.
        windowed: Whether some attention sees the last tokens only, hidden ones counted.
        limit: Rows of the tables of angles; None when no attention has any.
    """

    padding: Padding
    windowed: bool
    limit: int | None

    def to_json(self) -> dict[str, Any]:
        """As data for a manifest; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Binding:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: It is malformed.
        """
        try:
            return cls(**data)
        except TypeError as error:
            raise ArtifactError(f"the binding in the manifest is malformed ({error})") from error


def binding_of(graph: Graph) -> Binding | None:
    """How the caches of `graph` can be buffers; None when they can't.

    `com.microsoft.GroupQueryAttention` computes in float32 here, with heads of one width for
    keys and values that is a multiple of 8, and with codes for both of them or for none.
    """
    layout = graph.cache
    if layout is None or not any(slot.grows for slot in layout.slots):
        return None
    calls = [Call.of(node) for node in graph.find(lam.cached_attention.default)]
    if len(calls) * 2 != sum(slot.grows for slot in layout.slots):
        return None
    if not all(map(_fits, calls)):
        return None
    names = graph.signature.inputs
    mask = graph.inputs[names.index(layout.mask)]
    windowed = any(call["window"] for call in calls)
    limit = rows_of(graph) if any(_takes_tables(graph, call) for call in calls) else None
    return Binding(_padding(calls, mask, layout), windowed, limit)


def _fits(call: Call) -> bool:
    query, key, value = (call.fake(name) for name in ("query", "key", "value"))
    width, value_width = query.shape[3], value.shape[3]
    if query.dtype != torch.float32 or width % 8:
        return False
    if width != value_width or int(query.shape[1]) % int(key.shape[1]):
        return False
    if (call["key_scale"] is None) != (call["value_scale"] is None):
        return False
    slots = [call[name] for name in ("past_key", "past_value")]
    # A buffer has more rows than were ever filled: nothing else may read it.
    alone = all(slot.op == "placeholder" and len(slot.users) == 1 for slot in slots)
    return alone and all(_goes_out(user) for user in call.node.users if user.args[1])


def _takes_tables(graph: Graph, call: Call) -> bool:
    query = call["query"]
    return rotated_alike(query, call["key"]) and table_of(graph, query) is not None


def _goes_out(present: Node) -> bool:
    return all(user.op == "output" for user in present.users)


def _padding(calls: list[Call], mask: Node, layout: CacheLayout) -> Padding:
    readers = [u for u in mask.users if u.target is not torch.ops.aten.sym_size.int]
    attending = [call for call in calls if call["mask"] is not None]
    if not attending:
        return "given"
    if layout.positions is None and _sizes_tensors(mask):
        # What is as long as the mask would count the hidden tokens that have no row.
        return "general"
    alone = all(u.target is lam.cached_attention.default for u in readers)
    direct = len(attending) == len(calls) and all(call["mask"] is mask for call in calls)
    plain = all(call["bias"] is None for call in calls)
    plain = plain and all(slot.grows for slot in layout.slots)
    return "compact" if alone and direct and plain else "general"


def _sizes_tensors(mask: Node) -> bool:
    """Whether tensors are made whose sizes follow from that of the mask."""
    sizes = [user for user in mask.users if user.target is torch.ops.aten.sym_size.int]
    for node in sizes:
        for user in node.users:
            if isinstance(user.meta.get("val"), torch.Tensor):
                return True
            if user not in sizes:
                sizes.append(user)
    return False
