"""Watching an engine of this user from another process: finding it, reading its frames.

A watcher only reads. Knows neither what frames mean nor how they are shown.
"""

import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from runner.errors import OptionError
from runner.frames import MAX_LINE_BYTES, Frame, FrameReader
from runner.process import meeting_place

_FIRST_FRAME_S = 1.5  # a busy machine's engine answers in time, a stopped one never
_CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Running:
    """One engine of this user, as found."""

    frame: Frame

    @property
    def pid(self) -> int:
        """Of the engine's process."""
        return self.frame.pid

    @property
    def name(self) -> str:
        """Of the model, "" before it is loaded."""
        model = self.frame.model
        return (model.name or os.path.basename(model.path)) if model is not None else ""


class Watch:
    """A connection to one engine."""

    def __init__(self, pid: int, environment: Mapping[str, str] = os.environ) -> None:
        """Connect to the engine with this process number. Raises OptionError when it is gone."""
        _check_platform()
        try:
            self._socket = meeting_place.call(meeting_place.directory(environment), pid)
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise OptionError(f"no engine of this user has the process number {pid}") from error
        except OSError as error:
            raise OptionError(f"the engine {pid} takes no viewer: {error}") from error
        self._reader = FrameReader()
        self._pending = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop watching; `frames` ends, in another thread too. Can be called twice."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def frames(self) -> Iterator[Frame]:
        """Frames as they come, until the engine's process has ended."""
        while (line := self._line(None)) is not None:
            frame = self._reader.read(line)
            if frame is not None:
                yield frame

    def first(self, timeout_s: float = _FIRST_FRAME_S) -> Frame | None:
        """The next frame, None when the engine ends or has none in time."""
        until_s = time.monotonic() + timeout_s
        while (line := self._line(until_s)) is not None:
            frame = self._reader.read(line)
            if frame is not None:
                return frame
        return None

    def _line(self, until_s: float | None) -> bytes | None:
        """The next line; None at the end, or when none is complete at that time."""
        begin = 0
        while (end := self._pending.find(b"\n", begin)) < 0:
            begin = len(self._pending)
            if begin > MAX_LINE_BYTES:
                raise OptionError("the engine sends lines that are too long")
            piece = self._receive(until_s)
            if not piece:
                return None
            self._pending += piece
        line = bytes(self._pending[:end])
        del self._pending[: end + 1]
        return line

    def _receive(self, until_s: float | None) -> bytes:
        try:
            if until_s is not None:
                left_s = max(0.0, until_s - time.monotonic())
                if not select.select([self._socket], [], [], left_s)[0]:
                    return b""
            return self._socket.recv(_CHUNK_BYTES)
        except (OSError, ValueError):  # closed, perhaps by another thread
            return b""


def running(environment: Mapping[str, str] = os.environ) -> list[Running]:
    """All engines of this user that answer, in the order of their process numbers. All are asked
    at the same time: those that do not answer, as when they are stopped, cost a moment together."""
    _check_platform()
    pids = meeting_place.pids(meeting_place.directory(environment))
    if not pids:
        return []
    with ThreadPoolExecutor(len(pids)) as threads:
        frames = threads.map(lambda pid: _first_frame(pid, environment), pids)
        return [Running(frame) for frame in frames if frame is not None]


def _first_frame(pid: int, environment: Mapping[str, str]) -> Frame | None:
    try:
        with Watch(pid, environment) as watch:
            return watch.first()
    except OptionError:
        return None  # it ended meanwhile


def find(pid: int | None, environment: Mapping[str, str] = os.environ) -> list[Running]:
    """The engines that a process number may mean: the engine's own or the program's that started
    it; None means all. Raises OptionError when there is none."""
    every = running(environment)
    found = [each for each in every if pid in (None, each.pid, each.frame.owner_pid)]
    if found:
        return found
    if not every:
        raise OptionError("no buddyrun of this user is running; start one: buddyrun MODEL")
    known = ", ".join(str(each.frame.owner_pid) for each in every)
    raise OptionError(f"no buddyrun has the process number {pid}; running: {known}")


def _check_platform() -> None:
    if not meeting_place.HAS_MEETING_PLACE:
        raise OptionError("watching another buddyrun needs Unix sockets, which Python lacks here")
