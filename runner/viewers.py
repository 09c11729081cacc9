"""Sends frames to whoever watches this engine; nothing that a viewer says is listened to.

One thread. A frame is made once for all viewers, at most five times a second, and not so often that
it would take a noticeable part of the engine's time; without viewers none is made.
"""

import contextlib
import select
import socket
import time
import traceback
from collections.abc import Callable
from functools import partial

from runner.frames import Frame, frame_line, model_line

FRAMES_PER_S = 5.0
MAX_COST = 0.008  # of a core's time
_NO_ROOM_S = 0.1
_PATIENCE_S = 10.0  # a viewer that takes nothing for so long is left


class Viewer:
    """One connection, and what it has not taken yet."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.model: object = self  # what it was told; at first nothing
        self.pending = memoryview(b"")
        self._moved_s = time.monotonic()

    @property
    def is_behind(self) -> bool:
        """Whether it has still to take something."""
        return len(self.pending) > 0

    def give(self, data: bytes) -> None:
        """Send what comes next. Raises OSError when it is gone."""
        self.pending = memoryview(data)
        self._moved_s = time.monotonic()
        self.push()

    def push(self) -> None:
        """Send what it will take. Raises OSError when it is gone or takes nothing for long."""
        with contextlib.suppress(BlockingIOError):
            n_sent = self.connection.send(self.pending)
            self.pending = self.pending[n_sent:]
            self._moved_s = time.monotonic()
        if self.is_behind and time.monotonic() - self._moved_s > _PATIENCE_S:
            raise TimeoutError

    def check_presence(self) -> None:
        """Throw away what it said. Raises OSError when it is gone."""
        with contextlib.suppress(BlockingIOError):
            if not self.connection.recv(4096):
                raise ConnectionResetError


class Viewers:
    """Serves all viewers of one engine."""

    def __init__(self, listener: socket.socket, frame: Callable[[], Frame]) -> None:
        """listener: does not block; frame: makes one, from this thread."""
        self._listener = listener
        self._frame = frame
        self._viewers: list[Viewer] = []
        self._due_s = 0.0  # when the next frame is
        self._told: tuple[object, bytes] = (self, b"")  # the latest model and its line
        self._line = b""  # of the latest frame

    def run(self) -> None:
        """Serve until the process ends."""
        try:
            while True:
                self.serve(self._due_s - time.monotonic() if self._viewers else None)
        except Exception:  # the edge of a thread: the run goes on, and who watches is told
            traceback.print_exc()
            self.close()

    def close(self) -> None:
        """Serve nobody any more."""
        self._listener.close()
        for viewer in self._viewers:
            viewer.connection.close()

    def serve(self, timeout_s: float | None) -> None:
        """Wait at most so long for somebody; then send the frame that is due."""
        calls = [self._listener, *(viewer.connection for viewer in self._viewers)]
        behind = [viewer.connection for viewer in self._viewers if viewer.is_behind]
        timeout_s = None if timeout_s is None else max(0.0, timeout_s)
        readable, writable, _ = select.select(calls, behind, [], timeout_s)
        for viewer in list(self._viewers):
            if viewer.connection in readable:
                self._try(viewer, viewer.check_presence)
            if viewer.connection in writable:
                self._try(viewer, viewer.push)
        if self._listener in readable:
            self._accept()
        if self._viewers and time.monotonic() >= self._due_s:
            self._send_frame()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:  # it left before
            return
        except OSError:  # too many open files; who waits is still there a moment later
            time.sleep(_NO_ROOM_S)
            return
        viewer = Viewer(connection)
        self._viewers.append(viewer)
        if time.monotonic() < self._due_s:  # else it gets a new one
            viewer.model = self._told[0]
            self._try(viewer, partial(viewer.give, self._told[1] + self._line))

    def _send_frame(self) -> None:
        began_s, spent_s = time.monotonic(), time.thread_time()
        frame = self._frame()
        if frame.model is not self._told[0]:
            self._told = frame.model, model_line(frame).encode() + b"\n"
        self._line = line = frame_line(frame).encode() + b"\n"
        for viewer in list(self._viewers):
            if viewer.is_behind:  # it gets a later one
                self._try(viewer, viewer.push)
                continue
            news = b"" if viewer.model is frame.model else self._told[1]
            viewer.model = frame.model
            self._try(viewer, partial(viewer.give, news + line))
        cost_s = time.thread_time() - spent_s
        self._due_s = began_s + max(1 / FRAMES_PER_S, cost_s / MAX_COST)

    def _try(self, viewer: Viewer, send: Callable[[], object]) -> None:
        if viewer not in self._viewers:
            return
        try:
            send()
        except OSError:
            self._viewers.remove(viewer)
            viewer.connection.close()
