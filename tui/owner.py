"""What a monitor may ask of the run that it belongs to, and who asks. Knows no widget."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Protocol

from runner.client import BuddyrunError
from tui.words import percent


class Owner(Protocol):
    """A run that can be changed while it goes on. Both may block for a moment."""

    def change(
        self,
        is_exact: bool | None = None,
        buddy: str | None = None,
        buddy_budget: float | None = None,
        is_paused: bool | None = None,
    ) -> object:
        """Change what is not None. Raises BuddyrunError that says why it cannot be."""
        ...


@dataclass(frozen=True)
class Change:
    """One change that a person asked for."""

    is_exact: bool | None = None
    buddy: str | None = None
    buddy_budget: float | None = None
    is_paused: bool | None = None

    def ask(self, owner: Owner) -> None:
        """Ask for it; returns when it is so."""
        owner.change(self.is_exact, self.buddy, self.buddy_budget, self.is_paused)

    @property
    def words(self) -> str:
        """What is so when it is done."""
        if self.is_exact is not None:
            return "Exact: nobody stands in." if self.is_exact else "Others may stand in again."
        if self.buddy is not None:
            return f"Stand-ins are chosen by {self.buddy} now."
        if self.buddy_budget is not None:
            if self.buddy_budget >= 1.0:
                return "Stand-ins may carry all of the router's weight."
            return f"Stand-ins may carry {percent(self.buddy_budget)} of the router's weight."
        return "Paused between two tokens." if self.is_paused else "It goes on."


class Asker:
    """Asks an owner for one change after the other, in a thread of its own.

    An owner that does not answer keeps nobody waiting, nor the program from ending.
    """

    def __init__(self, on_answer: Callable[[str, bool], object]) -> None:
        """`on_answer` gets what is so now, or why not and True; it is called in the thread."""
        self._on_answer = on_answer
        self._wanted: SimpleQueue[tuple[Owner, Change] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="changes", daemon=True)

    def ask(self, owner: Owner, change: Change) -> None:
        """Ask when what was asked before is answered."""
        self._wanted.put((owner, change))
        if self._thread.ident is None:
            self._thread.start()

    def stop(self) -> None:
        """Ask no more."""
        self._wanted.put(None)

    def _run(self) -> None:
        while (wanted := self._wanted.get()) is not None:
            answer = _answer(*wanted)
            with contextlib.suppress(RuntimeError):  # the program has ended meanwhile
                self._on_answer(*answer)


def _answer(owner: Owner, change: Change) -> tuple[str, bool]:
    try:
        change.ask(owner)
    except BuddyrunError as error:
        return str(error), True
    except Exception as error:  # the edge of the thread: a bug is told, and the screen stays
        return f"It could not be changed: {type(error).__name__}: {error}", True
    return change.words, False
