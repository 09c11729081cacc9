"""A picture of what a person sees: a chat and its monitor in a real terminal, as SVG.

python -m tests.tui.terminal_picture FILE.svg [COLUMNS ROWS]
"""

import subprocess
import sys
import tempfile
import time
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.paths import ROOT

FLAGS = [
    "--tui",
    "--moe-cache-slots",
    "4",
    "-t",
    "1",
    "-s",
    "3",
    "-n",
    "400",
    "--verify-every",
    "9",
]
MESSAGE = "Tell me a story about a fox and a lamp."


def main() -> None:
    path = Path(sys.argv[1])
    columns, rows = (int(word) for word in sys.argv[2:4]) if len(sys.argv) > 3 else (140, 44)
    console = Console(width=columns, record=True, file=StringIO(), force_terminal=True)
    console.print(Text.from_ansi(screen(columns, rows)), end="")
    path.write_text(console.export_svg(title="buddyrun"))
    print(f"{path}: {path.stat().st_size} bytes")


def screen(columns: int, rows: int) -> str:
    """What the terminal shows while an answer is being made, with its colours."""
    with tempfile.TemporaryDirectory(prefix="tmux-") as home:
        command = [sys.executable, "-m", "tui", "demo", *FLAGS]
        environment = ["env", "TERM=xterm-256color", "COLORTERM=truecolor", "BUDDYRUN_HISTORY="]

        def tmux(*arguments: str) -> str:
            done = subprocess.run(
                ["tmux", "-S", f"{home}/s", *arguments],
                capture_output=True, text=True, encoding="utf-8", check=True, cwd=ROOT,
            )  # fmt: skip
            return done.stdout

        size = ("-x", str(columns), "-y", str(rows))
        tmux("-f", "/dev/null", "new-session", "-d", *size, *environment, *command)
        try:
            wait_for(tmux, "A message")
            for message in (MESSAGE, "Tell me a story about a bear."):
                tmux("send-keys", "-l", message)
                tmux("send-keys", "Enter")
                wait_for(tmux, "answering")
                wait_for(tmux, "A message")
                time.sleep(2)
            return tmux("capture-pane", "-p", "-e", "-N")
        finally:
            tmux("kill-server")


def wait_for(tmux: object, text: str) -> None:
    assert callable(tmux)
    for _ in range(600):
        if text in tmux("capture-pane", "-p"):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no {text!r} on the screen")


if __name__ == "__main__":
    main()
