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
    """Memory for programs and file pages, limits of control groups included.

    None where the system does not say.
    """
    known = [n for n in (_available(), _cgroup_limit()) if n is not None]
    return min(known) if known else None


def _available() -> int | None:
    for line in _read(_MEMINFO).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _cgroup_limit() -> int | None:
    """The tightest limit on the way from this process's group to the root, v1 or v2."""
    places = [folder / "memory.max" for folder in _group_folders("", _CGROUPS)]
    folders = _group_folders("memory", _CGROUPS / "memory")
    places += [folder / "memory.limit_in_bytes" for folder in folders]
    texts = [_read(place).strip() for place in places]
    return min((int(text) for text in texts if text.isdigit()), default=None)


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
