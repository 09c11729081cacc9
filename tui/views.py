"""The views of the heat map: their names, what they show, their colours. Knows no widget.

A cell's code is 2 * level + kind: levels 0 (nothing) to 9, kind 1 only where a view shows two
things. Brightness rises with the level in every ramp, so that hues are not needed to read one.
"""

from dataclasses import dataclass
from functools import cached_property

N_LEVELS = 10
N_CODES = 2 * N_LEVELS
CURSOR = N_CODES  # the code of the chosen cell

ASCII_LEVELS = " .:-=+*#%@"
ASCII_SECOND = " ,;i1oa0&8"  # of kind 1
ASCII_CURSOR = "X"

Rgb = tuple[int, int, int]
_EMPTY: Rgb = (38, 42, 51)
_CURSOR_COLOR: Rgb = (255, 95, 215)


@dataclass(frozen=True)
class View:
    """One picture of all experts."""

    name: str
    short: str
    shows: str  # what is bright, in words
    anchors: tuple[Rgb, ...]  # colours from the darkest to the brightest level
    second: tuple[Rgb, ...] = ()  # of kind 1
    has_levels: bool = True  # else a cell is only on or off

    @cached_property
    def palette(self) -> tuple[Rgb, ...]:
        """The colour of every code, the cursor's last."""
        first = _ramp(self.anchors)
        second = _ramp(self.second or self.anchors)
        mixed = [color for pair in zip(first, second, strict=True) for color in pair]
        return (*mixed, _CURSOR_COLOR)

    @cached_property
    def characters(self) -> str:
        """The ASCII character of every code, the cursor's last."""
        pairs = zip(ASCII_LEVELS, ASCII_SECOND, strict=True)
        return "".join(first + second for first, second in pairs) + ASCII_CURSOR


def _ramp(anchors: tuple[Rgb, ...]) -> list[Rgb]:
    """The empty colour, then N_LEVELS - 1 colours along the anchors."""
    last = len(anchors) - 1
    colors = [_EMPTY]
    for level in range(N_LEVELS - 1):
        place = level / (N_LEVELS - 2) * last
        index = min(int(place), last - 1) if last else 0
        colors.append(_mixed(anchors[index], anchors[min(index + 1, last)], place - index))
    return colors


def _mixed(first: Rgb, second: Rgb, part: float) -> Rgb:
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(first, second, strict=True))
    return red, green, blue


VIEWS = (
    View("resident", "res", "in memory now", ((46, 196, 160),), has_levels=False),
    View(
        "activations",
        "act",
        "chosen by the router",
        ((68, 58, 131), (49, 104, 142), (33, 145, 140), (94, 201, 98), (253, 231, 37)),
    ),
    View(
        "misses",
        "miss",
        "chosen but not in memory",
        ((87, 32, 99), (160, 48, 96), (213, 84, 64), (245, 140, 40), (252, 230, 150)),
    ),
    View(
        "substitutions",
        "sub",
        "replaced by others",
        ((110, 70, 0), (230, 159, 0), (255, 224, 150)),
        second=((0, 60, 110), (0, 114, 178), (150, 215, 255)),
    ),
    View(
        "loads",
        "load",
        "read into a slot",
        ((24, 60, 90), (40, 110, 160), (86, 180, 233), (225, 245, 255)),
    ),
)
RESIDENT, ACTIVATIONS, MISSES, SUBSTITUTIONS, LOADS = range(len(VIEWS))
