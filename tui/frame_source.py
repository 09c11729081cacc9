"""Frames from an engine or a recording, read in a thread and handed to a screen as messages.

Knows neither widgets nor what frames mean. The screen may skip frames, the recorder gets all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event, Lock
from typing import Protocol

from textual.message import Message

from runner.client import BuddyrunError, Frame, Recorder, Replay, Running, Watch


@dataclass
class FrameArrived(Message):
    """The latest moment; a newer one takes its place while it waits."""

    frame: Frame

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, FrameArrived)


@dataclass
class FramesEnded(Message):
    """No frame follows, for this reason."""

    reason: str


class FrameSource(Protocol):
    """Where frames come from; `close` ends `frames`, from another thread too."""

    @property
    def ending(self) -> str:
        """Why it ended, in words."""
        ...

    def frames(self) -> Iterator[Frame]: ...

    def close(self) -> None: ...


class EngineSource:
    """The frames of a running engine."""

    def __init__(self, running: Running) -> None:
        self._pid = running.pid
        self._watch: Watch | None = None
        self._is_closed = Event()

    @property
    def ending(self) -> str:
        return f"the engine's process {self._pid} is gone"

    def frames(self) -> Iterator[Frame]:
        """Raises OptionError when the engine cannot be reached."""
        self._watch = Watch(self._pid)
        if not self._is_closed.is_set():
            yield from self._watch.frames()

    def close(self) -> None:
        self._is_closed.set()
        if self._watch is not None:
            self._watch.close()


class ReplaySource:
    """The frames of a recording, which can be held."""

    def __init__(self, replay: Replay) -> None:
        self._replay = replay
        self._is_closed, self._may_go_on = Event(), Event()
        self._may_go_on.set()

    @property
    def ending(self) -> str:
        return "the recording is over; space plays it again"

    @property
    def is_held(self) -> bool:
        return not self._may_go_on.is_set()

    def hold(self, is_held: bool) -> None:
        """Stop between two frames, or go on."""
        if is_held:
            self._may_go_on.clear()
        else:
            self._may_go_on.set()

    def frames(self) -> Iterator[Frame]:
        """Raises OptionError for a file that is no recording."""
        for frame in self._replay.frames(sleep=self._sleep):
            if self._is_closed.is_set():
                return
            yield frame

    def close(self) -> None:
        self._is_closed.set()
        self._may_go_on.set()

    def _sleep(self, seconds: float) -> None:
        self._is_closed.wait(seconds)
        self._may_go_on.wait()


class OneAtATime:
    """A recorder for one source after the other: what an earlier one still reads is not kept."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._source: FrameSource | None = None
        self._writing = Lock()

    def begin(self, source: FrameSource) -> None:
        """From now on only this one's frames are kept."""
        self._source = source

    def write(self, source: FrameSource, frame: Frame) -> None:
        """Keep a frame of this source. Raises OptionError when the disk refuses."""
        with self._writing:
            if source is self._source:
                self._recorder.write(frame)


def read_frames(
    source: FrameSource, recorder: OneAtATime | None, post: Callable[[Message], object]
) -> None:
    """Post what comes until nothing does: the work of a thread."""
    try:
        for frame in source.frames():
            if recorder is not None:
                recorder.write(source, frame)
            post(FrameArrived(frame))
    except BuddyrunError as error:
        post(FramesEnded(str(error)))
    else:
        post(FramesEnded(source.ending))
    finally:
        source.close()
