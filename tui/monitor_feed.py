"""Asks an engine for its frames, five times a second, in a thread of its own. Knows no widget."""

import threading
from collections.abc import Callable
from typing import Protocol

from runner.client import BuddyrunError, Frame

PERIOD_S = 0.2


class FrameSource(Protocol):
    """An engine; `frame` may block for a moment."""

    def frame(self) -> Frame:
        """What it does now. Raises BuddyrunError when it is gone."""
        ...


class MonitorFeed:
    """Hands over every frame, and once why there is none. Both calls come from the thread."""

    def __init__(
        self,
        source: FrameSource,
        on_frame: Callable[[Frame], object],
        on_end: Callable[[str], object],
    ) -> None:
        self._source = source
        self._on_frame = on_frame
        self._on_end = on_end
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more. The thread ends by itself: an engine that is stuck is not waited for."""
        self._stopped.set()

    def _run(self) -> None:
        ended = ""
        while not self._stopped.wait(PERIOD_S):
            try:
                frame = self._source.frame()
            except BuddyrunError as error:
                if str(error) != ended and not self._stopped.is_set():
                    ended = str(error)
                    self._on_end(ended)
            else:
                ended = ""
                if not self._stopped.is_set():
                    self._on_frame(frame)
