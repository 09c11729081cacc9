"""Signals on systems that have fewer of them."""

import importlib.util
import signal

import pytest

from tui import terminal_state


def test_a_system_without_signals_of_terminals_can_load_the_screens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("SIGHUP", "SIGTSTP", "SIGCONT", "SIGWINCH", "SIGTTIN", "SIGTTOU"):
        monkeypatch.delattr(signal, name)
    spec = importlib.util.spec_from_file_location("copy", terminal_state.__file__)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    assert copy.LEAVING == (signal.SIGTERM, signal.SIGINT)
    with copy.signals_as_before():
        pass
