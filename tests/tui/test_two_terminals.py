"""A chat in one real terminal and `buddyrun top` in another, both read as a person does."""

import os
import signal
import sys
from pathlib import Path

import pytest

from runner.watch import running
from tests.runner.tmux import Pane
from tests.tui.test_chat_terminal import flags

pytestmark = [pytest.mark.terminal, pytest.mark.slow]

BUDDYRUN = [sys.executable, "-m", "tui"]
CHAT = [*BUDDYRUN, "demo", "-t", "1", "-s", "7", "--moe-cache-slots", "4", "--ignore-eos"]


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A folder for each terminal, and one for the sockets of both."""
    places = {name: tmp_path / name for name in ("chat", "top", "sockets")}
    for place in places.values():
        place.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(places["sockets"]))
    return places


def pane(command: list[str], places: dict[str, Path], name: str) -> Pane:
    return Pane(
        command, places[name], TERM="screen-256color", XDG_RUNTIME_DIR=str(places["sockets"])
    )


def test_a_chat_is_watched_from_another_terminal_to_its_end(places: dict[str, Path]) -> None:
    with pane([*CHAT, "-n", "400"], places, "chat") as chat:
        chat.wait_for_prompt(1)
        with pane([*BUDDYRUN, "top"], places, "top") as top:
            top.wait_for("waits for a message")
            chat.type("Tell me a story about a fox.", "Enter")
            top.wait_for("generating")
            screen = top.wait_for("tokens/s")
            assert "Buddy Demo 29M MoE" in screen and "8 layers x 8 experts" in screen
            top.press("4")
            top.wait_for("stood in")
            top.press("e")
            top.wait_for("only watched")
            assert "Tell me a story" in chat.wait_for("stopped at -n")
            chat.type("/bye", "Enter")
            assert chat.wait_for_end() == "0"
            top.wait_for("ended")
            top.press("q")
            assert top.wait_for_end() == "0"
            assert flags(top) == "0 1 0 0 0 0 1 0 0 0 0 0\n"


def test_a_killed_engine_is_told_by_the_monitor_and_started_again_by_the_chat(
    places: dict[str, Path],
) -> None:
    with pane([*CHAT, "-n", "5"], places, "chat") as chat:
        chat.wait_for_prompt(1)
        with pane([*BUDDYRUN, "top"], places, "top") as top:
            top.wait_for("waits for a message")
            (found,) = running()
            os.kill(found.pid, signal.SIGKILL)
            top.wait_for("ended")
            chat.type("Hello", "Enter")
            chat.wait_for("Restarted; your conversation is kept")
            top.press("l")
            top.wait_for("Buddy Demo 29M MoE")
            top.press("q")
            assert top.wait_for_end() == "0"
        chat.type("/bye", "Enter")
        chat.wait_for_end()


def test_a_terminal_shows_one_text_and_a_list(places: dict[str, Path]) -> None:
    with pane([*CHAT, "-n", "5"], places, "chat") as chat:
        chat.wait_for_prompt(1)
        for command, words in ((["top", "--once"], "slots       4 of 8"), (["ps"], "32/64")):
            with pane([*BUDDYRUN, *command], places, "top") as shell:
                assert words in shell.wait_for("all-done")
