"""Who stands in for whom most often: a list for screens with room."""

from heapq import nlargest

from textual.content import Content

from runner.client import Frame
from tui.widgets.panel import Panel


class Standins(Panel):
    """As many rows as there is room for."""

    def text(self, frame: Frame, width: int) -> Content:
        counts = frame.stats.experts if frame.stats is not None else None
        if counts is None or not counts.buddies:
            return Content.styled("nobody stood in for anybody", "$text-muted")
        rows = nlargest(max(1, self.content_size.height), counts.buddies, key=lambda row: row[3])
        return Content("\n").join(_row(*row) for row in rows)


def _row(layer: int, missing: int, by: int, n: int) -> Content:
    who = f"expert {by} for {missing}" if by >= 0 else f"nobody for {missing}"
    return Content.assemble((f"layer {layer:<4}", "$text-muted"), f"{who:<20}", f"{n:>8,} x")
