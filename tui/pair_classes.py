"""What can become of a pair of token and expert: names, letters and colours. Knows no widget.

The colours are Okabe and Ito's, which people with any colour vision can tell apart.
"""

from dataclasses import dataclass

from runner.client import StatsSnapshot
from tui.views import Rgb


@dataclass(frozen=True)
class PairClass:
    """One way in which a pair was computed."""

    name: str
    letter: str
    fill: str  # of a bar, where colours are all there is besides
    color: Rgb

    @property
    def style(self) -> str:
        return "rgb({},{},{})".format(*self.color)


PAIR_CLASSES = (
    PairClass("hit", "H", "█", (0, 158, 115)),
    PairClass("substituted", "S", "▓", (230, 159, 0)),
    PairClass("on host", "C", "▒", (86, 180, 233)),
    PairClass("loaded", "L", "▚", (213, 94, 0)),
    PairClass("dropped", "D", "░", (204, 121, 167)),
)


def pairs_of(stats: StatsSnapshot) -> tuple[tuple[int, ...], ...]:
    """The pairs of every class and layer: (5, n_layer), in the order of PAIR_CLASSES."""
    return stats.hit, stats.substituted, stats.on_host, stats.loaded, stats.dropped
