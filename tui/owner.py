"""What a monitor may ask of the run that it belongs to. Knows no widget."""

from dataclasses import dataclass
from typing import Protocol

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
