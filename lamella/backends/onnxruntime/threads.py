"""How many threads compute: the physical cores that this process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup/cpu.max")


def physical_cores() -> int:
    """Physical cores among the CPUs of this process, at most its quota of CPU time.

    Two hardware threads of one core share its arithmetic units: a second compute thread there
    only gets in the way.
    """
    allowed = _allowed_cpus()
    cores = len({_core_of(cpu) for cpu in allowed})
    return max(1, min(cores, _quota(), len(allowed)))


def _allowed_cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _core_of(cpu: int) -> tuple[str, str]:
    """What two hardware threads of the same core share; where unknown, each is a core."""
    topology = _CPUS / f"cpu{cpu}" / "topology"
    try:
        package = (topology / "physical_package_id").read_text(encoding="ascii").strip()
        return package, (topology / "core_id").read_text(encoding="ascii").strip()
    except OSError:
        return "cpu", str(cpu)


def _quota() -> int:
    """CPUs' worth of time that a container may use."""
    try:
        limit, period = _CGROUP.read_text(encoding="ascii").split()[:2]
    except (OSError, ValueError):
        return 2**31
    return 2**31 if limit == "max" else math.ceil(int(limit) / int(period))
