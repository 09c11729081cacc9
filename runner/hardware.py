"""What this machine has: cores and free memory. Knows no model."""

import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_MEMINFO = Path("/proc/meminfo")
_CGROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def n_physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once; at least 1."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    return max(1, len({_siblings(cpu) for cpu in os.sched_getaffinity(0)}))


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


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
    limits = []
    for line in _read(_MEMBERSHIP).splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            limits += _limits_upward(_CGROUPS, group, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_upward(_CGROUPS / "memory", group, "memory.limit_in_bytes")
    return min(limits, default=None)


def _limits_upward(root: Path, group: str, name: str) -> list[int]:
    folder = root / group.lstrip("/")
    texts = [_read(place / name).strip() for place in (folder, *folder.parents)]
    return [int(text) for text in texts if text.isdigit()]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
