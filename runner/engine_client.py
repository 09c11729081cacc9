"""What the terminal's process knows of the engine: requests, their replies, a worker's death."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from runner import message_values
from runner.config import EngineConfig, GenerateRequest
from runner.doctor_report import DoctorReport
from runner.errors import (
    BuddyrunError,
    CancelledError,
    OptionError,
    OutOfMemoryError,
    ProfileError,
    WorkerDiedError,
)
from runner.frames import Frame, RunSettings
from runner.process.less_memory import with_less_memory
from runner.process.worker_death import Circumstances, explain, lacked_device_memory
from runner.process.worker_line import Asked, WorkerLine
from runner.protocol import (
    BenchFields,
    BenchSample,
    BenchTest,
    ChangeFields,
    DoctorFields,
    FrontierFields,
    GenerateFields,
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

LAST_REPLIES = (
    "loaded", "done", "bench_done", "perplexity_done", "profile_done", "frontier_done",
    "doctor_done", "stats", "frame", "changed", "error",
)  # fmt: skip
_ENVELOPE = ("type", "id")  # of every message

OnProgress = Callable[[str, int, int], None]


class Client:
    """One engine in a process of its own. Requests come from one thread, but `stats`, `frame`,
    `change` and `cancel` may come from any, and `cancel` from a signal handler too.

    Errors that the worker raised are raised here with the same class and text. When it died
    that is WorkerDiedError, and `restart` makes a new one with the same model.
    """

    def __init__(self) -> None:
        self._loaded: LoadFields | None = None
        self._changed = ChangeFields()  # since then, by the owner
        self._change_lock = threading.Lock()
        self._info: ModelInfo | None = None  # of the last load
        self._lacked_device_memory = False  # when something went wrong last
        self._job: Asked | None = None  # the running one
        self._dropped: Asked | None = None  # a job whose reader went away before its end
        self._open_worker()

    @classmethod
    def start(cls) -> Self:
        """Start a worker; returns at once, while it gets ready."""
        return cls()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._line.pid

    @property
    def log(self) -> str:
        """The last lines that the worker wrote to stderr: traces, what native code said."""
        return self._line.log

    def load(
        self,
        path: str | Path,
        config: EngineConfig | None = None,
        chat_template: str | None = None,
        on_progress: OnProgress | None = None,
    ) -> ModelInfo:
        """Load a model in the place of any other. `chat_template` replaces the model's own;
        `on_progress(stage, done, total)` is called in this thread. Where a worker dies of it
        because a GPU's memory runs out, another tries once with less of it, and a warning.
        Raises CancelledError after `cancel`."""
        model = str(Path(path).absolute())
        self._loaded = LoadFields(model, config or EngineConfig(), chat_template)
        self._changed = ChangeFields()
        self._info = None
        has_begun = False

        def show(stage: str, done: int, total: int) -> None:
            nonlocal has_begun
            has_begun = True
            if on_progress is not None:
                on_progress(stage, done, total)

        try:
            return self._load(show)
        except WorkerDiedError as death:  # perhaps one of an earlier job, that nobody noticed
            is_hopeless = with_less_memory(self._loaded.engine, None) is None
            if not (has_begun and self._lacked_device_memory) or is_hopeless:
                raise
            try:
                return self.restart(on_progress)
            except OptionError:  # there is no less
                raise death from None

    def restart(self, on_progress: OnProgress | None = None) -> ModelInfo:
        """Replace the worker, dead or alive, by a new one and load the same model again; with
        fewer slots for experts, and a warning, where the memory of a GPU had run out."""
        assert self._loaded is not None, "nothing was loaded that could be loaded again"
        self._line.kill()
        self._line.end()
        self._open_worker()
        warning = self._ask_for_less() if self._lacked_device_memory else ""
        self._lacked_device_memory = False
        info = self._load(on_progress)
        self._change_again()
        return replace(info, warnings=(*info.warnings, warning)) if warning else info

    def _ask_for_less(self) -> str:
        """Change the settings; returns what to tell the user, "" when nothing can be less."""
        assert self._loaded is not None
        less = with_less_memory(self._loaded.engine, self._info)
        if less is None:
            return ""
        engine, warning = less
        self._loaded = replace(self._loaded, engine=engine)
        return warning

    def generate(
        self, request: GenerateRequest
    ) -> Iterator[TextPiece | PromptProgress | GenerateResult]:
        """Make one answer; the last item is the GenerateResult, also after `cancel`. To close
        the iterator early cancels the answer."""
        for reply in self._run_job("generate", GenerateFields(request)):
            match reply["type"]:
                case "text":
                    yield TextPiece(reply["text"], reply["n_tokens"])
                case "prompt_progress":
                    yield PromptProgress(reply["done"], reply["total"], reply["n_cached"])
                case "done":
                    yield message_values.parse(GenerateResult, reply["result"])

    def bench(
        self, tests: Sequence[BenchTest], repetitions: int, text: str
    ) -> Iterator[BenchSample]:
        """Measure speed on the tokens of `text`; one sample per test. `cancel` ends it early."""
        for reply in self._run_job("bench", BenchFields(tuple(tests), repetitions, text)):
            if reply["type"] == "bench_result":
                sample = {name: value for name, value in reply.items() if name not in _ENVELOPE}
                yield message_values.parse(BenchSample, sample)

    def perplexity(
        self, wanted: PerplexityFields, on_progress: OnProgress | None = None
    ) -> Iterator[RunProgress | WindowDone | Evaluation]:
        """Judge settings by the exact run of the same file; the last item is the Evaluation. No
        model is loaded after it. `on_progress` as for `load`. Raises CancelledError after
        `cancel`."""
        for kind, body in self._run_on_file("perplexity", wanted, on_progress):
            match kind:
                case "run_progress":
                    yield message_values.parse(RunProgress, body)
                case "window_done":
                    yield message_values.parse(WindowDone, body)
                case "perplexity_done":
                    yield message_values.parse(Evaluation, body["evaluation"])

    def profile(
        self, wanted: ProfileFields, on_progress: OnProgress | None = None
    ) -> ProfileResult:
        """Make a model's profile of buddies. No model is loaded after it. `on_progress` as for
        `load`. Raises CancelledError after `cancel`."""
        *_, (_, body) = self._run_on_file("profile", wanted, on_progress)
        return message_values.parse(ProfileResult, body["result"])

    def frontier(
        self, wanted: FrontierFields, on_progress: OnProgress | None = None
    ) -> Iterator[RunProgress | FrontierBase | FrontierPoint]:
        """Judge many settings by one exact run of the same file: what that cost, then every point.
        No model is loaded after it. `on_progress` as for `load`. Raises CancelledError after
        `cancel`."""
        for kind, body in self._run_on_file("frontier", wanted, on_progress):
            match kind:
                case "run_progress":
                    yield message_values.parse(RunProgress, body)
                case "frontier_base":
                    yield message_values.parse(FrontierBase, body)
                case "frontier_point":
                    yield message_values.parse(FrontierPoint, body)

    def doctor(self, wanted: DoctorFields, on_progress: OnProgress | None = None) -> DoctorReport:
        """Examine what this machine can compute on. No model is loaded after it. `on_progress` as
        for `load`. Raises CancelledError after `cancel`."""
        self._loaded = None
        self._circumstances = Circumstances.now(None)
        report: DoctorReport | None = None
        for reply in self._run_job("doctor", wanted):
            if reply["type"] == "progress" and on_progress is not None:
                on_progress(reply["stage"], reply["done"], reply["total"])
            elif reply["type"] == "doctor_done":
                report = message_values.parse(DoctorReport, reply["report"])
        assert report is not None
        return report

    def stats(self) -> dict[str, Any]:
        """The engine's counters now, also while it computes."""
        snapshot: dict[str, Any] = self._ask("stats")["snapshot"]
        return snapshot

    def frame(self) -> Frame:
        """What the engine does now, also while it computes; from any thread."""
        reply = self._ask("frame")
        frame = message_values.parse(Frame, reply["frame"])
        return replace(frame, model=self._info if frame.stats is not None else None)

    def change(
        self,
        is_exact: bool | None = None,
        buddy: str | None = None,
        buddy_budget: float | None = None,
        is_paused: bool | None = None,
    ) -> RunSettings:
        """Change what is not None, from the next token on; returns what holds then. From any
        thread, also while the engine computes. Raises OptionError for what cannot be."""
        wanted = ChangeFields(is_exact, buddy, buddy_budget, is_paused)
        reply = self._ask("change", **vars(wanted))
        given = {name: value for name, value in vars(wanted).items() if value is not None}
        with self._change_lock:
            self._changed = replace(self._changed, **given)
        return message_values.parse(RunSettings, reply["settings"])

    def _change_again(self) -> None:
        """What was changed holds after a restart too, but for a pause: exact first, whatever
        becomes of the rest. Where every expert is in memory by now nothing can be changed."""
        changed = self._changed
        if changed.is_exact is not None:
            with suppress(OptionError):
                self.change(is_exact=changed.is_exact)
        if (changed.buddy, changed.buddy_budget) != (None, None):
            with suppress(OptionError, ProfileError):
                self.change(buddy=changed.buddy, buddy_budget=changed.buddy_budget)

    def cancel(self) -> None:
        """Ask the worker to end the running job; no-op when none runs."""
        _cancel(self._job)

    def close(self) -> None:
        """End the worker. Can be called twice."""
        self._line.tell("shutdown")
        self._line.end()

    def _open_worker(self) -> None:
        self._job = self._dropped = None
        self._circumstances = Circumstances.now(None)
        self._line = WorkerLine()

    def _load(self, on_progress: OnProgress | None) -> ModelInfo:
        assert self._loaded is not None
        self._circumstances = Circumstances.now(Path(self._loaded.model))
        info: ModelInfo | None = None
        for reply in self._run_job("load", self._loaded):
            if reply["type"] == "progress" and on_progress is not None:
                on_progress(reply["stage"], reply["done"], reply["total"])
            elif reply["type"] == "loaded":
                info = message_values.parse(ModelInfo, reply["info"])
        assert info is not None
        self._info = info
        return info

    def _run_on_file(
        self,
        kind: str,
        wanted: PerplexityFields | ProfileFields | FrontierFields,
        on_progress: OnProgress | None,
    ) -> Iterator[tuple[str, Message]]:
        """A job that opens a model itself: type and content of its replies but for progress."""
        model = Path(wanted.model).absolute()
        self._loaded = None
        self._circumstances = Circumstances.now(model)
        for reply in self._run_job(kind, replace(wanted, model=str(model))):
            body = {name: value for name, value in reply.items() if name not in _ENVELOPE}
            if reply["type"] != "progress":
                yield reply["type"], body
            elif on_progress is not None:
                on_progress(reply["stage"], reply["done"], reply["total"])

    def _run_job(self, kind: str, body: object) -> Iterator[Message]:
        """Send a request and yield its replies up to the last one, or raise what it says."""
        self._await_dropped()
        asked = self._line.ask(kind, **vars(body))
        self._job = asked
        is_over = False
        try:
            while not is_over:
                reply = self._next_reply(asked)
                is_over = reply["type"] in LAST_REPLIES
                yield reply
        except (BuddyrunError, CancelledError) as error:
            is_over = True
            if not isinstance(error, WorkerDiedError):  # of which its death told
                self._lacked_device_memory = isinstance(error, OutOfMemoryError)
            raise
        finally:
            if is_over:
                asked.forget()
            elif asked.line is self._line:  # not of a worker since replaced
                _cancel(asked)
                self._dropped = asked
            if self._job is asked:
                self._job = None

    def _await_dropped(self) -> None:
        """Skip what is still to come of a job that was dropped before its end."""
        if self._dropped is None:
            return
        try:
            while self._next_reply(self._dropped)["type"] not in LAST_REPLIES:
                pass
        except WorkerDiedError:
            raise
        except (BuddyrunError, CancelledError):
            pass  # the dropped job's own error is nobody's any more
        self._dropped.forget()
        self._dropped = None

    def _ask(self, kind: str, **body: object) -> Message:
        """Send what has one reply, and wait for that."""
        asked = self._line.ask(kind, **body)
        try:
            return self._next_reply(asked)
        finally:
            asked.forget()

    def _next_reply(self, asked: Asked) -> Message:
        reply = asked.next_reply()
        if reply is None:
            raise self._death(asked.line)
        return reply

    def _death(self, line: WorkerLine) -> WorkerDiedError:
        status = line.end()
        if line is self._line:
            self._lacked_device_memory = lacked_device_memory(status, line.log)
        return WorkerDiedError(explain(status, line.log, self._circumstances))


def _cancel(job: Asked | None) -> None:
    if job is not None:
        job.line.tell("cancel", target=job.number)
