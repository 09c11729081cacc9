"""A real terminal for tests: one tmux pane with a shell that runs one command."""

import os
import shlex
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parent.parent.parent
_PATIENCE_S = 20.0


class Pane:
    """Runs `command` in a terminal of 100 x 40, between two looks at the terminal's settings."""

    def __init__(self, command: list[str], folder: Path, **environment: str) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="tmux-")  # sockets need short paths
        self._folder = folder
        settings = {"BUDDYRUN_HISTORY": str(folder / "history"), "PYTHONPATH": str(ROOT)}
        words = ["env", *(f"{k}={v}" for k, v in {**settings, **environment}.items()), *command]
        script = (
            f"cd {shlex.quote(str(ROOT))}; stty -g > {folder}/before; {shlex.join(words)};"
            f' echo "status=$?"; stty -g > {folder}/after; echo all-done; exec sleep 60'
        )
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "40", script)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tmux("kill-server")
        self._home.cleanup()

    @property
    def pid(self) -> int:
        """The process id of the pane's shell."""
        return int(self._tmux("list-panes", "-F", "#{pane_pid}"))

    @property
    def title(self) -> str:
        return self._tmux("display-message", "-p", "#{pane_title}")

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names: Enter, C-c, M-Enter, Up, Tab."""
        self._tmux("send-keys", *keys)

    def type(self, text: str, *keys: str) -> None:
        """Type text letter by letter, then press keys."""
        self._tmux("send-keys", "-l", text)
        if keys:
            self.press(*keys)

    def paste(self, text: str) -> None:
        """Paste as a terminal does that knows bracketed paste."""
        self._tmux("set-buffer", text)
        self._tmux("paste-buffer", "-p", "-r")

    def screen(self, with_styles: bool = False) -> str:
        """Everything on the screen and above it."""
        styles = ["-e"] if with_styles else []
        return self._tmux("capture-pane", "-p", "-J", "-S", "-500", *styles)

    def wait_for(self, text: str, n_times: int = 1) -> str:
        """The screen once it shows `text` so often; fails after a while."""
        deadline = time.monotonic() + _PATIENCE_S
        while (screen := self.screen()).count(text) < n_times:
            assert time.monotonic() < deadline, f"no {text!r} in:\n{screen}"
            threading.Event().wait(0.03)
        return screen

    def wait_for_prompt(self, n_times: int) -> str:
        """The screen once the n-th prompt is there, ready for keys."""
        return self.wait_for(">>>", n_times)

    def wait_for_end(self) -> str:
        """The command's exit status, once the terminal's settings are checked to be as before."""
        screen = self.wait_for("all-done")
        before, after = ((self._folder / name).read_text() for name in ("before", "after"))
        assert before == after
        return screen.partition("status=")[2].partition("\n")[0].strip()

    def _tmux(self, *arguments: str) -> str:
        environment = {**os.environ, "TERM": "screen-256color", "LC_ALL": "C.UTF-8"}
        environment.pop("TMUX", None)
        done = subprocess.run(
            ["tmux", "-S", f"{self._home.name}/s", *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            env=environment,
            check=True,
        )
        return done.stdout
