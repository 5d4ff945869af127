"""Models of the zoo and their graphs, each made once per session and handed out as copies."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from lamella.ir.capture import capture_module
from lamella.ir.graph import Graph
from lamella.rewrite.canonicalize import canonicalize
from tests.zoo.families import EXTRA, FAMILIES, Family

# The same examples in every run, and none that fails because the machine is busy.
settings.register_profile(
    "lamella", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lamella")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Tiny models are faster on one thread, and several workers share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def family_of(name: str) -> Family:
    """The family called `name`, among the 28 or the extra ones."""
    return FAMILIES[name] if name in FAMILIES else EXTRA[name]


@functools.cache
def _model(name: str) -> nn.Module:
    return family_of(name).build()


@functools.cache
def _raw(name: str) -> Graph:
    return capture_module(_model(name), family_of(name).inputs())


@functools.cache
def _canonical(name: str) -> Graph:
    graph = _raw(name).copy()
    canonicalize(graph)
    return graph


@pytest.fixture(scope="session")
def model() -> Callable[[str], nn.Module]:
    """``model("llama")``: the model of a family in eval mode, a copy of its own."""
    return lambda name: copy.deepcopy(_model(name))


@pytest.fixture(scope="session")
def raw() -> Callable[[str], Graph]:
    """``raw("llama")``: the captured graph before `canonicalize`, a copy of its own."""
    return lambda name: _raw(name).copy()


@pytest.fixture(scope="session")
def captured() -> Callable[[str], Graph]:
    """``captured("llama")``: the canonical graph of a family, a copy of its own."""
    return lambda name: _canonical(name).copy()


@pytest.fixture(scope="session")
def sample_inputs() -> Callable[..., dict[str, Tensor]]:
    """``sample_inputs("llama", batch=2, sequence=7, seed=0)``: inputs of a family."""
    return lambda name, *args, **kwargs: family_of(name).inputs(*args, **kwargs)
