"""What the chat's thread has to say, in its order, until the screen takes it. Knows no widget."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from tui.markdown_text import Kind


class ScreenClosedError(Exception):
    """The screen is gone: whoever has something to say should end."""


@dataclass(frozen=True)
class Said:
    """A text of its own."""

    text: str
    kind: Kind


@dataclass(frozen=True)
class AnswerBegan:
    """An answer follows in pieces."""


@dataclass(frozen=True)
class AnswerPiece:
    """The next piece of the answer."""

    text: str
    is_thinking: bool


@dataclass(frozen=True)
class AnswerEnded:
    """No piece follows."""


@dataclass(frozen=True)
class StatusShown:
    """What goes on now, or how the last answer went; "" when there is nothing to tell."""

    text: str


@dataclass(frozen=True)
class Waiting:
    """The chat waits for the next message."""


Saying = Said | AnswerBegan | AnswerPiece | AnswerEnded | StatusShown | Waiting


class ChatFeed:
    """Takes from one thread and gives to another. `on_first` is called in the first one when
    there is something to take again after everything was taken."""

    def __init__(self, on_first: Callable[[], object]) -> None:
        self._on_first = on_first
        self._lock = threading.Lock()
        self._sayings: deque[Saying] = deque()
        self._is_closed = False

    def put(self, saying: Saying) -> None:
        """Add something. Raises ScreenClosedError."""
        with self._lock:
            if self._is_closed:
                raise ScreenClosedError
            is_first = not self._sayings
            self._sayings.append(saying)
        if is_first:
            self._on_first()

    def take(self, n_chars: int) -> list[Saying]:
        """The next sayings, of about so many characters; pieces of an answer are joined."""
        taken: list[Saying] = []
        pieces: list[str] = []
        with self._lock:
            while self._sayings and n_chars > 0:
                saying = self._sayings.popleft()
                if isinstance(saying, AnswerPiece):
                    saying = self._shortened(saying, n_chars)
                    n_chars -= len(saying.text)
                    pieces.append(saying.text)
                    if n_chars > 0 and self._is_piece_next(saying.is_thinking):
                        continue
                    saying = AnswerPiece("".join(pieces), saying.is_thinking)
                    pieces.clear()
                elif isinstance(saying, Said):
                    n_chars -= len(saying.text)
                taken.append(saying)
        return taken

    @property
    def is_empty(self) -> bool:
        """Whether everything was taken."""
        return not self._sayings

    def close(self) -> None:
        """Forget everything; from now on `put` raises."""
        with self._lock:
            self._is_closed = True
            self._sayings.clear()

    def _shortened(self, piece: AnswerPiece, n_chars: int) -> AnswerPiece:
        """The piece, without what is too much for now."""
        if len(piece.text) > n_chars:
            self._sayings.appendleft(AnswerPiece(piece.text[n_chars:], piece.is_thinking))
            return AnswerPiece(piece.text[:n_chars], piece.is_thinking)
        return piece

    def _is_piece_next(self, is_thinking: bool) -> bool:
        following = self._sayings[0] if self._sayings else None
        return isinstance(following, AnswerPiece) and following.is_thinking == is_thinking
