"""Layers of few bits by dense products of PyTorch: their weights are unpacked once.

Layers of integers need nothing of their own: the references of their operators
(`lamella.ir.operators`, `lamella.ir.integer_operators`) take codes that are held as float32.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from lamella.ir.operators import round_to_int8


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, block: int) -> Tensor:
    """A linear layer; a `block` rounds the input as `linear_nbits` with 8-bit activations does.

    The weight may be wider than the input: blocks are whole, features need not be.
    """
    rounded = round_to_int8(input, block) if block else input
    return functional.linear(rounded, weight[:, : input.shape[-1]].to(input.dtype), bias)
