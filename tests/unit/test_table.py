"""Rule tables."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lamella.errors import MissingRuleError
from lamella.ir.capture import capture_module
from lamella.rules.table import RuleTable

aten = torch.ops.aten


def test_extend_adds_and_leaves_the_first_table_alone():
    first = RuleTable("demo", {aten.add.Tensor: 1})
    second = first.extend({aten.mul.Tensor: 2})
    assert dict(second.items()) == {aten.add.Tensor: 1, aten.mul.Tensor: 2}
    assert len(first) == 1
    assert aten.mul.Tensor not in first


def test_extend_refuses_to_replace_and_override_refuses_to_add():
    table = RuleTable("demo", {aten.add.Tensor: 1})
    with pytest.raises(ValueError, match=r"aten\.add\.Tensor already.*override"):
        table.extend({aten.add.Tensor: 2})
    with pytest.raises(ValueError, match=r"aten\.mul\.Tensor to replace.*extend"):
        table.override({aten.mul.Tensor: 2})
    assert table.override({aten.add.Tensor: 2})[aten.add.Tensor] == 2


def test_check_lists_every_gap_with_its_count():
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(torch.sin(x)) + torch.cos(x)

    graph = capture_module(Model(), (torch.randn(2, 3),))
    table = RuleTable("demo", {aten.add.Tensor: 1})
    with pytest.raises(MissingRuleError) as caught:
        table.check(graph)
    assert str(caught.value) == (
        "no demo rule for aten.sin.default (x2), aten.cos.default (x1); "
        "add one with RuleTable.extend"
    )


def test_a_missing_rule_is_an_error_and_not_a_default():
    with pytest.raises(MissingRuleError, match=r"aten\.sin\.default"):
        RuleTable("demo", {})[aten.sin.default]
