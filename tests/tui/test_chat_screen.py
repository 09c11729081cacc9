"""Every key and state of the chat screen, with a client that follows a script."""

from pathlib import Path

import pytest
from textual.pilot import Pilot

from runner.client import LineHistory, PromptProgress, RunSettings, WorkerDiedError
from tests.runner.chat_fakes import result
from tests.tui.chat_fakes import FakeClient, Hold, request
from tests.tui.screens import app_of, shown, until, until_ready, until_shown
from tui.chat_app import ChatApp
from tui.chat_help import ChatHelp

SIZE = (90, 30)  # without the monitor


async def send(pilot: Pilot[None], text: str) -> None:
    """Type a message and send it."""
    app_of(pilot).pane.input.insert(text)
    await pilot.press("enter")


async def test_a_message_is_answered_and_its_figures_are_in_the_status_line() -> None:
    client = FakeClient([["Hello, ", "**you**."]])
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        assert "Fake ␛[31m8x1B" in shown(app_of(pilot))
        assert "! The context is capped." in shown(app_of(pilot))
        await pilot.press(*"Hi", "enter")
        await until_ready(pilot)
        screen = shown(app_of(pilot))
        assert "❯ Hi" in screen
        assert "Hello, you." in screen
        assert "Generation: 9.8 t/s" in app_of(pilot).pane.status_line.status
    assert client.requests[0].messages[-1]["content"] == "Hi"


async def test_the_first_message_is_shown_and_answered_at_once() -> None:
    client = FakeClient([["Of course."]])
    async with ChatApp(request(client, first_message="Can you?")).run_test(size=SIZE) as pilot:
        await until_shown(pilot, "Of course.")
        screen = shown(app_of(pilot))
        assert screen.index("buddyrun") < screen.index("❯ Can you?") < screen.index("Of course.")


async def test_shift_tab_goes_to_the_monitor_and_escape_back() -> None:
    app = ChatApp(request(FakeClient()))
    async with app.run_test(size=(120, 40)) as pilot:
        await until_ready(pilot)
        await pilot.press("shift+tab")
        assert app.focused is not None and app.monitor in app.focused.ancestors
        await pilot.press("escape")
        assert app.pane.input.has_focus
        await pilot.press("shift+tab", "shift+tab")
        assert app.pane.input.has_focus
        await pilot.press("shift+tab", "f2")
        assert app.pane.input.has_focus


async def test_the_monitors_help_in_a_chat_has_only_keys_that_are_there() -> None:
    app = ChatApp(request(FakeClient()))
    async with app.run_test(size=(120, 60)) as pilot:
        await until_ready(pilot)
        await pilot.press("shift+tab", "question_mark")
        await until_shown(pilot, "F2             hide the monitor")
        screen = shown(app)
        assert "hold a replay" not in screen and "list of running" not in screen
        assert "what is watched goes on" not in screen


async def test_pages_are_turned_and_the_end_is_followed_again_there() -> None:
    hold = Hold()
    lines = "".join(f"line {n}\n\n" for n in range(60))
    app = ChatApp(request(FakeClient([[lines, hold, "the end"]])))
    async with app.run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "x")
        await until_shown(pilot, "line 59")
        await pilot.press("pageup", "pageup")
        place = app.pane.log_view.scroll_offset
        hold.released.set()
        await until_ready(pilot)
        assert app.pane.log_view.scroll_offset == place
        assert "the end" not in shown(app)
        await pilot.press("pagedown", "pagedown", "pagedown")
        await until_shown(pilot, "the end")
        await pilot.resize_terminal(60, 20)
        await until_shown(pilot, "the end")


async def test_marked_text_is_copied() -> None:
    app = ChatApp(request(FakeClient([["some words to copy"]])))
    async with app.run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "x")
        await until_ready(pilot)
        row = next(n for n, row in enumerate(shown(app).split("\n")) if "some words" in row)
        await pilot.mouse_down(offset=(1, row))
        await pilot.hover(offset=(11, row))
        await pilot.mouse_up(offset=(11, row))
        await pilot.press("ctrl+c")
        assert app.clipboard.strip() == "some words"


async def test_a_message_that_is_sent_before_the_chat_is_there_waits_for_it() -> None:
    async with ChatApp(request(FakeClient([["Now."]]))).run_test(size=SIZE) as pilot:
        assert not app_of(pilot).pane.is_waiting
        await send(pilot, "early")
        await until_shown(pilot, "Now.")


async def test_escape_stops_an_answer_and_the_chat_goes_on() -> None:
    hold = Hold()
    client = FakeClient([["begun", hold, " never"], ["Second."]])
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "long")
        await until_shown(pilot, "begun")
        await until_shown(pilot, "answering; Esc stops")
        await pilot.press("escape")
        await until_ready(pilot)
        assert "never" not in shown(app_of(pilot))
        assert "stopped" in app_of(pilot).pane.status_line.status
        await send(pilot, "again")
        await until_shown(pilot, "Second.")


async def test_escape_stops_the_reading_of_the_prompt() -> None:
    hold = Hold()
    client = FakeClient([[PromptProgress(128, 512, 0), hold, "never"]])
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "long")
        await until_shown(pilot, "reading the prompt [####------------] 25%; Esc stops")
        await pilot.press("escape")
        await until_shown(pilot, "Stopped before the first word.")


async def test_control_c_clears_the_input_then_stops_and_then_asks_to_leave() -> None:
    hold = Hold()
    client = FakeClient([["begun", hold]])
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "long")
        await until_shown(pilot, "begun")
        await pilot.press(*"draft", "ctrl+c")
        assert app_of(pilot).pane.input.text == ""
        await pilot.press("ctrl+c")
        await until_ready(pilot)
        assert app_of(pilot).is_running
        await pilot.press("ctrl+c")
        await until_shown(pilot, "Ctrl-C once more leaves")
        await pilot.press("ctrl+c")
        await until(pilot, lambda: not pilot.app.is_running)


@pytest.mark.parametrize("key", ("ctrl+d", "ctrl+q"))
async def test_a_key_leaves(key: str) -> None:
    async with ChatApp(request(FakeClient())).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await pilot.press(key)
        await until(pilot, lambda: not pilot.app.is_running)


async def test_control_d_in_a_text_deletes_a_character() -> None:
    async with ChatApp(request(FakeClient())).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await pilot.press(*"ab", "home", "ctrl+d")
        assert app_of(pilot).pane.input.text == "b"


async def test_bye_leaves_also_while_an_answer_is_made() -> None:
    hold = Hold()
    async with ChatApp(request(FakeClient([["begun", hold]]))).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "long")
        await until_shown(pilot, "begun")
        await send(pilot, "not now")
        assert app_of(pilot).pane.input.text == "not now"
        await until_shown(pilot, "Esc stops it.")
        await pilot.press("ctrl+c")
        await send(pilot, "/bye")
        await until(pilot, lambda: not pilot.app.is_running)


async def test_leaving_ends_the_threads_of_the_chat() -> None:
    app = ChatApp(request(FakeClient([["begun", Hold()]])))
    async with app.run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "long")
        await until_shown(pilot, "begun")
    assert not app._chat_thread.is_alive()
    assert app.error is None


async def test_slash_commands_are_those_of_the_plain_chat() -> None:
    async with ChatApp(request(FakeClient([["One."]]))).run_test(size=(90, 60)) as pilot:
        await until_ready(pilot)
        for line, answer in (
            ("/?", "answer the last message again"),
            ("/set temp 0.5", "temp = 0.5"),
            ("/nonsense", "There is no command /nonsense"),
            ("/show nonsense", "! /show knows"),
            ("/regen", "There is no message to answer yet."),
        ):
            await send(pilot, line)
            await until_shown(pilot, answer)
            await until_ready(pilot)


@pytest.mark.parametrize("key", ("ctrl+j", "alt+enter", "shift+enter"))
async def test_a_key_breaks_the_line(key: str) -> None:
    client = FakeClient([["."]])
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await pilot.press("a", key, "b", "enter")
        await until_ready(pilot)
    assert client.requests[0].messages[-1]["content"] == "a\nb"


async def test_a_backslash_at_the_end_and_open_quotes_break_the_line() -> None:
    client = FakeClient([["."], ["."]])
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await pilot.press("a", "backslash", "enter", "b", "enter")
        await until_ready(pilot)
        await send(pilot, '"""one')
        await send(pilot, 'two"""')
        await until_ready(pilot)
    contents = [each.messages[-1]["content"] for each in client.requests]
    assert contents == ["a\nb", "one\ntwo"]


async def test_up_and_down_go_through_the_lines_of_earlier_chats(tmp_path: Path) -> None:
    history = LineHistory(tmp_path / "history")
    history.add("earlier")
    client = FakeClient([["."]])
    async with ChatApp(request(client, history=history)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        text = lambda: app_of(pilot).pane.input.text  # noqa: E731
        await send(pilot, "latest")
        await until_ready(pilot)
        await pilot.press(*"draft", "up")
        assert text() == "latest"
        await pilot.press("up")
        assert text() == "earlier"
        await pilot.press("up", "down", "down")
        assert text() == "draft"
    assert LineHistory(tmp_path / "history").load() == ["earlier", "latest"]


async def test_tab_completes_commands_and_shows_what_is_possible() -> None:
    async with ChatApp(request(FakeClient())).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await pilot.press(*"/reg", "tab")
        assert app_of(pilot).pane.input.text == "/regen"
        await pilot.press("ctrl+c", *"/s", "tab")
        await until_shown(pilot, "/save  /set  /show  /system")
        assert app_of(pilot).pane.input.has_focus


async def test_what_is_pasted_is_made_visible_and_may_have_lines() -> None:
    client = FakeClient([["."]])
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        from textual.events import Paste

        app_of(pilot).pane.input.post_message(Paste("a\r\nb\x1b[2J\u202e"))
        await until(pilot, lambda: app_of(pilot).pane.input.text)
        assert app_of(pilot).pane.input.text == "a\nb␛[2J<U+202E>"
        assert not client.requests


async def test_a_dead_engine_is_told_and_started_again_and_the_monitor_sees_both() -> None:
    client = FakeClient([["half"], ["Back."]])
    client.restart_hold = Hold()
    app = ChatApp(request(client))

    def die() -> None:
        client.is_dead = True
        raise WorkerDiedError("The engine was killed (SIGKILL).")

    client._turns[0] = ["half", die]
    async with app.run_test(size=(180, 40)) as pilot:
        await until_ready(pilot)
        await send(pilot, "long")
        await until_shown(pilot, "! The engine was killed (SIGKILL).")
        await until_shown(pilot, "ended: The engine was killed")
        await until_shown(pilot, "reading weights [####")
        client.restart_hold.released.set()
        await until_shown(pilot, "Restarted; your conversation is kept.")
        await until(pilot, lambda: "ended:" not in shown(app))
        assert "half" in shown(app)
        await until_ready(pilot)
        await send(pilot, "/regen")
        await until_shown(pilot, "Back.")


async def test_an_engine_that_cannot_be_started_again_leaves_the_chat_open() -> None:
    client = FakeClient([[WorkerDiedError("killed")], ["Better."]])

    class Stubborn(FakeClient):
        def restart(self, on_progress: object = None) -> None:  # type: ignore[override]
            raise WorkerDiedError("killed again")

    client.restart = Stubborn.restart.__get__(client)  # type: ignore[method-assign]
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "long")
        await until_shown(pilot, "! killed again")
        await until_shown(pilot, "/regen tries again.")
        await until_ready(pilot)


async def test_a_bug_in_the_chat_ends_the_screen_and_is_raised() -> None:
    app = ChatApp(request(FakeClient([[KeyError("a bug")]])))
    async with app.run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "x")
        await until(pilot, lambda: not app.is_running)
    assert isinstance(app.error, KeyError)


async def test_thinking_is_shown_apart_or_not_at_all() -> None:
    turn = ["<think>\nLet me", " see.\n</think>\n\nYes."]
    client = FakeClient([turn, turn])
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "a")
        await until_ready(pilot)
        assert "│ Let me see." in shown(app_of(pilot))
        await send(pilot, "/set nothink")
        await until_ready(pilot)
        await send(pilot, "b")
        await until_ready(pilot)
        screen = shown(app_of(pilot))
        assert screen.count("Let me see.") == 1
        assert screen.count("Yes.") == 2


async def test_a_full_context_is_warned_of() -> None:
    client = FakeClient([["x", result("context", 8192)]])
    async with ChatApp(request(client)).run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "a")
        await until_shown(pilot, "! The answer was cut: the context is full")


async def test_f2_shows_and_hides_the_monitor_and_f1_explains() -> None:
    app = ChatApp(request(FakeClient()))
    async with app.run_test(size=(80, 24)) as pilot:
        await until_ready(pilot)
        assert not app.monitor.display  # no room beside the chat
        await pilot.press("f2")
        await pilot.pause()
        assert app.monitor.display
        assert app.monitor.region.y > app.pane.region.y  # below it
        assert app.monitor.region.height >= 12
        await pilot.press("f2")
        await pilot.pause()
        assert not app.monitor.display
        assert app.pane.input.has_focus
        await pilot.press("f1")
        await until(pilot, lambda: isinstance(app.screen, ChatHelp))
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, ChatHelp))


async def test_the_monitor_is_beside_the_chat_where_there_is_room() -> None:
    app = ChatApp(request(FakeClient()))
    async with app.run_test(size=(120, 40)) as pilot:
        await until_ready(pilot)
        await until(pilot, lambda: app.monitor.frame is not None)
        assert app.monitor.region.x > 40
        assert app.monitor.region.y == app.pane.region.y
        assert app.monitor.owner is app._request.client


async def test_frames_come_five_times_a_second_while_the_monitor_is_shown() -> None:
    client = FakeClient()
    async with ChatApp(request(client)).run_test(size=(120, 40)) as pilot:
        await until_ready(pilot)
        begin = client.n_frames
        await pilot.pause(1.1)
        assert 3 <= client.n_frames - begin <= 6
        await pilot.press("f2")
        await pilot.pause(0.3)  # one may be on its way
        begin = client.n_frames
        await pilot.pause(0.6)
        assert client.n_frames == begin
        await pilot.press("f2")
        await until(pilot, lambda: client.n_frames > begin)


async def test_a_pause_is_said_in_the_chat_too_also_when_the_monitor_is_hidden() -> None:
    client = FakeClient()
    client.settings = RunSettings(False, "router", 0.08, is_paused=True)
    async with ChatApp(request(client)).run_test(size=(120, 40)) as pilot:
        await until_ready(pilot)
        await until_shown(pilot, "Paused: p in the monitor goes on.")
        await until_shown(pilot, "paused; waits for a message  p goes on")
        await pilot.press("f2")
        client.settings = RunSettings(False, "router", 0.08, is_paused=False)
        await until(pilot, lambda: "Paused" not in shown(app_of(pilot)))


@pytest.mark.parametrize("size", ((20, 5), (1, 1), (10, 40), (300, 3)))
async def test_any_size_will_do_and_the_chat_comes_back(size: tuple[int, int]) -> None:
    app = ChatApp(request(FakeClient([["# Head\n\n- an item of a list\n\n| a | b |\n|---|---|"]])))
    async with app.run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        await send(pilot, "hello")
        await until_ready(pilot)
        await pilot.resize_terminal(*size)
        await pilot.pause()
        await pilot.press("f2", "f2", "x", "backspace")
        await pilot.resize_terminal(*SIZE)
        await until_shown(pilot, "an item of a list")
        assert app.pane.input.has_focus


async def test_commands_of_the_palette_are_there_and_a_theme_can_be_chosen() -> None:
    app = ChatApp(request(FakeClient([["`code`"]])))
    async with app.run_test(size=SIZE) as pilot:
        await until_ready(pilot)
        names = [command.title for command in app.get_system_commands(app.screen)]
        assert {"Monitor", "Stop", "Help", "Theme", "Quit"} <= set(names)
        await send(pilot, "x")
        await until_ready(pilot)
        for theme in ("textual-light", "ansi-dark", "dracula"):
            app.theme = theme
            await pilot.pause()
            assert "code" in shown(app)
        await pilot.press("ctrl+p")
        await until_shown(pilot, "Search for commands")
        await pilot.press("escape")


async def test_ascii_screens_have_no_other_character() -> None:
    client = FakeClient([["- item\n\n> said\n\n| a |\n|---|\n| b |\n"]])
    app = ChatApp(request(client, is_ascii=True))
    async with app.run_test(size=(80, 30)) as pilot:
        await until_ready(pilot)
        await send(pilot, "x")
        await until_ready(pilot)
        rows = shown(app).replace("␛", "").split("\n")[:-1]  # the footer is Textual's
        assert all(row.isascii() for row in rows), rows
