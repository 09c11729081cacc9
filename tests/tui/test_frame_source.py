"""Who writes into a recording."""

import threading
from collections.abc import Iterator
from pathlib import Path

from runner.frames import Frame
from runner.recording import Recorder, Replay
from tests.tui.fake_engine import FakeEngine
from tui.frame_source import OneAtATime, read_frames


class HeldSource:
    """Gives one frame, and another when it is let, though it was closed."""

    ending = "over"

    def __init__(self, pid: int) -> None:
        self._engine = FakeEngine(2, 4, pid=pid)
        self.may_go_on = threading.Event()
        self.gave_one = threading.Event()

    def frames(self) -> Iterator[Frame]:
        yield self._engine.frame()
        self.gave_one.set()
        self.may_go_on.wait(20)
        yield self._engine.frame()

    def close(self) -> None:
        """It is slow."""


def test_a_source_that_was_left_writes_no_more(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with Recorder(path) as file:
        recorder, sources = OneAtATime(file), [HeldSource(1), HeldSource(2)]
        threads = []
        for source in sources:
            recorder.begin(source)
            args = (source, recorder, lambda _: None)
            threads.append(threading.Thread(target=read_frames, args=args))
            threads[-1].start()
            assert source.gave_one.wait(20)
        for source in sources:
            source.may_go_on.set()
        for thread in threads:
            thread.join()
    assert [frame.pid for frame in Replay(path).all()] == [1, 2, 2]
