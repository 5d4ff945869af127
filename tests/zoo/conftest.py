"""The 28 families as parameters of a test: a test that takes `family` runs once for each."""

from __future__ import annotations

import pytest

from tests.zoo.families import FAMILIES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test with an argument `family` the name of each family."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(FAMILIES))
