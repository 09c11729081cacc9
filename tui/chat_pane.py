"""The chat's part of the screen: conversation, status line, input. Knows a feed, but no engine.

However fast an answer comes, the screen is changed at most 20 times a second, and less often where
laying it out takes long: most of the time is left for the keys.
"""

import time
from dataclasses import dataclass

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widgets import Static

from tui.chat_feed import (
    AnswerBegan,
    AnswerEnded,
    AnswerPiece,
    ChatFeed,
    Said,
    Saying,
    StatusShown,
    Waiting,
)
from tui.markdown_text import Kind
from tui.widgets.chat_input import ChatInput
from tui.widgets.conversation_log import ConversationLog

_INTERVAL_S = 0.05
_BUDGET_S = 0.015  # for laying out what is new, in one change of the screen
_N_CHARS = 100  # of an answer, between two looks at the clock
_SHARE = 3  # a change of the screen waits three times as long as the one before took
_HINT_S = 3.0
PAUSED = "Paused: p in the monitor goes on."
BUSY = "An answer is being made: Esc stops it."


class StatusLine(Static):
    """What goes on, or how the last answer went; for a moment a hint in its place."""

    status: reactive[str] = reactive("")
    hint: reactive[str] = reactive("")
    is_paused: reactive[bool] = reactive(False)  # no token is made until the person goes on

    def watch_status(self) -> None:
        """Show it."""
        self._show()

    def watch_hint(self) -> None:
        """Show it."""
        self._show()

    def watch_is_paused(self) -> None:
        """Show it."""
        self._show()

    def _show(self) -> None:
        status = f"{PAUSED} {self.status}".rstrip() if self.is_paused else self.status
        self.update(Content(self.hint or status))
        self.set_class(bool(self.hint), "-hint")


class ChatPane(Vertical):
    """Shows what a feed says and takes the person's messages."""

    @dataclass
    class Wake(Message):
        """There is something in the feed."""

        def can_replace(self, message: Message) -> bool:
            """One is enough."""
            return isinstance(message, ChatPane.Wake)

    @dataclass
    class Given(Message):
        """A message or command for the chat, which waits for it."""

        text: str

    class StopAsked(Message):
        """The person wants the answer to end."""

    class LeaveAsked(Message):
        """The person wants to leave."""

    def __init__(self, history: list[str], is_ascii: bool = False, id: str | None = None) -> None:
        super().__init__(id=id)
        self.feed = ChatFeed(lambda: self.post_message(self.Wake()))
        self.is_waiting = False  # the chat wants a message
        self._is_asked = False  # it has one to answer
        self._sends_soon = False  # Enter was pressed before the chat was there
        self._history = history
        self._is_ascii = is_ascii
        self._next_s = 0.0  # when the screen may be changed again
        self._has_timer = False
        self._n_hints = 0
        self._may_leave = False  # Ctrl-C was pressed once
        self._answer = ""  # a status that tells of the last answer

    def compose(self) -> ComposeResult:
        """Conversation, status, input."""
        yield ConversationLog(self._is_ascii, id="log")
        yield StatusLine(id="status", markup=False)
        yield ChatInput(self._history, id="input")

    @property
    def log_view(self) -> ConversationLog:
        """The conversation."""
        return self.query_one(ConversationLog)

    @property
    def input(self) -> ChatInput:
        """Where the person types."""
        return self.query_one(ChatInput)

    @property
    def status_line(self) -> StatusLine:
        """What goes on."""
        return self.query_one(StatusLine)

    def ask(self, text: str) -> None:
        """Show a message of the person and wait for what the chat makes of it."""
        self.expect_answer()
        self.log_view.add(text, Kind.QUESTION)
        self.log_view.show_open()
        self.log_view.follow()

    def expect_answer(self) -> None:
        """The chat has a message to answer; until it is done, it waits for no other."""
        self.is_waiting, self._is_asked = False, True

    def hint(self, text: str) -> None:
        """Show a text for a moment."""
        self._n_hints += 1
        number = self._n_hints
        self.status_line.hint = text
        self.set_timer(_HINT_S, lambda: self._end_hint(number))

    def _end_hint(self, number: int) -> None:
        if number == self._n_hints:
            self.status_line.hint = ""
            self._may_leave = False

    # What the chat says

    def on_chat_pane_wake(self) -> None:
        """Change the screen now, or as soon as it is time again."""
        if not self._has_timer:
            self._has_timer = True
            wait_s = self._next_s - time.perf_counter()
            self.set_timer(max(wait_s, 0.001), self._update)

    def _update(self) -> None:
        self._has_timer = False
        began_s = time.perf_counter()
        while not self.feed.is_empty and time.perf_counter() < began_s + _BUDGET_S:
            for saying in self.feed.take(_N_CHARS):
                self._show(saying)
        self.log_view.show_open()
        took_s = time.perf_counter() - began_s
        self._next_s = began_s + max(_INTERVAL_S, _SHARE * took_s)
        if not self.feed.is_empty:
            self.on_chat_pane_wake()

    def _show(self, saying: Saying) -> None:
        match saying:
            case Said():
                self.log_view.add(saying.text, saying.kind)
            case AnswerPiece():
                self.log_view.extend(saying.text, saying.is_thinking)
            case AnswerBegan() | AnswerEnded():
                self.log_view.end_answer()
            case StatusShown():
                self.status_line.status = saying.text
            case Waiting():
                self.is_waiting, self._is_asked = True, False
                if self._sends_soon:
                    self._send()

    # What the person does

    def on_chat_input_sent(self, message: ChatInput.Sent) -> None:
        """Give it to the chat if that waits."""
        message.stop()
        if self.is_waiting:
            self._send()
        elif not self._is_asked:
            self._sends_soon = True
        elif message.text.strip() in ("/bye", "/exit", "/quit"):
            self.post_message(self.LeaveAsked())
        else:
            self.hint(BUSY)

    def _send(self) -> None:
        self._sends_soon = False
        text = self.input.take()
        self.ask(text)
        self.post_message(self.Given(text))

    def on_chat_input_interrupted(self, message: ChatInput.Interrupted) -> None:
        """Ctrl-C: stop the answer; without one ask, and leave at the second."""
        message.stop()
        if not self.is_waiting:
            self.post_message(self.StopAsked())
        elif self._may_leave:
            self.post_message(self.LeaveAsked())
        else:
            self.hint("Ctrl-C once more leaves; so do Ctrl-D and /bye.")
            self._may_leave = True

    def on_chat_input_left(self, message: ChatInput.Left) -> None:
        """Ctrl-D."""
        message.stop()
        self.post_message(self.LeaveAsked())

    def on_chat_input_completions(self, message: ChatInput.Completions) -> None:
        """Show what the line can become."""
        message.stop()
        if message.words:
            self.hint("  ".join(message.words[:40]))

    def on_chat_input_log_scrolled(self, message: ChatInput.LogScrolled) -> None:
        """Turn a page of the conversation."""
        message.stop()
        self.log_view.turn_page(message.n_pages)
