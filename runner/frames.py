"""One moment of an engine as it is shown: plain values, as messages and back. Knows no socket.

A stream of frames, to a viewer or in a file, is one JSON object per line: {model: {ModelInfo
fields} | null} when the model changes, {frame: {Frame fields but model}} for each moment.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace

from runner import message_values
from runner.errors import OptionError
from runner.protocol import ModelInfo
from runner.stats import StatsSnapshot

PHASES = (
    "starting",  # no model yet
    "empty",  # no model any more
    "loading",
    "ready",  # waits for something to do
    "prompt",
    "generating",
    "paused",  # between two tokens of an answer
    "measuring",  # bench, perplexity, profile, frontier, doctor
    "ended",  # the process is gone; only a viewer says so
)
MAX_LINE_BYTES = 64 << 20


@dataclass(frozen=True)
class RunSettings:
    """What the owner of a run can change while it runs."""

    is_exact: bool  # nobody stands in, whatever policy and budget say
    buddy: str  # the policy when not exact; "" where nobody has to stand in
    buddy_budget: float  # share of the router's weight
    is_paused: bool


@dataclass(frozen=True)
class Frame:
    """What an engine does at one moment."""

    pid: int  # of the engine's process
    owner_pid: int  # of the program that started it
    version: str  # of buddyrun
    time_s: float  # since 1970
    phase: str  # one of PHASES
    stage: str = ""  # what is loaded or measured, in words
    done: int = 0  # of total: bytes while loading, tokens of a prompt
    total: int = 0
    memory_bytes: int = 0  # in RAM, of the engine's process, mapped files included; 0 = not known
    settings: RunSettings | None = None  # None where no model is loaded
    stats: StatsSnapshot | None = None  # with experts; None where no model is loaded
    model: ModelInfo | None = None


class FrameWriter:
    """Makes a stream's lines of frames."""

    def __init__(self) -> None:
        self._model: ModelInfo | None = None
        self._is_first = True

    def lines(self, frame: Frame) -> Iterator[str]:
        """The lines of the next frame, without line ends."""
        if self._is_first or frame.model != self._model:
            self._model, self._is_first = frame.model, False
            yield model_line(frame)
        yield frame_line(frame)


def model_line(frame: Frame) -> str:
    """The line about a frame's model."""
    return json.dumps({"model": frame.model}, default=message_values.fields_of)


def frame_line(frame: Frame) -> str:
    """The line of a frame, without its model."""
    return json.dumps({"frame": replace(frame, model=None)}, default=message_values.fields_of)


class FrameReader:
    """Makes frames of a stream's lines."""

    def __init__(self) -> None:
        self._model: ModelInfo | None = None

    def read(self, line: str | bytes) -> Frame | None:
        """The frame of a line, None for a line about the model. Raises OptionError for what is no
        line of such a stream."""
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"not a line of a recording: {line[:60]!r}") from error
        match message:
            case {"model": None}:
                self._model = None
            case {"model": dict(info)}:
                self._model = message_values.parse(ModelInfo, info)
            case {"frame": dict(values)}:
                return replace(message_values.parse(Frame, values), model=self._model)
            case _:
                raise OptionError(f"not a line of a recording: {line[:60]!r}")
        return None
