"""What Ctrl-C means while an answer is being made. Knows neither chat nor engine."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class SecondInterrupt(KeyboardInterrupt):
    """Ctrl-C came again before the first one had taken effect: leave at once."""


@contextmanager
def first_interrupt_calls(action: Callable[[], None]) -> Iterator[None]:
    """Inside, the first Ctrl-C calls `action` and goes on; the second raises SecondInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    n_interrupts = 0

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal n_interrupts
        n_interrupts += 1
        if n_interrupts > 1:
            raise SecondInterrupt
        action()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
