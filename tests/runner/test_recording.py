"""Recordings: kept line by line, played at their own pace, refused when they are none."""

from dataclasses import replace
from pathlib import Path

import pytest

from runner.errors import OptionError
from runner.frames import Frame
from runner.recording import Recorder, Replay
from tests.runner.test_frames import frame


def moment(number: int, time_s: float) -> Frame:
    return frame(time_s=time_s, done=number)


def record(path: Path, *times_s: float) -> None:
    with Recorder(path) as recorder:
        for number, time_s in enumerate(times_s):
            recorder.write(moment(number, time_s))


def test_a_moment_in_which_nothing_happened_takes_no_room(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        for time_s in range(100):
            idle = frame(time_s=float(time_s), memory_bytes=time_s)
            assert idle.stats is not None
            recorder.write(replace(idle, stats=replace(idle.stats, uptime_s=time_s)))
        recorder.write(frame(time_s=100.0, phase="paused"))
    assert [each.time_s for each in Replay(tmp_path / "r").all()] == [0.0, 100.0]


def test_a_recording_plays_what_was_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a b ä.jsonl"
    record(path, 1.0, 1.5, 2.0)
    assert list(Replay(path).all()) == [moment(n, t) for n, t in enumerate((1.0, 1.5, 2.0))]


def test_frames_come_at_the_pace_of_the_recording_but_nobody_waits_long(tmp_path: Path) -> None:
    path = tmp_path / "r"
    record(path, 10.0, 10.25, 100.0, 99.0)
    waits: list[float] = []
    assert len(list(Replay(path).frames(waits.append))) == 4
    assert waits == [0.25, 2.0, 0.0], "a long pause is cut, and a clock may be set back"


def test_every_frame_is_in_the_file_at_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r")
    recorder.write(frame())
    assert len(list(Replay(tmp_path / "r").all())) == 1
    recorder.close()


def test_a_recording_that_was_cut_plays_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "r"
    record(path, 1.0, 2.0, 3.0)
    path.write_bytes(path.read_bytes()[:-40])
    assert [each.time_s for each in Replay(path).all()] == [1.0, 2.0]


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text("precious")
    with pytest.raises(OptionError, match="exists already"):
        Recorder(path)
    assert path.read_text() == "precious"


def test_where_nothing_can_be_written_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot record"):
        Recorder(tmp_path / "nowhere" / "r")


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r")
    recorder.close()
    recorder._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(OptionError, match="cannot record to .*: No space left"):
        recorder.write(frame())


@pytest.mark.parametrize("content", [b"hello\n", b"{}\n", b"GGUF\x03\0\0\0\n", b"\n"])
def test_another_file_is_no_recording(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r"
    path.write_bytes(content)
    with pytest.raises(OptionError, match="not a line of a recording"):
        list(Replay(path).all())


def test_what_cannot_be_read_is_told_before_anything_is_shown(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(OptionError, match="cannot read the recording"):
            Replay(path)
