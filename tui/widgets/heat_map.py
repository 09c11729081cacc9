"""The map of all experts: a row of cells for every layer, a cell for every expert. It scrolls.

Knows codes and places, not what they count. Only rows whose codes changed are drawn again.
"""

from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from tui.half_blocks import blocks, characters
from tui.heat_grid import HeatGrid
from tui.heat_layout import HeatLayout, fit
from tui.views import CURSOR, VIEWS

_MOVES = {
    "up": (-1, 0),
    "down": (1, 0),
    "left": (0, -1),
    "right": (0, 1),
    "pageup": (-8, 0),
    "pagedown": (8, 0),
    "home": (0, -1 << 20),
    "end": (0, 1 << 20),
}
_CHOSEN, _OTHERS = Style(bold=True), Style(dim=True)


class HeatMap(ScrollView, can_focus=True):
    """Shows a `HeatGrid`; arrows and the mouse choose a cell."""

    ALLOW_SELECT = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move('up')", "cell", key_display="arrows"),
        Binding("down", "move('down')", "Layer down", show=False),
        Binding("left", "move('left')", "Expert left", show=False),
        Binding("right", "move('right')", "Expert right", show=False),
        Binding("pageup", "move('pageup')", "Eight layers up", show=False),
        Binding("pagedown", "move('pagedown')", "Eight layers down", show=False),
        Binding("home", "move('home')", "First expert", show=False),
        Binding("end", "move('end')", "Last expert", show=False),
    ]

    grid: reactive[HeatGrid] = reactive(HeatGrid(0), init=False, repaint=False)
    places: reactive[HeatLayout] = reactive(HeatLayout(0, 0, 1, 1, 1), init=False, repaint=False)
    chosen: reactive[tuple[int, int]] = reactive((0, 0), init=False, repaint=False)  # layer, expert

    @dataclass
    class CellShown(Message):
        """Another cell is asked about: by the cursor, or by the mouse."""

        layer: int
        expert: int

        def can_replace(self, message: Message) -> bool:
            return isinstance(message, HeatMap.CellShown)

    def __init__(self, is_ascii: bool, id: str | None = None) -> None:
        super().__init__(id=id)
        self._is_ascii = is_ascii
        self._strips: dict[int, Strip] = {}
        self._base: Style | None = None

    def make_room(
        self, n_layer: int, n_expert: int, width: int, n_rows: int, cell_width: int
    ) -> None:
        """Place the cells of such a model in this room."""
        self.places = fit(n_layer, n_expert, width, n_rows, self._is_ascii, cell_width)
        self.chosen = self._inside(*self.chosen)

    def watch_places(self) -> None:
        self._strips.clear()
        self.virtual_size = Size(self.places.width, self.places.n_rows)
        self.refresh(layout=True)

    def watch_grid(self, before: HeatGrid, now: HeatGrid) -> None:
        if before.view != now.view or len(before.rows) != len(now.rows):
            self._strips.clear()
            self.refresh()
            return
        changed = {
            self.places.row_of(layer)
            for layer, (old, new) in enumerate(zip(before.rows, now.rows, strict=True))
            if old != new
        }
        self._draw_again(changed)

    def watch_chosen(self, before: tuple[int, int], now: tuple[int, int]) -> None:
        self._draw_again({self.places.row_of(before[0]), self.places.row_of(now[0])})
        row = self.places.row_of(now[0])
        self.scroll_to_region(Region(0, row, 1, 1), animate=False, force=True)
        self.post_message(self.CellShown(*now))

    def action_move(self, direction: str) -> None:
        """Choose a neighbour of the chosen cell."""
        layers, experts = _MOVES[direction]
        self.chosen = self._inside(self.chosen[0] + layers, self.chosen[1] + experts)

    def on_mouse_move(self, event: events.MouseMove) -> None:
        cell = self._cell_under(event)
        self.post_message(self.CellShown(*(cell or self.chosen)))

    def on_leave(self) -> None:
        self.post_message(self.CellShown(*self.chosen))

    def on_click(self, event: events.Click) -> None:
        """Choose what was clicked; a second click chooses the row's other layer."""
        cell = self._cell_under(event)
        if cell is None:
            return
        lower = self.places.layers_of(self.places.row_of(cell[0]))[1]
        self.chosen = (lower, cell[1]) if cell == self.chosen and lower is not None else cell

    def render_line(self, y: int) -> Strip:
        row = y + self.scroll_offset.y
        strip = self._strips.get(row)
        if strip is None:
            strip = self._strips[row] = self._strip(row)
        return strip

    def on_resize(self) -> None:
        self._strips.clear()

    def notify_style_update(self) -> None:
        self._strips.clear()
        self._base = None
        super().notify_style_update()

    def _strip(self, row: int) -> Strip:
        if self._base is None:
            self._base = self.rich_style  # which costs more than a row of cells
        width = self.size.width
        if row >= self.places.n_rows or len(self.grid.rows) != self.places.n_layer:
            return Strip.blank(width, self._base)
        upper, lower = self.places.layers_of(row)
        label = self._label(upper, lower, self._base)
        strip = Strip([label, *self._cells(upper, lower)], self.places.width)
        return strip.adjust_cell_length(width, self._base)

    def _cells(self, upper: int, lower: int | None) -> list[Segment]:
        view, width = VIEWS[self.grid.view], self.places.cell_width
        if self._is_ascii:
            return characters(self._codes(upper), view.palette, view.characters, width)
        below = self._codes(lower) if lower is not None else None
        return blocks(self._codes(upper), below, view.palette, width)

    def _label(self, upper: int, lower: int | None, base: Style) -> Segment:
        """The number of a row's layer: of the chosen one, else of the upper one."""
        is_chosen = self.chosen[0] in (upper, lower)
        layer = self.chosen[0] if is_chosen else upper
        style = base + (_CHOSEN if is_chosen else _OTHERS)
        return Segment(f"{layer:>{self.places.label_width - 1}} ", style)

    def _codes(self, layer: int) -> bytes:
        """The codes of a layer's columns, the chosen one's replaced."""
        codes = self.places.columns(self.grid.rows[layer])
        if layer != self.chosen[0]:
            return codes
        column = self.places.column_of(self.chosen[1])
        return codes[:column] + bytes([CURSOR]) + codes[column + 1 :]

    def _cell_under(self, event: events.MouseEvent) -> tuple[int, int] | None:
        """The cell under the mouse; of a column of many experts the strongest."""
        y = event.pointer_y + self.scroll_offset.y
        place = self.places.place_at(event.pointer_x, y)
        if place is None or place[0] >= len(self.grid.rows):
            return None
        layer, column = place
        codes = self.grid.rows[layer]
        return layer, max(self.places.experts_of(column), key=lambda expert: codes[expert])

    def _inside(self, layer: int, expert: int) -> tuple[int, int]:
        return (
            max(0, min(layer, self.places.n_layer - 1)),
            max(0, min(expert, self.places.n_expert - 1)),
        )

    def _draw_again(self, rows: set[int]) -> None:
        for row in rows:
            self._strips.pop(row, None)
            self.refresh_line(row)
