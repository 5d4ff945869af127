"""Every registered pass keeps the contract."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest

from lamella.passes.base import Analysis, Effect, Transform
from lamella.passes.options import summary_of
from lamella.passes.registry import ANALYSES, TRANSFORMS

PASSES = (*TRANSFORMS, *ANALYSES)


def test_names_are_distinct():
    names = [kind.name for kind in PASSES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)
def test_a_registered_pass_keeps_the_contract(kind: type[Transform | Analysis]):
    assert dataclasses.is_dataclass(kind)
    assert kind.__dataclass_params__.frozen
    assert not inspect.isabstract(kind)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", kind.name)
    assert summary_of(kind).endswith(".")
    assert all(option.doc for option in kind.describe())
    if issubclass(kind, Transform):
        assert isinstance(kind.effect, Effect)
