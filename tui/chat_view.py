"""The chat's side of the screen: a view and a reader for `Chat`, which runs in a thread of its own.

Everything goes into a `ChatFeed`; nothing here touches a widget. Text is made visible here.
"""

from queue import SimpleQueue

from runner.client import (
    GenerateResult,
    LineHistory,
    ModelInfo,
    Part,
    PromptProgress,
    ThinkingSplitter,
    eight_labels,
    info_lines,
    remarks_on_end,
    summary,
    version,
    visible,
)
from tui.chat_feed import (
    AnswerBegan,
    AnswerEnded,
    AnswerPiece,
    ChatFeed,
    Said,
    StatusShown,
    Waiting,
)
from tui.markdown_text import Kind

HINT = "/? lists the commands, F1 the keys, Esc stops an answer, /bye leaves"
ANSWERING = "answering; Esc stops"
READING = "reading the prompt"
_BAR_CELLS = 16


class ScreenStatus:
    """Says in the status line what goes on."""

    def __init__(self, feed: ChatFeed) -> None:
        self._feed = feed

    def show(self, text: str) -> None:
        """Put a text of ours in the line."""
        self._feed.put(StatusShown(text))

    def show_progress(self, label: str, done: int, total: int) -> None:
        """Put a bar in the line."""
        share = min(max(done / total, 0.0), 1.0) if total > 0 else 0.0
        n_full = round(share * _BAR_CELLS)
        bar = "#" * n_full + "-" * (_BAR_CELLS - n_full)
        self.show(f"{visible(label)} [{bar}] {share:.0%}; Esc stops")

    def clear(self) -> None:
        """Empty the line."""
        self.show("")


class ScreenView:
    """A `View` of the chat for `Chat`."""

    def __init__(self, feed: ChatFeed) -> None:
        self._feed = feed
        self.status = ScreenStatus(feed)

    def banner(self, info: ModelInfo) -> None:
        """What is running and how to get help."""
        lines = [f"buddyrun {version()}", *info_lines(info)]
        self.say("\n".join(lines))
        for note in (*info.warnings, *info.notes):
            self.warn(note)
        self._feed.put(Said(HINT, Kind.FIGURES))

    def question(self, text: str) -> None:
        """A message of the person that was not typed here."""
        self._feed.put(Said(visible(text), Kind.QUESTION))

    def say(self, text: str) -> None:
        """A remark of ours: it may quote names and values from outside."""
        self._feed.put(Said(visible(text), Kind.REMARK))

    def warn(self, text: str) -> None:
        """A remark that should not be overlooked."""
        self._feed.put(Said(visible(text), Kind.WARNING))

    def answer(self, show_thinking: bool) -> "ScreenAnswer":
        """Begin an answer."""
        return ScreenAnswer(self._feed, self.status, show_thinking)

    def last_line(
        self, result: GenerateResult, verbose: bool, total_s: float, load_s: float
    ) -> None:
        """Speeds and context use: in the status line, and all of it in the chat if asked for."""
        if verbose:
            labels = "\n".join(eight_labels(result, total_s, load_s))
            self._feed.put(Said(visible(labels), Kind.FIGURES))
        for remark in remarks_on_end(result, has_reader=True):
            self.warn(remark)
        self.status.show(summary(result))


class ScreenAnswer:
    """Takes one answer as it streams in."""

    def __init__(self, feed: ChatFeed, status: ScreenStatus, show_thinking: bool) -> None:
        self._feed = feed
        self._status = status
        self._show_thinking = show_thinking
        self._splitter = ThinkingSplitter()
        self._last = ""  # the last character that was shown
        self._shown_status = ""
        feed.put(AnswerBegan())
        self._say(f"{READING}; Esc stops")

    def prompt_progress(self, progress: PromptProgress) -> None:
        """Show how far the prompt is."""
        done, total = progress.done - progress.n_cached, progress.total - progress.n_cached
        if done < total:
            self._status.show_progress(READING, done, total)

    def push(self, text: str) -> None:
        """The next piece."""
        self._put(self._splitter.push(text))

    def close(self) -> None:
        """Give what was held back."""
        self._put(self._splitter.flush())
        self._feed.put(AnswerEnded())
        self._status.clear()

    def _put(self, parts: list[Part]) -> None:
        for part in parts:
            if part.is_thinking and not self._show_thinking:
                self._say("thinking ...; Esc stops")
                continue
            self._say(ANSWERING)
            text = visible(part.text, self._last)
            self._last = part.text[-1:] or self._last
            self._feed.put(AnswerPiece(text, part.is_thinking))

    def _say(self, text: str) -> None:
        if text != self._shown_status:
            self._shown_status = text
            self._status.show(text)


class ScreenReader:
    """A `Reader` that gets its lines from the screen."""

    def __init__(self, history: LineHistory, feed: ChatFeed) -> None:
        self.history = history
        self._feed = feed
        self._lines: SimpleQueue[str | None] = SimpleQueue()

    def read(self) -> str:
        """The next message. Raises EOFError when the person leaves."""
        self._feed.put(Waiting())
        line = self._lines.get()
        if line is None:
            raise EOFError
        self.history.add(line)
        return line

    def give(self, line: str | None) -> None:
        """The next line for `read`; None ends the chat. From any thread."""
        self._lines.put(line)
