"""A box of text that is made from the latest values and drawn again only when it differs."""

from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static

from runner.client import Frame


class Panel(Static):
    """Children say in `text` what is in it. What else they show is set before the frame."""

    frame: reactive[Frame | None] = reactive[Frame | None](None, repaint=False)

    def __init__(self, is_ascii: bool, title: str = "", id: str | None = None) -> None:
        super().__init__(id=id, markup=False)
        self.is_ascii = is_ascii
        self.border_title = Content(title) if title else None
        self._drawn = Content()

    def text(self, frame: Frame, width: int) -> Content:
        """What is in the panel at this width."""
        raise NotImplementedError

    def text_before(self) -> Content:
        """What is in it before the first frame."""
        return Content()

    def watch_frame(self) -> None:
        self.redraw()

    def on_resize(self) -> None:
        self.redraw()

    def redraw(self) -> None:
        """Show the text of the values now."""
        width = self.content_size.width
        if width < 1:
            return
        text = self.text(self.frame, width) if self.frame is not None else self.text_before()
        if text.is_same(self._drawn):
            return
        grows = text.plain.count("\n") != self._drawn.plain.count("\n")
        self._drawn = text
        self.update(text, layout=grows)

    @property
    def plain(self) -> str:
        """What can be read now."""
        return self._drawn.plain
