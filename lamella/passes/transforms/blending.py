"""What `blend-weights` and `restore-blocks` share: one weight from two checkpoints."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from lamella.errors import PassError
from lamella.ir.graph import Graph
from lamella.passes.sites import FOLDED
from lamella.passes.transforms.checkpoint import Checkpoint


def blend(graph: Graph, node: Node, checkpoint: Checkpoint, ratio: float) -> None:
    """Put ``(1 - ratio) w + ratio w_other`` in the place of a weight."""
    if ratio == 0:
        return
    other = checkpoint.read(str(node.target))
    dtype = node.meta["val"].dtype
    if ratio == 1:
        graph.set_weight(node, other.to(dtype).contiguous())
        return
    own = graph.weight(node)
    wide = own.double() if own.dtype.itemsize == 8 else own.float()
    graph.set_weight(node, wide.lerp(other.to(wide.dtype), ratio).to(dtype))


def check_unchanged(graph: Graph, name: str) -> None:
    """Refuse weights that a pass before has folded or quantized.

    Raises:
        PassError: There are some; they no longer compare with those of a checkpoint.
    """
    changed = [str(node.target) for node in graph.weight_nodes() if FOLDED in node.meta]
    if changed:
        raise PassError(
            f"{name} has to come first: {', '.join(changed)} were folded or quantized before"
        )


def check_blocks(graph: Graph, wanted: Iterable[int]) -> None:
    """Refuse indices of blocks that are not there.

    Raises:
        PassError: There are some; all are listed.
    """
    strange = [index for index in wanted if index >= len(graph.blocks)]
    if strange:
        raise PassError(
            f"there is no block {', '.join(map(str, strange))}: the graph has "
            f"{len(graph.blocks)}, counted from 0"
        )
