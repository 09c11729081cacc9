"""Where every expert is on the heat map, and which expert is under a place. Pure arithmetic.

Layers that do not fit are scrolled to; experts that do not fit share a column, which shows the
strongest of them.
"""

from dataclasses import dataclass

MAX_CELL_WIDTH = 3  # where the layers' bars need room too
_GAP = 1  # between the layers' numbers and the cells


@dataclass(frozen=True)
class HeatLayout:
    """The places of n_layer x n_expert cells."""

    n_layer: int
    n_expert: int
    layers_per_row: int  # of text: 2 = half blocks
    experts_per_column: int
    cell_width: int

    @property
    def n_columns(self) -> int:
        return -(-self.n_expert // self.experts_per_column)

    @property
    def n_rows(self) -> int:
        return -(-self.n_layer // self.layers_per_row)

    @property
    def label_width(self) -> int:
        """Of a layer's number, with the gap after it."""
        return len(str(max(0, self.n_layer - 1))) + _GAP

    @property
    def width(self) -> int:
        return self.label_width + self.n_columns * self.cell_width

    def layers_of(self, row: int) -> tuple[int, int | None]:
        """The upper and the lower layer of a row of text; None below the last one."""
        upper = row * self.layers_per_row
        if self.layers_per_row == 1:
            return upper, upper
        return upper, upper + 1 if upper + 1 < self.n_layer else None

    def row_of(self, layer: int) -> int:
        return layer // self.layers_per_row

    def column_of(self, expert: int) -> int:
        return expert // self.experts_per_column

    def experts_of(self, column: int) -> range:
        first = column * self.experts_per_column
        return range(first, min(first + self.experts_per_column, self.n_expert))

    def place_at(self, x: float, y: float) -> tuple[int, int] | None:
        """The layer and the column at a place of the whole map; a fraction of y tells a row's two
        layers apart. None beside the cells."""
        column = int(x - self.label_width) // self.cell_width
        layer = int(y * self.layers_per_row)
        if x < self.label_width or column >= self.n_columns or not 0 <= layer < self.n_layer:
            return None
        return layer, column

    def columns(self, codes: bytes) -> bytes:
        """The codes of a layer's columns: of each the strongest."""
        step = self.experts_per_column
        if step == 1:
            return codes
        return bytes(max(codes[begin : begin + step]) for begin in range(0, len(codes), step))


def fit(
    n_layer: int,
    n_expert: int,
    width: int,
    n_rows: int,
    is_ascii: bool,
    max_cell_width: int = MAX_CELL_WIDTH,
) -> HeatLayout:
    """The best layout for a room of `width` columns and `n_rows` rows of text.

    A layer has a row of its own where all layers fit so, and without half blocks.
    """
    layers_per_row = 1 if is_ascii or n_layer <= n_rows else 2
    room = max(1, width - len(str(max(0, n_layer - 1))) - _GAP)
    if n_expert > room:
        return HeatLayout(n_layer, n_expert, layers_per_row, -(-n_expert // room), 1)
    cell_width = max(1, min(max_cell_width, room // max(1, n_expert)))
    return HeatLayout(n_layer, n_expert, layers_per_row, 1, cell_width)
