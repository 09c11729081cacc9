"""The last while of one engine: rates from frame to frame. Knows no widget.

A window between two frames in which nothing was computed has no rates: None.
"""

from collections import deque

from runner.client import Frame, StatsRates, StatsSnapshot
from tui.activity import NAMES, Activity

N_WINDOWS = 240  # 48 seconds at five frames a second: more than a wide screen shows

Trend = tuple[StatsRates | None, ...]


class History:
    """What came so far of an engine; another engine or model begins anew."""

    def __init__(self) -> None:
        self.activity = Activity()
        self._windows: deque[StatsRates | None] = deque(maxlen=N_WINDOWS)
        self._before: Frame | None = None

    def add(self, frame: Frame) -> None:
        """Take the next frame."""
        before, self._before = self._before, frame
        if before is not None and not _is_same_run(before, frame):
            self.activity = Activity()
            self._windows.clear()
            before = None
        if frame.stats is None:
            return
        if frame.stats.experts is not None:
            self.activity.add(frame.stats.experts, frame.time_s)
        if before is not None and before.stats is not None:
            self._windows.append(_rates(before.stats, frame.stats))

    @property
    def trend(self) -> Trend:
        """The windows' rates, the latest last."""
        return tuple(self._windows)

    @property
    def latest(self) -> StatsRates | None:
        """The rates of the last window with any."""
        return next((rates for rates in reversed(self._windows) if rates is not None), None)


def _is_same_run(before: Frame, now: Frame) -> bool:
    if before.pid != now.pid or before.model != now.model:
        return False
    if before.stats is None or now.stats is None:
        return True
    if _lengths(before.stats) != _lengths(now.stats):
        return False  # a strange recording: what differs in length cannot be compared
    return now.stats.uptime_s >= before.stats.uptime_s and now.stats.n_pairs >= before.stats.n_pairs


def _lengths(stats: StatsSnapshot) -> list[object]:
    """Of all that is counted for each layer or expert."""
    lengths: list[object] = [len(each) for each in vars(stats).values() if isinstance(each, tuple)]
    if stats.experts is not None:
        lengths += [[len(row) for row in getattr(stats.experts, name)] for name in NAMES]
    return lengths


def _rates(before: StatsSnapshot, now: StatsSnapshot) -> StatsRates | None:
    n_before = before.n_tokens_generated + before.n_tokens_prompt
    if now.n_tokens_generated + now.n_tokens_prompt == n_before:
        return None
    return now.since(before)
