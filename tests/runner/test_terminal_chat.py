"""The chat in a real terminal (tmux): keys, interrupts, pasted text, what is left behind."""

import os
import shutil
import signal
import stat
import sys
from pathlib import Path

import psutil
import pytest

from tests.runner.tmux import Pane

pytestmark = [
    pytest.mark.terminal,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed"),
]

SCRIPTED = [sys.executable, "-m", "tests.runner.scripted_client"]
DEMO = [sys.executable, "-m", "runner", "demo"]


def scripted(folder: Path, *arguments: str, **environment: str) -> Pane:
    """A pane with a chat whose engine is scripted."""
    (folder / "model.gguf").touch()
    command = [*SCRIPTED, str(folder / "model.gguf"), *arguments]
    return Pane(command, folder, **environment)


def test_a_chat_from_banner_to_bye_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        banner = pane.wait_for_prompt(1)
        assert "Scripted: llama, 32 layers x 8 experts (top 2), Q8_0, 8.50 GB" in banner
        assert "The context is capped." in banner
        pane.type("hello", "Enter")
        assert "You said 'hello'\n[ Prompt: 41.2 t/s | Generation" in pane.wait_for_prompt(2)
        pane.type("/bye", "Enter")
        assert pane.wait_for_end() == "0"


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("long", "Enter")
        pane.wait_for("word5")
        pane.press("C-c")
        pane.wait_for("| stopped ]")
        pane.wait_for_prompt(2)
        pane.type("hello", "Enter")
        pane.wait_for("You said 'hello'")


def test_ctrl_c_twice_leaves_with_130(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("stuck", "Enter")
        pane.wait_for("stuck", 2)
        pane.press("C-c")
        pane.press("C-c")
        assert pane.wait_for_end() == "130"


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_clears_the_line_or_says_how_to_leave(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("abc")
        pane.wait_for(">>> abc")
        pane.press("C-c")
        pane.type("def", "Enter")
        pane.wait_for("You said 'def'")
        pane.wait_for_prompt(2)
        pane.press("C-c")
        pane.wait_for("Use Ctrl-D or /bye to leave.")
        pane.wait_for_prompt(3)
        pane.press("C-d")
        assert pane.wait_for_end() == "0"


@pytest.mark.slow
def test_an_unknown_command_is_refused(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("/nothing", "Enter")
        assert "You said" not in pane.wait_for("There is no command /nothing.")


def test_escape_sequences_of_a_model_do_not_reach_the_terminal(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        title = pane.title
        pane.wait_for_prompt(1)
        pane.type("evil", "Enter")
        screen = pane.wait_for("␛[2J␛]0;owned␇␛[?1049h<U+202E>evil<U+009B>31m")
        assert "Scripted" in screen
        assert pane.title == title


@pytest.mark.slow
def test_earlier_lines_come_back_also_in_the_next_chat(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("first", "Enter")
        pane.wait_for_prompt(2)
        pane.press("Up", "Enter")
        pane.wait_for("You said 'first'", 2)
        pane.wait_for_prompt(3)
        pane.type("/set nohistory", "Enter")
        pane.wait_for_prompt(4)
        pane.type("secret", "Enter")
        pane.wait_for_prompt(5)
        pane.press("C-d")
        pane.wait_for_end()
    assert stat.S_IMODE((tmp_path / "history").stat().st_mode) == 0o600
    assert "secret" not in (tmp_path / "history").read_text()
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.press("Up", "Up", "Enter")
        pane.wait_for("You said 'first'")


def test_messages_of_several_lines(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type('"""one', "Enter")
        pane.wait_for("\n...")
        pane.type('two"""', "Enter")
        pane.wait_for(r"You said 'one\ntwo'")
        pane.type("three\\", "Enter")
        pane.type("four", "Enter")
        pane.wait_for(r"You said 'three\nfour'")
        pane.type("five", "M-Enter")
        pane.type("six", "Enter")
        pane.wait_for(r"You said 'five\nsix'")


@pytest.mark.slow
def test_pasted_lines_are_one_message_and_keep_their_backslashes(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.paste("make \\\n  all\nmake test")
        pane.wait_for("make test")
        assert "You said" not in pane.screen()
        pane.press("Enter")
        pane.wait_for(r"You said 'make \\\n  all\nmake test'")


def test_tab_completes_commands_and_file_names(tmp_path: Path) -> None:
    (tmp_path / "only one.txt").write_text("text")
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("/cle", "Tab")
        pane.wait_for(">>> /clear")
        pane.press("C-c")
        pane.type(f"/read {tmp_path}/only", "Tab")
        pane.wait_for("only one.txt")
        pane.press("Enter")
        pane.wait_for("4 characters of only one.txt go with the next message.")


@pytest.mark.slow
def test_a_chosen_completion_is_taken_by_enter_and_sent_by_the_next(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("/show ", "Tab")
        pane.wait_for("parameters")
        pane.press("Tab", "Tab")
        pane.wait_for(">>> /show context")
        pane.press("Enter", "Enter")
        pane.wait_for("0 of 8192 tokens are used")
        assert "..." not in pane.screen()


@pytest.mark.slow
def test_tab_after_an_unknown_user_does_no_harm(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("/read ~nouser/", "Tab")
        pane.type("x", "Enter")
        assert "Traceback" not in pane.wait_for("no such home directory: ~nouser/x")


@pytest.mark.slow
def test_a_searched_line_is_taken_by_enter(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("the first line", "Enter")
        pane.wait_for_prompt(2)
        pane.press("C-r")
        pane.wait_for("I-search backward")
        pane.type("irst")
        pane.wait_for(">>> the first line", 2)
        pane.press("Enter")
        pane.type("!", "Enter")
        pane.wait_for("You said 'the f!irst line'")


def test_ctrl_c_leaves_a_search_and_the_chat_goes_on(tmp_path: Path) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("the first line", "Enter")
        pane.wait_for_prompt(2)
        pane.press("C-r")
        pane.wait_for("I-search backward")
        pane.type("irst")
        pane.press("C-c")
        pane.type("/bye", "Enter")
        assert pane.wait_for_end() == "0"


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [(["--simple-io"], {}), pytest.param([], {"TERM": "dumb"}, marks=pytest.mark.slow)],
)
def test_plain_input_works_where_editing_does_not(
    arguments: list[str], environment: dict[str, str], tmp_path: Path
) -> None:
    with scripted(tmp_path, *arguments, **environment) as pane:
        pane.wait_for_prompt(1)
        pane.type('"""one', "Enter")
        pane.wait_for("\n...")
        pane.type('two"""', "Enter")
        pane.wait_for(r"You said 'one\ntwo'")
        pane.wait_for_prompt(2)
        pane.press("C-c")
        pane.wait_for("Use Ctrl-D or /bye to leave.")
        pane.wait_for_prompt(3)
        pane.press("C-d")
        assert pane.wait_for_end() == "0"


@pytest.mark.parametrize(
    ("arguments", "environment", "is_dim"),
    [
        ([], {}, True),
        (["--no-color"], {}, False),
        pytest.param([], {"NO_COLOR": "1"}, False, marks=pytest.mark.slow),
    ],
)
def test_thinking_is_dim_unless_colours_are_off(
    arguments: list[str], environment: dict[str, str], is_dim: bool, tmp_path: Path
) -> None:
    with scripted(tmp_path, *arguments, **environment) as pane:
        pane.wait_for_prompt(1)
        pane.type("think", "Enter")
        pane.wait_for_prompt(2)
        assert "hmm\n\nYes.\n[ Prompt" in pane.screen()
        assert ("\x1b[2mhmm" in pane.screen(with_styles=True)) == is_dim


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGTERM, "143"), pytest.param(signal.SIGHUP, "129", marks=pytest.mark.slow)],
)
def test_a_signal_at_the_prompt_leaves_the_terminal_as_it_was(
    number: signal.Signals, status: str, tmp_path: Path
) -> None:
    with scripted(tmp_path) as pane:
        pane.wait_for_prompt(1)
        pane.type("half a line")
        pane.wait_for(">>> half a line")
        for child in psutil.Process(pane.pid).children():
            child.send_signal(number)
        assert pane.wait_for_end() == status


def test_one_answer_on_a_terminal_is_safe_to_look_at(tmp_path: Path) -> None:
    with scripted(tmp_path, "-p", "evil") as pane:
        assert pane.wait_for_end() == "0"
        assert "␛[2J" in pane.screen() and "[ Prompt: 41.2" in pane.screen()


@pytest.mark.slow
def test_a_prompt_with_cnv_begins_a_chat(tmp_path: Path) -> None:
    with scripted(tmp_path, "-cnv", "-p", "hello") as pane:
        assert "You said 'hello'" in pane.wait_for_prompt(1)
        pane.type("more", "Enter")
        pane.wait_for("You said 'more'")


@pytest.mark.slow
def test_a_single_turn_on_a_terminal(tmp_path: Path) -> None:
    with scripted(tmp_path, "-cnv", "-st") as pane:
        pane.wait_for_prompt(1)
        pane.type("hello", "Enter")
        assert pane.wait_for_end() == "0"


def test_the_demo_chats_is_stopped_and_survives_the_death_of_its_engine(tmp_path: Path) -> None:
    with Pane([*DEMO, "-c", "8192"], tmp_path) as pane:
        assert "8 layers x 8 experts (top 2)" in pane.wait_for_prompt(1)
        pane.type('/set grammar root ::= "zebra " root', "Enter")
        pane.wait_for("grammar = ")
        pane.type("Tell me a story.", "Enter")
        pane.wait_for("zebra zebra zebra")
        pane.press("C-c")
        pane.wait_for("| stopped ]")
        (buddyrun,) = psutil.Process(pane.pid).children()
        (worker,) = buddyrun.children()
        os.kill(worker.pid, signal.SIGKILL)
        pane.type("And then?", "Enter")
        pane.wait_for("Restarted; your conversation is kept.")
        pane.wait_for_prompt(4)
        pane.type("/set n-predict 4", "Enter")
        pane.wait_for_prompt(5)
        pane.type("/regen", "Enter")
        pane.wait_for("| stopped at -n ]")
        pane.type("/show context", "Enter")
        pane.wait_for("4 messages.")
        pane.press("C-d")
        assert pane.wait_for_end() == "0"
        assert not psutil.pid_exists(worker.pid)
