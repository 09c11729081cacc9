"""Where the person types: several lines, earlier lines, completion. Knows no chat.

Enter sends; Alt-Enter, Ctrl-J and a trailing backslash break the line, and so does Enter while a
`\"\"\"` is open. What is pasted or recalled is made visible first: it is sent as it is shown.
"""

import os
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea

from runner.client import complete, is_open, visible

_NEWLINE_KEYS = ("ctrl+j", "alt+enter", "shift+enter", "newline")


class ChatInput(TextArea):
    """One message, edited over one or several lines."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+d", "delete_or_leave", "Leave", show=False),
        Binding("ctrl+c", "clear_or_interrupt", "Clear", show=False),
        Binding("ctrl+z", "app.suspend_process", "Suspend", show=False),
        Binding("ctrl+underscore", "undo", "Undo", show=False),
        Binding("tab", "complete", "Complete", show=False),
        Binding("pageup", "scroll_log(-1)", "Page up", show=False),
        Binding("pagedown", "scroll_log(1)", "Page down", show=False),
    ]

    @dataclass
    class Sent(Message):
        """The person pressed Enter."""

        text: str

    class Left(Message):
        """Ctrl-D in the empty input."""

    class Interrupted(Message):
        """Ctrl-C in the empty input."""

    @dataclass
    class Completions(Message):
        """What the line can become; () when that is settled."""

        words: tuple[str, ...]

    @dataclass
    class LogScrolled(Message):
        """The person wants to see earlier (-1) or later (1) lines of the conversation."""

        n_pages: int

    def __init__(self, history: list[str], id: str | None = None) -> None:
        super().__init__(
            id=id,
            tab_behavior="indent",
            highlight_cursor_line=False,
            placeholder="A message, or /? for help",
            compact=True,
        )
        self._lines = history  # of earlier chats, oldest first, and of this one
        self._n_back = 0  # which of them is shown; 0 = none, 1 = the newest
        self._draft = ""  # what was typed before going back
        self.is_ready = True  # Enter sends

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            event.stop()
            event.prevent_default()
            self._enter()
        elif event.key in _NEWLINE_KEYS:
            event.stop()
            event.prevent_default()
            self.insert("\n")
        elif event.key in ("escape", "tab"):
            event.prevent_default()  # bindings have them
        else:
            await super()._on_key(event)

    async def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        text = visible(event.text.replace("\r\n", "\n").replace("\r", "\n"))
        if result := self._replace_via_keyboard(text, *self.selection):
            self.move_cursor(result.end_location)

    def _enter(self) -> None:
        text = self.text
        if is_open(text):
            self.insert("\n")
        elif text.endswith("\\") and self.cursor_location == self.document.end:
            self.action_delete_left()
            self.insert("\n")
        elif text.strip():
            self.post_message(self.Sent(text))

    def take(self) -> str:
        """The text, which is then an earlier line; the input is empty."""
        text = self.text
        self._lines.append(text)
        self._n_back = 0
        self.text = ""
        return text

    def action_cursor_up(self, select: bool = False) -> None:
        """Up, and above the first line to the line before."""
        if select or not self.navigator.is_first_wrapped_line(self.cursor_location):
            super().action_cursor_up(select)
        elif self._n_back < len(self._lines):
            self._recall(self._n_back + 1)

    def action_cursor_down(self, select: bool = False) -> None:
        """Down, and below the last line to the line after."""
        if select or not self.navigator.is_last_wrapped_line(self.cursor_location):
            super().action_cursor_down(select)
        elif self._n_back:
            self._recall(self._n_back - 1)

    def _recall(self, n_back: int) -> None:
        if not self._n_back:
            self._draft = self.text
        self._n_back = n_back
        self.text = visible(self._lines[-n_back]) if n_back else self._draft
        self.move_cursor(self.document.end)

    def action_delete_or_leave(self) -> None:
        """Ctrl-D: delete a character; leave when there is none."""
        if self.text:
            self.action_delete_right()
        else:
            self.post_message(self.Left())

    def action_clear_or_interrupt(self) -> None:
        """Ctrl-C: copy what is marked, else clear, else tell."""
        if self.selected_text or self.screen.get_selected_text():
            self.app.copy_to_clipboard(self.selected_text or self.screen.get_selected_text() or "")
            self.screen.clear_selection()
        elif self.text:
            self._n_back = 0
            self.text = ""
        else:
            self.post_message(self.Interrupted())

    def action_complete(self) -> None:
        """Tab: complete the command or file name before the cursor as far as it is certain."""
        row, column = self.cursor_location
        before = self.get_text_range((0, 0), (row, column))
        n_replaced, words = complete(before)
        if not words:
            return
        common = os.path.commonprefix(words)  # noqa: RUF071 (words, not paths)
        if len(words) == 1 or len(common) > n_replaced:
            self.replace(visible(common), (row, column - n_replaced), (row, column))
        settled = len(words) == 1
        self.post_message(self.Completions(() if settled else tuple(map(visible, words))))

    def action_scroll_log(self, n_pages: int) -> None:
        """The input is small; pages are turned in the conversation."""
        self.post_message(self.LogScrolled(n_pages))
