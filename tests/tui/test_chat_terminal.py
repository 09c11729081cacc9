"""The chat screen in a real terminal: keys, text, and how the terminal is left."""

import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.runner.tmux import Pane

pytestmark = [pytest.mark.terminal, pytest.mark.slow]

FLAGS = (
    "#{alternate_on} #{cursor_flag} #{mouse_any_flag} #{mouse_all_flag} #{mouse_standard_flag}"
    " #{mouse_sgr_flag} #{wrap_flag} #{insert_flag} #{keypad_flag} #{keypad_cursor_flag}"
    " #{scroll_region_upper} #{origin_flag}"
)
CHAT = [sys.executable, "-m", "tests.tui.run_chat"]
READY = "A message, or /? for help"


def flags(pane: Pane) -> str:
    """The modes of the terminal, as tmux knows them."""
    return pane._tmux("display-message", "-p", FLAGS)


@contextmanager
def chat(folder: Path, *arguments: str, **environment: str) -> Iterator[Pane]:
    """A chat screen in a terminal, ready for a message; all is as before after its end."""
    command = [*CHAT, *(arguments or ("demo", "--tui", "-t", "1", "-s", "7"))]
    with Pane(command, folder, TERM="screen-256color", **environment) as pane:
        pane.wait_for(READY)
        yield pane
        pane.wait_for("all-done")
        assert flags(pane) == "0 1 0 0 0 0 1 0 0 0 0 0\n"


@contextmanager
def scripted(folder: Path) -> Iterator[Pane]:
    """The same with the scripted engine."""
    model = folder / "model.gguf"
    model.touch()
    with chat(folder, str(model), "--tui", SCRIPTED="1") as pane:
        yield pane


def processes(pane: Pane) -> list[psutil.Process]:
    """Python's processes in the pane, the chat first, then its engine."""
    every = psutil.Process(pane.pid).children(recursive=True)
    return [each for each in every if "python" in each.name()]


def test_a_chat_from_a_message_to_control_d_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    with chat(tmp_path) as pane:
        assert flags(pane).startswith("1 ")
        pane.type("Tell me a story about a fox and a lamp.", "Enter")
        screen = pane.wait_for("Generation:")
        assert "❯ Tell me a story" in screen
        pane.press("C-d")
        assert pane.wait_for_end() == "0"


def test_alt_enter_control_j_and_pasted_lines_make_one_message(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.type("one")
        pane.press("M-Enter")
        pane.type("two")
        pane.press("C-j")
        pane.paste("three\nfour")
        pane.press("Enter")
        pane.wait_for("You said 'one\\ntwo\\nthree\\nfour'")
        pane.type("/bye", "Enter")
        assert pane.wait_for_end() == "0"


@pytest.mark.parametrize("kind", ("escapes", "markup", "bidi", "one line", "marks"))
def test_hostile_text_does_nothing_to_the_terminal(kind: str, tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.type(kind, "Enter")
        pane.wait_for("Generation:")
        assert pane.title != "owned"
        assert flags(pane).startswith("1 ")
        pane.type("hello", "Enter")
        pane.wait_for("You said 'hello'")
        pane.press("C-d")
        assert pane.wait_for_end() == "0"


def test_a_key_is_answered_while_a_text_comes_as_fast_as_it_can(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.type("flood", "Enter")
        pane.wait_for("0123456789" * 4)
        pane.type("typed")
        pane.wait_for("typed")
        pane.press("Escape")
        pane.wait_for("Generation:")
        pane.press("C-c", "C-d")
        assert pane.wait_for_end() == "0"


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP, signal.SIGINT))
def test_a_signal_leaves_the_terminal_as_it_was(number: signal.Signals, tmp_path: Path) -> None:
    with chat(tmp_path) as pane:
        pane.type("Tell me a story.", "Enter")
        screen, *_ = processes(pane)
        screen.send_signal(number)
        assert pane.wait_for_end() == str(128 + number)


def test_an_engine_that_is_killed_is_started_again(tmp_path: Path) -> None:
    with chat(tmp_path) as pane:
        _, engine = processes(pane)
        engine.kill()
        pane.type("Tell me a story.", "Enter")
        pane.wait_for("The engine was killed")
        pane.wait_for("Restarted; your conversation is kept.")
        pane.type("/regen", "Enter")
        pane.wait_for("Generation:")
        pane.type("/bye", "Enter")
        assert pane.wait_for_end() == "0"


def test_an_internal_error_is_told_after_the_screen_is_closed(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.touch()
    with chat(tmp_path, str(model), "--tui", SCRIPTED="1", BREAK="1") as pane:
        pane.type("hello", "Enter")
        assert pane.wait_for_end() == "1"
        assert "internal error: KeyError: 'a bug'" in pane.screen()
        assert "Traceback" not in pane.screen()


def test_a_small_terminal_and_back(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane._tmux("resize-window", "-x", "20", "-y", "5")
        pane.type("hello", "Enter")
        pane.press("F2", "F2")
        pane._tmux("resize-window", "-x", "100", "-y", "40")
        pane.wait_for("You said 'hello'")
        pane.press("C-d")
        assert pane.wait_for_end() == "0"


def test_control_z_without_a_shell_is_only_told(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.press("C-z")
        pane.wait_for("There is no shell to go back to.")
        pane.press("C-d")
        assert pane.wait_for_end() == "0"


def test_control_z_goes_to_the_shell_and_fg_comes_back(tmp_path: Path) -> None:
    with Pane(["bash", "--norc", "-i"], tmp_path, TERM="screen-256color", PS1="shell> ") as pane:
        pane.wait_for("shell> ")
        before = flags(pane)
        pane.type(" ".join([*CHAT, "demo", "--tui", "-t", "1"]), "Enter")
        pane.wait_for(READY)
        engine = processes(pane)[-1]
        pane.press("C-z")
        pane.wait_for("Stopped")
        assert flags(pane) == before
        _until(lambda: engine.status() == psutil.STATUS_STOPPED)
        pane.type("stty -a | grep -c ' icanon'", "Enter")
        pane.wait_for("\n1\n")
        pane.type("fg", "Enter")
        pane.wait_for(READY)
        pane.type("Tell me a story.", "Enter")
        pane.wait_for("Generation:")
        pane.press("C-d")
        pane.wait_for("shell> ", 2)
        assert flags(pane) == before
        pane.type("exit", "Enter")
        pane.wait_for_end()


def test_a_terminal_that_goes_away_takes_the_chat_with_it(tmp_path: Path) -> None:
    with Pane([*CHAT, "demo", "--tui", "-t", "1"], tmp_path, TERM="screen-256color") as pane:
        pane.wait_for(READY)
        pane.type("Tell me a story.", "Enter")
        every = processes(pane)
        assert len(every) == 2
        pane._tmux("new-window", "-d", "sleep 60")
        pane._tmux("kill-pane")
        _until(lambda: not any(each.is_running() for each in every))


def _until(is_so: Callable[[], object]) -> None:
    until_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < until_s
        time.sleep(0.02)
