"""What the shown view's colours mean, in words beside the colours themselves."""

from textual.content import Content
from textual.reactive import reactive
from textual.widgets import Static

from tui.heat_grid import HeatGrid
from tui.heat_layout import HeatLayout
from tui.views import N_CODES, SUBSTITUTIONS, VIEWS, Rgb
from tui.widgets.pairs import wrapped

_ROOM_FOR_WORDS = 50  # columns; the view's name says nearly the same


class Legend(Static):
    """One or two lines."""

    grid: reactive[HeatGrid] = reactive(HeatGrid(0))
    places: reactive[HeatLayout] = reactive(HeatLayout(0, 0, 1, 1, 1))
    n_rows_shown: reactive[int] = reactive(0)

    def __init__(self, is_ascii: bool, id: str | None = None) -> None:
        super().__init__(id=id, markup=False)
        self._is_ascii = is_ascii
        self._n_lines = 1

    def watch_grid(self) -> None:
        self._fit()

    def watch_places(self) -> None:
        self._fit()

    def on_resize(self) -> None:
        self._fit()

    def _fit(self) -> None:
        """Take as many lines as the words need; they seldom change."""
        n_lines = self.render().plain.count("\n") + 1
        if n_lines != self._n_lines:
            self._n_lines = n_lines
            self.refresh(layout=True)

    def render(self) -> Content:
        if self.grid.remark:
            return Content(self.grid.remark)
        parts = [*self._ramps(), Content.styled(self.grid.scale, "$text-muted")]
        if self.places.experts_per_column > 1:
            words = f"strongest of {self.places.experts_per_column} experts a column"
            parts.append(Content.styled(words, "$text-muted"))
        if self.n_rows_shown < self.places.n_rows:
            n, n_all = self.n_rows_shown * self.places.layers_per_row, self.places.n_layer
            parts.append(Content.styled(f"{n} of {n_all} layers, scrolls", "$text-muted"))
        return Content("\n").join(wrapped(parts, self.size.width))

    def _ramps(self) -> list[Content]:
        if self.grid.view == SUBSTITUTIONS:
            return [self._ramp(0) + Content(" replaced"), self._ramp(1) + Content(" stood in")]
        has_room = self.size.width >= _ROOM_FOR_WORDS
        return [self._ramp(0) + Content(f" {VIEWS[self.grid.view].shows}" if has_room else "")]

    def _ramp(self, kind: int) -> Content:
        """The levels of a kind from dark to bright, three of them where there are so many."""
        view = VIEWS[self.grid.view]
        palette, characters = view.palette, view.characters
        codes = [0, N_CODES - 2] if not view.has_levels else [0, 4 + kind, 10 + kind, 18 + kind]
        return Content("").join(
            Content.styled(characters[code] if self._is_ascii else "█", _style(palette[code]))
            for code in codes
        )


def _style(color: Rgb) -> str:
    return "rgb({},{},{})".format(*color)
