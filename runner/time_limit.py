"""Ends Python code that runs too long. Knows nothing about what the code does."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class TimeLimitError(BaseException):
    """The code under a `time_limit` ran longer than it may.

    No `Exception`, so that the code's own `except Exception` does not swallow it.
    """


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeLimitError inside the block once it has run for `seconds`.

    In the main thread, where the system has interval timers, a signal ends long single operations
    too (`9**9**9`). Elsewhere a trace function looks at the clock on every line of Python, which
    ends loops but not one long call into C.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    limit = _by_signal if hasattr(signal, "setitimer") and in_main_thread else _by_tracing
    with limit(seconds):
        yield


@contextmanager
def _by_signal(seconds: float) -> Iterator[None]:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise TimeLimitError(f"over {seconds:g} s")

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


@contextmanager
def _by_tracing(seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + seconds

    def look(_frame: FrameType, _event: str, _argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise TimeLimitError(f"over {seconds:g} s")
        return look

    previous = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(previous)
