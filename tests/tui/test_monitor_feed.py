"""How often an engine is asked for frames."""

import threading
import time

from runner.frames import Frame
from tui.monitor_feed import MonitorFeed


class CostlySource:
    """Frames that take a while to be made in Python."""

    def __init__(self, cost_s: float) -> None:
        self._cost_s = cost_s
        self.times: list[float] = []

    def frame(self) -> Frame:
        self.times.append(time.monotonic())
        until_s = time.thread_time() + self._cost_s
        while time.thread_time() < until_s:
            pass
        return Frame(1, 1, "0", 0.0, "ready")


def test_frames_that_cost_much_are_asked_for_less_often() -> None:
    source, enough = CostlySource(0.02), threading.Event()
    feed = MonitorFeed(
        source, lambda _: enough.set() if len(source.times) == 3 else None, lambda _: None
    )
    feed.start()
    assert enough.wait(20)
    feed.stop()
    assert all(b - a > 0.5 for a, b in zip(source.times, source.times[1:], strict=False))


def test_nobody_is_asked_for_frames_that_nobody_sees() -> None:
    source = CostlySource(0.0)
    feed = MonitorFeed(source, lambda _: None, lambda _: None, is_wanted=lambda: False)
    feed.start()
    time.sleep(0.5)
    feed.stop()
    assert not source.times
