"""A bar for every layer beside the heat map, in the same rows: what became of its pairs."""

from textual.geometry import Region
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from runner.client import StatsSnapshot
from tui.drawing import split
from tui.half_blocks import blocks, characters
from tui.heat_layout import HeatLayout
from tui.pair_classes import PAIR_CLASSES, pairs_of

_PALETTE = tuple(each.color for each in PAIR_CLASSES)
_LETTERS = "".join(each.letter for each in PAIR_CLASSES)

Shares = tuple[tuple[float, ...], ...]  # (n_layer, 5); () for a layer without pairs


def layer_shares(stats: StatsSnapshot | None) -> Shares:
    """What became of every layer's pairs since the model was loaded."""
    if stats is None:
        return ()
    layers = zip(*pairs_of(stats), strict=True)
    return tuple(
        tuple(n / total for n in counts) if (total := sum(counts)) else () for counts in layers
    )


class LayerBars(Widget):
    """Follows the heat map's places and its scrolling."""

    shares: reactive[Shares] = reactive((), init=False, repaint=False)
    places: reactive[HeatLayout] = reactive(HeatLayout(0, 0, 1, 1, 1))
    first_row: reactive[int] = reactive(0)

    def __init__(self, is_ascii: bool, id: str | None = None) -> None:
        super().__init__(id=id)
        self._is_ascii = is_ascii
        self._rows: tuple[bytes, ...] = ()  # codes of every layer, as wide as the widget

    def watch_shares(self) -> None:
        before, self._rows = self._rows, self._codes()
        if len(before) != len(self._rows):
            self.refresh()
            return
        for layer, (old, new) in enumerate(zip(before, self._rows, strict=True)):
            if old != new:
                row = self.places.row_of(layer) - self.first_row
                self.refresh(Region(0, row, self.size.width, 1))

    def on_resize(self) -> None:
        self._rows = self._codes()
        self.refresh()

    def render_line(self, y: int) -> Strip:
        width, row = self.size.width, y + self.first_row
        if row >= self.places.n_rows or len(self._rows) != self.places.n_layer:
            return Strip.blank(width, self.rich_style)
        upper, lower = self.places.layers_of(row)
        first = self._rows[upper]
        second = self._rows[lower] if lower is not None else None
        if not first:
            return Strip.blank(width, self.rich_style)
        if self._is_ascii:
            segments = characters(first, _PALETTE, _LETTERS, 1)
        else:
            segments = blocks(first, second or None, _PALETTE, 1)
        return Strip(segments, width)

    def _codes(self) -> tuple[bytes, ...]:
        width = self.size.width
        return tuple(
            b"".join(bytes([code]) * n for code, n in enumerate(split(shares, width)))
            if shares
            else b""
            for shares in self.shares
        )
