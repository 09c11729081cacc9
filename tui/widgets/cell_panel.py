"""What is known of the expert under the cursor or the mouse, in sentences."""

from textual.content import Content
from textual.reactive import reactive

from runner.client import Frame
from tui.widgets.panel import Panel
from tui.words import cell_words


class CellPanel(Panel):
    """A title and as many sentences as there is room for."""

    cell: reactive[tuple[int, int]] = reactive((0, 0))  # layer, expert

    def watch_cell(self) -> None:
        self.redraw()

    def text(self, frame: Frame, width: int) -> Content:
        counts = frame.stats.experts if frame.stats is not None else None
        layer, expert = self.cell
        if frame.stats is None or counts is None or layer >= len(counts.missed):
            return Content()
        if expert >= len(counts.missed[layer]):
            return Content()
        words = cell_words(frame.stats, layer, expert)
        title = Content.styled(f"{words.title}: ", "bold")
        return title + Content(" ".join(words.sentences))
