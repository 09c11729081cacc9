"""One line at the bottom of a terminal that is written over and then removed. Knows no engine."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

_BAR_CELLS = 24
_MIN_INTERVAL_S = 0.05


class StatusLine:
    """Shows what goes on, only on a terminal; plain characters, so any terminal will do."""

    def __init__(self, stream: TextIO, is_shown: bool | None = None) -> None:
        self._stream = stream
        self._is_shown = stream.isatty() if is_shown is None else is_shown
        self._n_shown = 0
        self._last_s = 0.0

    def show(self, text: str) -> None:
        """Put `text` in the line; skipped when the last one is only just there."""
        now_s = time.monotonic()
        if not self._is_shown or (self._n_shown and now_s - self._last_s < _MIN_INTERVAL_S):
            return
        self._last_s = now_s
        self._write(text[: _columns(self._stream) - 1])

    def show_progress(self, label: str, done: int, total: int) -> None:
        """Put a bar in the line."""
        share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
        n_full = round(share * _BAR_CELLS)
        bar = "#" * n_full + "-" * (_BAR_CELLS - n_full)
        self.show(f"{label} [{bar}] {share:4.0%}")

    @contextmanager
    def shown_after(self, seconds: float, text: str) -> Iterator[None]:
        """Show `text` while the block runs, if that takes longer than `seconds`. The block leaves
        the line alone, since a timer's thread writes it."""
        timer = threading.Timer(seconds, self.show, [text])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            self.clear()

    def clear(self) -> None:
        """Remove the line."""
        if self._n_shown:
            self._write("")
            self._stream.write("\r")
            self._stream.flush()
            self._n_shown = 0

    def _write(self, text: str) -> None:
        self._stream.write("\r" + text.ljust(self._n_shown))
        self._stream.flush()
        self._n_shown = len(text)


def _columns(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
