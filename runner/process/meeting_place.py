"""Where viewers find running engines: one socket for each in a directory of this user only.

Knows no message.
"""

import contextlib
import os
import socket
import stat
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from runner.errors import OptionError

HAS_MEETING_PLACE = hasattr(socket, "AF_UNIX")
MAX_PATH_BYTES = 100  # of a socket: 104 on macOS, 108 on Linux
_BACKLOG = 16
_CONNECT_US = 500_000  # an engine that is stopped does not accept, and its queue may be full
_CONNECT_TIME = struct.pack("ll", 0, _CONNECT_US)  # a `timeval`
_SUFFIX = ".sock"
_RUNTIME_DIRS = "/run/user"  # where XDG_RUNTIME_DIR leads on Linux; cron and sudo do not set it


def directory(environment: Mapping[str, str]) -> Path:
    """The user's own run directory, else one in the temporary folder; not made."""
    for runtime in (environment.get("XDG_RUNTIME_DIR", ""), f"{_RUNTIME_DIRS}/{os.getuid()}"):
        is_short = len(os.fsencode(runtime)) < MAX_PATH_BYTES - 30
        if Path(runtime).is_absolute() and is_short and Path(runtime).is_dir():
            return Path(runtime) / "buddyrun"
    return Path("/tmp") / f"buddyrun-{os.getuid()}"


def open_socket(place: Path, pid: int) -> socket.socket:
    """Listen for viewers of the engine `pid`, without waiting. Raises OSError where that cannot
    be, as when the directory is somebody else's."""
    _make(place)
    path = path_of(place, pid)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)  # of an earlier process with this number
        listener.bind(str(path))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def path_of(place: Path, pid: int) -> Path:
    """The socket of the engine `pid`."""
    return place / f"{pid}{_SUFFIX}"


def pids(place: Path) -> list[int]:
    """The engines that have a socket, in the order of their numbers; sockets that a killed one
    left behind are removed. Raises OptionError when the directory is not safe to use."""
    try:
        _check_owner(place)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OptionError(f"{place} cannot be used: {error.strerror or error}") from error
    return sorted(_alive(place))


def call(place: Path, pid: int) -> socket.socket:
    """Connect to the engine `pid`. Raises OSError when it is gone or does not accept."""
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Not `settimeout`, with which a full queue is an error at once.
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _CONNECT_TIME)
        caller.connect(str(path_of(place, pid)))
    except OSError:
        caller.close()
        raise
    return caller


def _make(place: Path) -> None:
    with contextlib.suppress(FileExistsError):
        place.mkdir(mode=0o700)
    _check_owner(place)


def _check_owner(place: Path) -> None:
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(0, "it is no directory")
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise PermissionError(0, "it is not of this user alone (expected mode 0700)")


def _alive(place: Path) -> Iterator[int]:
    for path in place.glob(f"*{_SUFFIX}"):
        if not (path.stem.isascii() and path.stem.isdecimal()):
            continue
        pid = int(path.stem)
        if _is_running(pid) or not _refuses(place, pid):
            yield pid
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def _refuses(place: Path, pid: int) -> bool:
    """Whether nobody listens. A process that this one cannot see may, as in another container."""
    try:
        call(place, pid).close()
    except ConnectionRefusedError:
        return True
    except OSError:  # its queue is full, or the socket is gone by now
        pass
    return False


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's by now, or no number of a process
        return False
    return True
