"""`buddyrun top` in a real terminal, watching a real engine, and what it leaves behind."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.watch import Running, Watch, running
from tests.runner.tmux import Pane

TOP = [sys.executable, "-m", "tui", "top"]
RECORDING = Path(__file__).parent.parent / "data" / "demo-run.jsonl"
STORY = "Tell me a story about a fox and a lamp."

pytestmark = [
    pytest.mark.terminal,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A demo engine that generates until it is stopped."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    flags = ["--moe-cache-slots", "4", "--context-shift", "--ignore-eos", "-n", "1000000"]
    command = [sys.executable, "-m", "tui", "demo", "-t", "1", *flags, "-p", STORY]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet) as process:  # type: ignore[call-overload]
        try:
            yield generating_engine(process)
        finally:
            process.kill()


def generating_engine(process: "subprocess.Popen[bytes]") -> Running:
    while not (found := running()):
        assert process.poll() is None, "the engine ended"
    with Watch(found[0].pid) as watch:
        for frame in watch.frames():
            if frame.phase == "generating":
                return Running(frame)
    raise AssertionError("the engine never generated")


def test_a_real_engine_is_watched_until_it_is_killed(engine: Running, tmp_path: Path) -> None:
    with Pane(TOP, tmp_path, XDG_RUNTIME_DIR=str(tmp_path)) as pane:
        pane.wait_for("Buddy Demo 29M MoE")
        pane.wait_for("generating")
        pane.type("4")
        pane.wait_for("stood in")
        pane.press("Down", "Right")
        pane.wait_for("Layer 1, expert 1:")
        pane.type("e")
        pane.wait_for("This buddyrun is only watched")
        os.kill(engine.pid, signal.SIGKILL)
        screen = pane.wait_for("ended: the engine's process")
        assert "Buddy Demo 29M MoE" in screen and "blend" in screen
        pane.type("q")
        pane.wait_for_end()


def test_a_recording_is_played_in_a_window_that_shrinks(tmp_path: Path) -> None:
    with Pane([*TOP, "--replay", str(RECORDING), "--ascii"], tmp_path) as pane:
        pane.wait_for("Buddy Demo 29M MoE")
        pane._tmux("resize-window", "-x", "20", "-y", "5")
        pane.wait_for("Too small: the")
        pane._tmux("resize-window", "-x", "80", "-y", "24")
        screen = pane.wait_for("hit rate")
        assert screen.isascii()
        pane.wait_for("ended: the recording is over")
        pane.type("q")
        pane.wait_for_end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminal_is_left_as_it_was_by_a_signal(number: int, tmp_path: Path) -> None:
    with Pane([*TOP, "--replay", str(RECORDING)], tmp_path) as pane:
        pane.wait_for("Buddy Demo 29M MoE")
        children = Path(f"/proc/{pane.pid}/task/{pane.pid}/children").read_text().split()
        os.kill(int(children[0]), number)
        pane.wait_for_end()


def test_ctrl_z_gives_the_terminal_back_and_fg_goes_on(tmp_path: Path) -> None:
    with Pane(["bash", "--norc", "-i"], tmp_path, PS1="your turn> ") as pane:
        pane.type(" ".join([*TOP, "--replay", str(RECORDING)]), "Enter")
        pane.wait_for("Buddy Demo 29M MoE")
        pane.press("C-z")
        pane.wait_for("Stopped")
        pane.type("fg", "Enter")
        pane.wait_for("hit rate")
        pane.type("q")
        pane.wait_for("your turn>", 3)  # at first, when it was stopped, and now
        pane.type("exit", "Enter")
        pane.wait_for_end()
