"""Frames in a file: written as they come, played again as they came. Knows no engine."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from runner.errors import OptionError
from runner.frames import MAX_LINE_BYTES, Frame, FrameReader, FrameWriter

_LONGEST_PAUSE_S = 2.0  # a recording of an engine that waited for a person is not waited for


class Recorder:
    """Appends frames to a new file. What is in it can be played when the program was killed."""

    def __init__(self, path: str | Path) -> None:
        """Raises OptionError when the file exists or cannot be made."""
        try:
            self._file: IO[str] = open(path, "x", encoding="utf-8")  # noqa: SIM115
        except FileExistsError as error:
            raise OptionError(f"{path} exists already; recordings do not overwrite") from error
        except OSError as error:
            raise OptionError(f"cannot record to {path}: {error.strerror}") from error
        self._writer = FrameWriter()
        self._last: Frame | None = None
        self.path = Path(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def write(self, frame: Frame) -> None:
        """Append a frame, unless nothing has happened since the one before. Raises OptionError
        when the disk refuses."""
        timeless = _without_clocks(frame)
        if timeless == self._last:
            return
        self._last = timeless
        try:
            for line in self._writer.lines(frame):
                self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise OptionError(f"cannot record to {self.path}: {error.strerror}") from error

    def close(self) -> None:
        """End the file. Can be called twice."""
        self._file.close()


def _without_clocks(frame: Frame) -> Frame:
    """What changes by itself is left out."""
    stats = replace(frame.stats, uptime_s=0.0) if frame.stats is not None else None
    return replace(frame, time_s=0.0, memory_bytes=0, stats=stats)


class Replay:
    """The frames of a recording."""

    def __init__(self, path: str | Path) -> None:
        """Raises OptionError when the file cannot be read."""
        self.path = Path(path)
        if not os.access(path, os.R_OK) or self.path.is_dir():
            raise OptionError(f"cannot read the recording {path}")

    def frames(self, sleep: Callable[[float], object] = time.sleep) -> Iterator[Frame]:
        """All frames, each as long after the one before as when they were recorded, but not much
        longer than a moment. Raises OptionError for a file that is no recording."""
        before_s: float | None = None
        for frame in self.all():
            if before_s is not None:
                sleep(min(max(0.0, frame.time_s - before_s), _LONGEST_PAUSE_S))
            before_s = frame.time_s
            yield frame

    def all(self) -> Iterator[Frame]:
        """All frames at once; a last line that is cut, as by a kill, ends them.

        Raises OptionError for a file that is no recording.
        """
        reader = FrameReader()
        try:
            with self.path.open("rb") as file:
                while line := file.readline(MAX_LINE_BYTES):
                    if not line.endswith(b"\n"):
                        return
                    frame = reader.read(line)
                    if frame is not None:
                        yield frame
        except OSError as error:
            raise OptionError(f"cannot read {self.path}: {error.strerror}") from error
