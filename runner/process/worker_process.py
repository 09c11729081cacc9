"""One worker process as its parent sees it: start, messages, log, end. Knows no request."""

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client as connect
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from runner import protocol
from runner.protocol import Message

PROGRAM = "from runner.worker import main; main()"
MAX_SOCKET_DIRECTORY = 90  # a socket's path has at most 104 bytes on macOS, 108 on Linux
LOG_BYTES = 16 << 10
END_WAIT_S = 2.0

# The worker must get the packages that this process runs, wherever they are and whatever lies in
# the current directory (-P); everything else comes from Python's usual places in the usual order.
_FIND_PACKAGES = "import sys; sys.path.insert(0, {root!r}); import quant, runner; del sys.path[0]; "


class WorkerProcess:
    """A running worker. Messages go out and come in on threads of their own, so that a signal
    (Ctrl-C) that interrupts the caller never leaves half a message on the stream."""

    def __init__(self, on_message: Callable[[Message], None], on_end: Callable[[], None]) -> None:
        """Start the worker; returns before it is ready. `on_message` is called for every message
        and `on_end` once, when there will be no more, both on the reader thread."""
        self._on_message = on_message
        self._on_end = on_end
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._log = bytearray()
        self._directory = make_private_directory()
        with ExitStack() as undo:
            undo.callback(remove_private_directory, self._directory)
            with _held_ctrl_c():
                self._process = self._spawn(PROGRAM)
                undo.callback(self._process.kill)
            undo.pop_all()
        self._threads = [self._start(self._drain_log), self._start(self._read)]

    def _spawn(self, program: str) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).resolve().parents[2])
        code = _FIND_PACKAGES.format(root=root) + program
        return subprocess.Popen(
            [sys.executable, "-P", "-c", code, str(self._directory)],
            stdin=subprocess.PIPE,  # its other end tells the worker that this process lives
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def log(self) -> str:
        """The last lines that the worker wrote to stderr."""
        return bytes(self._log).decode(errors="replace")

    def send(self, message: bytes) -> None:
        """Send an encoded message soon. Can be called from a signal handler and any thread;
        when the worker is gone the message is dropped, and `on_end` tells."""
        self._outbox.put(message)

    def end(self) -> int | None:
        """Wait for the process, remove what it left, return its exit status; None if it had to
        be killed because it did not end in time."""
        try:
            status: int | None = self._process.wait(END_WAIT_S)
        except subprocess.TimeoutExpired:
            status = None
            self._process.kill()
            self._process.wait()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(END_WAIT_S)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            assert pipe is not None
            pipe.close()
        remove_private_directory(self._directory)
        return status

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()  # no-op after its end

    def _start(self, run: Callable[[], None]) -> threading.Thread:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def _read(self) -> None:
        """Wait for the worker's address, call it, pass its messages on until it ends."""
        ended = suppress(EOFError, OSError, ValueError, AuthenticationError)
        with ended, self._connect() as connection:
            writer = self._start(lambda: self._write(connection))
            try:
                while True:
                    self._on_message(protocol.receive(connection))
            finally:
                self._outbox.put(None)
                writer.join(END_WAIT_S)
        self._on_end()

    def _connect(self) -> Connection:
        stdout = self._process.stdout
        assert stdout is not None
        while line := stdout.readline(4096):
            if line.startswith(b'{"address"'):  # what Python's own start-up prints is skipped
                announced = json.loads(line)
                return connect(announced["address"], authkey=bytes.fromhex(announced["authkey"]))
        raise EOFError

    def _write(self, connection: Connection) -> None:
        with suppress(OSError):
            while (message := self._outbox.get()) is not None:
                connection.send_bytes(message)

    def _drain_log(self) -> None:
        stderr: IO[bytes] | None = self._process.stderr
        assert stderr is not None
        while piece := stderr.read1(4096):  # type: ignore[attr-defined]
            self._log += piece
            del self._log[:-LOG_BYTES]


@contextmanager
def _held_ctrl_c() -> Iterator[None]:
    """Hold Ctrl-C back: it comes when the block ends, and a process that is started in the block
    never gets it. That process needs this until it can ignore Ctrl-C itself."""
    if sys.platform == "win32":  # the worker has a process group of its own there
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def make_private_directory() -> Path:
    """A new directory that only this user can open, with a path short enough for a socket."""
    directory = tempfile.mkdtemp(prefix="buddyrun-")
    if len(directory.encode(errors="surrogateescape")) > MAX_SOCKET_DIRECTORY:
        Path(directory).rmdir()
        directory = tempfile.mkdtemp(prefix="buddyrun-", dir="/tmp")
    return Path(directory)


def remove_private_directory(directory: Path) -> None:
    """Remove what `make_private_directory` made; the worker may have done so already."""
    with suppress(OSError):
        (directory / "s").unlink(missing_ok=True)
        directory.rmdir()
