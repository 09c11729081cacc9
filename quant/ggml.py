"""The only file that talks to ggml: bound C functions and the owners of everything they hand out.

The libraries are those that llama-cpp-python ships (or the folder in `LLAMA_CPP_LIB_PATH`). ggml
answers a wrong call by ending the process, so callers validate first. Knows no model.
"""

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from quant.errors import BackendError

SUPPORTED_GGML = ((0, 25), (0, 26))  # from, up to but not including
SUPPORTED_LLAMA_CPP_PYTHON = "0.3.36"

_STATUS = {-2: "out of memory", -1: "failed", 1: "aborted"}
_DEVICE_TYPE_CPU = 0
_LOG_LEVEL_ERROR = 4


class TensorHead(ctypes.Structure):
    """The start of `struct ggml_tensor` in ggml.h, as far as it is read here."""

    _fields_ = [
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
    ]


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


_ToFloat = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)  # blocks, floats, elements


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` in ggml.h, as far as it is read here."""

    _fields_ = [
        ("type_name", c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", _ToFloat),
    ]


TensorPointer = POINTER(TensorHead)
_T, _P, _I64, _Z, _F = TensorPointer, c_void_p, c_int64, c_size_t, c_float

# name: (result, arguments); the C declarations are in ggml.h, ggml-alloc.h and ggml-backend.h
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ggml_version": (c_char_p, []),
    "ggml_get_type_traits": (POINTER(_TypeTraits), [c_int]),
    "ggml_row_size": (_Z, [c_int, _I64]),
    "ggml_nbytes": (_Z, [_T]),
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_tensor_overhead": (_Z, []),
    "ggml_graph_overhead_custom": (_Z, [_Z, c_bool]),
    "ggml_new_tensor_4d": (_T, [_P, c_int, _I64, _I64, _I64, _I64]),
    "ggml_view_2d": (_T, [_P, _T, _I64, _I64, _Z, _Z]),
    "ggml_view_3d": (_T, [_P, _T, _I64, _I64, _I64, _Z, _Z, _Z]),
    "ggml_reshape_2d": (_T, [_P, _T, _I64, _I64]),
    "ggml_reshape_3d": (_T, [_P, _T, _I64, _I64, _I64]),
    "ggml_permute": (_T, [_P, _T, c_int, c_int, c_int, c_int]),
    "ggml_cont": (_T, [_P, _T]),
    "ggml_cpy": (_T, [_P, _T, _T]),
    "ggml_cast": (_T, [_P, _T, c_int]),
    "ggml_add": (_T, [_P, _T, _T]),
    "ggml_add_inplace": (_T, [_P, _T, _T]),
    "ggml_mul": (_T, [_P, _T, _T]),
    "ggml_div": (_T, [_P, _T, _T]),
    "ggml_scale": (_T, [_P, _T, _F]),
    "ggml_clamp": (_T, [_P, _T, _F, _F]),
    "ggml_sum_rows": (_T, [_P, _T]),
    "ggml_rms_norm": (_T, [_P, _T, _F]),
    "ggml_soft_max": (_T, [_P, _T]),
    "ggml_argsort_top_k": (_T, [_P, _T, c_int]),
    "ggml_get_rows": (_T, [_P, _T, _T]),
    "ggml_set_rows": (_T, [_P, _T, _T, _T]),
    "ggml_mul_mat": (_T, [_P, _T, _T]),
    "ggml_mul_mat_id": (_T, [_P, _T, _T, _T]),
    "ggml_swiglu_split": (_T, [_P, _T, _T]),
    "ggml_rope_ext": (_T, [_P, _T, _T, _T, c_int, c_int, c_int, _F, _F, _F, _F, _F, _F]),
    "ggml_flash_attn_ext": (_T, [_P, _T, _T, _T, _T, _F, _F, _F]),
    "ggml_new_graph_custom": (_P, [_P, _Z, c_bool]),
    "ggml_build_forward_expand": (None, [_P, _T]),
    "ggml_set_input": (None, [_T]),
    "ggml_set_output": (None, [_T]),
    "ggml_log_set": (None, [_P, _P]),
    "ggml_gallocr_new": (_P, [_P]),
    "ggml_gallocr_free": (None, [_P]),
    "ggml_gallocr_reserve": (c_bool, [_P, _P]),
    "ggml_gallocr_alloc_graph": (c_bool, [_P, _P]),
    "ggml_gallocr_get_buffer_size": (_Z, [_P, c_int]),
    "ggml_backend_alloc_ctx_tensors": (_P, [_P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "ggml_backend_buffer_get_base": (_P, [_P]),
    "ggml_backend_buffer_get_size": (_Z, [_P]),
    "ggml_backend_free": (None, [_P]),
    "ggml_backend_get_default_buffer_type": (_P, [_P]),
    "ggml_backend_graph_compute": (c_int, [_P, _P]),
    "ggml_backend_tensor_alloc": (c_int, [_P, _T, _P]),
    "ggml_backend_tensor_set": (None, [_T, _P, _Z, _Z]),
    "ggml_backend_tensor_get": (None, [_T, _P, _Z, _Z]),
    "ggml_backend_tensor_memset": (None, [_T, ctypes.c_uint8, _Z, _Z]),
    "ggml_backend_dev_init": (_P, [_P, c_char_p]),
    "ggml_backend_dev_description": (c_char_p, [_P]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_dev_buffer_from_host_ptr": (_P, [_P, _P, _Z, _Z]),
    "ggml_backend_dev_by_type": (_P, [c_int]),
    "ggml_backend_reg_get_proc_address": (_P, [_P, c_char_p]),
}


class Ggml:
    """The loaded libraries; every function of `_FUNCTIONS` is an attribute without its prefix."""

    def __init__(self, libraries: list[ctypes.CDLL]) -> None:
        self._libraries = libraries
        for name, (result, arguments) in _FUNCTIONS.items():
            function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if function is None:
                raise BackendError(
                    f"the ggml library has no function {name}; buddyrun is made for "
                    f"llama-cpp-python {SUPPORTED_LLAMA_CPP_PYTHON} (ggml {_range_text()})"
                )
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.version_text: str = self.version().decode()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"ggml_{name} is not bound in quant/ggml.py")


def to_float(type_id: int, n_block_bytes: int, blocks: np.ndarray, floats: np.ndarray) -> None:
    """Convert blocks of one ggml type to float32 (n,), as many as `floats` takes.

    `blocks` are exactly their bytes, n_block_bytes each. Raises BackendError for a type that ggml
    has no conversion for.
    """
    ggml = load_ggml()
    traits = ggml.get_type_traits(type_id).contents
    if not traits.to_float:
        name = (traits.type_name or b"?").decode(errors="replace")
        raise BackendError(f"ggml {ggml.version_text} cannot convert {name} to float32")
    assert traits.type_size == n_block_bytes, (type_id, traits.type_size, n_block_bytes)
    assert floats.size % traits.blck_size == 0, (type_id, floats.size)
    assert blocks.nbytes == floats.size // traits.blck_size * n_block_bytes, blocks.nbytes
    assert floats.dtype == np.float32 and floats.flags.c_contiguous and floats.flags.writeable
    assert blocks.flags.c_contiguous
    traits.to_float(blocks.ctypes.data, floats.ctypes.data, floats.size)


@cache
def load_ggml() -> Ggml:
    """Load the ggml libraries once. Raises BackendError when they are missing or do not fit."""
    folder = library_folder()
    names = ("ggml-base", "ggml-cpu", "ggml")
    paths = [_library_path(folder, name) for name in names]
    try:
        libraries = [ctypes.CDLL(str(path)) for path in paths if path is not None]
    except OSError as error:
        raise BackendError(f"a ggml library in {folder} cannot be loaded: {error}") from error
    if _library_path(folder, "ggml-base") is None:
        raise BackendError(f"no ggml-base library in {folder}: found no llama-cpp-python there")
    ggml = Ggml(libraries)
    check_version(ggml.version_text)
    _silence(ggml)
    return ggml


def library_folder() -> Path:
    """The folder with the shared libraries: `LLAMA_CPP_LIB_PATH`, or llama-cpp-python's own."""
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    if override:
        return Path(override)
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise BackendError(
            "llama-cpp-python is not installed: "
            f"pip install llama-cpp-python=={SUPPORTED_LLAMA_CPP_PYTHON}"
        )
    return Path(spec.origin).parent / "lib"


def check_version(text: str) -> None:
    """Refuse a ggml outside the tested range. Raises BackendError that names the range."""
    found = re.match(r"(\d+)\.(\d+)", text)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if not SUPPORTED_GGML[0] <= version < SUPPORTED_GGML[1]:
        raise BackendError(
            f"the installed llama-cpp-python brings ggml {text}; buddyrun is tested with ggml "
            f"{_range_text()}: pip install llama-cpp-python=={SUPPORTED_LLAMA_CPP_PYTHON}"
        )


def _range_text() -> str:
    (low_major, low_minor), (high_major, high_minor) = SUPPORTED_GGML
    return f">={low_major}.{low_minor},<{high_major}.{high_minor}"


def _library_path(folder: Path, name: str) -> Path | None:
    patterns = {"win32": ["{}.dll", "lib{}.dll"], "darwin": ["lib{}.dylib", "lib{}.so"]}
    for pattern in patterns.get(sys.platform, ["lib{}.so"]):
        path = folder / pattern.format(name)
        if path.exists():
            return path
    return None


@ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)  # type: ignore[untyped-decorator]
def _log_errors_only(level: int, text: bytes, _data: object) -> None:
    if level == _LOG_LEVEL_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def _silence(ggml: Ggml) -> None:
    ggml.log_set(ctypes.cast(_log_errors_only, c_void_p), None)


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
            raise BackendError(f"ggml could not make {what}: most likely out of memory")
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
        super().__init__(ggml, ggml.init(_InitParams(size, None, True)), "a context")

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
    """One device, ready to compute."""

    def __init__(self, ggml: Ggml, device: int, n_threads: int) -> None:
        super().__init__(ggml, ggml.backend_dev_init(device, None), "a backend")
        self._device = device
        self.description: str = ggml.backend_dev_description(device).decode(errors="replace")
        registry = ggml.backend_dev_backend_reg(device)
        address = ggml.backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        prototype = ctypes.CFUNCTYPE(None, c_void_p, c_int32)
        self._set_n_threads = prototype(address) if address else None
        self.set_n_threads(n_threads)

    @classmethod
    def cpu(cls, n_threads: int) -> "Backend":
        """The CPU. Raises BackendError when the libraries have no CPU backend."""
        ggml = load_ggml()
        device = ggml.backend_dev_by_type(_DEVICE_TYPE_CPU)
        if not device:
            raise BackendError(f"the ggml libraries in {library_folder()} have no CPU backend")
        return cls(ggml, device, n_threads)

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
            self._device, address, memory.nbytes, memory.nbytes
        )
        return Buffer(self.ggml, handle, f"a view of the model file on {self.description}")

    def write(self, tensor: Tensor, data: np.ndarray, offset: int = 0) -> None:
        """Copy host bytes into a tensor, `offset` bytes from its start."""
        assert offset + data.nbytes <= self.ggml.nbytes(tensor.pointer)
        assert data.flags.c_contiguous
        self.ggml.backend_tensor_set(tensor.pointer, data.ctypes.data, offset, data.nbytes)

    def read(self, tensor: Tensor, data: np.ndarray, offset: int = 0) -> None:
        """Fill host bytes from a tensor, `offset` bytes from its start on."""
        assert offset + data.nbytes <= self.ggml.nbytes(tensor.pointer)
        assert data.flags.c_contiguous
        self.ggml.backend_tensor_get(tensor.pointer, data.ctypes.data, offset, data.nbytes)

    def clear(self, tensor: Tensor, offset: int, n_bytes: int) -> None:
        """Zero a part of a tensor."""
        self.ggml.backend_tensor_memset(tensor.pointer, 0, offset, n_bytes)

    def compute(self, graph_handle: int) -> None:
        """Run a graph to its end. Raises BackendError with ggml's status."""
        check(self.ggml.backend_graph_compute(self.handle, graph_handle))


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
            raise BackendError("out of memory for the compute buffer: try a smaller -b or -c")

    def lay_out(self, graph_handle: int) -> None:
        """Give the graph's tensors their addresses."""
        if not self.ggml.gallocr_alloc_graph(self.handle, graph_handle):
            raise BackendError("out of memory for the compute buffer: try a smaller -b or -c")


def check(status: int) -> None:
    """Raise BackendError unless a ggml status says success."""
    if status != 0:
        raise BackendError(f"ggml: {_STATUS.get(status, f'status {status}')}")
