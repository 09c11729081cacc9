"""A computation graph in ggml, one short method per operation. Knows no model.

Shapes are in ggml's order (row length first). A graph is built once, laid out once in memory and
then computed as often as wanted; between runs only its inputs change.
"""

from typing import Self

import numpy as np

from quant.errors import BackendError
from quant.ggml import Backend, Context, GraphAllocator, Tensor

_TENSORS_PER_NODE = 2  # operations and the views between them


class Graph:
    """Builds and runs one graph on one backend."""

    def __init__(self, backend: Backend, max_nodes: int = 512) -> None:
        self._backend = backend
        self._ggml = backend.ggml
        self._context = Context(backend.ggml, max_nodes * _TENSORS_PER_NODE, max_nodes)
        self._handle = self._ggml.new_graph_custom(self._context.handle, max_nodes, False)

    def close(self) -> None:
        self._context.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def input(self, type_id: int, *shape: int) -> Tensor:
        """A tensor that the host fills before the graph runs."""
        tensor = self._context.tensor(type_id, *shape)
        self._ggml.set_input(tensor.pointer)
        return tensor

    # running

    def reserve(self, allocator: GraphAllocator) -> None:
        """Make sure that the allocator's memory is large enough for this graph."""
        allocator.reserve(self._handle)

    def lay_out(self, allocator: GraphAllocator) -> None:
        """Place all intermediate values in the allocator's memory."""
        allocator.lay_out(self._handle)

    def lay_out_within(self, allocator: GraphAllocator) -> None:
        """The same for a graph that needs no more memory than there is, so nothing else moves."""
        before = allocator.n_bytes
        self.reserve(allocator)
        assert allocator.n_bytes == before, "the allocator was not reserved for the largest graph"
        self.lay_out(allocator)

    def compute(self) -> None:
        """Run to the end. Raises BackendError."""
        self._backend.compute(self._handle)

    def start(self) -> None:
        """Put it into the backend's queue; `Backend.synchronize` waits. Raises BackendError."""
        self._backend.compute_later(self._handle)

    def check_support(self) -> None:
        """Raise BackendError that names the first operation the device cannot compute."""
        for i in range(self._ggml.graph_n_nodes(self._handle)):
            node = self._ggml.graph_node(self._handle, i)
            if not self._backend.supports(node):
                name = self._ggml.op_desc(node).decode()
                kind = self._ggml.type_name(node.contents.type).decode()
                remedy = ", or equal -ctk and -ctv" if name.startswith("FLASH_ATTN") else ""
                raise BackendError(
                    f"{self._backend.device.name} ({self._backend.description}) cannot compute "
                    f"{name} of {kind}, which this model needs: use --device cpu{remedy}"
                )

    def expand(self, tensor: Tensor) -> Tensor:
        """Compute `tensor`, after everything that was expanded before it."""
        self._ggml.build_forward_expand(self._handle, tensor.pointer)
        return tensor

    def output(self, tensor: Tensor) -> Tensor:
        """Compute `tensor` and keep its value readable until the next graph runs."""
        self._ggml.set_output(tensor.pointer)
        return self.expand(tensor)

    # shapes

    def view_2d(self, a: Tensor, ne0: int, ne1: int, nb1: int, offset: int = 0) -> Tensor:
        return self._op("view_2d", a, ne0, ne1, nb1, offset)

    def view_3d(
        self, a: Tensor, ne: tuple[int, int, int], nb: tuple[int, int], offset: int = 0
    ) -> Tensor:
        return self._op("view_3d", a, *ne, *nb, offset)

    def first_rows(self, a: Tensor, n_rows: int) -> Tensor:
        """The first rows of a matrix, without a copy."""
        return self.view_2d(a, a.shape[0], n_rows, a.strides[1])

    def matrix(self, a: Tensor, ne0: int, ne1: int) -> Tensor:
        """The start of `a`'s memory seen as a dense matrix (ne0, ne1)."""
        return self.view_2d(a, ne0, ne1, self._ggml.row_size(a.type, ne0))

    def reshape_2d(self, a: Tensor, ne0: int, ne1: int) -> Tensor:
        return self._op("reshape_2d", a, ne0, ne1)

    def reshape_3d(self, a: Tensor, ne0: int, ne1: int, ne2: int) -> Tensor:
        return self._op("reshape_3d", a, ne0, ne1, ne2)

    def permute(self, a: Tensor, axes: tuple[int, int, int, int]) -> Tensor:
        return self._op("permute", a, *axes)

    def cont(self, a: Tensor) -> Tensor:
        """A dense copy."""
        return self._op("cont", a)

    def cast(self, a: Tensor, type_id: int) -> Tensor:
        return self._op("cast", a, type_id)

    # arithmetic

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        return self._op("add", a, b)

    def add_inplace(self, a: Tensor, b: Tensor) -> Tensor:
        """a += b in a's own memory."""
        return self._op("add_inplace", a, b)

    def mul(self, a: Tensor, b: Tensor) -> Tensor:
        return self._op("mul", a, b)

    def div(self, a: Tensor, b: Tensor) -> Tensor:
        return self._op("div", a, b)

    def scale(self, a: Tensor, factor: float) -> Tensor:
        return self._op("scale", a, factor)

    def clamp(self, a: Tensor, low: float, high: float) -> Tensor:
        return self._op("clamp", a, low, high)

    def sum_rows(self, a: Tensor) -> Tensor:
        """(ne0, ...) -> (1, ...)."""
        return self._op("sum_rows", a)

    def rms_norm(self, a: Tensor, weight: Tensor, eps: float) -> Tensor:
        return self.mul(self._op("rms_norm", a, eps), weight)

    def soft_max(self, a: Tensor) -> Tensor:
        """Over ne0."""
        return self._op("soft_max", a)

    def top_k(self, a: Tensor, k: int) -> Tensor:
        """Indices of each row's k largest values, largest first: int32 (k, n_rows)."""
        return self._op("argsort_top_k", a, k)

    # rows and matrices

    def get_rows(self, a: Tensor, ids: Tensor) -> Tensor:
        return self._op("get_rows", a, ids)

    def set_rows(self, a: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
        """Write `rows` (float32) over a's rows `ids` (int64), converting to a's type."""
        return self._op("set_rows", a, rows, ids)

    def copy(self, source: Tensor, target: Tensor) -> Tensor:
        """Write `source` into `target`'s memory, as part of the graph."""
        return self.expand(self._op("cpy", source, target))

    def mul_mat(self, weight: Tensor, x: Tensor) -> Tensor:
        """weight (n_in, n_out), x (n_in, n) -> (n_out, n)."""
        return self._op("mul_mat", weight, x)

    def mul_mat_id(self, slab: Tensor, x: Tensor, slot_ids: Tensor) -> Tensor:
        """slab (n_in, n_out, n_slots), x (n_in, 1 or k, n), slot_ids (k, n) -> (n_out, k, n)."""
        return self._op("mul_mat_id", slab, x, slot_ids)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up."""
        return self._op("swiglu_split", gate, up)

    # attention

    def rope(
        self, a: Tensor, positions: Tensor, factors: Tensor | None, parameters: tuple[float, ...]
    ) -> Tensor:
        """Rotate pairs of a (n_embd_head, n_head, n); `parameters` follow ggml_rope_ext's order."""
        pointer = factors.pointer if factors is not None else None
        function = self._ggml.rope_ext
        return Tensor(
            function(self._context.handle, a.pointer, positions.pointer, pointer, *parameters)
        )

    def flash_attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        """softmax(q k + mask) v for every head; head = n_embd_head.

        q (head, n, n_head); k, v (head, n_kv, n_head_kv); mask float16 (n_kv, n), 0 or -inf.
        Returns (head, n_head, n).
        """
        return self._op("flash_attn_ext", q, k, v, mask, scale, 0.0, 0.0)

    def _op(self, name: str, *arguments: "Tensor | int | float") -> Tensor:
        plain = [a.pointer if isinstance(a, Tensor) else a for a in arguments]
        return Tensor(getattr(self._ggml, name)(self._context.handle, *plain))


class HostPort:
    """A fixed host array next to a tensor (or to its start), moved in one call either way.

    Where the array is `Backend.view` of the tensor there is nothing to move to it.
    """

    def __init__(self, backend: Backend, tensor: Tensor, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.array = array
        self._tensor = tensor
        self._pointer = tensor.pointer
        self._address = array.ctypes.data
        self._n_bytes = array.nbytes
        assert self._n_bytes <= backend.ggml.nbytes(tensor.pointer)
        self._backend = backend
        self._is_in_place = self._address == backend.ggml.get_data(tensor.pointer)
        self._set = backend.ggml.backend_tensor_set
        self._get = backend.ggml.backend_tensor_get
        self._get_later = backend.ggml.backend_tensor_get_async

    def upload(self) -> None:
        """host -> device"""
        if not self._is_in_place:
            self._set(self._pointer, self._address, 0, self._n_bytes)

    def upload_part(self, offset: int, n_bytes: int) -> None:
        """The same of some bytes, `offset` from the start of both."""
        assert 0 <= offset <= offset + n_bytes <= self._n_bytes
        self._set(self._pointer, self._address + offset, offset, n_bytes)

    def download(self) -> np.ndarray:
        """device -> host; returns the array, which the next download overwrites."""
        self._get(self._pointer, self._address, 0, self._n_bytes)
        return self.array

    def download_later(self) -> None:
        """device -> host in the backend's queue, behind what is in it; the array is filled when
        `Backend.synchronize` has returned. Beside the host only with pinned memory."""
        self._get_later(self._backend.handle, self._pointer, self._address, 0, self._n_bytes)
