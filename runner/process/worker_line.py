"""The line to one worker: requests go out, each one's replies come back to who asked. Knows no
request's meaning."""

import itertools
import threading
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from runner import errors, protocol
from runner.errors import InternalError
from runner.process.worker_process import WorkerProcess
from runner.protocol import Message

POLL_S = 0.5  # Windows lets Ctrl-C through only between waits

_Mailbox = SimpleQueue[Message | None]  # None: the worker has ended


@dataclass(frozen=True)
class Asked:
    """A request. It belongs to its worker to its end, also when that is replaced meanwhile."""

    number: int
    line: "WorkerLine"
    mailbox: _Mailbox

    def next_reply(self) -> Message | None:
        """Wait for it; None when the worker has ended. Raises what the worker raised, with the
        same class and text."""
        while True:
            try:
                reply = self.mailbox.get(timeout=POLL_S)
            except Empty:
                continue
            if reply is not None and reply["type"] == "error":
                raise _as_error(reply)
            return reply

    def forget(self) -> None:
        """Wait for no reply any more."""
        self.line.hang_up(self.number)


class WorkerLine:
    """One worker process and who waits for its replies; requests come from any thread."""

    def __init__(self) -> None:
        """Start the worker; returns before it is ready."""
        self._ids = itertools.count(1)
        self._mailboxes: dict[int, _Mailbox] = {}
        self._ended = threading.Event()
        self._worker = WorkerProcess(self._on_message, self._on_end)

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._worker.pid

    @property
    def log(self) -> str:
        """The last lines that the worker wrote to stderr."""
        return self._worker.log

    def ask(self, kind: str, **body: object) -> Asked:
        """Send a request soon; one that finds the worker gone is answered with that."""
        asked = Asked(next(self._ids), self, SimpleQueue())
        data = protocol.encode({"type": kind, "id": asked.number, **body})
        self._mailboxes[asked.number] = asked.mailbox
        if self._ended.is_set():
            asked.mailbox.put(None)
        self._worker.send(data)
        return asked

    def tell(self, kind: str, **body: object) -> None:
        """Send what has no reply; from a signal handler too."""
        self._worker.send(protocol.encode({"type": kind, **body}))

    def hang_up(self, number: int) -> None:
        """Nobody waits for the replies to this request."""
        self._mailboxes.pop(number, None)

    def kill(self) -> None:
        """End the worker at once."""
        self._worker.kill()

    def end(self) -> int | None:
        """Wait for the worker; its exit status, None if it had to be killed."""
        return self._worker.end()

    def _on_message(self, message: Message) -> None:
        mailbox = self._mailboxes.get(message.get("id") or 0)
        if mailbox is not None:
            mailbox.put(message)

    def _on_end(self) -> None:
        self._ended.set()
        for mailbox in list(self._mailboxes.values()):
            mailbox.put(None)


def _as_error(reply: Message) -> Exception:
    if reply["kind"] in errors.__all__:
        error: Exception = getattr(errors, reply["kind"])(reply["message"])
        return error
    return InternalError(reply["message"])
