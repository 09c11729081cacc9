"""The engine's process: takes requests from one client and answers. Knows no terminal.

The main thread loads, generates and measures, one job at a time (time limits by signals need it).
A reader thread takes the messages, so that `cancel` and `stats` work while the main thread
computes, and ends the process at once when the client is gone.
"""

import contextlib
import faulthandler
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from runner import protocol
from runner.config import EngineConfig, GenerateRequest
from runner.doctor_report import DoctorReport
from runner.errors import (
    BackendError,
    BuddyrunError,
    CancelledError,
    InternalError,
    OptionError,
)
from runner.process.worker_home import Home, accept, announce
from runner.protocol import (
    BenchSample,
    BenchTest,
    DoctorFields,
    FrontierFields,
    GenerateResult,
    Message,
    ModelInfo,
    PerplexityFields,
    ProfileFields,
    ProfileResult,
)
from runner.quality.evaluation import Evaluation, RunProgress, WindowDone
from runner.quality.frontier import FrontierBase, FrontierPoint

CLIENT_WAIT_S = 60.0  # a worker that nobody has called for so long exits
JOBS = ("load", "generate", "bench", "perplexity", "profile", "frontier", "doctor")

Cancelled = Callable[[], bool]


class SessionLike(Protocol):
    """What the worker needs of `runner.session.Session`."""

    def load(
        self,
        path: str,
        config: EngineConfig,
        chat_template: str | None,
        on_progress: Callable[[str, int, int], None],
        cancelled: Cancelled,
    ) -> ModelInfo: ...

    def generate(
        self, request: GenerateRequest, emit: Callable[[Any], None], cancelled: Cancelled
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
        on_progress: Callable[[str, int, int], None],
        emit: Callable[[RunProgress | WindowDone], None],
        cancelled: Cancelled,
    ) -> Evaluation: ...

    def profile(
        self,
        wanted: ProfileFields,
        on_progress: Callable[[str, int, int], None],
        cancelled: Cancelled,
    ) -> ProfileResult: ...

    def frontier(
        self,
        wanted: FrontierFields,
        on_progress: Callable[[str, int, int], None],
        emit: Callable[[RunProgress | FrontierBase | FrontierPoint], None],
        cancelled: Cancelled,
    ) -> None: ...

    def doctor(
        self,
        wanted: DoctorFields,
        on_progress: Callable[[str, int, int], None],
        cancelled: Cancelled,
    ) -> DoctorReport: ...

    def snapshot(self) -> object: ...


def main(session_factory: Callable[[], SessionLike] | None = None) -> None:
    """Run a worker whose socket lies in the empty directory named by the first argument."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m runner.worker DIRECTORY (buddyrun starts it by itself)")
    faulthandler.enable()
    os.environ["GGML_NO_BACKTRACE"] = "1"  # an abort would attach a debugger first
    home = Home(Path(sys.argv[1]))
    home.leave_on_sigterm()
    authkey = secrets.token_bytes(32)
    listener = home.listen(authkey)
    if sys.platform != "win32":  # there a read pending on stdin blocks the loading of libraries
        threading.Thread(target=home.leave_after_stdin, daemon=True).start()
    try:
        announce(listener, authkey)
    except OSError:
        home.leave(0)  # the parent is gone already
    serve(home, listener, session_factory or _real_session)


def serve(home: Home, listener: Listener, session_factory: Callable[[], SessionLike]) -> None:
    """Answer one client until it shuts the worker down or goes away. Does not return."""
    desk = Desk()

    def read() -> None:
        nobody_came = threading.Timer(CLIENT_WAIT_S, home.leave, (0,))
        nobody_came.daemon = True
        nobody_came.start()
        try:
            desk.connection = accept(listener)
            nobody_came.cancel()
            home.close(listener)
            desk.read_requests()
        except Exception:
            traceback.print_exc()
            home.leave(1)
        home.leave(0)

    threading.Thread(target=read, daemon=True).start()
    desk.session = session_factory()  # the heavy imports, while the client connects
    while True:
        desk.run_next_job()


@dataclass
class Job:
    """A request for the main thread."""

    message: Message
    cancelled: threading.Event = field(default_factory=threading.Event)


class Desk:
    """Where the reader thread leaves jobs for the main thread, and both write replies."""

    def __init__(self) -> None:
        self.connection: Connection | None = None  # set before any job exists
        self.session: SessionLike | None = None  # set before the first job runs
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._running: Job | None = None  # set by the reader, cleared by the main thread
        self._cancelled_id: object = None  # a cancel may come before what it cancels
        self._send_lock = threading.Lock()

    # the reader thread

    def read_requests(self) -> None:
        """Take messages until the client is gone or says shutdown."""
        assert self.connection is not None
        while True:
            try:
                message = protocol.receive(self.connection)
            except ValueError as error:
                self._reply_error(None, OptionError(str(error)))
                continue
            except EOFError:
                return
            except OSError as error:  # also a message too large, after which nothing is readable
                self._reply_error(None, OptionError(f"the message cannot be read: {error}"))
                return
            if message["type"] == "shutdown":
                return
            self._take(message)

    def _take(self, message: Message) -> None:
        kind, number = message["type"], message.get("id")
        if kind == "cancel":
            self._cancel(message.get("target"))
        elif kind == "stats":
            self._answer(number, self._stats)
        elif kind not in JOBS:
            self._reply_error(number, OptionError(f"no such request: {kind:.40}"))
        elif self._running is not None:
            self._reply_error(number, OptionError("the engine is busy with another request"))
        else:
            self._running = Job(message)
            if number is not None and number == self._cancelled_id:
                self._running.cancelled.set()
            self._jobs.put(self._running)

    def _cancel(self, target: object) -> None:
        self._cancelled_id = target
        job = self._running
        if job is not None and job.message.get("id") == target:
            job.cancelled.set()

    def _stats(self) -> Message:
        if self.session is None:
            raise OptionError("no model is loaded")
        return {"type": "stats", "snapshot": self.session.snapshot()}

    # the main thread

    def run_next_job(self) -> None:
        """Wait for a job, do it, reply."""
        job = self._jobs.get()
        self._answer(job.message.get("id"), lambda: self._do(job), self._finish)

    def _finish(self) -> None:
        self._running = None

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
        assert self.session is not None
        wanted = protocol.parse(protocol.LoadFields, _body(job.message))
        return self.session.load(
            wanted.model,
            wanted.engine,
            wanted.chat_template,
            self._load_progress(job),
            job.cancelled.is_set,
        )

    def _load_progress(self, job: Job) -> Callable[[str, int, int], None]:
        def on_progress(stage: str, done: int, total: int) -> None:
            self._reply(job, {"type": "progress", "stage": stage, "done": done, "total": total})

        return on_progress

    def _generate(self, job: Job) -> GenerateResult:
        assert self.session is not None
        wanted = protocol.parse(protocol.GenerateFields, _body(job.message))

        def emit(event: object) -> None:
            kind = "text" if isinstance(event, protocol.TextPiece) else "prompt_progress"
            self._reply(job, {"type": kind, **vars(event)})

        return self.session.generate(wanted.request, emit, job.cancelled.is_set)

    def _bench(self, job: Job) -> None:
        assert self.session is not None
        wanted = protocol.parse(protocol.BenchFields, _body(job.message))

        def emit(sample: BenchSample) -> None:
            self._reply(job, {"type": "bench_result", **vars(sample)})

        self.session.bench(
            wanted.tests, wanted.repetitions, wanted.text, emit, job.cancelled.is_set
        )

    def _perplexity(self, job: Job) -> Evaluation:
        assert self.session is not None
        wanted = protocol.parse(PerplexityFields, _body(job.message))
        return self.session.perplexity(
            wanted, self._load_progress(job), self._run_events(job), job.cancelled.is_set
        )

    def _run_events(self, job: Job) -> Callable[[object], None]:
        def emit(event: object) -> None:
            self._reply(job, {"type": protocol.EVENT_TYPES[type(event)], **vars(event)})

        return emit

    def _profile(self, job: Job) -> ProfileResult:
        assert self.session is not None
        wanted = protocol.parse(ProfileFields, _body(job.message))
        return self.session.profile(wanted, self._load_progress(job), job.cancelled.is_set)

    def _frontier(self, job: Job) -> None:
        assert self.session is not None
        wanted = protocol.parse(FrontierFields, _body(job.message))
        self.session.frontier(
            wanted, self._load_progress(job), self._run_events(job), job.cancelled.is_set
        )

    def _doctor(self, job: Job) -> DoctorReport:
        assert self.session is not None
        wanted = protocol.parse(DoctorFields, _body(job.message))
        return self.session.doctor(wanted, self._load_progress(job), job.cancelled.is_set)

    # both threads

    def _answer(
        self, number: object, make: Callable[[], Message], finish: Callable[[], None] | None = None
    ) -> None:
        """Send what `make` returns, or the error that it raised. `finish` comes before the
        reply: the client may send its next job the moment it has this one's end."""
        try:
            reply = make()
        except (BuddyrunError, CancelledError) as error:
            reply = _error(error)
        except MemoryError:
            traceback.print_exc()
            reply = _error(BackendError("not enough memory for this; a smaller context needs less"))
        except Exception as error:
            traceback.print_exc()
            reply = _error(InternalError(f"{type(error).__name__}: {error}"))
        if finish is not None:
            finish()
        self._send({"id": number, **reply})

    def _reply(self, job: Job, reply: Message) -> None:
        self._send({"id": job.message.get("id"), **reply})

    def _reply_error(self, number: object, error: BuddyrunError) -> None:
        self._send({"id": number, **_error(error)})

    def _send(self, message: Message) -> None:
        assert self.connection is not None
        # When the client is gone the reader thread sees it too and ends the process.
        with self._send_lock, contextlib.suppress(OSError):
            protocol.send(self.connection, message)


def _body(message: Message) -> Message:
    return {name: value for name, value in message.items() if name not in ("id", "type")}


def _error(error: BuddyrunError | CancelledError) -> Message:
    return {"type": "error", "kind": type(error).__name__, "message": str(error)}


def _real_session() -> SessionLike:
    from runner.session import Session

    return Session()


if __name__ == "__main__":
    main()
