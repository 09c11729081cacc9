"""A socket where viewers find an engine, served by this process with frames of a test."""

import contextlib
import os
import socket
import threading
from collections.abc import Mapping

from runner.frames import Frame, FrameWriter
from runner.process import meeting_place


class SocketEngine:
    """Sends every viewer the latest frame when it comes, and those that are sent later."""

    def __init__(self, pid: int, first: Frame, environment: Mapping[str, str] = os.environ) -> None:
        self.pid = pid
        self._place = meeting_place.directory(environment)
        self._listener = meeting_place.open_socket(self._place, pid)
        self._listener.setblocking(True)
        self._viewers: list[tuple[socket.socket, FrameWriter]] = []
        self._latest = first
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def send(self, frame: Frame) -> None:
        with self._lock:
            self._latest = frame
            for viewer, writer in self._viewers:
                _send(viewer, writer, frame)

    def end(self) -> None:
        """As when the process is gone."""
        with contextlib.suppress(OSError):  # the second time
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        meeting_place.path_of(self._place, self.pid).unlink(missing_ok=True)
        with self._lock:
            for viewer, _ in self._viewers:
                viewer.close()
            self._viewers.clear()

    def _accept(self) -> None:
        while True:
            try:
                viewer, _ = self._listener.accept()
            except OSError:
                return
            writer = FrameWriter()
            with self._lock:
                self._viewers.append((viewer, writer))
                _send(viewer, writer, self._latest)


def _send(viewer: socket.socket, writer: FrameWriter, frame: Frame) -> None:
    with contextlib.suppress(OSError):  # it went away
        viewer.sendall("".join(line + "\n" for line in writer.lines(frame)).encode())
