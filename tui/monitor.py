"""A line about the engine."""

from textual.app import RenderResult
from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

from runner.client import Client, Frame


class Monitor(Widget):
    """Shows the phase of the last frame."""

    frame: reactive[Frame | None] = reactive(None)
    ended: reactive[str] = reactive("")
    owner: Client | None = None

    def __init__(
        self, owner: Client | None = None, is_ascii: bool = False, id: str | None = None
    ) -> None:
        super().__init__(id=id)
        self.owner = owner

    def show(self, frame: Frame) -> None:
        """The next moment of an engine."""
        self.frame, self.ended = frame, ""

    def show_ended(self, reason: str) -> None:
        """No frame follows, for this reason; the last one stays."""
        self.ended = reason

    def render(self) -> RenderResult:
        """The line."""
        phase = self.frame.phase if self.frame else "no frame yet"
        return Content(f"{phase} {'ended: ' + self.ended if self.ended else ''}")
