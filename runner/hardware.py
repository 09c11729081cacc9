"""What this machine has: cores and free memory. Knows no model."""

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def n_cores() -> int:
    """Physical cores that this process may use, quotas of control groups included; at least 1."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    n_physical = len({_siblings(cpu) for cpu in os.sched_getaffinity(0)})
    return max(1, min([n_physical, *_cpu_quotas()]))


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cpu_quotas() -> list[int]:
    """Processors' worth of time per control group, rounded up; v2 only, as containers have it."""
    quotas = []
    for folder in _group_folders("", _CGROUPS):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if quota.isdigit() and period.isdigit():
            quotas.append(-(-int(quota) // int(period)))
    return quotas


def available_memory_bytes() -> int | None:
    """Memory that this process can still get, for itself and for file pages.

    What its control groups leave counts too. None where the system does not say.
    """
    available = _available()
    known = [*_left_in_groups(), *([] if available is None else [available])]
    return max(0, min(known)) if known else None


def total_memory_bytes() -> int | None:
    """The memory of this machine; None where the system does not say."""
    return _in_meminfo("MemTotal:")


def _available() -> int | None:
    return _in_meminfo("MemAvailable:")


def _in_meminfo(name: str) -> int | None:
    for line in _read(_MEMINFO).splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return None


def _left_in_groups() -> list[int]:
    """What each limited group from this process's up to the root can still get, v1 or v2."""
    v2 = _group_folders("", _CGROUPS)
    v1 = _group_folders("memory", _CGROUPS / "memory")
    left = [
        _left_in(folder, limit, "memory.current", "")
        for folder in v2
        for limit in ("memory.max", "memory.high")  # above high the system slows a group down
    ]
    left += [
        _left_in(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        for folder in v1
    ]
    return [n_bytes for n_bytes in left if n_bytes is not None]


def _left_in(folder: Path, limit_file: str, usage_file: str, prefix: str) -> int | None:
    """Limit - usage + file pages that the system drops when memory is short; None = no limit.

    Counts in memory.stat whose name has `prefix` include the groups below.
    """
    limit = _read(folder / limit_file).strip()
    if not limit.isdigit():
        return None
    usage = _read(folder / usage_file).strip()
    n_used = int(usage) if usage.isdigit() else 0
    droppable = (f"{prefix}inactive_file", f"{prefix}active_file")
    counts = (line.partition(" ") for line in _read(folder / "memory.stat").splitlines())
    n_droppable = sum(int(count) for name, _, count in counts if name in droppable)
    return int(limit) - max(0, n_used - n_droppable)


def _group_folders(controller: str, root: Path) -> list[Path]:
    """This process's group under `root` and all above it; controller "" means version 2."""
    for line in _read(_MEMBERSHIP).splitlines():
        _, controllers, group = line.split(":", 2)
        if controller in controllers.split(","):
            folder = root / group.lstrip("/")
            return [place for place in (folder, *folder.parents) if place.is_relative_to(root)]
    return []


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
