"""What an engine's process is busy with: noted by its main thread, read by any. Knows no engine."""

import os
import time
from dataclasses import dataclass

from runner.frames import Frame, RunSettings
from runner.process.own_memory import resident_bytes
from runner.protocol import ModelInfo
from runner.stats import StatsSnapshot
from runner.version import version


@dataclass(frozen=True)
class _Note:
    phase: str
    stage: str = ""
    done: int = 0
    total: int = 0
    model: ModelInfo | None = None


class RunBoard:
    """The latest note; one thread writes."""

    def __init__(self) -> None:
        self._note = _Note("starting")  # replaced as a whole, so that readers need no lock
        self._owner_pid = os.getppid()
        self._version = version()

    @property
    def has_model(self) -> bool:
        """Whether a model is loaded."""
        return self._note.model is not None

    def note(self, phase: str, stage: str = "", done: int = 0, total: int = 0) -> None:
        """The engine is in this phase now; see `frames.PHASES`."""
        self._note = _Note(phase, stage, done, total, self._note.model)

    def rest(self) -> None:
        """A job is over."""
        self._note = _Note("ready" if self.has_model else "empty", model=self._note.model)

    def keep_model(self, info: ModelInfo) -> None:
        """A model was loaded."""
        self._note = _Note("ready", model=info)

    def forget_model(self) -> None:
        """No model is loaded any more."""
        self._note = _Note("starting")

    def frame(self, settings: RunSettings | None, stats: StatsSnapshot | None) -> Frame:
        """This moment, with what the session says of it."""
        note = self._note
        return Frame(
            pid=os.getpid(),
            owner_pid=self._owner_pid,
            version=self._version,
            time_s=time.time(),
            phase=note.phase,
            stage=note.stage,
            done=note.done,
            total=note.total,
            memory_bytes=resident_bytes(),
            settings=settings,
            stats=stats,
            model=note.model,
        )
