"""Where the time goes: computing, waiting for reads, Python."""

from textual.content import Content
from textual.reactive import reactive

from runner.client import Frame, StatsRates, StatsSnapshot
from tui.drawing import split
from tui.widgets.pairs import wrapped
from tui.widgets.panel import Panel
from tui.words import percent

_PARTS = (
    ("computing", "c", "█", "$success"),
    ("waiting", "w", "▒", "$warning"),
    ("Python", "P", "░", "$accent"),
)


class TimeSplit(Panel):
    """The last window's shares; those since loading while nothing is computed."""

    rates: reactive[StatsRates | None] = reactive[StatsRates | None](None, repaint=False)

    def text(self, frame: Frame, width: int) -> Content:
        shares = _shares(self.rates, frame.stats)
        if not any(shares):
            return Content.styled("nothing was computed yet", "$text-muted")
        bar = Content("").join(
            Content.styled((letter if self.is_ascii else fill) * n, style)
            for (_, letter, fill, style), n in zip(_PARTS, split(shares, width), strict=True)
        )
        words = [
            Content.assemble(
                (letter if self.is_ascii else fill * 2, style), f" {name} {percent(s)}"
            )
            for (name, letter, fill, style), s in zip(_PARTS, shares, strict=True)
        ]
        return Content("\n").join([bar, *wrapped(words, width)])


def _shares(rates: StatsRates | None, stats: StatsSnapshot | None) -> tuple[float, float, float]:
    if rates is not None:
        return rates.compute_share, rates.wait_share, rates.python_share
    total_s = stats.prompt_s + stats.generation_s if stats is not None else 0.0
    if stats is None or not total_s:
        return 0.0, 0.0, 0.0
    return stats.compute_s / total_s, stats.wait_s / total_s, stats.python_s / total_s
