"""What the heat map shows of a moment: a code for every expert, and the words beside it.

Knows neither widgets nor colours; `tui.views` says what codes mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from runner.client import ExpertCounts, StatsSnapshot
from tui import views
from tui.activity import Activity

_TOP = views.N_LEVELS - 1
_COUNTS = {
    views.ACTIVATIONS: "used",
    views.MISSES: "missed",
    views.SUBSTITUTIONS: "substituted",
    views.LOADS: "loaded",
}


@dataclass(frozen=True)
class HeatGrid:
    """Codes of all experts in one view."""

    view: int
    rows: tuple[bytes, ...] = ()  # (n_layer, n_expert)
    scale: str = ""  # what the brightest level means
    remark: str = ""  # in the place of a picture

    @property
    def n_expert(self) -> int:
        return len(self.rows[0]) if self.rows else 0


def heat_grid(
    view: int, stats: StatsSnapshot | None, activity: Activity, is_total: bool
) -> HeatGrid:
    """The picture of a view; is_total: everything since the model was loaded, not what is now."""
    counts = stats.experts if stats is not None else None
    if stats is None or counts is None:
        return HeatGrid(view, remark="Nothing was counted yet: no model is loaded.")
    if not counts.missed or not counts.missed[0]:
        return HeatGrid(view, remark="This model has no experts: every token uses all weights.")
    if view == views.RESIDENT:
        return _resident(stats, counts)
    if view == views.ACTIVATIONS and not counts.used:
        empty = tuple(bytes(len(row)) for row in counts.missed)
        return HeatGrid(view, empty, scale="not counted in this run")
    if view == views.SUBSTITUTIONS:
        return _substitutions(counts, activity, is_total)
    name = _COUNTS[view]
    values, peak = _values(name, counts, activity, is_total)
    rows = _codes(values, peak) or tuple(bytes(len(row)) for row in counts.missed)
    return HeatGrid(view, rows, scale=scale_text(peak, is_total))


def scale_text(peak: float, is_total: bool) -> str:
    """What the brightest level stands for."""
    if not peak:
        return "none since loading" if is_total else "none lately"
    return f"up to {peak:,.0f} since loading" if is_total else f"up to {_rate(peak)}/s lately"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _resident(stats: StatsSnapshot, counts: ExpertCounts) -> HeatGrid:
    """Where a layer has no slots of its own, all of its experts are in memory."""
    full = 2 * _TOP
    if not stats.residency:
        every = tuple(bytes([full]) * len(row) for row in counts.missed)
        return HeatGrid(views.RESIDENT, every, scale="no cache: all of them, always")
    rows: list[bytes] = []
    for slots, row in zip(stats.residency, counts.missed, strict=True):
        line = bytearray(len(row))
        for expert in slots:
            if 0 <= expert < len(line):
                line[expert] = full
        rows.append(bytes(line))
    n_filled = sum(expert >= 0 for slots in stats.residency for expert in slots)
    n_all = sum(map(len, counts.missed))
    return HeatGrid(views.RESIDENT, tuple(rows), scale=f"{n_filled:,} of {n_all:,} experts")


def _substitutions(counts: ExpertCounts, activity: Activity, is_total: bool) -> HeatGrid:
    """Each cell shows what it was more of: replaced, or a stand-in for others."""
    replaced, first_peak = _values("substituted", counts, activity, is_total)
    stood_in, second_peak = _values("stood_in", counts, activity, is_total)
    peak = max(first_peak, second_peak)
    first, second = _codes(replaced, peak), _codes(stood_in, peak)
    rows = tuple(
        bytes(b + 1 if b > a else a for a, b in zip(one, other, strict=True)) if any(other) else one
        for one, other in zip(first, second, strict=True)
    ) or tuple(bytes(len(row)) for row in counts.missed)
    return HeatGrid(views.SUBSTITUTIONS, rows, scale=scale_text(peak, is_total))


def _values(
    name: str, counts: ExpertCounts, activity: Activity, is_total: bool
) -> tuple[Sequence[Sequence[float]], float]:
    if not is_total:
        return activity.rates(name), activity.peak(name)
    grid = getattr(counts, name)
    return grid, max((max(row, default=0) for row in grid), default=0)


def _codes(values: Sequence[Sequence[float]], peak: float) -> tuple[bytes, ...]:
    """Levels by the square root, which shows the small beside the large."""
    factor = (_TOP - 0.001) ** 2 / peak if peak else 0.0
    return tuple(
        bytes([2 + 2 * int((value * factor) ** 0.5) if value > 0 else 0 for value in row])
        if any(row)
        else bytes(len(row))
        for row in values
    )
