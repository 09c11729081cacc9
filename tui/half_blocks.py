"""Rows of coloured cells as text: two rows of pixels in one row of half blocks, or characters.

Knows codes and colours, not what they mean.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

from rich.color import Color
from rich.segment import Segment
from rich.style import Style

from tui.views import Rgb

_UPPER_HALF = "▀"


@lru_cache(maxsize=4096)
def _style(upper: Rgb, lower: Rgb | None) -> Style:
    color = Color.from_rgb(*upper)
    return Style(color=color, bgcolor=Color.from_rgb(*lower) if lower is not None else None)


def blocks(
    upper: bytes, lower: bytes | None, palette: Sequence[Rgb], cell_width: int
) -> list[Segment]:
    """Segments of two rows of codes; without a lower row the background is left as it is."""
    if lower is None:
        runs = [(code, None, sum(1 for _ in run)) for code, run in groupby(upper)]
    else:
        pairs = groupby(zip(upper, lower, strict=True))
        runs = [(*pair, sum(1 for _ in run)) for pair, run in pairs]  # type: ignore[misc]
    return [
        Segment(
            _UPPER_HALF * (n * cell_width),
            _style(palette[a], palette[b] if b is not None else None),
        )
        for a, b, n in runs
    ]


def characters(codes: bytes, palette: Sequence[Rgb], ramp: str, cell_width: int) -> list[Segment]:
    """Segments of one row of codes, each as its character of `ramp`."""
    return [
        Segment(ramp[code] * (sum(1 for _ in run) * cell_width), _style(palette[code], None))
        for code, run in groupby(codes)
    ]
