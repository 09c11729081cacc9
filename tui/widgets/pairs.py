"""What became of the router's choices: the shares of all pairs, as a bar and in words."""

from textual.content import Content
from textual.reactive import reactive

from runner.client import Frame, StatsRates
from tui.drawing import split
from tui.pair_classes import PAIR_CLASSES
from tui.widgets.panel import Panel
from tui.words import short_percent


class Pairs(Panel):
    """The last window's shares; those since loading while nothing is computed."""

    rates: reactive[StatsRates | None] = reactive[StatsRates | None](None, repaint=False)

    def text(self, frame: Frame, width: int) -> Content:
        stats = frame.stats
        source = self.rates or stats
        if stats is None or source is None or not stats.n_pairs:
            return Content.styled("no expert was asked for yet", "$text-muted")
        shares = (
            source.hit_share,
            source.substituted_share,
            source.on_host_share,
            source.loaded_share,
            source.dropped_share,
        )
        bar = Content("").join(
            Content.styled((each.letter if self.is_ascii else each.fill) * n, each.style)
            for each, n in zip(PAIR_CLASSES, split(shares, width), strict=True)
        )
        words = [
            Content.assemble(
                (each.letter if self.is_ascii else each.fill * 2, each.style),
                f" {each.name} {short_percent(share)}",
            )
            for each, share in zip(PAIR_CLASSES, shares, strict=True)
            if share or each.letter in "HSL"
        ]
        return Content("\n").join([bar, *wrapped(words, width)])


def wrapped(parts: list[Content], width: int) -> list[Content]:
    """Lines of whole parts, two spaces between them."""
    lines: list[Content] = []
    for part in parts:
        if lines and lines[-1].cell_length + 2 + part.cell_length <= width:
            lines[-1] = lines[-1] + Content("  ") + part
        else:
            lines.append(part)
    return lines
