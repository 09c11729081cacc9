"""A device that copies as late as it may: what is sent to it lies in a queue until somebody waits.

It stands where ggml's functions stand, so queues, events and pinned memory above it are the real
ones. A copy takes its bytes from the host's memory when it is made, not when it is asked for: a
piece that is overwritten too early, or a send that returns too early, leaves other bytes here.
"""

import ctypes
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from random import Random
from types import SimpleNamespace
from typing import Any

from quant.devices import Device
from quant.ggml import Backend, Tensor

SPOILED = 0xDB  # what freed memory is overwritten with


@dataclass(frozen=True)
class Copy:
    """One copy that was asked for and not made yet."""

    target: bytearray
    offset: int
    address: int
    n_bytes: int


@dataclass
class Queue:
    """One queue: copies are made in their order."""

    waiting: deque[Copy] = field(default_factory=deque)
    n_made: int = 0

    @property
    def n_asked(self) -> int:
        return self.n_made + len(self.waiting)

    def make(self, n_in_all: int) -> None:
        """Make copies until so many were made since the beginning."""
        while self.n_made < n_in_all:
            copy = self.waiting.popleft()
            data = ctypes.string_at(copy.address, copy.n_bytes)
            copy.target[copy.offset : copy.offset + copy.n_bytes] = data
            self.n_made += 1


class LateGgml:
    """The functions of ggml that a copying queue needs; see `quant/ggml_library.py`.

    `eagerness` 0.0: copies are made when somebody waits for them; else at any call also some
    earlier, as chance says.
    """

    def __init__(self, rng: Random, eagerness: float, has_pinned: bool) -> None:
        self.queues: dict[int, Queue] = {}
        self.n_freed_under_way = 0  # memory and events that copies still needed
        self.n_owned = 0  # queues, events and memory that were made and not freed
        self._rng, self._eagerness, self._has_pinned = rng, eagerness, has_pinned
        self._events: dict[int, tuple[Queue, int] | None] = {}  # what was asked at `record`
        self._memory: dict[int, Any] = {}
        self._handles = count(1)

    # queues

    def backend_dev_init(self, device: int, _parameters: None) -> int:
        handle = self._made()
        self.queues[handle] = Queue()
        return handle

    def backend_dev_backend_reg(self, device: int) -> int:
        return device

    def backend_reg_get_proc_address(self, registry: int, name: bytes) -> None:
        return None

    def backend_free(self, handle: int) -> None:
        self._freed(self.queues.pop(handle).waiting)

    def backend_tensor_set_async(
        self, handle: int, tensor: Any, address: int, offset: int, n_bytes: int
    ) -> None:
        queue = self.queues[handle]
        queue.waiting.append(Copy(tensor.memory, offset, address, n_bytes))
        self._go_on(queue)

    def backend_synchronize(self, handle: int) -> None:
        self.queues[handle].make(self.queues[handle].n_asked)

    def nbytes(self, tensor: Any) -> int:
        return len(tensor.memory)

    def _go_on(self, queue: Queue) -> None:
        """Whatever was asked for may be made at any time."""
        if self._rng.random() < self._eagerness:
            queue.make(self._rng.randint(queue.n_made, queue.n_asked))

    # events

    def backend_event_new(self, device: int) -> int:
        handle = self._made()
        self._events[handle] = None
        return handle

    def backend_event_free(self, handle: int) -> None:
        at = self._events.pop(handle)
        self._freed(at is not None and at[0].n_made < at[1])

    def backend_event_record(self, handle: int, queue: int) -> None:
        self._events[handle] = self.queues[queue], self.queues[queue].n_asked

    def backend_event_synchronize(self, handle: int) -> None:
        at = self._events[handle]
        assert at is not None, "waited for an event that was never recorded: ggml may end here"
        queue, n_asked = at
        queue.make(n_asked)
        self._go_on(queue)

    # pinned memory

    def backend_dev_host_buffer_type(self, device: int) -> int | None:
        return device if self._has_pinned else None

    def backend_buft_alloc_buffer(self, kind: int, n_bytes: int) -> int:
        handle = self._made()
        self._memory[handle] = (ctypes.c_uint8 * n_bytes)()
        return handle

    def backend_buffer_get_base(self, handle: int) -> int:
        return ctypes.addressof(self._memory[handle])

    def backend_buffer_free(self, handle: int) -> None:
        memory = self._memory[handle]  # kept, so that reading freed memory ends no test
        ctypes.memset(memory, SPOILED, len(memory))
        self._freed(any(queue.waiting for queue in self.queues.values()))

    def _made(self) -> int:
        self.n_owned += 1
        return next(self._handles)

    def _freed(self, is_under_way: object) -> None:
        self.n_owned -= 1
        self.n_freed_under_way += bool(is_under_way)


DEVICE = Device(1, "Late0", "late", "Late", "gpu", has_events=True, has_host_buffer=True)


def late_queue(
    rng: Random,
    eagerness: float = 0.0,
    has_events: bool = True,
    has_pinned: bool = True,
    backend_type: Callable[..., Backend] = Backend,
) -> Backend:
    """A queue on such a device."""
    device = replace(DEVICE, has_events=has_events, has_host_buffer=has_pinned)
    return backend_type(LateGgml(rng, eagerness, has_pinned), device)


def late_tensor(n_bytes: int) -> Tensor:
    """Memory on the device, all zero."""
    return Tensor(SimpleNamespace(memory=bytearray(n_bytes)))  # type: ignore[arg-type]


def bytes_of(tensor: Tensor) -> bytearray:
    """A tensor's bytes as they are now."""
    return tensor.pointer.memory  # type: ignore[attr-defined, no-any-return]
