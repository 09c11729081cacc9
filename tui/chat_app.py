"""The chat on the whole screen, with the monitor at its side: opens, runs and leaves in order.

The chat itself is `runner.client.Chat`, in a thread of its own; frames come from another. Both only
post messages. Nothing here knows what a command does.
"""

import asyncio
import gc
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer

from runner.client import Chat, ChatRequest, Frame
from tui.chat_feed import ScreenClosedError
from tui.chat_help import ChatHelp
from tui.chat_pane import ChatPane
from tui.chat_view import ScreenReader, ScreenView
from tui.monitor import Monitor
from tui.monitor_feed import MonitorFeed
from tui.terminal_state import (
    LEAVING,
    know_alt_enter,
    leave_for_sure,
    signals_as_before,
    stop_process_group,
)

_JOIN_S = 2.0
WIDE = 100  # columns from which on the monitor is shown beside the chat at once
_BROAD = 180  # columns from which on the monitor has room for all it can show
_LOW, _MIDDLE = 9, 30  # rows


def open_chat(request: ChatRequest) -> None:
    """Chat until the person leaves. Raises what ended it otherwise; SystemExit after a signal."""
    know_alt_enter()
    app = ChatApp(request)
    with signals_as_before():
        app.run()
    if app.error is not None:
        raise app.error
    if app.signal_number:
        raise SystemExit(128 + app.signal_number)


class ChatScreen(Screen[None]):
    """The conversation and the monitor."""

    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (WIDE, "-wide"), (_BROAD, "-broad")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-flat"), (_LOW, "-low"), (_MIDDLE, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "help", "Help"),
        Binding("f2", "monitor", "Monitor"),
        Binding("escape", "stop", "Stop"),
        Binding("ctrl+d", "leave", "Leave"),
    ]

    def __init__(self, request: ChatRequest) -> None:
        super().__init__()
        self._request = request
        self.pane = ChatPane(request.history.load(), request.is_ascii, id="chat")
        self.monitor = Monitor(request.client, request.is_ascii, id="monitor")

    def compose(self) -> ComposeResult:
        """Chat left, monitor right, keys below."""
        with Container(id="both"):
            yield self.pane
            yield self.monitor
        yield Footer()

    def on_mount(self) -> None:
        """Show the monitor where there is room."""
        self.set_class(self._request.is_ascii, "-ascii")
        self.set_class(self.app.size.width >= WIDE, "-monitor")
        self.pane.input.focus()

    @property
    def shows_monitor(self) -> bool:
        """Whether the monitor is on the screen."""
        return self.has_class("-monitor")

    def action_help(self) -> None:
        """Explain the keys."""
        self.app.push_screen(ChatHelp(self._request.is_ascii))

    def action_monitor(self) -> None:
        """Show or hide the monitor."""
        self.toggle_class("-monitor")
        if not self.shows_monitor:
            self.pane.input.focus()

    def action_stop(self) -> None:
        """Esc: stop the answer and go back to the input."""
        if not self.pane.is_waiting:
            self.pane.post_message(ChatPane.StopAsked())
        self.pane.input.focus()

    def action_leave(self) -> None:
        """Ctrl-D where the focus is not in the input."""
        self.pane.post_message(ChatPane.LeaveAsked())


class ChatApp(App[None]):
    """Runs one chat."""

    CSS_PATH = ["app.tcss", "chat.tcss"]  # noqa: RUF012
    TITLE = "buddyrun"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+q", "leave", "Leave", show=False, priority=True),
        Binding("ctrl+z", "suspend_process", "Suspend", show=False),
    ]

    @dataclass
    class ChatEnded(Message):
        """The chat's thread is over, with an error if there was one."""

        error: Exception | None

    @dataclass
    class FrameCame(Message):
        """What the engine does now."""

        frame: Frame

        def can_replace(self, message: Message) -> bool:
            """Only the latest one counts."""
            return isinstance(message, ChatApp.FrameCame)

    @dataclass
    class EngineEnded(Message):
        """There are no frames, for this reason."""

        reason: str

    def __init__(self, request: ChatRequest) -> None:
        super().__init__()
        self.error: Exception | None = None
        self.signal_number = 0
        self._request = request
        self._chat_screen = ChatScreen(request)
        self._reader: ScreenReader | None = None
        self._is_paused = False
        self._chat_thread = threading.Thread(target=self._run_chat, name="chat", daemon=True)
        self._frames = MonitorFeed(
            request.client,
            lambda frame: self.post_message(self.FrameCame(frame)),
            lambda reason: self.post_message(self.EngineEnded(reason)),
            lambda: self._chat_screen.shows_monitor or self._is_paused,
        )

    def get_default_screen(self) -> Screen[None]:
        """The only screen, but for help."""
        return self._chat_screen

    @property
    def pane(self) -> ChatPane:
        """The chat's part of the screen."""
        return self._chat_screen.pane

    @property
    def monitor(self) -> Monitor:
        """The engine's part of the screen."""
        return self._chat_screen.monitor

    def on_mount(self) -> None:
        """Begin to chat once there is a screen for it."""
        loop = asyncio.get_running_loop()
        if threading.current_thread() is threading.main_thread():
            for number in LEAVING:
                with suppress(NotImplementedError):  # Windows ends a program by itself
                    loop.add_signal_handler(number, self._leave_by_signal, int(number))
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        if self._request.first_message:
            self.pane.expect_answer()
        self._reader = ScreenReader(self._request.history, self.pane.feed)
        self.pane.log_view.warm_up()
        # What is there now stays: to look for garbage in it takes 0.1 s, and keys would wait.
        gc.collect()
        gc.freeze()
        self._chat_thread.start()
        self._frames.start()

    def _run_chat(self) -> None:
        """In the chat's thread: until the person leaves."""
        request, reader = self._request, self._reader
        assert reader is not None
        view = ScreenView(self.pane.feed)
        error: Exception | None = None
        try:
            view.banner(request.info)
            if request.first_message:
                view.question(request.first_message)
            chat = Chat(request.client, request.info, request.conversation, view, reader)
            chat.run(request.first_message)
        except ScreenClosedError:
            return
        except Exception as caught:  # the edge of the thread
            error = caught
        self.post_message(self.ChatEnded(error))

    # Leaving

    def action_leave(self) -> None:
        """Stop the answer and end the chat."""
        self._stop()
        self.exit()

    async def action_quit(self) -> None:
        """The palette's word for it."""
        self.action_leave()

    def _leave_by_signal(self, number: int) -> None:
        self.signal_number = number
        leave_for_sure(number)
        self.action_leave()

    def _stop(self) -> None:
        self._frames.stop()
        self.pane.feed.close()
        if self._reader is not None:
            self._request.client.cancel()
            self._reader.give(None)

    async def on_unmount(self) -> None:
        """However it ends, nobody goes on talking to this screen."""
        gc.unfreeze()
        self._stop()
        if self._chat_thread.is_alive():
            await asyncio.to_thread(self._chat_thread.join, _JOIN_S)

    def _handle_exception(self, error: Exception) -> None:
        """A bug: whoever opened the screen reports it, in its own way."""
        super()._handle_exception(error)
        self._exit_renderables.clear()
        self.error = self.error or error

    def on_chat_app_chat_ended(self, message: ChatEnded) -> None:
        """/bye, or a bug."""
        self.error = message.error
        self.action_leave()

    # What the person asks

    def on_chat_pane_given(self, message: ChatPane.Given) -> None:
        """A message for the chat."""
        assert self._reader is not None
        self._reader.give(message.text)

    def on_chat_pane_stop_asked(self) -> None:
        """End the answer; the engine ends it between two tokens or batches of the prompt."""
        self._request.client.cancel()

    def on_chat_pane_leave_asked(self) -> None:
        """Ctrl-D, /bye."""
        self.action_leave()

    def action_suspend_process(self) -> None:
        """Ctrl-Z."""
        if self._driver is None or not self._driver.can_suspend:
            return
        if not stop_process_group(self._suspend_signal):
            self.pane.hint("There is no shell to go back to.")

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """What the palette offers."""
        yield from super().get_system_commands(screen)
        yield SystemCommand(
            "Monitor", "Show or hide the monitor (F2)", self._chat_screen.action_monitor
        )
        yield SystemCommand("Stop", "Stop the answer (Esc)", self._chat_screen.action_stop)
        yield SystemCommand("Help", "Explain the keys (F1)", self._chat_screen.action_help)

    # What the engine does

    def on_chat_app_frame_came(self, message: FrameCame) -> None:
        """Show it."""
        if self._has_monitor:
            settings = message.frame.settings
            self._tell_pause(settings is not None and settings.is_paused)
            self.monitor.show(message.frame)

    def on_chat_app_engine_ended(self, message: EngineEnded) -> None:
        """Say so."""
        if self._has_monitor:
            self._tell_pause(False)
            self.monitor.show_ended(message.reason)

    def _tell_pause(self, is_paused: bool) -> None:
        """Say it in the chat; while it is so the engine is asked, also behind a hidden monitor."""
        self._is_paused = is_paused
        self.pane.status_line.is_paused = is_paused

    @property
    def _has_monitor(self) -> bool:
        """Whether it is on the screen: a frame may come late, when that is being closed."""
        return self.is_running and self.monitor.is_mounted
