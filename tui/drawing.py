"""Bars, gauges and sparklines as plain text. Knows neither colours nor what is drawn."""

from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_LEVELS = " ▁▂▃▄▅▆▇█"
_ASCII_LEVELS = " .:-=+*#%@"


def gauge(share: float, width: int, is_ascii: bool) -> tuple[str, str]:
    """A bar of `width` cells in two parts: what is filled, and what is left."""
    share = min(1.0, max(0.0, share))
    if is_ascii:
        n = round(share * width)
        return "#" * n, "-" * (width - n)
    eighths = round(share * width * 8)
    full, part = divmod(eighths, 8)
    filled = "█" * full + (_EIGHTHS[part] if part else "")
    return filled, "░" * (width - len(filled))


def split(shares: Sequence[float], width: int) -> list[int]:
    """Whole cells for shares: they add up to `width` when the shares add up to 1, and nothing
    that is there at all gets none, while there is room."""
    exact = [max(0.0, share) * width for share in shares]
    cells = [int(value) for value in exact]
    left = round(sum(exact)) - sum(cells)
    by_rest = sorted(range(len(exact)), key=lambda i: cells[i] - exact[i])
    for index in by_rest[:left]:
        cells[index] += 1
    for index, value in enumerate(exact):
        largest = max(range(len(cells)), key=cells.__getitem__, default=0)
        if value > 0 and not cells[index] and cells[largest] > 1:
            cells[index] += 1
            cells[largest] -= 1
    return cells


def sparkline(
    values: Sequence[float | None], width: int, height: int, top: float, is_ascii: bool
) -> list[str]:
    """The latest `width` values as rows of text, the upper one first; `top` is a full column.

    None is a moment without a value; a value of 0 is the lowest mark.
    """
    latest = [*[None] * (width - len(values)), *values[-width:]] if width > 0 else []
    ramp = _ASCII_LEVELS if is_ascii else _LEVELS
    steps = len(ramp) - 1
    heights = [_steps(value, top, steps * height) for value in latest]
    return [
        "".join(ramp[min(steps, max(0, n - steps * row))] for n in heights)
        for row in reversed(range(height))
    ]


def _steps(value: float | None, top: float, n_steps: int) -> int:
    if value is None:
        return 0
    return max(1, min(n_steps, round(value / top * n_steps))) if top > 0 else 1
