"""What every expert did lately: differences between frames that fade. Knows no view and no widget.

Counts grow from the start of a run; what a person wants to see is what happens now. Each count's
rate is an exponential mean with a half-life, so that a burst glows and fades.
"""

from collections.abc import Sequence

from runner.client import ExpertCounts

HALF_LIFE_S = 2.0
PEAK_HALF_LIFE_S = 20.0  # the brightest colour's meaning changes slowly, or nothing would fade
_AT_LEAST_EVERY_S = 1.0
_NOTHING_PER_S = 0.02  # below it a cell is dark

Moment = tuple[ExpertCounts, float]  # counts, seconds
Grid = Sequence[Sequence[int]]
NAMES = ("used", "missed", "substituted", "stood_in", "loaded")


class Activity:
    """The rates of the experts in one run; one thread.

    A grid is worked out when it is asked for, the others only once a second: of large models each
    takes a millisecond.
    """

    def __init__(self) -> None:
        self._latest: Moment | None = None
        self._reached: dict[str, Moment] = {}  # up to when each grid is worked out
        self._rates: dict[str, list[list[float]]] = {}
        self._peaks: dict[str, float] = {}

    def add(self, counts: ExpertCounts, time_s: float) -> None:
        """Take the counts of the next moment of the same run."""
        self._latest = counts, time_s
        for name in NAMES:
            reached = self._reached.setdefault(name, self._latest)
            if time_s - reached[1] >= _AT_LEAST_EVERY_S:
                self._work_out(name)

    def rates(self, name: str) -> list[list[float]]:
        """Events per second, (n_layer, n_expert); [] where there is nothing to compare yet."""
        self._work_out(name)
        return self._rates.get(name, [])

    def peak(self, name: str) -> float:
        """The highest rate of the last while."""
        self._work_out(name)
        return self._peaks.get(name, 0.0)

    def _work_out(self, name: str) -> None:
        if self._latest is None:
            return
        (counts, time_s), (before, before_s) = self._latest, self._reached[name]
        if time_s > before_s:
            grids = getattr(before, name), getattr(counts, name)
            self._add_grid(name, *grids, time_s - before_s)
            self._reached[name] = self._latest

    def _add_grid(self, name: str, before: Grid, now: Grid, passed_s: float) -> None:
        if not now or not before:
            return
        keep = 0.5 ** (passed_s / HALF_LIFE_S)
        gain = (1.0 - keep) / passed_s
        rates = self._rates.setdefault(name, [[0.0] * len(row) for row in now])
        highest = 0.0
        for layer, (old, new) in enumerate(zip(before, now, strict=True)):
            row = rates[layer]
            if new != old:
                row = [keep * r + gain * (b - a) for r, a, b in zip(row, old, new, strict=True)]
            elif any(row):
                row = [keep * r if r > _NOTHING_PER_S else 0.0 for r in row]
            else:
                continue
            rates[layer] = row
            highest = max(highest, *row)
        slow = 0.5 ** (passed_s / PEAK_HALF_LIFE_S)
        self._peaks[name] = max(highest, slow * self._peaks.get(name, 0.0))
