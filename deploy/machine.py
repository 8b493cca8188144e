"""What this process may really use: cores of the cgroup and the affinity mask, never the host's."""

import math
import os
from pathlib import Path

CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """Cores that this process may use, at least 1: the smaller of its affinity mask and its cgroup's quota."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, _quota_cores(CGROUP_CPU_MAX) or affinity))


def _quota_cores(path: Path) -> int | None:
    """Cores of a cgroup v2 ``cpu.max`` ("quota period" in microseconds), or None where there is no limit."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else math.ceil(int(quota) / int(period))
