"""The chat loop: reads a message or command, lets the engine answer, keeps the conversation.

Knows the client's public names; what shows it is a `view.View`, commands in `chat_commands`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runner.errors import (
    BackendError,
    BuddyrunError,
    CancelledError,
    ContextFullError,
    InternalError,
    WorkerDiedError,
)
from runner.protocol import GenerateResult, ModelInfo, PromptProgress, TextPiece
from runner.terminal.chat_commands import ChatCommands, ChatState, Next
from runner.terminal.chat_input import Reader, without_quotes
from runner.terminal.conversation import Conversation
from runner.terminal.interrupts import SecondInterrupt, first_interrupt_calls
from runner.terminal.terminal_text import storable
from runner.terminal.view import Answer, View

if TYPE_CHECKING:
    from runner.engine_client import Client

HOW_TO_LEAVE = "Use Ctrl-D or /bye to leave."
_WHAT_TO_DO = (
    "Shorten the message, /clear the messages, start with more room (-c N), or let the oldest part"
    " be forgotten (--context-shift)."
)


@dataclass
class _Answer:
    """The answer as far as it has come."""

    text: str = ""
    result: GenerateResult | None = None


class Chat:
    """A conversation in the terminal, until the person leaves."""

    def __init__(
        self,
        client: "Client",
        info: ModelInfo,
        conversation: Conversation,
        view: View,
        reader: Reader,
    ) -> None:
        self._client = client
        self._conversation = conversation
        self._view = view
        self._reader = reader
        self._state = ChatState(info, client.stats, reader.history)
        self._commands = ChatCommands(conversation, view, self._state)
        self._is_down = False  # the engine died and could not be started again

    def run(self, first_message: str = "", is_single_turn: bool = False) -> None:
        """Answer `first_message` if there is one, then chat. Raises SecondInterrupt."""
        if first_message:
            self._take(first_message)
        while not (is_single_turn and self._state.last_result):
            try:
                line = storable(self._reader.read())
                if self._handle(line) is Next.LEAVE:
                    return
            except SecondInterrupt:
                raise
            except KeyboardInterrupt:
                self._view.say(HOW_TO_LEAVE)
            except EOFError:
                return

    def _handle(self, line: str) -> Next:
        text = line.strip()
        if not text:
            return Next.READ
        if text.startswith("/") and not text.startswith("//"):
            following = self._commands.run(text)
            if following is Next.ANSWER:
                self._answer()
            return following
        self._take(without_quotes(line.removeprefix("/") if text.startswith("//") else line))
        return Next.READ

    def _take(self, message: str) -> None:
        if message.strip():
            self._conversation.ask(message)
            self._answer()

    def _answer(self) -> None:
        """Let the engine answer the open question; print, keep and account for it."""
        with first_interrupt_calls(self._client.cancel):
            if self._is_down and not self._restart():
                self._conversation.take_back()
                return
            answer = _Answer()
            began_s = time.monotonic()
            error = self._try_stream(answer)
            self._conversation.answer(answer.text)
            if error is None:
                self._finish(answer, time.monotonic() - began_s)
            else:
                self._report(error)

    def _try_stream(self, answer: _Answer) -> BuddyrunError | None:
        """Print the answer as it comes; what went wrong, if anything."""
        printer = self._view.answer(self._conversation.settings.show_thinking)
        try:
            self._stream(answer, printer)
        except BuddyrunError as error:
            return error
        finally:
            printer.close()
        return None

    def _stream(self, answer: _Answer, printer: Answer) -> None:
        for item in self._client.generate(self._conversation.request()):
            match item:
                case TextPiece():
                    answer.text += item.text
                    printer.push(item.text)
                case PromptProgress():
                    printer.prompt_progress(item)
                case GenerateResult():
                    answer.result = item

    def _finish(self, answer: _Answer, total_s: float) -> None:
        result = answer.result
        assert result is not None, "an answer ends with its result"
        self._state.last_result = result
        if not answer.text:
            why = (
                "Stopped before" if result.stop_reason == "cancelled" else "The model ended before"
            )
            self._view.say(f"{why} the first word. {self._what_is_left()} /regen tries again.")
        self._view.last_line(
            result, self._conversation.settings.verbose, total_s, self._state.info.load_s
        )

    def _report(self, error: BuddyrunError) -> None:
        self._view.warn(str(error))
        if isinstance(error, InternalError | WorkerDiedError):
            self._say_log()
        if isinstance(error, ContextFullError):
            self._view.say(f"{self._what_is_left()} {_WHAT_TO_DO}")
        elif not isinstance(error, WorkerDiedError | BackendError):  # a device may go on failing
            self._view.say("/regen tries your last message again.")
        elif self._restart():
            for warning in self._state.info.warnings:
                self._view.warn(warning)
            self._view.say("Restarted; your conversation is kept. /regen answers it again.")

    def _what_is_left(self) -> str:
        is_taken_back = self._conversation.has_unanswered
        return "Your message was taken back." if is_taken_back else "The earlier answer is kept."

    def _say_log(self) -> None:
        if self._conversation.settings.verbose:
            self._view.say(self._client.log)

    def _restart(self) -> bool:
        """A new engine for the same conversation. When that fails it is tried again before the
        next answer, so that a chat can at least be saved."""
        self._view.say("Starting the engine again ...")
        try:
            self._state.info = self._client.restart(progress(self._view))
            self._is_down = False
        except (BuddyrunError, CancelledError) as error:
            self._is_down = True
            self._view.status.clear()
            self._view.warn(str(error) or "Stopped.")
            self._view.say(
                "The answered messages are kept: /save FILE writes them; /regen tries again."
            )
        self._view.status.clear()
        return not self._is_down


def progress(view: View) -> Callable[[str, int, int], None]:
    """A callback that shows how far loading is."""

    def show(stage: str, done: int, total: int) -> None:
        view.status.show_progress(stage, done, total)

    return show
