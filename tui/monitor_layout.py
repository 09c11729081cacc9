"""How much room every part of the monitor gets. Pure arithmetic; knows no widget."""

from dataclasses import dataclass

from tui.heat_layout import MAX_CELL_WIDTH, fit

MIN_WIDTH, MIN_HEIGHT = 38, 12
_SIDE_BY_SIDE_WIDTH = 70  # below it, everything is in one column
_FULL_WIDTH, _FULL_HEIGHT = 100, 30
_WIDE_WIDTH, _WIDE_HEIGHT = 160, 45
_PANELS_WIDTH = 35  # at least, beside the map
_BARS_WIDTH = 8  # at least, with the gap before them
_CELL_WIDTHS = {"compact": MAX_CELL_WIDTH, "tall": MAX_CELL_WIDTH, "full": 4, "wide": 6}
_FIXED_ROWS = {"narrow": 9, "compact": 7, "tall": 12, "full": 11, "wide": 12}
"""Rows above and below the map: headline, views, legend, the cell's words."""


@dataclass(frozen=True)
class Room:
    """What fits into a monitor of a size."""

    mode: str  # "tiny", "narrow", "compact", "tall", "full", "wide": the name of a style class
    map_width: int  # of the labels and cells
    cell_width: int  # at most
    n_rows: int  # of text, for the map
    left_width: int  # of the column with the map and the layers' bars; 0 = all of it


def room(width: int, height: int, n_layer: int, n_expert: int, is_ascii: bool) -> Room:
    """The room in a monitor of this size for a model of this shape."""
    mode = _mode(width, height)
    if mode == "tiny":
        return Room(mode, 0, 1, 0, 0)
    n_rows = max(3, height - _FIXED_ROWS[mode])
    if mode == "narrow":
        n_rows = max(3, min(n_rows // 2, 16))
        most = width - _BARS_WIDTH
        places = fit(n_layer, n_expert, most, n_rows, is_ascii)
        return Room(mode, places.width, MAX_CELL_WIDTH, n_rows, 0)
    most = width - _PANELS_WIDTH - _BARS_WIDTH - 1
    cell_width = _CELL_WIDTHS[mode]
    places = fit(n_layer, n_expert, most, n_rows, is_ascii, cell_width)
    left = max(places.width + _BARS_WIDTH, width // 2)
    return Room(mode, places.width, cell_width, n_rows, left)


def _mode(width: int, height: int) -> str:
    if width < MIN_WIDTH or height < MIN_HEIGHT:
        return "tiny"
    if width < _SIDE_BY_SIDE_WIDTH:
        return "narrow"
    if width >= _WIDE_WIDTH and height >= _WIDE_HEIGHT:
        return "wide"
    if width >= _FULL_WIDTH and height >= _FULL_HEIGHT:
        return "full"
    return "tall" if height >= _FULL_HEIGHT else "compact"
