"""What is shown in a room that is too small for a monitor."""

from textual.content import Content
from textual.widget import Widget


class TooSmall(Widget):
    """One sentence."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self._needed = width, height

    def render(self) -> Content:
        width, height = self._needed
        return Content(f"Too small: the monitor needs {width} x {height}.")
