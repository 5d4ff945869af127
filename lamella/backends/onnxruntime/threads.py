"""How many threads compute, and where: the physical cores that this process may use."""

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


def worker_cpus(threads: int) -> tuple[int, ...]:
    """A CPU for each thread beside the calling one, where the threads take all cores.

    The system wakes a worker on the core of the caller as often as not, and leaves it there for
    as long as a session lives: then one core does the work of two. As ONNX Runtime does when it
    chooses the number of threads itself, each worker gets a core of its own; the first core is
    left to the caller.

    Args:
        threads: That compute one operator, the caller among them.

    Returns:
        ``threads - 1`` CPUs; none where the system chooses, because there are more cores than
        threads, or no way to say.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    first: dict[tuple[str, str], int] = {}
    for cpu in sorted(_allowed_cpus()):
        first.setdefault(_core_of(cpu), cpu)
    return tuple(first.values())[1:] if len(first) == threads else ()


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
