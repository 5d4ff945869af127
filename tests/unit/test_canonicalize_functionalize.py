"""Writes become values: everything that reads the memory later sees what was written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lamella.errors import CaptureError
from lamella.ir.capture import capture_module
from lamella.rewrite.canonicalize import canonicalize
from tests.unit.written import canonical, graph_of, operators, random

X, Y = random(4, 6), random(4, 6, seed=1)
AXES = {"a": (0,), "b": (0,)}


def in_a_row(x: Tensor, y: Tensor) -> Tensor:
    z = x + y
    z.mul_(2).sub_(y)
    z += 1
    return z


def base_sees_write_through_view(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x + y
    before = z * 1.5
    z[:, 1:3] = 7.0
    return z, before


def view_sees_write_to_base(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x * y
    left, turned = z[:, :3], z.t()
    z.add_(1)
    return left * 2, turned


def sibling_sees_write(x: Tensor, y: Tensor) -> Tensor:
    z = x * y
    left, flat = z[:, :3], z.view(-1)
    left.zero_()
    return flat + 1


def row_of_a_row(x: Tensor, y: Tensor) -> Tensor:
    z = x - y
    z.t()[1].unsqueeze(0).copy_(y[:, :1].t())
    return z * 2


def last_row(x: Tensor, y: Tensor) -> Tensor:
    z = x - y
    z[:, -1].fill_(3.0)
    z[:, -3:-1].mul_(y[:, :2])
    return z


def copy_is_apart(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x - y
    apart = z.clone()
    turned = z.t().contiguous()
    z.add_(5)
    return apart, turned


def contiguous_is_the_same(x: Tensor, y: Tensor) -> Tensor:
    z = x - y
    same = z.contiguous().to(torch.float64).reshape(-1, 3)
    z.add_(5)
    return same


def masked(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z.masked_fill_(y > 0, -1.0)
    z[y < -1] = 9.0
    return z


def in_parts(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1.0
    one, two = z.split(3, dim=1)
    total = one + two
    z.mul_(3)
    return total + one


def promoted(x: Tensor, y: Tensor) -> Tensor:
    z = x.float()
    z.mul_(y[:, :1])
    return z


WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    function.__name__: function
    for function in (
        in_a_row,
        base_sees_write_through_view,
        view_sees_write_to_base,
        sibling_sees_write,
        row_of_a_row,
        last_row,
        copy_is_apart,
        contiguous_is_the_same,
        masked,
        in_parts,
        promoted,
    )
}


@pytest.mark.parametrize("name", WRITES)
def test_later_readers_see_the_new_value(name: str) -> None:
    graph, report = canonical(WRITES[name], X, Y, dynamic=AXES)
    assert report.counts["functionalize"] >= 1
    assert not any(op.endswith("_") for op in operators(graph))


def test_metadata_in_place_is_a_view() -> None:
    graph, _ = canonical(lambda x: (x * 2).unsqueeze_(0).detach_(), X)
    assert operators(graph) == {"mul": 1, "unsqueeze": 1}


def test_a_model_that_writes_into_its_input_is_reported() -> None:
    graph, report = canonical(lambda x: x.mul_(2) + 1, X)
    assert report.written_inputs == ("a",)
    kept = X.clone()
    graph(a=kept)
    torch.testing.assert_close(kept, X, rtol=0, atol=0)


def test_a_model_that_writes_into_a_buffer_has_no_functional_form() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("sums", torch.zeros(()))

        def forward(self, a: Tensor) -> Tensor:
            self.calls.add_(1)
            self.sums.add_(a.sum().float())
            return a + self.calls

    graph = capture_module(Counts(), {"a": X})
    with pytest.raises(CaptureError, match=r"calls.*sums"):
        canonicalize(graph)


def test_a_write_that_can_not_be_put_back_lists_its_readers() -> None:
    def every_other(x: Tensor) -> Tensor:
        z = x * 2
        z[:, ::2].add_(1)
        return z - 1

    with pytest.raises(
        CaptureError, match=r"add_ \(aten.add_.Tensor\) writes through slice.*sub reads mul"
    ):
        canonicalize(graph_of(every_other, X, dynamic=AXES))


def test_random_writes_have_no_functional_twin() -> None:
    graph = graph_of(lambda x: (x * 2).normal_() + 1, X)
    with pytest.raises(CaptureError, match=r"normal_ .* has no functional twin"):
        canonicalize(graph)
