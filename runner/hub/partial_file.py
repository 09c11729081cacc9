"""PartialFile: a file that grows over several runs and is checked before anybody can see it.

Knows no hub. A file whose bytes are not those of its hash is never published. One process writes
at a time; the caller holds a lock.
"""

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, Self

from runner.byte_sizes import bytes_text
from runner.errors import HubError
from runner.hub.repo_files import RepoFile

SYNC_BYTES = 256 << 20  # written between two syncs: what a power cut can damage
_BLOCK_BYTES = 1 << 20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...
    def hexdigest(self) -> str: ...


class PartialFile:
    """The bytes of `file` that have come so far, at `path`, and their hash."""

    def __init__(self, path: Path, file: RepoFile) -> None:
        """Open or create. Raises OSError."""
        self._path = path
        self._file = file
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        self._open = os.fdopen(fd, "r+b", buffering=0)
        self.n_bytes = 0  # that are in the file and in the hash
        self.n_found = min(os.fstat(fd).st_size, file.n_bytes)  # from earlier runs
        self._hash = _new_hash(file)
        self._n_unsynced = 0

    def take_up(self, report: Callable[[int], None]) -> None:
        """Hash what earlier runs left; `report` gets the number of bytes of each step."""
        while self.n_bytes < self.n_found:
            block = self._open.read(min(_BLOCK_BYTES, self.n_found - self.n_bytes))
            if not block:
                break
            self._hash.update(block)
            self.n_bytes += len(block)
            report(len(block))
        self._open.truncate(self.n_bytes)

    def append(self, data: bytes) -> None:
        """Write what comes next at once, so that it outlives this process. Raises HubError."""
        n_written = 0
        try:
            while n_written < len(data):
                rest = data[n_written:]
                n = self._open.write(rest)
                self._hash.update(rest[:n])
                self.n_bytes += n
                n_written += n
            self._n_unsynced += len(data)
            if self._n_unsynced >= SYNC_BYTES:
                os.fsync(self._open.fileno())
                self._n_unsynced = 0
        except OSError as error:
            raise self._write_error(error) from error

    def restart(self) -> None:
        """Forget all bytes."""
        self._open.seek(0)
        self._open.truncate()
        self.n_bytes = self.n_found = 0
        self._hash = _new_hash(self._file)

    def is_right(self) -> bool:
        """Whether the whole file is there and has the hash that the hub lists."""
        return self.n_bytes == self._file.n_bytes and self._hash.hexdigest() == self._file.hash

    def publish(self, target: Path) -> None:
        """Give the file its place and name. Raises HubError unless it is right."""
        assert self.is_right(), f"{self._path} is not what the hub lists"
        try:
            os.fsync(self._open.fileno())
            if os.fstat(self._open.fileno()).st_size != self._file.n_bytes:
                raise HubError(f"{self._path}: another program writes to it; run this again")
            self._open.close()  # Windows renames no open file
            os.replace(self._path, target)
            _sync_folder(target.parent)
        except OSError as error:
            raise self._write_error(error) from error

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_error(self, error: OSError) -> HubError:
        return write_error(error, self._path.parent, self._file.n_bytes - self.n_bytes)


def write_error(error: OSError, folder: Path, n_missing: int = 0) -> HubError:
    """Why nothing can be written to `folder`, with what to do."""
    if error.errno in _FULL:
        missing = f", and {bytes_text(n_missing)} are still to come" if n_missing else ""
        return HubError(
            f"the disk of {folder} is full{missing}: make room and run the same again; what came"
            " is kept"
        )
    return HubError(f"cannot write to {folder}: {error.strerror or error}; what came is kept")


def has_right_bytes(path: Path, file: RepoFile) -> bool:
    """Whether a file on this machine, as large as `file`, has its hash. Raises OSError."""
    found = _new_hash(file)
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest() == file.hash


def _new_hash(file: RepoFile) -> _Hash:
    """SHA-256, or what git names a small file by."""
    if len(file.hash) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % file.n_bytes, usedforsecurity=False)


def _sync_folder(folder: Path) -> None:
    """Make a rename outlive a power cut, where the system can."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
