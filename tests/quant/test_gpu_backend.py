"""Memory, queues, events and single operations of a device that is not the CPU."""

from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import pytest

from quant.dequantize import dequantize
from quant.devices import Device
from quant.errors import BackendError, OutOfMemoryError
from quant.ggml import Backend, Context, Event, GraphAllocator, PinnedMemory
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.graph import Graph, HostPort

pytestmark = pytest.mark.gpu

F32, I32 = GGML_TYPES_BY_NAME["F32"].id, GGML_TYPES_BY_NAME["I32"].id
RNG = np.random.default_rng(5)
MANY_BYTES = 64 << 20  # long enough on its way for a host that does not wait to be early


@pytest.fixture(scope="module")
def backend(gpu_device: Device):  # type: ignore[no-untyped-def]
    with Backend.on(gpu_device) as backend:
        yield backend


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def is_close(found: np.ndarray, expected: np.ndarray, share: float = 2e-3) -> bool:
    """To a share of the largest number; a GPU may multiply float32 batches in float16."""
    return bool(np.abs(found - expected).max() <= share * np.abs(expected).max())


def random_bytes(n: int) -> np.ndarray:
    return RNG.integers(0, 256, n, np.uint8)


class Product:
    """A graph for x @ weight.T with x (n, n_in)."""

    def __init__(self, backend: Backend, weight: np.ndarray, n: int) -> None:
        n_out, n_in = weight.shape
        self.graph, self._allocator = Graph(backend), GraphAllocator(backend)
        factor, self.x_tensor = self.graph.input(F32, n_in, n_out), self.graph.input(F32, n_in, n)
        out = self.graph.output(self.graph.mul_mat(factor, self.x_tensor))
        self.graph.check_support()
        self.graph.reserve(self._allocator)
        self.graph.lay_out(self._allocator)
        HostPort(backend, factor, weight).upload()
        self.x = HostPort(backend, self.x_tensor, np.zeros((n, n_in), np.float32))
        self.out = HostPort(backend, out, np.zeros((n, n_out), np.float32))

    def close(self) -> None:
        self.graph.close()
        self._allocator.close()


# memory


def test_a_tensor_comes_back_as_it_was_written_whole_and_in_parts(backend: Backend) -> None:
    with Context(backend.ggml, 2) as context:
        first, second = context.tensor(F32, 100, 7), context.tensor(F32, 33)
        with context.allocate(backend):
            numbers, others = normal(7, 100), normal(33)
            backend.write(first, numbers)
            backend.write(second, others)
            found, part = np.zeros_like(numbers), np.zeros((2, 100), np.float32)
            backend.read(first, found)
            assert (found == numbers).all()
            numbers[3:5] = normal(2, 100)
            backend.write(first, numbers[3:5], offset=3 * 400)
            backend.clear(first, 6 * 400, 400)
            numbers[6] = 0
            backend.read(first, part, offset=4 * 400)
            assert (part[0] == numbers[4]).all() and (part[1] == numbers[5]).all()
            backend.read(first, found)
            assert (found == numbers).all()
            backend.read(second, part.reshape(-1)[:33])
            assert (part.reshape(-1)[:33] == others).all()


@pytest.mark.parametrize("n_bytes", [4, 4096, 3_000_000, MANY_BYTES])
def test_what_is_written_later_is_there_after_waiting(backend: Backend, n_bytes: int) -> None:
    data, found = random_bytes(n_bytes), np.zeros(n_bytes, np.uint8)
    with Context(backend.ggml, 1) as context:
        tensor = context.tensor(F32, n_bytes // 4)
        with context.allocate(backend):
            backend.write_later(tensor, data)
            backend.synchronize()
            backend.read(tensor, found)
    assert (found == data).all()


def test_later_writes_are_done_in_their_order(backend: Backend) -> None:
    rounds = [np.full(100_000, i, np.float32) for i in range(20)]
    found = np.zeros(100_000, np.float32)
    with Context(backend.ggml, 1) as context:
        tensor = context.tensor(F32, 100_000)
        with context.allocate(backend):
            for data in rounds:
                backend.write_later(tensor, data)
            backend.write_later(tensor, rounds[0][:10], offset=40)
            backend.synchronize()
            backend.read(tensor, found)
    assert (found[10:20] == 0).all() and (found[:10] == 19).all() and (found[20:] == 19).all()


def test_pinned_memory_is_filled_and_copied_from_like_any_other(backend: Backend) -> None:
    n_bytes = 1 << 20
    pinned = PinnedMemory(backend, n_bytes)
    assert pinned.is_pinned == backend.device.has_host_buffer
    assert pinned.array.shape == (n_bytes,) and pinned.array.dtype == np.uint8
    with Context(backend.ggml, 1) as context:
        tensor = context.tensor(F32, n_bytes // 4)
        with context.allocate(backend):
            for _ in range(3):
                pinned.array[:] = data = random_bytes(n_bytes)
                backend.write_later(tensor, pinned.array)
                backend.synchronize()
                pinned.array[:] = 0
                backend.read(tensor, pinned.array)
                assert (pinned.array == data).all()
    pinned.close()


def test_more_memory_than_the_device_has_is_refused_in_words(
    backend: Backend, gpu_device: Device
) -> None:
    _, total = gpu_device.memory_bytes()
    with Context(backend.ggml, 1) as context:
        context.tensor(F32, 1024, 16 * total // 4096)
        with pytest.raises(OutOfMemoryError, match="buffer on .* out of memory"):
            context.allocate(backend)
    with Context(backend.ggml, 1) as context:  # and the device goes on
        context.tensor(F32, 1024)
        context.allocate(backend).close()


def test_a_graph_with_larger_values_than_the_device_is_refused_in_words(
    backend: Backend, gpu_device: Device
) -> None:
    _, total = gpu_device.memory_bytes()
    with Graph(backend) as g, GraphAllocator(backend) as allocator:
        a = g.input(F32, 1024, 16 * total // 4096)
        g.output(g.add(a, a))
        with pytest.raises(OutOfMemoryError, match="out of memory for the compute buffer"):
            g.reserve(allocator)
    product = Product(backend, normal(8, 64), 1)  # and the device goes on
    product.graph.compute()
    product.close()


# queues


def test_after_an_event_the_copied_memory_is_free_for_something_else(backend: Backend) -> None:
    pinned, found = PinnedMemory(backend, MANY_BYTES), np.zeros(MANY_BYTES, np.uint8)
    event = Event(backend)
    event.synchronize()  # of nothing recorded: no wait
    with Backend.on(backend.device) as reader, Context(backend.ggml, 1) as context:
        tensor = context.tensor(F32, MANY_BYTES // 4)
        with context.allocate(backend):
            for i in range(3):
                pinned.array[:] = i + 1
                backend.write_later(tensor, pinned.array)
                event.record()
                event.synchronize()
                pinned.array[:] = 99
                reader.read(tensor, found)
                assert (found == i + 1).all()
    event.close()
    pinned.close()


@pytest.mark.parametrize(("n", "share"), [(1, 1e-5), (64, 2e-3)])
def test_a_graph_that_was_only_started_has_numpys_result_after_waiting(
    backend: Backend, n: int, share: float
) -> None:
    weight, x = normal(300, 256), normal(n, 256)
    product = Product(backend, weight, n)
    for sign in (1, -1):
        product.x.array[:] = sign * x
        product.x.upload()
        product.graph.start()
        backend.synchronize()
        assert is_close(product.out.download(), sign * x @ weight.T, share)
    product.close()


def test_a_graph_waits_for_what_was_written_before_it(backend: Backend) -> None:
    weight = normal(64, 64)
    product = Product(backend, weight, 64)
    for _ in range(20):
        x = normal(64, 64)
        backend.write_later(product.x_tensor, x)
        product.graph.start()
        backend.synchronize()
        assert is_close(product.out.download(), x @ weight.T)
    product.close()


def test_one_thread_copies_while_another_computes(gpu_device: Device) -> None:
    n_rounds, n_bytes = 200, 1 << 20

    def copy() -> int:
        with Backend.on(gpu_device) as backend, Context(backend.ggml, 2) as context:
            tensors = [context.tensor(F32, n_bytes // 4) for _ in range(2)]
            pinned, event = PinnedMemory(backend, n_bytes), Event(backend)
            found, n_right = np.zeros(n_bytes, np.uint8), 0
            with context.allocate(backend):
                for i in range(n_rounds):
                    pinned.array[:] = i % 251
                    backend.write_later(tensors[i % 2], pinned.array)
                    event.record()
                    event.synchronize()
                    backend.read(tensors[i % 2], found)
                    n_right += int((found == i % 251).all())
            event.close()
            pinned.close()
        return n_right

    def compute() -> int:
        rng = np.random.default_rng(7)
        weight, x = (rng.standard_normal((128, 128), np.float32) for _ in range(2))
        expected, n_right = x @ weight.T, 0
        with Backend.on(gpu_device) as backend:
            product = Product(backend, weight, 128)
            for i in range(n_rounds):
                product.x.array[:] = x * (i + 1)
                product.x.upload()
                product.graph.start()
                backend.synchronize()
                n_right += is_close(product.out.download(), expected * (i + 1))
            product.close()
        return n_right

    with ThreadPoolExecutor(2) as threads:
        jobs = [threads.submit(copy), threads.submit(compute)]
        assert [job.result() for job in jobs] == [n_rounds, n_rounds]


# operations


def slab_of(kind: str, n_slots: int, n_out: int, n_in: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of a quantized slab, and its numbers (n_slots, n_out, n_in)."""
    type = GGML_TYPES_BY_NAME[kind]
    if kind == "Q8_0":
        rows = normal(n_slots * n_out, n_in)
        blocks = gguf.quants.quantize(rows, gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    else:
        n_blocks = n_slots * n_out * n_in // type.block_size
        blocks = RNG.integers(0, 256, (n_blocks, type.type_bytes), np.uint8)
        at, n_scales = {"Q4_K": (0, 2), "Q6_K": (208, 1)}[kind]  # float16
        blocks[:, at : at + 2 * n_scales] = np.full(n_scales, 0.01, np.float16).view(np.uint8)
        blocks = blocks.reshape(-1)
    blocks = np.ascontiguousarray(blocks).view(np.uint8)
    return blocks, dequantize(blocks, type).reshape(n_slots, n_out, n_in)


@pytest.mark.parametrize("n", [1, 3, 40])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q6_K"])
def test_products_with_experts_in_slots_are_those_of_their_numbers(
    backend: Backend, kind: str, n: int
) -> None:
    n_slots, n_out, n_in, k = 4, 48, 256, 2
    blocks, numbers = slab_of(kind, n_slots, n_out, n_in)
    x = normal(n, 1, n_in)
    ids = np.argsort(RNG.random((n, n_slots)), axis=1)[:, :k].astype(np.int32)
    with (
        Context(backend.ggml, 1) as context,
        Graph(backend) as g,
        GraphAllocator(backend) as allocator,
    ):
        slab = context.tensor(GGML_TYPES_BY_NAME[kind].id, n_in, n_out, n_slots)
        with context.allocate(backend):
            slot_bytes = blocks.size // n_slots
            for slot in range(n_slots):
                backend.write_later(
                    slab, blocks[slot * slot_bytes :][:slot_bytes], slot * slot_bytes
                )
            a, slot_ids = g.input(F32, n_in, 1, n), g.input(I32, k, n)
            out = g.output(g.mul_mat_id(slab, a, slot_ids))
            g.check_support()
            g.reserve(allocator)
            g.lay_out(allocator)
            HostPort(backend, a, x).upload()
            HostPort(backend, slot_ids, ids).upload()
            g.start()
            backend.synchronize()
            found = HostPort(backend, out, np.zeros((n, k, n_out), np.float32)).download()
    expected = np.einsum("tkoi,ti->tko", numbers[ids], x[:, 0])
    assert is_close(found, expected, 0.01)


def test_an_operation_that_the_device_cannot_do_is_named_before_it_runs(backend: Backend) -> None:
    with Graph(backend) as g:
        weight = g.input(GGML_TYPES_BY_NAME["Q8_1"].id, 256, 8)  # a type of activations only
        g.output(g.mul_mat(weight, g.input(F32, 256, 2)))
        with pytest.raises(BackendError, match=f"{backend.device.name} .* cannot compute MUL_MAT"):
            g.check_support()
