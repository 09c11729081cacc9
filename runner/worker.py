"""The engine's process: takes requests from one client and answers. Knows no terminal.

The main thread loads, generates and measures, one job at a time (time limits by signals need it).
A reader thread takes the messages, so that `cancel`, `stats` and `frame` work while the main thread
computes, and ends the process at once when the client is gone. What is to change in a running
answer is left for the main thread, which looks between two tokens. A third thread serves viewers.
"""

import contextlib
import faulthandler
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from queue import Empty, SimpleQueue

from runner import message_values, protocol
from runner.errors import (
    BackendError,
    BuddyrunError,
    CancelledError,
    InternalError,
    OptionError,
)
from runner.frames import Frame
from runner.jobs import KINDS, Job, Jobs, SessionLike, body
from runner.process.worker_home import Home, accept, announce
from runner.protocol import ChangeFields, Message
from runner.run_board import RunBoard
from runner.viewers import Viewers

CLIENT_WAIT_S = 60.0  # a worker that nobody has called for so long exits


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
            _open_to_viewers(home, desk)
            desk.read_requests()
        except Exception:
            traceback.print_exc()
            home.leave(1)
        home.leave(0)

    threading.Thread(target=read, daemon=True).start()
    desk.begin(session_factory())  # the heavy imports, while the client connects
    while True:
        desk.run_next_job()


def _open_to_viewers(home: Home, desk: "Desk") -> None:
    """Let this user's other programs watch. A run that nobody can watch is a run all the same."""
    listener = home.listen_to_viewers(os.environ)
    if listener is not None:
        threading.Thread(target=Viewers(listener, desk.frame).run, daemon=True).start()


class Desk:
    """Where the reader thread leaves jobs for the main thread, and both write replies."""

    def __init__(self) -> None:
        self.connection: Connection | None = None  # set before any job exists
        self._session: SessionLike | None = None  # set before the first job runs
        self._board = RunBoard()
        self._queue: SimpleQueue[Job | None] = SimpleQueue()  # None: look for changes
        self._changes: SimpleQueue[Message | None] = SimpleQueue()  # None: look up
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
        elif kind == "frame":
            self._answer(number, lambda: {"type": "frame", "frame": self.frame()})
        elif kind == "change":
            self._changes.put(message)
            self._queue.put(None)  # where no answer is made nobody looks between tokens
        elif kind not in KINDS:
            self._reply_error(number, OptionError(f"no such request: {kind:.40}"))
        elif self._running is not None:
            self._reply_error(number, OptionError("the engine is busy with another request"))
        else:
            self._running = Job(message)
            if number is not None and number == self._cancelled_id:
                self._running.cancelled.set()
            self._queue.put(self._running)

    def _cancel(self, target: object) -> None:
        self._cancelled_id = target
        job = self._running
        if job is not None and job.message.get("id") == target:
            job.cancelled.set()
            self._changes.put(None)  # it may be paused

    def _stats(self) -> Message:
        if self._session is None:
            raise OptionError("no model is loaded")
        return {"type": "stats", "snapshot": self._session.snapshot()}

    # the main thread

    def begin(self, session: SessionLike) -> None:
        """Jobs can be done from now on."""
        self._session = session
        self._jobs = Jobs(session, self._board, self._reply, self._look_between_tokens)

    def run_next_job(self) -> None:
        """Wait for a job or changes, do them, reply."""
        job = self._queue.get()
        if job is None:
            self._make_changes()
        else:
            self._answer(job.message.get("id"), lambda: self._jobs.do(job), self._finish)

    def _finish(self) -> None:
        self._running = None

    def _look_between_tokens(self, job: Job) -> None:
        """Make the changes that came; while the run is paused wait for one that ends that."""
        assert self._session is not None
        self._make_changes()
        while (settings := self._session.settings) and settings.is_paused:
            if job.cancelled.is_set():  # the next answer is not meant
                self._session.change(ChangeFields(is_paused=False))
                return
            self._board.note("paused")
            self._make_change(self._changes.get())

    def _make_changes(self) -> None:
        with contextlib.suppress(Empty):
            while True:
                self._make_change(self._changes.get_nowait())

    def _make_change(self, message: Message | None) -> None:
        if message is not None:
            wanted = message
            self._answer(wanted.get("id"), lambda: self._change(wanted))

    def _change(self, message: Message) -> Message:
        assert self._session is not None
        wanted = message_values.parse(ChangeFields, body(message))
        return {"type": "changed", "settings": self._session.change(wanted)}

    # any thread

    def frame(self) -> Frame:
        """What the engine does now."""
        if self._session is None or not self._board.has_model:
            return self._board.frame(None, None)
        try:
            return self._board.frame(self._session.settings, self._session.snapshot(True))
        except OptionError:  # the model is gone since
            return self._board.frame(None, None)

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


def _error(error: BuddyrunError | CancelledError) -> Message:
    return {"type": "error", "kind": type(error).__name__, "message": str(error)}


def _real_session() -> SessionLike:
    from runner.session import Session

    return Session()


if __name__ == "__main__":
    main()
