"""Measures how many bytes a second a device's memory and the way to it take. Knows no model.

A figure is given only after the bytes were seen to be where they belong: a backend may refuse an
operation silently, and would then look very fast.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing

import numpy as np

from quant.errors import BackendError
from quant.ggml import Backend, Context, GraphAllocator, PinnedMemory, Tensor
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.graph import Graph
from runner.byte_sizes import bytes_text
from runner.doctor_report import Bandwidth

_F32 = GGML_TYPES_BY_NAME["F32"].id
_MIB = 1 << 20
_MEMORY_SIZES = (4 * _MIB, 32 * _MIB, 256 * _MIB)  # the last is larger than most caches
_COPY_SIZES = (4 * _MIB, 16 * _MIB, 64 * _MIB)
_ROW = 4096  # numbers in a row of the tensors
_TIMED_S = 0.25  # for each size
_QUEUED_S = 0.05  # so long a queue makes starting its parts cost nothing
_MAX_RUN_S = 0.3  # a size is left out when once through it would take longer


def from_host(backend: Backend, limit_bytes: int) -> Bandwidth:
    """Copies from host memory to the device, pinned where it can be; at most `limit_bytes`."""
    if backend.is_host:
        return Bandwidth(None, "nothing is copied: it computes in the host's memory")
    is_pinned = True

    def measure(n_bytes: int) -> float:
        nonlocal is_pinned
        with Context(backend.ggml, 1) as context:
            target = context.tensor(_F32, _ROW, n_bytes // (4 * _ROW))
            with context.allocate(backend), closing(PinnedMemory(backend, n_bytes)) as memory:
                is_pinned = memory.is_pinned
                memory.array[:] = 7
                backend.clear(target, 0, n_bytes)
                rate = _rate(
                    lambda: backend.write_later(target, memory.array), backend.synchronize, n_bytes
                )
                _check_end(backend, target, memory.array[-_MIB:])
        return rate

    found = _with_growing_size(measure, _COPY_SIZES, limit_bytes, "copies of {}")
    memory = "pinned" if is_pinned else "ordinary (no pinned)"
    how = found.how if found.gb_per_s is None else f"{found.how} from {memory} host memory"
    return Bandwidth(found.gb_per_s, how)


def own_memory(backend: Backend, limit_bytes: int) -> Bandwidth:
    """Copies within the device's memory; what is read and what is written both count."""

    def measure(n_bytes: int) -> float:
        with Context(backend.ggml, 2) as context, Graph(backend, 8) as graph:
            shape = (_ROW, n_bytes // (4 * _ROW))
            source, target = (context.tensor(_F32, *shape) for _ in range(2))
            with context.allocate(backend), GraphAllocator(backend) as allocator:
                _prepare(backend, graph, graph.copy(source, target), allocator)
                end = np.full(_MIB, 7, np.uint8)
                backend.clear(source, 0, n_bytes)
                backend.clear(target, 0, n_bytes)
                backend.write(source, end, n_bytes - end.nbytes)
                rate = _rate(graph.start, backend.synchronize, 2 * n_bytes)
                _check_end(backend, target, end)
        return rate

    how = "a ggml graph copies {} of F32; read and written bytes count"
    return _with_growing_size(measure, _MEMORY_SIZES, limit_bytes, how)


def host_read(n_threads: int, limit_bytes: int) -> Bandwidth:
    """Reading the machine's memory as decoding does: a matrix times a vector, on the CPU."""

    def measure(n_bytes: int) -> float:
        n_rows = n_bytes // (4 * _ROW)
        with Backend.cpu(n_threads) as backend, Context(backend.ggml, 1) as context:
            matrix = context.tensor(_F32, _ROW, n_rows)
            with (
                context.allocate(backend),
                Graph(backend, 8) as graph,
                GraphAllocator(backend) as allocator,
            ):
                vector = graph.input(_F32, _ROW, 1)
                product = graph.output(graph.mul_mat(matrix, vector))
                _prepare(backend, graph, product, allocator)
                ones = np.ones(_MIB // 4, np.float32)
                for offset in range(0, n_bytes, ones.nbytes):
                    backend.write(matrix, ones, offset)
                backend.write(vector, ones[:_ROW])
                backend.clear(product, 0, 4 * n_rows)  # an earlier size's product may lie there
                rate = _rate(graph.start, backend.synchronize, n_bytes)
                _check_end(backend, product, np.full(n_rows, _ROW, np.float32))
        return rate

    threads = f"{n_threads} thread{'s' * (n_threads > 1)}"
    how = f"ggml multiplies a matrix of {{}} (F32) by a vector on the CPU, {threads}"
    return _with_growing_size(measure, _MEMORY_SIZES, limit_bytes, how)


def _with_growing_size(
    measure: Callable[[int], float], sizes: Sequence[int], limit_bytes: int, how: str
) -> Bandwidth:
    """The figure of the largest size that the memory, the device and the time allow."""
    found = Bandwidth(None, f"not enough free memory: {bytes_text(max(0, limit_bytes))} for this")
    for n_bytes in sizes:
        if n_bytes > limit_bytes:
            break
        try:
            rate = measure(n_bytes)
        except BackendError as error:  # what a smaller size gave stands
            return found if found.gb_per_s is not None else Bandwidth(None, str(error))
        found = Bandwidth(rate / 1e9, how.format(f"{n_bytes // _MIB} MiB"))
        if sizes[-1] / sizes[-2] * n_bytes / rate > _MAX_RUN_S:
            break
    return found


def _prepare(backend: Backend, graph: Graph, node: Tensor, allocator: GraphAllocator) -> None:
    """Lay a graph out. Raises BackendError when the device cannot compute `node`."""
    if not backend.supports(node.pointer):
        raise BackendError(f"{backend.device.name} has no kernel for what measures this")
    graph.reserve(allocator)
    graph.lay_out(allocator)


def _rate(start: Callable[[], None], wait: Callable[[], None], n_bytes: int) -> float:
    """Bytes a second of the best of several runs; a run starts as often as fills _QUEUED_S."""
    start()
    wait()
    best, n_starts = 0.0, 1
    end_s = time.perf_counter() + _TIMED_S
    while time.perf_counter() < end_s or not best:
        began_s = time.perf_counter()
        for _ in range(n_starts):
            start()
        wait()
        taken_s = time.perf_counter() - began_s
        best = max(best, n_starts * n_bytes / taken_s)
        if taken_s < _QUEUED_S:
            n_starts *= 2
    return best


def _check_end(backend: Backend, tensor: Tensor, expected: np.ndarray) -> None:
    """Raise BackendError unless the tensor ends with these bytes."""
    found = np.zeros_like(expected)
    backend.read(tensor, found, backend.ggml.nbytes(tensor.pointer) - found.nbytes)
    if not np.array_equal(found, expected):
        raise BackendError(
            f"{backend.device.name} did not compute what measures this: wrong values came back"
        )
