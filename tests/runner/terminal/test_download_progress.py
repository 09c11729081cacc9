"""Bars are drawn where somebody looks on."""

import io
import sys

import pytest

from runner.hub.repo_files import RepoFile
from runner.terminal.download_progress import ProgressWatcher, watching


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [False, True])
def test_bars_are_drawn_when_stderr_is_a_terminal_whatever_stdout_is(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Screen() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "stderr", stream)
    file = RepoFile("a\nb-Q8_0.gguf", 10)
    with watching((file,), 10) as watcher:
        watcher.begin(file, 0)
        watcher.add(10)
        watcher.end()
        assert isinstance(watcher, ProgressWatcher) == is_terminal
    assert ("b-Q8_0.gguf" in stream.getvalue()) == is_terminal
