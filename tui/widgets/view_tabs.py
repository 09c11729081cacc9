"""The names of the views with their keys, the shown one marked. A click chooses."""

from dataclasses import dataclass

from textual import events
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.widgets import Static

from tui.views import VIEWS


class ViewTabs(Static):
    """One line."""

    view: reactive[int] = reactive(0)

    @dataclass
    class Chosen(Message):
        """A view was clicked."""

        view: int

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, markup=False)

    def render(self) -> Content:
        parts = []
        for view, name in enumerate(self._names()):
            style = "bold reverse" if view == self.view else "$text-muted"
            parts.append(Content.styled(name, style))
        return Content(" ").join(parts)

    def on_click(self, event: events.Click) -> None:
        begin = 0
        for view, name in enumerate(self._names()):
            if begin <= event.x < begin + len(name):
                self.post_message(self.Chosen(view))
            begin += len(name) + 1

    def _names(self) -> list[str]:
        """As long as there is room for."""
        for names in (
            [f" {n} {view.name} " for n, view in enumerate(VIEWS, 1)],
            [f"{n} {view.name}" for n, view in enumerate(VIEWS, 1)],
            [f"{n} {view.short}" for n, view in enumerate(VIEWS, 1)],
            [f"{n}{view.short}" for n, view in enumerate(VIEWS, 1)],
        ):
            if sum(map(len, names)) + len(names) - 1 <= self.size.width:
                return names
        return [str(n) for n in range(1, len(VIEWS) + 1)]
