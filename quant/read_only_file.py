"""ReadOnlyFile: one regular file, opened, read at offsets and mapped. Knows nothing of GGUF."""

import io
import mmap
import os
import stat
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from quant.errors import GGUFError

WritableBuffer = bytearray | memoryview | NDArray[Any]

BLOCK_BYTES = 4096  # offsets, lengths and addresses of direct reads are multiples of it

_OPEN_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_BINARY", 0)  # Windows would translate line ends without it
    | getattr(os, "O_NONBLOCK", 0)  # a pipe put in the file's place must not make open wait
)


@dataclass(frozen=True)
class FileChange:
    """What happened to an open file since it was opened."""

    path: Path
    description: str  # "was truncated from 10 to 4 bytes"
    is_data_intact: bool  # the open file still has its old bytes, only the name lost them


class ReadOnlyFile:
    """A regular file that stays open; reads never move a shared position, so threads may read."""

    def __init__(self, path: Path) -> None:
        """Open `path`. Raises GGUFError when it is missing, unreadable or no regular file."""
        self.path = path
        self._fd = _open_regular(path)
        self._opened = os.fstat(self._fd)
        self.size_bytes = self._opened.st_size
        self._lock = threading.Lock()
        self._mapping: mmap.mmap | None = None
        self._direct_fd = -1

    def read_into(self, offset: int, into: WritableBuffer) -> None:
        """Fill `into` from the byte `offset` on. Raises GGUFError when fewer bytes are there."""
        view = bytes_of(into)
        done = 0
        while done < len(view):
            try:
                n = self._read_some(offset + done, view[done:])
            except OSError as error:
                raise GGUFError(
                    f"{self.path}: reading byte {offset + done}: {_reason(error)}"
                ) from error
            if n == 0:
                raise self._short_read(offset, done, len(view))
            done += n

    def read(self, offset: int, n_bytes: int) -> bytes:
        """`n_bytes` from the byte `offset` on. Raises GGUFError when fewer bytes are there."""
        buffer = bytearray(n_bytes)
        self.read_into(offset, buffer)
        return bytes(buffer)

    def open_direct(self) -> bool:
        """Make `read_direct` possible; False where the system or the file system cannot."""
        if self._direct_fd < 0 and hasattr(os, "O_DIRECT"):
            self._direct_fd = _open_same(self.path, self._opened, os.O_DIRECT)
            if self._direct_fd >= 0 and not self._can_read_direct():
                os.close(self._direct_fd)
                self._direct_fd = -1
        return self._direct_fd >= 0

    def read_direct(self, offset: int, into: memoryview) -> None:
        """Fill `into` past the system's page cache; needs `open_direct`.

        Offset, length and address are multiples of BLOCK_BYTES. Beyond the end of the file `into`
        holds anything. Raises GGUFError when bytes are missing before it.
        """
        wanted = min(len(into), self.size_bytes - offset)
        done = 0
        while done < wanted:
            try:
                n = os.preadv(self._direct_fd, [into[done:]], offset + done)
            except OSError as error:
                raise GGUFError(
                    f"{self.path}: reading byte {offset + done}: {_reason(error)}"
                ) from error
            if n == 0 or (done + n < wanted and n % BLOCK_BYTES):
                raise self._short_read(offset, done + n, wanted)
            done += n

    def is_cached(self, offset: int) -> bool:
        """Whether the system has the page around this byte in memory; False if it cannot say.

        When it has not, asking may bring the page in.
        """
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        try:
            return os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:
            return False

    def forget(self, offset: int, n_bytes: int) -> None:
        """Tell the system that these pages need not stay in memory."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, n_bytes, os.POSIX_FADV_DONTNEED)

    def mapping(self) -> NDArray[np.uint8]:
        """The whole file, mapped read-only on the first call: uint8 (size_bytes,)."""
        if self._mapping is None:
            try:
                self._mapping = mmap.mmap(self._fd, self.size_bytes, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise GGUFError(f"{self.path}: cannot be mapped into memory: {error}") from error
        return np.frombuffer(self._mapping, np.uint8)

    def will_need(self, offset: int, n_bytes: int) -> None:
        """Ask the system to read a part of the mapping ahead; does nothing where it cannot."""
        if self._mapping is not None and hasattr(mmap, "MADV_WILLNEED"):
            start = offset - offset % mmap.PAGESIZE
            n_bytes = min(offset + n_bytes, self.size_bytes) - start
            self._mapping.madvise(mmap.MADV_WILLNEED, start, n_bytes)

    @property
    def is_mapped(self) -> bool:
        return self._mapping is not None

    def find_change(self) -> FileChange | None:
        """Compare size, time of change and identity with those at opening; None when the same."""
        now, before = os.fstat(self._fd), self._opened
        if now.st_size != before.st_size:
            verb = "truncated" if now.st_size < before.st_size else "extended"
            return FileChange(
                self.path, f"was {verb} from {before.st_size} to {now.st_size} bytes", False
            )
        if now.st_mtime_ns != before.st_mtime_ns:
            return FileChange(self.path, "was written to", False)
        try:
            named = os.stat(self.path)
        except OSError:
            return FileChange(self.path, "was deleted or moved away", True)
        if (named.st_ino, named.st_dev) != (before.st_ino, before.st_dev):
            return FileChange(self.path, "was replaced by another file", True)
        return None

    def close(self) -> None:
        """Give the file back. Arrays over the mapping that are still in use stay valid."""
        if self._mapping is not None:
            with suppress(BufferError):  # an array still points into it; the last one unmaps it
                self._mapping.close()
            self._mapping = None
        if self._direct_fd >= 0:
            os.close(self._direct_fd)
            self._direct_fd = -1
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_some(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], offset)
        with self._lock, io.FileIO(self._fd, closefd=False) as file:
            file.seek(offset)
            return file.readinto(view) or 0

    def _can_read_direct(self) -> bool:
        with mmap.mmap(-1, BLOCK_BYTES) as block, memoryview(block) as view:
            try:
                return os.preadv(self._direct_fd, [view], 0) > 0
            except OSError:
                return False

    def _short_read(self, offset: int, done: int, wanted: int) -> GGUFError:
        return GGUFError(
            f"{self.path}: the file was truncated or replaced: only {done} of {wanted} bytes "
            f"could be read at byte {offset}; when it was opened it had {self.size_bytes} bytes"
        )


def round_up(n: int, multiple: int) -> int:
    """The least multiple that is not below n."""
    return -(-n // multiple) * multiple


def bytes_of(buffer: WritableBuffer) -> memoryview:
    """The bytes of a contiguous buffer or array, without a copy."""
    return (buffer.data if isinstance(buffer, np.ndarray) else memoryview(buffer)).cast("B")


def _open_regular(path: Path) -> int:
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISREG(mode):
            fd = os.open(path, _OPEN_FLAGS)
            mode = os.fstat(fd).st_mode
            if stat.S_ISREG(mode):
                return fd
            os.close(fd)
    except (OSError, ValueError) as error:
        raise GGUFError(f"{path}: cannot be opened: {_reason(error)}") from error
    raise GGUFError(f"{path}: found {_kind(mode)}; expected a GGUF file")


def _open_same(path: Path, opened: os.stat_result, flags: int) -> int:
    """Open the file again with more flags; -1 when that fails or another file has its name."""
    try:
        fd = os.open(path, _OPEN_FLAGS | flags)
    except OSError:
        return -1
    now = os.fstat(fd)
    if (now.st_ino, now.st_dev) == (opened.st_ino, opened.st_dev):
        return fd
    os.close(fd)
    return -1


def _reason(error: OSError | ValueError) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text[:1].lower() + text[1:]


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    return "a device or socket"
