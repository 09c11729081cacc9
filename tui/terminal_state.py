"""A screen and the signals of its process: it leaves in order, or stops for a while. No widget."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from textual import _ansi_sequences
from textual.keys import Keys


def _known(*names: str) -> tuple[signal.Signals, ...]:
    """Those of these signals that this system has."""
    return tuple(getattr(signal, name) for name in names if hasattr(signal, name))


LEAVING = _known("SIGTERM", "SIGHUP", "SIGINT")
_CHANGED = (*LEAVING, *_known("SIGTSTP", "SIGCONT", "SIGWINCH", "SIGTTIN", "SIGTTOU"))
_PATIENCE_S = 5.0


@contextmanager
def signals_as_before() -> Iterator[None]:
    """What handles signals is the same after the block; Textual leaves its own handlers."""
    before = {number: signal.getsignal(number) for number in _CHANGED}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def leave_for_sure(number: int) -> None:
    """End the process in a while if it has not ended by then: a terminal that is gone blocks
    whoever writes to it."""
    timer = threading.Timer(_PATIENCE_S, os._exit, [128 + number])
    timer.daemon = True
    timer.start()


def stop_process_group(before: Callable[[], None]) -> bool:
    """Stop this process and those it was started with, as Ctrl-Z does; `before` is called first.
    False, and nothing done, when no shell would let them go on."""
    if not _has_shell():
        return False
    before()
    os.killpg(os.getpgrp(), signal.SIGTSTP)
    return True


def _has_shell() -> bool:
    """Whether some parent is of the same session, but not of the same process group."""
    pid = os.getppid()
    try:
        while pid > 1 and os.getsid(pid) == os.getsid(0):
            if os.getpgid(pid) != os.getpgrp():
                return True
            status = Path(f"/proc/{pid}/stat").read_text()
            pid = int(status.rpartition(")")[2].split()[1])
    except OSError:
        pass
    return False


def know_alt_enter() -> None:
    """Most terminals send ESC CR for Alt-Enter, which is a plain Enter to Textual."""
    sequences = _ansi_sequences.ANSI_SEQUENCES_KEYS
    assert isinstance(sequences, dict)
    sequences["\x1b\r"] = (Keys.ControlJ,)
