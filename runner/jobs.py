"""What the worker does for each job: from a request to the session, and its events back.

Runs on the worker's main thread. Knows no socket; what it is busy with is noted on the board.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from runner import message_values, protocol
from runner.config import EngineConfig, GenerateRequest
from runner.doctor_report import DoctorReport
from runner.frames import RunSettings
from runner.protocol import (
    BenchFields,
    BenchSample,
    BenchTest,
    ChangeFields,
    DoctorFields,
    FrontierFields,
    GenerateResult,
    LoadFields,
    Message,
    ModelInfo,
    PerplexityFields,
    ProfileFields,
    ProfileResult,
    PromptProgress,
    TextPiece,
)
from runner.quality.evaluation import Evaluation, RunProgress, WindowDone
from runner.quality.frontier import FrontierBase, FrontierPoint
from runner.run_board import RunBoard
from runner.stats import StatsSnapshot

KINDS = ("load", "generate", "bench", "perplexity", "profile", "frontier", "doctor")

Cancelled = Callable[[], bool]
OnProgress = Callable[[str, int, int], None]


class SessionLike(Protocol):
    """What the worker needs of `runner.session.Session`."""

    def load(
        self,
        path: str,
        config: EngineConfig,
        chat_template: str | None,
        on_progress: OnProgress,
        cancelled: Cancelled,
    ) -> ModelInfo: ...

    def generate(
        self,
        request: GenerateRequest,
        emit: Callable[[Any], None],
        cancelled: Cancelled,
        between: Callable[[], None],
    ) -> GenerateResult: ...

    def bench(
        self,
        tests: Sequence[BenchTest],
        repetitions: int,
        text: str,
        emit: Callable[[BenchSample], None],
        cancelled: Cancelled,
    ) -> None: ...

    def perplexity(
        self,
        wanted: PerplexityFields,
        on_progress: OnProgress,
        emit: Callable[[RunProgress | WindowDone], None],
        cancelled: Cancelled,
    ) -> Evaluation: ...

    def profile(
        self, wanted: ProfileFields, on_progress: OnProgress, cancelled: Cancelled
    ) -> ProfileResult: ...

    def frontier(
        self,
        wanted: FrontierFields,
        on_progress: OnProgress,
        emit: Callable[[RunProgress | FrontierBase | FrontierPoint], None],
        cancelled: Cancelled,
    ) -> None: ...

    def doctor(
        self, wanted: DoctorFields, on_progress: OnProgress, cancelled: Cancelled
    ) -> DoctorReport: ...

    def snapshot(self, with_experts: bool = False) -> StatsSnapshot: ...

    @property
    def settings(self) -> RunSettings | None: ...

    def change(self, wanted: ChangeFields) -> RunSettings: ...


@dataclass
class Job:
    """A request for the main thread."""

    message: Message
    cancelled: threading.Event = field(default_factory=threading.Event)


class Jobs:
    """Does one job after the other."""

    def __init__(
        self,
        session: SessionLike,
        board: RunBoard,
        reply: Callable[[Job, Message], None],
        between: Callable[[Job], None],
    ) -> None:
        """reply: sends what is not the end of a job; between: is called between two tokens."""
        self._session = session
        self._board = board
        self._reply = reply
        self._between = between

    def do(self, job: Job) -> Message:
        """Do a job; returns its last reply. Raises BuddyrunError, CancelledError."""
        try:
            return self._do(job)
        finally:
            self._board.rest()

    def _do(self, job: Job) -> Message:
        match job.message["type"]:
            case "load":
                return {"type": "loaded", "info": self._load(job)}
            case "generate":
                return {"type": "done", "result": self._generate(job)}
            case "perplexity":
                return {"type": "perplexity_done", "evaluation": self._perplexity(job)}
            case "profile":
                return {"type": "profile_done", "result": self._profile(job)}
            case "frontier":
                self._frontier(job)
                return {"type": "frontier_done"}
            case "doctor":
                return {"type": "doctor_done", "report": self._doctor(job)}
            case _:
                self._bench(job)
                return {"type": "bench_done"}

    def _load(self, job: Job) -> ModelInfo:
        wanted = message_values.parse(LoadFields, body(job.message))
        self._board.forget_model()
        progress = self._progress(job, "loading")
        info = self._session.load(
            wanted.model, wanted.engine, wanted.chat_template, progress, job.cancelled.is_set
        )
        self._board.keep_model(info)
        return info

    def _progress(self, job: Job, phase: str) -> OnProgress:
        self._board.note(phase)

        def on_progress(stage: str, done: int, total: int) -> None:
            self._board.note(phase, stage, done, total)
            self._reply(job, {"type": "progress", "stage": stage, "done": done, "total": total})

        return on_progress

    def _generate(self, job: Job) -> GenerateResult:
        wanted = message_values.parse(protocol.GenerateFields, body(job.message))
        self._board.note("prompt")

        def emit(event: TextPiece | PromptProgress) -> None:
            kind = "text" if isinstance(event, TextPiece) else "prompt_progress"
            if isinstance(event, PromptProgress):
                self._board.note("prompt", "", event.done, event.total)
            self._reply(job, {"type": kind, **vars(event)})

        def between() -> None:
            self._between(job)
            self._board.note("generating")

        return self._session.generate(wanted.request, emit, job.cancelled.is_set, between)

    def _bench(self, job: Job) -> None:
        wanted = message_values.parse(BenchFields, body(job.message))
        self._board.note("measuring", "speed")

        def emit(sample: BenchSample) -> None:
            self._reply(job, {"type": "bench_result", **vars(sample)})

        self._session.bench(
            wanted.tests, wanted.repetitions, wanted.text, emit, job.cancelled.is_set
        )

    def _perplexity(self, job: Job) -> Evaluation:
        wanted = message_values.parse(PerplexityFields, body(job.message))
        progress = self._begin_on_file(job)
        return self._session.perplexity(
            wanted, progress, self._run_events(job), job.cancelled.is_set
        )

    def _begin_on_file(self, job: Job) -> OnProgress:
        """A job that opens a model itself begins: none is loaded from then on."""
        self._board.forget_model()
        return self._progress(job, "measuring")

    def _run_events(self, job: Job) -> Callable[[object], None]:
        def emit(event: object) -> None:
            self._reply(job, {"type": protocol.EVENT_TYPES[type(event)], **vars(event)})

        return emit

    def _profile(self, job: Job) -> ProfileResult:
        wanted = message_values.parse(ProfileFields, body(job.message))
        return self._session.profile(wanted, self._begin_on_file(job), job.cancelled.is_set)

    def _frontier(self, job: Job) -> None:
        wanted = message_values.parse(FrontierFields, body(job.message))
        progress = self._begin_on_file(job)
        self._session.frontier(wanted, progress, self._run_events(job), job.cancelled.is_set)

    def _doctor(self, job: Job) -> DoctorReport:
        wanted = message_values.parse(DoctorFields, body(job.message))
        return self._session.doctor(wanted, self._begin_on_file(job), job.cancelled.is_set)


def body(message: Message) -> Message:
    """What a message says besides its kind and number."""
    return {name: value for name, value in message.items() if name not in ("id", "type")}
