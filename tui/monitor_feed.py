"""Asks an engine for its frames, in a thread of its own, while somebody sees them. Knows no widget.

Five times a second, but less often where reading a frame takes long, as of a large model: the
screen's thread needs the interpreter too.
"""

import threading
import time
from collections.abc import Callable
from typing import Protocol

from runner.client import BuddyrunError, Frame

PERIOD_S = 0.2
_SHARE = 25  # at most one part in so many of the thread's time is work


class FrameSource(Protocol):
    """An engine; `frame` may block for a moment."""

    def frame(self) -> Frame:
        """What it does now. Raises BuddyrunError when it is gone."""
        ...


class MonitorFeed:
    """Hands over every frame, and once why there is none. All three are called in the thread."""

    def __init__(
        self,
        source: FrameSource,
        on_frame: Callable[[Frame], object],
        on_end: Callable[[str], object],
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self._source = source
        self._on_frame = on_frame
        self._on_end = on_end
        self._is_wanted = is_wanted
        self._ended = ""  # the reason that was handed over last
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="frames", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def stop(self) -> None:
        """Ask no more. The thread ends by itself: an engine that is stuck is not waited for."""
        self._stopped.set()

    def _run(self) -> None:
        wait_s = PERIOD_S
        while not self._stopped.wait(wait_s):
            wait_s = PERIOD_S
            if self._is_wanted():
                began_s = time.thread_time()
                self._ask()
                wait_s = max(wait_s, _SHARE * (time.thread_time() - began_s))

    def _ask(self) -> None:
        try:
            frame = self._source.frame()
        except BuddyrunError as error:
            if str(error) != self._ended and not self._stopped.is_set():
                self._ended = str(error)
                self._on_end(self._ended)
        else:
            self._ended = ""
            if not self._stopped.is_set():
                self._on_frame(frame)
