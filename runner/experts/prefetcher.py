"""One thread that reads experts into memory it was lent, in the order in which they are asked for.

It knows no bookkeeping: whose memory it was, and whether the expert is now resident, is for the
engine's thread to say.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Queue, SimpleQueue

from runner.experts.slot_memory import SlotPart

Parts = tuple[SlotPart, SlotPart, SlotPart]
Read = Callable[[int, int, Parts], None]


@dataclass(eq=False)
class Load:
    """One expert on its way into a slot."""

    layer: int
    expert: int
    slot: int
    parts: Parts  # lent until `is_done`
    is_done: bool = False  # written, like the rest below, when the engine's thread takes it back
    error: Exception | None = field(default=None)
    duration_ns: int = 0


Result = tuple[Load, Exception | None, int]  # with the nanoseconds that the read took


class Prefetcher:
    """Reads in the background. All methods belong to the engine's thread."""

    def __init__(self, read: Read, max_waiting: int) -> None:
        """`read` fills parts with an expert's bytes; at most max_waiting loads are under way."""
        self._read = read
        self._requests: Queue[Load | None] = Queue(max_waiting + 1)  # and the request to end
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
        self._requests.put_nowait(load)

    def wait(self, load: Load) -> None:
        """Return when `load` is done, well or not: see its `error`."""
        while not load.is_done:
            self._take_back(self._finished.get())

    def poll(self) -> None:
        """Mark what is done by now, without waiting."""
        while not self._finished.empty():
            self._take_back(self._finished.get())

    def close(self) -> None:
        """Finish the reads under way and end the thread."""
        self._requests.put(None)
        self._thread.join()

    def _take_back(self, result: Result) -> None:
        load, error, duration_ns = result
        load.error, load.duration_ns, load.is_done = error, duration_ns, True
        self._n_under_way -= 1

    def _work(self) -> None:
        while (load := self._requests.get()) is not None:
            started = time.perf_counter_ns()
            error: Exception | None = None
            try:
                self._read(load.layer, load.expert, load.parts)
            except Exception as failure:  # whatever it is, the engine's thread must hear of it
                error = failure
            self._finished.put((load, error, time.perf_counter_ns() - started))
