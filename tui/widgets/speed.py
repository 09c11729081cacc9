"""How fast it was in the last while: tokens, hits, reads. One sparkline each."""

from collections.abc import Callable

from textual.content import Content
from textual.reactive import reactive

from runner.client import Frame, StatsRates
from tui.drawing import sparkline
from tui.history import Trend
from tui.widgets.panel import Panel
from tui.words import figure, percent

_LABEL_WIDTH, _VALUE_WIDTH = 9, 7
_HEADROOM = 1.2  # above the highest value


class Speed(Panel):
    """Sparklines as high as the panel has room for."""

    trend: reactive[Trend] = reactive[Trend]((), repaint=False)

    def text(self, frame: Frame, width: int) -> Content:
        has_cache = frame.stats is not None and bool(frame.stats.n_slots)
        rows = [self._row("tokens/s", _tokens_per_s, figure, "$success", width)]
        if has_cache:
            rows.append(self._row("hit rate", _hit_share, percent, "$primary", width, top=1.0))
            rows.append(self._row("read GB/s", _gb_per_s, figure, "$accent", width))
        between = "\n\n" if self._height > 1 else "\n"
        return Content(between).join(rows)

    @property
    def _height(self) -> int:
        """Rows of each sparkline, with a row between two where there is room."""
        n_rows = self.content_size.height
        return max(1, (n_rows - 2) // 3) if n_rows >= 8 else 1

    def _row(
        self,
        label: str,
        value_of: Callable[[StatsRates], float],
        text_of: Callable[[float], str],
        style: str,
        width: int,
        top: float = 0.0,
    ) -> Content:
        values = [None if rates is None else value_of(rates) for rates in self.trend]
        known = [value for value in values if value is not None]
        room = max(0, width - _LABEL_WIDTH - _VALUE_WIDTH - 2)
        highest = max((v for v in values[-room:] if v is not None), default=0.0)
        top = top or _HEADROOM * highest
        rows = sparkline(values, room, self._height, top, self.is_ascii)
        value = text_of(known[-1]) if known else "-"
        lines = []
        for index, row in enumerate(rows):
            is_last = index == len(rows) - 1
            lines.append(
                Content.assemble(
                    (f"{label if is_last else '':<{_LABEL_WIDTH}} ", "$text-muted"),
                    (row, style),
                    (f" {value if is_last else '':>{_VALUE_WIDTH}}", "bold"),
                )
            )
        return Content("\n").join(lines)


def _tokens_per_s(rates: StatsRates) -> float:
    return rates.generation_tokens_per_s or rates.prompt_tokens_per_s


def _hit_share(rates: StatsRates) -> float:
    return rates.hit_share


def _gb_per_s(rates: StatsRates) -> float:
    return rates.read_gb_per_s
