"""Viewers over real sockets: many, slow, rude and leaving ones; the engine is never held up."""

import contextlib
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner import viewers as module
from runner.frames import Frame, FrameReader
from runner.process import meeting_place
from runner.viewers import FRAMES_PER_S, MAX_COST, Viewers
from tests.runner.chat_fakes import INFO
from tests.runner.test_frames import frame

pytestmark = pytest.mark.skipif(not meeting_place.HAS_MEETING_PLACE, reason="no Unix sockets")


class Stage:
    """An engine's side without an engine: frames by number, served when the test says so."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.listener = meeting_place.open_socket(place, 1)
        self.n_made = 0
        self.model: object = INFO
        self.viewers = Viewers(self.listener, self.make)

    def make(self) -> Frame:
        self.n_made += 1
        return frame(time_s=float(self.n_made), model=self.model)

    def call(self) -> socket.socket:
        caller = meeting_place.call(self.place, 1)
        self.viewers.serve(0.0)
        return caller

    def tick(self) -> None:
        """The next frame is due."""
        self.viewers._due_s = 0.0
        self.viewers.serve(0.0)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with contextlib.closing(meeting_place.open_socket(tmp_path / "b", 2)):
        stage = Stage(tmp_path / "b")
        yield stage
        stage.listener.close()


def frames(caller: socket.socket, reader: FrameReader | None = None) -> list[Frame]:
    """What has come so far."""
    caller.setblocking(False)
    data = b""
    with contextlib.suppress(BlockingIOError):
        while piece := caller.recv(1 << 20):
            data += piece
    assert data.endswith(b"\n") or not data
    reader = reader or FrameReader()
    return [made for line in data.splitlines() if (made := reader.read(line)) is not None]


def test_who_calls_gets_a_frame_at_once_and_the_model_with_it(stage: Stage) -> None:
    with stage.call() as caller:
        assert frames(caller) == [frame(time_s=1.0)]


def test_every_viewer_gets_every_frame_and_each_is_made_once(stage: Stage) -> None:
    with contextlib.ExitStack() as owned:
        callers = [owned.enter_context(stage.call()) for _ in range(10)]
        readers = [FrameReader() for _ in callers]
        stage.tick()
        for caller, reader in zip(callers, readers, strict=True):
            frames(caller, reader)
        made_before = stage.n_made
        stage.tick()
        assert stage.n_made == made_before + 1
        for caller, reader in zip(callers, readers, strict=True):
            assert frames(caller, reader) == [frame(time_s=float(stage.n_made))]


def test_without_viewers_no_frame_is_made(stage: Stage) -> None:
    stage.tick()
    assert stage.n_made == 0
    stage.call().close()
    stage.tick()
    made = stage.n_made
    stage.tick()
    assert stage.n_made <= made + 1 and not stage.viewers._viewers


def test_a_model_is_told_again_when_it_is_another(stage: Stage) -> None:
    with stage.call() as caller:
        reader = FrameReader()
        assert frames(caller, reader)[0].model == INFO
        stage.model = None
        stage.tick()
        assert frames(caller, reader)[0].model is None


def test_a_viewer_that_takes_nothing_loses_frames_but_never_gets_half_a_line(
    stage: Stage,
) -> None:
    with stage.call() as slow, stage.call() as quick:
        reader = FrameReader()
        for _ in range(400):
            stage.tick()
            assert frames(quick, reader), "the quick one is not held up"
        assert any(viewer.is_behind for viewer in stage.viewers._viewers)
        slow_reader = FrameReader()
        got = b""
        slow.setblocking(False)
        for _ in range(2000):
            with contextlib.suppress(BlockingIOError):
                got += slow.recv(1 << 16)
            stage.viewers.serve(0.0)
            if not any(viewer.is_behind for viewer in stage.viewers._viewers):
                break
        with contextlib.suppress(BlockingIOError):
            while piece := slow.recv(1 << 20):
                got += piece
        times = [f.time_s for line in got.splitlines() if (f := slow_reader.read(line))]
        assert times == sorted(times) and 1 < len(times) < 400


def test_a_viewer_that_takes_nothing_for_long_is_left(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stage.call():
        for _ in range(400):
            stage.tick()
        assert stage.viewers._viewers
        monkeypatch.setattr(module, "_PATIENCE_S", 0.0)
        time.sleep(0.001)
        stage.tick()
        assert not stage.viewers._viewers


def test_who_comes_between_two_frames_gets_the_last_one_at_once(stage: Stage) -> None:
    with stage.call() as first:
        assert len(frames(first)) == 1
        stage.viewers._due_s = time.monotonic() + 60.0
        with stage.call() as second:
            assert frames(second) == [frame(time_s=1.0)]
            assert stage.n_made == 1


def test_an_error_ends_the_watching_and_not_the_run(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    with stage.call() as caller:
        frames(caller)

        def fail() -> Frame:
            raise KeyError("blk.0")

        stage.viewers._frame = fail
        stage.viewers._due_s = 0.0
        stage.viewers.run()
        caller.setblocking(True)
        assert caller.recv(1) == b"", "who watches sees the end"
    assert "KeyError" in capsys.readouterr().err


def test_what_a_viewer_says_changes_nothing(stage: Stage) -> None:
    with stage.call() as caller:
        frames(caller, reader := FrameReader())
        caller.setblocking(True)
        for line in (b'{"type": "change", "is_exact": false}\n', b"\xff" * 4000, b"\n" * 9):
            caller.sendall(line)
            stage.tick()
        assert [made.settings for made in frames(caller, reader)] == [frame().settings] * 3


def test_viewers_that_leave_are_forgotten(stage: Stage) -> None:
    callers = [stage.call() for _ in range(5)]
    for caller in callers:
        caller.close()
    stage.tick()
    stage.tick()
    assert not stage.viewers._viewers


def test_a_frame_that_is_dear_to_make_comes_less_often(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent_s = 0.0
    monkeypatch.setattr(time, "thread_time", lambda: spent_s)

    def make() -> Frame:
        nonlocal spent_s
        spent_s += 0.02
        return frame()

    stage.viewers._frame = make
    with stage.call():
        left_s = stage.viewers._due_s - time.monotonic()
        assert 0.9 * 0.02 / MAX_COST < left_s <= 0.02 / MAX_COST
        assert left_s > 1 / FRAMES_PER_S
