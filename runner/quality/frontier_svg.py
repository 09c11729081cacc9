"""A frontier as a picture: speed, and bytes read, against mean KL. Writes SVG, knows no engine.

Two panels side by side share the x axis, which is logarithmic; what differs by nothing at all
stands left of a break in it. Colours are told apart by colour-blind eyes, markers by all.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape, quoteattr

from runner.quality.frontier import FORMAT, FrontierBase, FrontierPoint, FrontierRow, rows_of
from runner.terminal.terminal_text import visible_line

# What one step of quantization costs: mean KL of LLaMA-3-8B against f16, by llama.cpp.
QUANTIZATION_STEPS = (("Q8_0", 0.0014), ("Q6_K", 0.0055), ("Q4_K_M", 0.031))

_WIDTH, _HEIGHT = 1160, 640
_TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 126, 480, 370
_LEFTS = (76, 656)  # of the panels
_ZERO_X, _LOG_X = 22, 56  # inside a panel: where a KL of 0 stands, and where the log axis begins
_LEGEND_Y, _LEGEND_STEP_X, _LEGEND_COLUMNS = 560, 172, 6
_INK, _SOFT, _GRID = "#222222", "#666666", "#e4e4e4"
_N_TICKS = 6


@dataclass(frozen=True)
class _Look:
    """How a policy is drawn."""

    color: str
    marker: str
    is_control: bool = False  # drawn dashed: nobody would use it


_LOOKS = {  # Okabe and Ito's colours without the yellow, and Tol's wine
    "blend": _Look("#d55e00", "circle"),
    "buddymoe": _Look("#0072b2", "square"),
    "router": _Look("#009e73", "up"),
    "similar": _Look("#cc79a7", "diamond"),
    "prior": _Look("#e69f00", "down"),
    "prior-router": _Look("#56b4e9", "cross"),
    "resident": _Look("#882255", "pentagon"),
    "drop": _Look("#000000", "plus", is_control=True),
    "random": _Look("#777777", "ring", is_control=True),
}
_UNKNOWN = _Look("#332288", "pentagon")
_CORNERS = {  # of markers, in units of their size
    "square": ((-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)),
    "up": ((0, -1.1), (1, 0.75), (-1, 0.75)),
    "down": ((0, 1.1), (1, -0.75), (-1, -0.75)),
    "diamond": ((0, -1.2), (1.05, 0), (0, 1.2), (-1.05, 0)),
    "pentagon": ((0, -1.1), (1.05, -0.34), (0.65, 0.89), (-0.65, 0.89), (-1.05, -0.34)),
}


@dataclass(frozen=True)
class _Panel:
    """One plot: where it is and what its axes mean."""

    left: float
    title: str
    value: Callable[[FrontierRow], float]
    rows: Sequence[FrontierRow]
    kl_range: tuple[float, float]
    y_range: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        values = [value for row in self.rows if math.isfinite(value := self.value(row))]
        object.__setattr__(self, "y_range", _padded([1.0, *values]))

    def x(self, kl: float) -> float:
        """Of a KL in the picture."""
        if kl <= 0.0:
            return self.left + _ZERO_X
        low, high = (math.log(end) for end in self.kl_range)
        share = (math.log(kl) - low) / (high - low)
        return self.left + _LOG_X + share * (_PLOT_WIDTH - _LOG_X)

    def y(self, value: float) -> float:
        """Of a value in the picture."""
        low, high = self.y_range
        return _TOP + _PLOT_HEIGHT * (1 - (value - low) / (high - low))

    def can_draw(self, row: FrontierRow) -> bool:
        return math.isfinite(row.kl) and math.isfinite(self.value(row))


def frontier_svg(points: Sequence[FrontierPoint], base: FrontierBase) -> str:
    """The picture as SVG with a white background; points without numbers are left out."""
    rows = rows_of(points)
    kl_range = _kl_range(rows)
    panels = [
        _Panel(_LEFTS[0], "Speed, times exact", lambda row: row.speed_ratio, rows, kl_range),
        _Panel(_LEFTS[1], "Bytes read, times exact", lambda row: row.bytes_ratio, rows, kl_range),
    ]
    parts = [
        f'<svg id="{FORMAT}" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}"'
        f' width="{_WIDTH}" height="{_HEIGHT}" font-family="Helvetica, Arial, sans-serif"'
        f' font-size="13" fill="{_INK}">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
        *_headings(rows, base),
    ]
    for panel in panels:
        parts += [*_axes(panel), *_curves(panel)]
    return "\n".join([*parts, *_legend(rows), "</svg>", ""])


def _headings(rows: Sequence[FrontierRow], base: FrontierBase) -> list[str]:
    slots = {point.evaluation.moe_cache_slots for row in rows for point in row.points}
    held = f"{min(slots)} slots a layer; " if slots else ""
    n_texts = f"{len(base.texts)} text{'s' * (len(base.texts) != 1)}"
    about = f"{base.model}: {held}{base.n_tokens} tokens of {n_texts}"
    budgets = dict.fromkeys(row.setting.budget_label for row in rows if not row.is_exact)
    if budgets:
        about += f"; along each line the budgets {', '.join(budgets)}"
    return [
        _text(24, 34, "What stand-ins for missing experts bring and cost", size=20, weight="bold"),
        _text(24, 58, about, fill=_SOFT),
    ]


def _axes(panel: _Panel) -> list[str]:
    bottom, right = _TOP + _PLOT_HEIGHT, panel.left + _PLOT_WIDTH
    parts = [_text(panel.left, _TOP - 34, panel.title, weight="bold")]
    for value in _ticks(*panel.y_range):
        y = panel.y(value)
        parts += [
            _line(panel.left, y, right, y, _GRID),
            _text(panel.left - 8, y + 4.5, f"{value:g}", anchor="end"),
        ]
    for value in _log_ticks(*panel.kl_range):
        x = panel.x(value)
        parts += [
            _line(x, _TOP, x, bottom, _GRID),
            _text(x, bottom + 18, f"{value:g}", anchor="middle"),
        ]
    parts += _quantization(panel)
    y = panel.y(1.0)
    middle = panel.left + (_PLOT_WIDTH + _LOG_X) / 2
    return [
        *parts,
        _line(panel.left, y, right, y, _INK, "2 3"),
        _text(right - 4, y - 6, "exact", anchor="end", fill=_SOFT, size=12),
        _line(panel.left, _TOP, panel.left, bottom, _INK),
        *_broken_axis(panel.left, right, bottom),
        _text(panel.x(0), bottom + 18, "0", anchor="middle"),
        _text(middle, bottom + 38, "mean KL divergence from the exact run, nats", anchor="middle"),
    ]


def _broken_axis(left: float, right: float, y: float) -> list[str]:
    at = left + (_ZERO_X + _LOG_X) / 2
    return [
        _line(left, y, at - 3, y, _INK),
        _line(at + 3, y, right, y, _INK),
        _line(at - 6, y + 5, at, y - 5, _INK),
        _line(at, y + 5, at + 6, y - 5, _INK),
    ]


def _quantization(panel: _Panel) -> list[str]:
    parts = []
    for name, kl in QUANTIZATION_STEPS:
        x = panel.x(kl)
        parts += [
            _line(x, _TOP - 6, x, _TOP + _PLOT_HEIGHT, "#9a9a9a", "6 4"),
            _text(x, _TOP - 11, name, anchor="middle", fill=_SOFT, size=12),
        ]
    return parts


def _curves(panel: _Panel) -> list[str]:
    parts = []
    by_policy: dict[str, list[FrontierRow]] = {}
    for row in panel.rows:
        if panel.can_draw(row):
            by_policy.setdefault(row.setting.policy, []).append(row)
    for policy, rows in by_policy.items():
        if rows[0].is_exact:
            continue
        look = _LOOKS.get(policy, _UNKNOWN)
        places = [(panel.x(row.kl), panel.y(panel.value(row))) for row in rows]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{look.color}" stroke-width="1.8"'
            f"{_dashes('5 3' if look.is_control else '')}/>"
        )
    for rows in by_policy.values():
        parts += [part for row in rows for part in _points(panel, row)]
    return parts


def _points(panel: _Panel, row: FrontierRow) -> list[str]:
    """The row's marker; of several seeds each as a dot too."""
    parts = []
    for point in row.points if row.n_seeds > 1 else ():
        one = FrontierRow(point.setting, (point,))
        if panel.can_draw(one):
            x, y = panel.x(one.kl), panel.y(panel.value(one))
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="1.6" fill="{_look(row).color}"/>')
    said = f"{row.setting.label}: KL {row.kl:.5f}, {panel.value(row):.3f} x exact"
    marker = _marker(_look(row), panel.x(row.kl), panel.y(panel.value(row)))
    return [*parts, f'<g class="point"><title>{_escaped(said)}</title>{marker}</g>']


def _look(row: FrontierRow) -> _Look:
    if row.is_exact:
        return _Look(_INK, "circle")
    return _LOOKS.get(row.setting.policy, _UNKNOWN)


def _marker(look: _Look, x: float, y: float, size: float = 5.5) -> str:
    at = f'transform="translate({x:.1f} {y:.1f})"'
    if look.marker in ("circle", "ring"):
        fill = look.color if look.marker == "circle" else "#ffffff"
        edge = "#ffffff" if look.marker == "circle" else look.color
        return f'<circle {at} r="{size * 0.95:.2f}" fill="{fill}" stroke="{edge}"/>'
    if look.marker in ("plus", "cross"):
        d = f"M{-size} 0H{size}M0 {-size}V{size}"
        turned = at if look.marker == "plus" else at[:-1] + ' rotate(45)"'
        return f'<path {turned} d="{d}" stroke="{look.color}" stroke-width="2.6" fill="none"/>'
    corners = " ".join(f"{size * a:.1f},{size * b:.1f}" for a, b in _CORNERS[look.marker])
    return f'<polygon {at} points="{corners}" fill="{look.color}" stroke="#ffffff"/>'


def _legend(rows: Sequence[FrontierRow]) -> list[str]:
    parts = []
    first_of = {row.setting.policy: row for row in reversed(rows)}
    in_order = sorted(first_of.values(), key=rows.index)
    for number, row in enumerate(in_order):
        x = _LEFTS[0] + number % _LEGEND_COLUMNS * _LEGEND_STEP_X
        y = _LEGEND_Y + number // _LEGEND_COLUMNS * 22
        look = _look(row)
        if not row.is_exact:
            parts.append(_line(x, y, x + 30, y, look.color, "5 3" if look.is_control else "", 1.8))
        name = "exact again" if row.is_exact else row.setting.policy
        parts += [_marker(look, x + 15, y), _text(x + 38, y + 4.5, name)]
    note = "Vertical lines: what one step of quantization costs (LLaMA-3-8B, KL against f16)."
    return [*parts, _text(_LEFTS[0], _HEIGHT - 20, note, fill=_SOFT, size=12)]


def _kl_range(rows: Sequence[FrontierRow]) -> tuple[float, float]:
    """Of the axis: all positive KLs and the steps of quantization."""
    values = [row.kl for row in rows] + [
        point.evaluation.divergence.kl_mean for row in rows for point in row.points
    ]
    values += [kl for _, kl in QUANTIZATION_STEPS]
    found = [value for value in values if math.isfinite(value) and value > 0.0]
    return min(found) / 1.3, max(found) * 1.3


def _padded(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = max(0.08 * (high - low), 0.02)
    return max(low - room, -0.02), high + room


def _ticks(low: float, high: float) -> list[float]:
    """Round values between, about _N_TICKS of them."""
    rough = (high - low) / _N_TICKS
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(number * step, 10) for number in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1 and 3 of every power of ten between; only the powers where these would be many."""
    factors = (1, 3) if high / low < 1e5 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [round(factor * 10.0**power, 12 - power) for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _line(
    x1: float, y1: float, x2: float, y2: float, color: str, dashes: str = "", width: float = 1
) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}"'
        f' stroke-width="{width:g}"{_dashes(dashes)}/>'
    )


def _dashes(dashes: str) -> str:
    return f' stroke-dasharray="{dashes}"' if dashes else ""


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str = "start",
    fill: str = _INK,
    size: int = 13,
    weight: str = "normal",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor={quoteattr(anchor)} fill="{fill}"'
        f' font-size="{size}" font-weight="{weight}">{_escaped(text)}</text>'
    )


def _escaped(text: str) -> str:
    """Safe between tags: also of characters that XML does not allow."""
    return escape(visible_line(text))
