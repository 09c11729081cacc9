"""Loading ggml, the owners of its memory, and single operations against numpy."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from quant.errors import BackendError
from quant.ggml import Backend, Context, GraphAllocator, check
from quant.ggml_library import check_version, library_folder
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.graph import Graph, HostPort

F32, I32 = GGML_TYPES_BY_NAME["F32"].id, GGML_TYPES_BY_NAME["I32"].id
RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def backend():  # type: ignore[no-untyped-def]
    with Backend.cpu(1) as cpu:
        yield cpu


def run(backend: Backend, build, *inputs: np.ndarray) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Compute build(g, *tensors) for float32 or int32 inputs given in numpy's order."""
    with Graph(backend) as g, GraphAllocator(backend) as allocator:
        kinds = [I32 if x.dtype == np.int32 else F32 for x in inputs]
        tensors = [g.input(k, *x.shape[::-1]) for k, x in zip(kinds, inputs, strict=True)]
        out = g.output(build(g, *tensors))
        g.reserve(allocator)
        g.lay_out(allocator)
        for tensor, x in zip(tensors, inputs, strict=True):
            HostPort(backend, tensor, np.ascontiguousarray(x)).upload()
        g.compute()
        shape = out.shape[::-1]
        kind = np.int32 if out.type == I32 else np.float32
        return HostPort(backend, out, np.zeros(shape, kind)).download().squeeze()


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, np.float32)


def test_matrix_products_match_numpy(backend: Backend) -> None:
    weight, x = normal(5, 32), normal(3, 32)
    assert np.allclose(run(backend, Graph.mul_mat, weight, x), x @ weight.T, atol=1e-4)


def test_expert_products_take_the_slot_that_the_ids_name(backend: Backend) -> None:
    slab, x = normal(4, 6, 32), normal(3, 1, 32)  # 4 slots of (6, 32); 3 tokens
    ids = np.array([[3, 1], [0, 0], [2, 3]], np.int32)
    out = run(backend, Graph.mul_mat_id, slab, x, ids)
    assert np.allclose(out, np.einsum("tkoi,ti->tko", slab[ids], x[:, 0]), atol=1e-4)


def test_top_k_is_sorted_and_picks_the_largest(backend: Backend) -> None:
    scores = normal(7, 8)
    with_views = run(backend, lambda g, a: g.cont(g.top_k(a, 3)), scores)
    assert (with_views == np.argsort(-scores, axis=1)[:, :3]).all()


def test_norms_and_gates_match_numpy(backend: Backend) -> None:
    x, w, up = normal(4, 32), normal(32), normal(4, 32)
    normed = run(backend, lambda g, a, b: g.rms_norm(a, b, 1e-5), x, w)
    assert np.allclose(normed, x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5) * w, atol=1e-5)
    assert np.allclose(run(backend, Graph.swiglu, x, up), x / (1 + np.exp(-x)) * up, atol=1e-5)


def test_softmax_sums_and_division_match_numpy(backend: Backend) -> None:
    x = normal(4, 8)
    e = np.exp(x)
    assert np.allclose(run(backend, Graph.soft_max, x), e / e.sum(1, keepdims=True), atol=1e-6)
    shares = run(backend, lambda g, a: g.div(a, g.clamp(g.sum_rows(a), 1e-3, 9e9)), e)
    assert np.allclose(shares, e / e.sum(1, keepdims=True), atol=1e-6)
    assert np.allclose(run(backend, lambda g, a: g.scale(a, 2.5), x), 2.5 * x)


def test_a_graph_is_computed_again_with_new_inputs(backend: Backend) -> None:
    with Graph(backend) as g, GraphAllocator(backend) as allocator:
        a = g.input(F32, 4)
        out = g.output(g.add(a, a))
        g.reserve(allocator)
        g.lay_out(allocator)
        source = HostPort(backend, a, np.zeros(4, np.float32))
        result = HostPort(backend, out, np.zeros(4, np.float32))
        for value in (1.0, -3.0, 8.5):
            source.array[:] = value
            source.upload()
            g.compute()
            assert (result.download() == 2 * value).all()


def test_graphs_that_share_memory_do_not_disturb_each_other(backend: Backend) -> None:
    with GraphAllocator(backend) as allocator:
        graphs = []
        for n in (64, 8, 32):
            g = Graph(backend)
            a = g.input(F32, n)
            out = g.output(g.mul(g.add(a, a), a))
            graphs.append((g, a, out, n))
        for g, *_ in graphs:
            g.reserve(allocator)
        size = allocator.n_bytes
        for g, *_ in graphs:
            g.lay_out(allocator)
        assert allocator.n_bytes == size
        for value in (2.0, 3.0):
            for g, a, out, n in graphs:
                HostPort(backend, a, np.full(n, value, np.float32)).upload()
                g.compute()
                result = HostPort(backend, out, np.zeros(n, np.float32)).download()
                assert (result == 2 * value * value).all()
        for g, *_ in graphs:
            g.close()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "IQ4_XS"])
def test_quantized_weights_are_used_in_place(kind: str, backend: Backend) -> None:
    q = gguf.GGMLQuantizationType[kind]
    block, n_bytes = gguf.GGML_QUANT_SIZES[q]
    data = gguf.quants.quantize(normal(6, 256), gguf.GGMLQuantizationType.Q8_0)
    if kind != "Q8_0":
        data = RNG.integers(0, 100, (6, 256 // block * n_bytes), np.uint8)
        data[:, 0:4] = np.frombuffer(np.float16([0.01, 0.02]).tobytes(), np.uint8)
    memory = np.zeros(4096 + data.nbytes, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + data.nbytes] = data.reshape(-1)
    weight_values = gguf.quants.dequantize(data, q)
    x = normal(2, 256)
    with (
        Context(backend.ggml, 1) as context,
        backend.wrap(memory[start:]) as buffer,
        Graph(backend) as g,
        GraphAllocator(backend) as allocator,
    ):
        weight = context.tensor(GGML_TYPES_BY_NAME[kind].id, 256, 6)
        buffer.place(weight, 0)
        a = g.input(F32, 256, 2)
        out = g.output(g.mul_mat(weight, a))
        g.reserve(allocator)
        g.lay_out(allocator)
        HostPort(backend, a, x).upload()
        g.compute()
        result = HostPort(backend, out, np.zeros((2, 6), np.float32)).download()
    assert np.allclose(result, x @ weight_values.T, atol=0.05 * np.abs(x @ weight_values.T).max())


def test_a_tensor_is_never_placed_outside_its_buffer(backend: Backend) -> None:
    memory = np.zeros(4096, np.uint8)
    with Context(backend.ggml, 1) as context, backend.wrap(memory[-memory.ctypes.data % 64 :]) as b:
        with pytest.raises(AssertionError):
            b.place(context.tensor(F32, 4096), 0)


def test_a_closed_owner_is_not_used(backend: Backend) -> None:
    context = Context(backend.ggml, 1)
    context.close()
    context.close()
    with pytest.raises(AssertionError, match="closed"):
        context.tensor(F32, 1)


@pytest.mark.parametrize("text", ["0.24.9", "0.26.0", "1.0.0", "nonsense"])
def test_an_untested_ggml_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(BackendError, match=r"ggml >=0\.25,<0\.26.*pip install llama-cpp-python"):
        check_version(text)


def test_a_failed_status_is_an_error() -> None:
    check(0)
    with pytest.raises(BackendError, match="out of memory"):
        check(-2)


def test_the_library_folder_can_be_chosen(tmp_path: Path) -> None:
    code = "from quant.ggml_library import load_ggml; print(load_ggml().version_text)"

    def load(folder: Path) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, env=env)

    assert load(library_folder()).stdout.startswith("0.25")
    assert "BackendError: no ggml-base library" in load(tmp_path).stderr
    (tmp_path / "libggml-base.so").write_bytes(b"not a library")
    assert "cannot be loaded" in load(tmp_path).stderr
