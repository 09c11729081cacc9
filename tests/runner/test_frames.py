"""Frames as lines and back, and lines that are none."""

import json
from dataclasses import replace

import pytest

from runner import message_values
from runner.errors import OptionError
from runner.expert_counts import ExpertCounter
from runner.frames import Frame, FrameReader, FrameWriter, RunSettings
from runner.stats_recorder import StatsRecorder
from tests.runner.chat_fakes import INFO


def frame(**changes: object) -> Frame:
    counter = ExpertCounter(2, 3)
    stats = replace(
        StatsRecorder(2, (1, 2), n_expert=3).snapshot(3, 64, ((0,), (1, -1)), (0, 0)),
        uptime_s=1.5,
        experts=replace(counter.counts(), used=((1, 2, 3), (4, 5, 6)), buddies=((1, 2, 0, 7),)),
    )
    settings = RunSettings(False, "blend", 0.08, False)
    made = Frame(7, 6, "0.1.0", 12.5, "generating", "", 1, 2, 3, settings, stats, INFO)
    return replace(made, **changes)  # type: ignore[arg-type]


def test_frames_come_back_as_they_were_written() -> None:
    frames = [
        Frame(7, 6, "0.1.0", 1.0, "loading", "weights", 1, 9),
        frame(),
        frame(time_s=13.0, phase="ready"),
        frame(model=replace(INFO, name="another")),
        Frame(7, 6, "0.1.0", 20.0, "starting"),
    ]
    writer, reader = FrameWriter(), FrameReader()
    lines = [line for each in frames for line in writer.lines(each)]
    assert all("\n" not in line for line in lines)
    assert [each for line in lines if (each := reader.read(line)) is not None] == frames
    assert sum("model" in json.loads(line) for line in lines) == 4, "a model is told once"


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "7", "{}", '{"frame": 3}', '{"model": "x"}', '{"frame": {"pid": 1}}',
     '{"model": {"path": 3}}', "[" * 100_000, '{"frame": {"pid": "7"}}', b"\xff\xfe"],
)  # fmt: skip
def test_a_line_that_is_none_is_refused(line: str | bytes) -> None:
    with pytest.raises(OptionError):
        FrameReader().read(line)


def test_numbers_of_a_grid_are_checked_even_though_thousands_come_at_once() -> None:
    values = json.loads(list(FrameWriter().lines(frame()))[1])
    values["frame"]["stats"]["experts"]["missed"][1][2] = "3"
    with pytest.raises(OptionError, match="missed"):
        FrameReader().read(json.dumps(values))
    values["frame"]["stats"]["experts"]["missed"][1][2] = True
    with pytest.raises(OptionError, match="missed"):
        FrameReader().read(json.dumps(values))


def test_a_tuple_of_a_fixed_length_has_that_length() -> None:
    values = json.loads(list(FrameWriter().lines(frame()))[1])
    values["frame"]["stats"]["experts"]["buddies"] = [[1, 2, 3]]
    with pytest.raises(OptionError, match="4 values"):
        FrameReader().read(json.dumps(values))


def test_a_dataclass_is_json_field_by_field() -> None:
    text = json.dumps(RunSettings(True, "x", 0.5, False), default=message_values.fields_of)
    assert json.loads(text) == vars(RunSettings(True, "x", 0.5, False))
