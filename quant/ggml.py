"""Owners of everything that ggml hands out: tensors' memory, backends, graphs' memory, events.

ggml answers a wrong call by ending the process, so callers validate first. Knows no model.
"""

import ctypes
from ctypes import c_int32, c_void_p
from types import TracebackType
from typing import Self

import numpy as np

from quant.devices import Device, cpu_device
from quant.errors import BackendError, OutOfMemoryError
from quant.ggml_library import Ggml, InitParams, TensorHead, load_ggml

_OUT_OF_MEMORY = -2
_STATUS = {-1: "failed", 1: "aborted"}


class Tensor:
    """A handle on one ggml tensor; belongs to the context that made it and dies with it."""

    __slots__ = ("pointer",)

    def __init__(self, pointer: "ctypes._Pointer[TensorHead]") -> None:
        assert pointer, "ggml returned no tensor: its context is too small"
        self.pointer = pointer

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """ggml order: ne0 is the row length."""
        return tuple(self.pointer.contents.ne)

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """In bytes, ggml order."""
        return tuple(self.pointer.contents.nb)

    @property
    def type(self) -> int:
        return int(self.pointer.contents.type)

    def set_slice_stride(self, n_bytes: int) -> None:
        """Space the matrices of a 3-d tensor `n_bytes` apart, before the tensor is placed."""
        head = self.pointer.contents
        head.nb[2] = n_bytes
        head.nb[3] = n_bytes * head.ne[2]


class _Owner:
    """Holds one C handle; `close` frees it once."""

    def __init__(self, ggml: Ggml, handle: int | None, what: str) -> None:
        if not handle:
            raise OutOfMemoryError(f"ggml could not make {what}: most likely out of memory")
        self.ggml = ggml
        self._handle: int | None = handle

    @property
    def handle(self) -> int:
        assert self._handle is not None, f"this {type(self).__name__} is closed"
        return self._handle

    def close(self) -> None:
        if self._handle is not None:
            self._free(self._handle)
            self._handle = None

    def _free(self, handle: int) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Buffer(_Owner):
    """Memory of a device; frees it on close."""

    def _free(self, handle: int) -> None:
        self.ggml.backend_buffer_free(handle)

    @property
    def n_bytes(self) -> int:
        return int(self.ggml.backend_buffer_get_size(self.handle))

    def place(self, tensor: Tensor, offset: int) -> None:
        """Give `tensor` its memory, `offset` bytes from the buffer's start."""
        n_bytes = self.ggml.nbytes(tensor.pointer)
        assert offset >= 0 and offset + n_bytes <= self.n_bytes, (offset, n_bytes, self.n_bytes)
        base = self.ggml.backend_buffer_get_base(self.handle)
        check(self.ggml.backend_tensor_alloc(self.handle, tensor.pointer, base + offset))


class Context(_Owner):
    """Where tensors and graphs are described; holds no tensor data."""

    def __init__(self, ggml: Ggml, n_tensors: int, n_graph_nodes: int = 0) -> None:
        size = n_tensors * ggml.tensor_overhead()
        if n_graph_nodes:
            size += ggml.graph_overhead_custom(n_graph_nodes, False)
        super().__init__(ggml, ggml.init(InitParams(size, None, True)), "a context")

    def _free(self, handle: int) -> None:
        self.ggml.free(handle)

    def tensor(self, type_id: int, *shape: int) -> Tensor:
        """A tensor without memory; `shape` in ggml order, 1 to 4 dimensions."""
        ne = (*shape, 1, 1, 1)[:4]
        return Tensor(self.ggml.new_tensor_4d(self.handle, type_id, *ne))

    def allocate(self, backend: "Backend") -> Buffer:
        """Give every tensor that has none yet its memory on `backend`."""
        handle = self.ggml.backend_alloc_ctx_tensors(self.handle, backend.handle)
        return Buffer(self.ggml, handle, f"a buffer on {backend.description}")


class Backend(_Owner):
    """One device, ready to compute: a queue of its own. One thread at a time uses it."""

    def __init__(self, ggml: Ggml, device: Device, n_threads: int = 1) -> None:
        """n_threads means something to the CPU only."""
        handle = ggml.backend_dev_init(device.handle, None)
        if not handle:
            remedy = ": --device cpu goes on without it" if device.is_gpu else ""
            raise BackendError(
                f"{device.name} ({device.description}) could not be opened: ggml or its driver "
                f"refused{remedy}"
            )
        super().__init__(ggml, handle, "a backend")
        self.device = device
        registry = ggml.backend_dev_backend_reg(device.handle)
        address = ggml.backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        prototype = ctypes.CFUNCTYPE(None, c_void_p, c_int32)
        self._set_n_threads = prototype(address) if address else None
        self.set_n_threads(n_threads)

    @classmethod
    def cpu(cls, n_threads: int) -> "Backend":
        """The CPU. Raises BackendError when the libraries have no CPU backend."""
        return cls(load_ggml(), cpu_device(), n_threads)

    @classmethod
    def on(cls, device: Device) -> "Backend":
        """A queue on this device. Several on one device run beside each other where ggml gives
        each its own, as with CUDA's streams; with Vulkan they end in one and take turns."""
        return cls(load_ggml(), device)

    @property
    def description(self) -> str:
        return self.device.description

    @property
    def is_host(self) -> bool:
        """Whether it computes in the host's own memory, mapped files included."""
        return self.device.kind == "cpu"

    def _free(self, handle: int) -> None:
        self.ggml.backend_free(handle)

    def set_n_threads(self, n_threads: int) -> None:
        if self._set_n_threads is not None:
            self._set_n_threads(self.handle, n_threads)

    def wrap(self, memory: np.ndarray) -> Buffer:
        """Use host memory in place, without a copy; `memory` must outlive the buffer.

        Raises BackendError when the device cannot use host memory.
        """
        address = memory.ctypes.data
        handle = self.ggml.backend_dev_buffer_from_host_ptr(
            self.device.handle, address, memory.nbytes, memory.nbytes
        )
        return Buffer(self.ggml, handle, f"a view of the model file on {self.description}")

    def write(self, tensor: Tensor, data: np.ndarray, offset: int = 0) -> None:
        """Copy host bytes into a tensor, `offset` bytes from its start."""
        assert offset + data.nbytes <= self.ggml.nbytes(tensor.pointer)
        assert data.flags.c_contiguous
        self.ggml.backend_tensor_set(tensor.pointer, data.ctypes.data, offset, data.nbytes)

    def write_later(self, tensor: Tensor, data: np.ndarray, offset: int = 0) -> None:
        """The same in this queue, after what is in it; leave `data` alone until it is empty."""
        assert offset + data.nbytes <= self.ggml.nbytes(tensor.pointer)
        assert data.flags.c_contiguous
        self.ggml.backend_tensor_set_async(
            self.handle, tensor.pointer, data.ctypes.data, offset, data.nbytes
        )

    def read(self, tensor: Tensor, data: np.ndarray, offset: int = 0) -> None:
        """Fill host bytes from a tensor, `offset` bytes from its start on."""
        assert offset + data.nbytes <= self.ggml.nbytes(tensor.pointer)
        assert data.flags.c_contiguous
        self.ggml.backend_tensor_get(tensor.pointer, data.ctypes.data, offset, data.nbytes)

    def view(self, tensor: Tensor) -> np.ndarray:
        """A tensor's bytes in place, (n_bytes,) uint8, for as long as its memory lives: only where
        `is_host`."""
        assert self.is_host
        n_bytes = self.ggml.nbytes(tensor.pointer)
        address = self.ggml.get_data(tensor.pointer)
        return np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address))

    def clear(self, tensor: Tensor, offset: int, n_bytes: int) -> None:
        """Zero a part of a tensor."""
        self.ggml.backend_tensor_memset(tensor.pointer, 0, offset, n_bytes)

    def compute(self, graph_handle: int) -> None:
        """Run a graph to its end. Raises BackendError with ggml's status."""
        check(self.ggml.backend_graph_compute(self.handle, graph_handle))

    def compute_later(self, graph_handle: int) -> None:
        """Put a graph into the queue; `synchronize` waits for it. Errors as `compute`."""
        check(self.ggml.backend_graph_compute_async(self.handle, graph_handle))

    def synchronize(self) -> None:
        """Wait until the queue is empty."""
        self.ggml.backend_synchronize(self.handle)

    def supports(self, tensor: "ctypes._Pointer[TensorHead]") -> bool:
        """Whether the device can compute this node of a graph."""
        return bool(self.ggml.backend_dev_supports_op(self.device.handle, tensor))


class PinnedMemory:
    """Host memory that a device copies from at full speed; where there is none, ordinary memory.

    `array` (n_bytes,) uint8 must not be used after `close`.
    """

    def __init__(self, backend: Backend, n_bytes: int) -> None:
        ggml = backend.ggml
        kind = ggml.backend_dev_host_buffer_type(backend.device.handle)
        handle = ggml.backend_buft_alloc_buffer(kind, n_bytes) if kind else None
        self._buffer = Buffer(ggml, handle, "pinned memory") if handle else None
        if self._buffer is None:
            self.array = np.zeros(n_bytes, np.uint8)
            return
        base = ggml.backend_buffer_get_base(self._buffer.handle)
        memory = (ctypes.c_uint8 * n_bytes).from_address(base)
        self.array = np.ctypeslib.as_array(memory)

    @property
    def is_pinned(self) -> bool:
        return self._buffer is not None

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.close()


class Event:
    """A mark in a backend's queue that the host can wait for.

    Where a device has no events it is the end of the queue.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._ggml = backend.ggml
        self._handle: int | None = None
        self._is_recorded = False
        if backend.device.has_events:
            self._handle = self._ggml.backend_event_new(backend.device.handle)

    def close(self) -> None:
        if self._handle:
            self._ggml.backend_event_free(self._handle)
            self._handle = None

    def record(self) -> None:
        """Mark the end of the queue as it is now."""
        if self._handle:
            self._ggml.backend_event_record(self._handle, self._backend.handle)
        self._is_recorded = True

    def synchronize(self) -> None:
        """Wait until all is done that was in the queue at the last `record`."""
        if not self._is_recorded:
            return
        if self._handle:
            self._ggml.backend_event_synchronize(self._handle)
        else:
            self._backend.synchronize()


class GraphAllocator(_Owner):
    """Lays graphs out in one shared piece of device memory, as large as the largest of them.

    Graphs that share an allocator never run at the same time and keep no values between runs.
    """

    def __init__(self, backend: Backend) -> None:
        ggml = backend.ggml
        buffer_type = ggml.backend_get_default_buffer_type(backend.handle)
        super().__init__(ggml, ggml.gallocr_new(buffer_type), "a graph allocator")

    def _free(self, handle: int) -> None:
        self.ggml.gallocr_free(handle)

    @property
    def n_bytes(self) -> int:
        return int(self.ggml.gallocr_get_buffer_size(self.handle, 0))

    def reserve(self, graph_handle: int) -> None:
        """Grow to what this graph needs. Earlier layouts are void if `n_bytes` changes."""
        if not self.ggml.gallocr_reserve(self.handle, graph_handle):
            raise OutOfMemoryError("out of memory for the compute buffer: use a smaller -b or -c")

    def lay_out(self, graph_handle: int) -> None:
        """Give the graph's tensors their addresses."""
        if not self.ggml.gallocr_alloc_graph(self.handle, graph_handle):
            raise OutOfMemoryError("out of memory for the compute buffer: use a smaller -b or -c")


def check(status: int) -> None:
    """Raise BackendError unless a ggml status says success."""
    if status == _OUT_OF_MEMORY:
        raise OutOfMemoryError("out of memory while the device computed: use a smaller -b or -c")
    if status != 0:
        what = _STATUS.get(status, f"status {status}")
        raise BackendError(f"the device did not do what it was asked to (ggml: {what})")
