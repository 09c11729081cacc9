"""How a person's messages are read: multi-line rules, plain lines, or a line editor.

Knows nothing of commands beyond the completions it is given. Both readers behave like `input`:
EOFError means leave, KeyboardInterrupt means Ctrl-C at an empty prompt.
"""

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol

from runner.terminal.history import LineHistory

if TYPE_CHECKING:
    from prompt_toolkit.buffer import Buffer
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

PROMPT = ">>> "
CONTINUATION = "... "
_QUOTES = '"""'
_BEFORE_QUOTES = re.compile(r"\s*(/system\s+|/set\s+system\s+)?", re.ASCII)

# Line so far -> how many characters at its end to replace, and by which words.
Completions = Callable[[str], tuple[int, list[str]]]


class Reader(Protocol):
    """Where messages come from."""

    history: LineHistory

    def read(self) -> str: ...


def is_open(text: str) -> bool:
    """True while a `\"\"\"` at the beginning has not been closed."""
    begin = _BEFORE_QUOTES.match(text)
    body = text[begin.end() if begin else 0 :].rstrip()
    return body.startswith(_QUOTES) and (len(body) < 6 or not body.endswith(_QUOTES))


def without_quotes(text: str) -> str:
    """The text between `\"\"\"` and `\"\"\"`, or the text itself."""
    body = text.strip()
    if len(body) >= 6 and body.startswith(_QUOTES) and body.endswith(_QUOTES):
        return body[3:-3].removeprefix("\n").removesuffix("\n")
    return text


class PlainReader:
    """Reads with `input`, for pipes, dumb terminals and `--simple-io`."""

    def __init__(self, history: LineHistory, shows_prompt: bool = True) -> None:
        self.history = history
        self._shows_prompt = shows_prompt

    def read(self) -> str:
        """One message; a trailing backslash or an open `\"\"\"` continues on the next line."""
        text = self._line(PROMPT)
        while True:
            if text.endswith("\\") and not is_open(text):
                text = text[:-1] + "\n" + self._line(CONTINUATION)
            elif is_open(text):
                text += "\n" + self._line(CONTINUATION)
            else:
                self.history.add(text)
                return text

    def _line(self, prompt: str) -> str:
        return input(prompt if self._shows_prompt else "")


class EditingReader:
    """Reads with prompt_toolkit: editing, history, completion, bracketed paste."""

    def __init__(self, history: LineHistory, completions: Completions) -> None:
        from prompt_toolkit import PromptSession

        self.history = history
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            multiline=True,
            prompt_continuation=CONTINUATION,
            key_bindings=_key_bindings(),
            history=_editor_history(history),
            completer=_completer(completions),
            complete_while_typing=False,
            enable_suspend=True,
        )

    def read(self) -> str:
        """One message, edited over one or several lines."""
        return self._session.prompt()


def _key_bindings() -> "KeyBindings":
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    in_message = has_focus(DEFAULT_BUFFER)  # and not in the search line of Ctrl-R
    keys.add("enter", filter=in_message)(_on_enter)
    keys.add("escape", "enter", filter=in_message)(_on_newline)
    keys.add("c-c", filter=in_message)(_on_interrupt)
    return keys


def _on_enter(event: "KeyPressEvent") -> None:
    buffer: Buffer = event.current_buffer
    if buffer.complete_state and buffer.complete_state.current_completion:
        buffer.complete_state = None  # takes the completion; the next Enter sends
        return
    is_at_end = buffer.cursor_position == len(buffer.text)
    if is_open(buffer.text):
        buffer.insert_text("\n")
    elif is_at_end and buffer.text.endswith("\\"):
        buffer.delete_before_cursor()
        buffer.insert_text("\n")
    else:
        buffer.validate_and_handle()


def _on_newline(event: "KeyPressEvent") -> None:
    event.current_buffer.insert_text("\n")


def _on_interrupt(event: "KeyPressEvent") -> None:
    if event.current_buffer.text:
        event.current_buffer.reset()
    else:
        event.app.exit(exception=KeyboardInterrupt)


def _editor_history(lines: LineHistory) -> "History":
    from prompt_toolkit.history import History

    class EditorHistory(History):
        """Lets the editor recall the lines of `LineHistory`."""

        def load_history_strings(self) -> Iterable[str]:
            return reversed(lines.load())

        def store_string(self, string: str) -> None:
            lines.add(string)

    return EditorHistory()


def _completer(completions: Completions) -> "Completer":
    from prompt_toolkit.completion import Completer, Completion

    class LineCompleter(Completer):
        """Hands the line before the cursor to `completions`."""

        def get_completions(self, document: Any, complete_event: Any) -> Iterable[Completion]:
            n_replaced, words = completions(document.text_before_cursor)
            for word in words:
                yield Completion(word, start_position=-n_replaced)

    return LineCompleter()
