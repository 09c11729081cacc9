"""One thread that reads experts into memory it was lent, in the order in which they are asked for.

It knows no bookkeeping: whose memory it was, and whether the expert is now resident, is for the
engine's thread to say.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import SimpleQueue

from runner.experts.slot_memory import Parts


@dataclass(eq=False)
class Load:
    """One expert on its way into memory that was lent for it."""

    layer: int
    expert: int
    slot: int  # -1 = into staging memory, as a guess
    parts: Parts | None  # lent until `is_done`; None = the slot is on a device
    n_skipped_bytes: int = 0  # at the start of `parts`, which are not to be read
    is_unwanted: bool = False  # set by the engine's thread: do not begin, or stop between reads
    n_read_bytes: int = 0  # written by the reading thread before it is done
    is_done: bool = False  # written, like the rest below, when the engine's thread takes it back
    error: Exception | None = field(default=None)
    duration_ns: int = 0


Read = Callable[[Load], None]


class UnwantedError(Exception):
    """A load that was not begun because nobody wanted it any more."""


Result = tuple[Load, Exception | None, int]  # with the nanoseconds that the read took


class Prefetcher:
    """Reads in the background. All methods belong to the engine's thread.

    The queues are bounded by `can_request`, not by themselves: a queue.Queue costs half a
    millisecond per load, since its locks make the two threads wait for each other.
    """

    def __init__(self, read: Read, max_waiting: int) -> None:
        """`read` fills a load's parts; at most max_waiting loads are under way."""
        self._read = read
        self._requests: SimpleQueue[Load | None] = SimpleQueue()  # None = end
        self._finished: SimpleQueue[Result] = SimpleQueue()
        self._max_waiting = max_waiting
        self._n_under_way = 0
        self._thread = threading.Thread(target=self._work, name="prefetcher", daemon=True)
        self._thread.start()

    @property
    def can_request(self) -> bool:
        """Whether one more load may be asked for now."""
        return self._n_under_way < self._max_waiting

    def request(self, load: Load) -> None:
        """Begin to read as soon as what was asked for earlier is read. Ask `can_request` first."""
        assert self.can_request
        self._n_under_way += 1
        self._requests.put(load)

    def wait(self, load: Load) -> None:
        """Return when `load` is done, well or not: see its `error`."""
        while not load.is_done:
            self._take_back(self._finished.get())

    def take_back_done(self) -> None:
        """Learn of loads that are done, without waiting."""
        while not self._finished.empty():
            self._take_back(self._finished.get())

    def close(self) -> None:
        """Finish the reads under way and end the thread."""
        self._requests.put(None)
        self._thread.join()
        while not self._finished.empty():  # they hold views of memory that is freed next
            self._finished.get()

    def _take_back(self, result: Result) -> None:
        load, error, duration_ns = result
        load.error, load.duration_ns, load.is_done = error, duration_ns, True
        self._n_under_way -= 1

    def _work(self) -> None:
        while (load := self._requests.get()) is not None:
            started = time.perf_counter_ns()
            error: Exception | None = None
            try:
                if load.is_unwanted:
                    raise UnwantedError
                self._read(load)
            except Exception as failure:  # whatever it is, the engine's thread must hear of it
                error = failure
            self._finished.put((load, error, time.perf_counter_ns() - started))
