"""The names of PyTorch that have no public home, in one place.

A new release of PyTorch that moves one of them breaks this module and no other.
"""

from __future__ import annotations

from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import (
    TreeSpec,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_unflatten,
    treespec_dumps,
    treespec_loads,
)

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "TreeSpec",
    "detect_fake_mode",
    "statically_known_true",
    "tree_flatten",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "treespec_dumps",
    "treespec_loads",
]
