"""The passes that Lamella brings along.

The lists are explicit: importing a module registers nothing. A new pass is added here, or
comes from another distribution by entry point (see `lamella.plugins`).
"""

from __future__ import annotations

from typing import Any

from lamella.passes.base import Analysis, Transform

TRANSFORMS: tuple[type[Transform], ...] = ()
"""The built-in transforms, in the order in which they are listed."""

ANALYSES: tuple[type[Analysis[Any]], ...] = ()
"""The built-in analyses, in the order in which they are listed."""
