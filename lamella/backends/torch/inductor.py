"""AOTInductor behind two functions.

`torch._inductor` is the documented home of both in spite of its name. Importing it takes a
second, which is why nothing but the aot backend does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch._inductor import aoti_compile_and_package, aoti_load_package
from torch.export import ExportedProgram


def compile_package(program: ExportedProgram, package: Path, *, with_weights: bool) -> Path:
    """Compile an exported program into the file `package`, with its weights or without."""
    options = {"aot_inductor.package_constants_in_so": with_weights}
    path = aoti_compile_and_package(program, package_path=str(package), inductor_configs=options)
    return Path(path)


def load_package(package: Path) -> Any:
    """What `compile_package` made: callable, with `load_constants` and `get_constant_fqns`."""
    return aoti_load_package(str(package))
