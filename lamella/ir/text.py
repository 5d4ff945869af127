"""The text of a graph: stable, so that the diff of two texts is the diff of two graphs."""

from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from lamella.ir.graph import Graph

def text_of(graph: Graph) -> str:
    return str(graph.module.graph)
