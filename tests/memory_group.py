"""Runs commands in a memory control group of their own, with no file in the page cache.

Works with version 1 and 2 of control groups, and needs root for both. Knows nothing of models.
"""

import os
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.paths import ROOT

_MOUNT = Path("/sys/fs/cgroup")
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")
_PROBE_BYTES = 1 << 30

# The shell joins the group and then becomes the command, so that all of it is counted.
_JOIN = 'echo $$ > "$0/cgroup.procs" && exec "$@"'


class NoMemoryGroupError(Exception):
    """Control groups cannot be used here; the text says why."""


@dataclass(frozen=True)
class CappedRun:
    """How a command ended and what its group counted."""

    returncode: int  # negative = minus the signal that ended it
    stdout: str
    peak_bytes: int  # page cache included
    n_at_limit: int  # how often the limit made the system take pages back
    n_oom_kills: int

    def check(self) -> Self:
        """Raises RuntimeError unless the command ended well."""
        if self.returncode:
            killed = f", {self.n_oom_kills} killed for memory" if self.n_oom_kills else ""
            raise RuntimeError(
                f"the command ended with status {self.returncode}{killed}; "
                f"peak {self.peak_bytes} bytes"
            )
        return self


class MemoryGroup:
    """A group that may use `limit_bytes`; it is removed at the end of the `with` block."""

    def __init__(self, limit_bytes: int) -> None:
        """Raises NoMemoryGroupError."""
        self._files = _V1 if _has_v1() else _V2
        try:
            self._folder = _make_folder(self._files.parent)
            self._set_limit(limit_bytes)
        except OSError as error:
            raise NoMemoryGroupError(
                f"no memory control group can be made in {self._files.parent}: "
                f"{error.strerror} ({error.filename}); this needs root and a writable {_MOUNT}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.rmdir()

    def run(self, command: Sequence[str]) -> CappedRun:
        """Run the command from the repository's folder; what it says on stderr passes through."""
        joined = ["sh", "-c", _JOIN, str(self._folder), *command]
        done = subprocess.run(joined, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        files = self._files
        return CappedRun(
            done.returncode,
            done.stdout,
            peak_bytes=int(self._read(files.peak)),
            n_at_limit=_number(self._read(files.at_limit), "max"),
            n_oom_kills=_number(self._read(files.oom), "oom_kill"),
        )

    def _set_limit(self, limit_bytes: int) -> None:
        try:
            self._write(self._files.limit, str(limit_bytes))
            with suppress(OSError):  # not there when the system cannot swap
                self._write(self._files.swap, "0")
        except OSError:
            self._folder.rmdir()
            raise

    def _write(self, name: str, text: str) -> None:
        (self._folder / name).write_text(text)

    def _read(self, name: str) -> str:
        return (self._folder / name).read_text()


def run_capped(command: Sequence[str], limit_bytes: int) -> CappedRun:
    """Run the command in a group of its own, the page cache emptied before.

    Raises NoMemoryGroupError.
    """
    drop_page_cache()
    with MemoryGroup(limit_bytes) as group:
        return group.run(command)


def drop_page_cache() -> None:
    """Make the system forget all files that no process has mapped. Raises NoMemoryGroupError."""
    os.sync()
    try:
        _DROP_CACHES.write_text("3")
    except OSError as error:
        raise NoMemoryGroupError(
            f"the page cache cannot be emptied: {error.strerror} ({_DROP_CACHES}); this needs root"
        ) from error


def why_not() -> str:
    """Why commands cannot be run in groups here; "" when they can."""
    try:
        with MemoryGroup(_PROBE_BYTES):
            return "" if os.access(_DROP_CACHES, os.W_OK) else f"{_DROP_CACHES} is not writable"
    except NoMemoryGroupError as error:
        return str(error)


@dataclass(frozen=True)
class _Files:
    """What one version of control groups calls things."""

    parent: Path
    limit: str
    swap: str  # 0 keeps anonymous memory in memory
    peak: str
    at_limit: str
    oom: str


_V1 = _Files(
    _MOUNT / "memory",
    limit="memory.limit_in_bytes",
    swap="memory.swappiness",
    peak="memory.max_usage_in_bytes",
    at_limit="memory.failcnt",
    oom="memory.oom_control",
)
_V2 = _Files(
    _MOUNT,
    limit="memory.max",
    swap="memory.swap.max",
    peak="memory.peak",
    at_limit="memory.events",
    oom="memory.events",
)


def _has_v1() -> bool:
    return (_V1.parent / _V1.limit).exists()


def _make_folder(parent: Path) -> Path:
    controllers = parent / "cgroup.subtree_control"  # of version 2 only
    if controllers.exists() and "memory" not in controllers.read_text().split():
        controllers.write_text("+memory")
    return Path(tempfile.mkdtemp(prefix="buddyrun.", dir=parent))


def _number(text: str, key: str) -> int:
    """The number behind `key` in lines of "key number", or the only number; 0 without either."""
    if text.strip().isdigit():
        return int(text)
    counts = dict(line.split() for line in text.splitlines())
    return int(counts.get(key, 0))
