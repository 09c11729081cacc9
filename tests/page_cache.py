"""What the system has of a file in memory, by its own calls and not by the code under test."""

import ctypes
import mmap
import os
import sys
from pathlib import Path

import pytest


def write_to_disk(path: Path, data: bytes) -> Path:
    """Write a file whose pages the system can drop; returns its path."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return path


def can_read_direct(path: Path) -> bool:
    """Whether the file system reads this file past its page cache."""
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        return False
    try:
        return os.preadv(fd, [mmap.mmap(-1, 4096)], 0) > 0
    except OSError:
        return False
    finally:
        os.close(fd)


def tells_what_is_cached(path: Path) -> bool:
    """Whether a page that was just read is said to be in memory."""
    if sys.platform != "linux":
        return False
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, 1, 0)
        return os.preadv(fd, [bytearray(1)], 0, os.RWF_NOWAIT) == 1 and 0 in cached_pages(path)
    except OSError:
        return False
    finally:
        os.close(fd)


def cached_pages(path: Path) -> list[int]:
    """The pages of a file that are in memory, as mincore counts them; it reads none."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as pages:
        first = ctypes.c_char.from_buffer(pages)
        found = (ctypes.c_ubyte * (-(-len(pages) // mmap.PAGESIZE)))()
        address, n_bytes = ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(pages))
        status = libc.mincore(address, n_bytes, found)
        del first
    assert status == 0, os.strerror(ctypes.get_errno())
    return [i for i, page in enumerate(found) if page & 1]


def bytes_read_from_disk() -> int:
    """What this process has asked the disk for, finished or not."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        pytest.skip("this system does not count what a process reads")
    return int(counts.read_text().partition("\nread_bytes: ")[2].split()[0])
