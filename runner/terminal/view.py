"""What a chat needs of whoever shows it: `chat_view` is one for plain terminals. Shows nothing."""

from typing import Protocol

from runner.protocol import GenerateResult, PromptProgress


class Status(Protocol):
    """Where it says what goes on."""

    def show_progress(self, label: str, done: int, total: int) -> None:
        """Say how far it is."""

    def clear(self) -> None:
        """Say nothing any more."""


class Answer(Protocol):
    """Takes one answer as it streams in."""

    def prompt_progress(self, progress: PromptProgress) -> None:
        """The prompt is so far."""

    def push(self, text: str) -> None:
        """The next piece."""

    def close(self) -> None:
        """The answer is over, whatever ended it."""


class View(Protocol):
    """Shows a chat."""

    @property
    def status(self) -> Status:
        """Where it says what goes on."""

    def say(self, text: str) -> None:
        """A remark of ours: it may quote names and values from outside."""

    def warn(self, text: str) -> None:
        """A remark that should not be overlooked."""

    def answer(self, show_thinking: bool) -> Answer:
        """Begin an answer."""

    def last_line(
        self, result: GenerateResult, verbose: bool, total_s: float, load_s: float
    ) -> None:
        """Speeds and context use after an answer, and why it ended if not by itself."""
