"""A module in whose place a few names mean something else."""

from __future__ import annotations

import types
from typing import Any


class Instead(types.ModuleType):
    """Another module, but for the names that are given.

    ``monkeypatch.setattr(code, "torch", Instead(torch, float32=torch.float64))`` makes `code`
    compute in float64 where it says float32.
    """

    def __init__(self, module: types.ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
