"""The ggml libraries and their functions, found and bound. Owns no memory.

They are those that llama-cpp-python ships (or the folder in `LLAMA_CPP_LIB_PATH`). Only
`quant/ggml.py` and `quant/devices.py` call them: ggml answers a wrong call by ending the process.
"""

import ctypes
import importlib.util
import os
import re
import sys
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quant.errors import BackendError

SUPPORTED_GGML = ((0, 25), (0, 26))  # from, up to but not including
SUPPORTED_LLAMA_CPP_PYTHON = "0.3.36"

_LOG_LEVEL_ERROR = 4


class TensorHead(ctypes.Structure):
    """The start of `struct ggml_tensor` in ggml.h, as far as it is read here."""

    _fields_ = [
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
    ]


class InitParams(ctypes.Structure):
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


class DeviceProperties(ctypes.Structure):
    """`struct ggml_backend_dev_props` in ggml-backend.h."""

    _fields_ = [
        ("name", c_char_p),
        ("description", c_char_p),
        ("memory_free", c_size_t),
        ("memory_total", c_size_t),
        ("type", c_int),
        ("device_id", c_char_p),
        ("async", c_bool),
        ("host_buffer", c_bool),
        ("buffer_from_host_ptr", c_bool),
        ("events", c_bool),
        ("mmap_support", c_bool),
    ]


TensorPointer = POINTER(TensorHead)
_T, _P, _I64, _Z, _F = TensorPointer, c_void_p, c_int64, c_size_t, c_float

# name: (result, arguments); the C declarations are in ggml.h, ggml-alloc.h and ggml-backend.h
_FUNCTIONS: dict[str, tuple[object, list[object]]] = {
    "ggml_version": (c_char_p, []),
    "ggml_get_type_traits": (POINTER(_TypeTraits), [c_int]),
    "ggml_row_size": (_Z, [c_int, _I64]),
    "ggml_nbytes": (_Z, [_T]),
    "ggml_init": (_P, [InitParams]),
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
    "ggml_get_data": (_P, [_T]),
    "ggml_graph_n_nodes": (c_int, [_P]),
    "ggml_graph_node": (_T, [_P, c_int]),
    "ggml_op_desc": (c_char_p, [_T]),
    "ggml_type_name": (c_char_p, [c_int]),
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
    "ggml_backend_tensor_set_async": (None, [_P, _T, _P, _Z, _Z]),
    "ggml_backend_tensor_get_async": (None, [_P, _T, _P, _Z, _Z]),
    "ggml_backend_graph_compute_async": (c_int, [_P, _P]),
    "ggml_backend_synchronize": (None, [_P]),
    "ggml_backend_event_new": (_P, [_P]),
    "ggml_backend_event_free": (None, [_P]),
    "ggml_backend_event_record": (None, [_P, _P]),
    "ggml_backend_event_synchronize": (None, [_P]),
    "ggml_backend_event_wait": (None, [_P, _P]),
    "ggml_backend_buft_alloc_buffer": (_P, [_P, _Z]),
    "ggml_backend_buft_get_max_size": (_Z, [_P]),
    "ggml_backend_dev_count": (_Z, []),
    "ggml_backend_dev_get": (_P, [_Z]),
    "ggml_backend_dev_name": (c_char_p, [_P]),
    "ggml_backend_dev_type": (c_int, [_P]),
    "ggml_backend_dev_memory": (None, [_P, POINTER(_Z), POINTER(_Z)]),
    "ggml_backend_dev_get_props": (None, [_P, POINTER(DeviceProperties)]),
    "ggml_backend_dev_supports_op": (c_bool, [_P, _T]),
    "ggml_backend_dev_host_buffer_type": (_P, [_P]),
    "ggml_backend_reg_name": (c_char_p, [_P]),
    "ggml_backend_dev_init": (_P, [_P, c_char_p]),
    "ggml_backend_dev_description": (c_char_p, [_P]),
    "ggml_backend_dev_backend_reg": (_P, [_P]),
    "ggml_backend_dev_buffer_from_host_ptr": (_P, [_P, _P, _Z, _Z]),
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


def device_memory_bytes(ggml: Ggml, device: int) -> tuple[int, int]:
    """Free and total."""
    free, total = c_size_t(), c_size_t()
    ggml.backend_dev_memory(device, byref(free), byref(total))
    return free.value, total.value


def device_properties(ggml: Ggml, device: int) -> DeviceProperties:
    """What ggml knows of a device; its texts live as long as the process."""
    properties = DeviceProperties()
    ggml.backend_dev_get_props(device, byref(properties))
    return properties


@cache
def load_ggml() -> Ggml:
    """Load the ggml libraries once. Raises BackendError when they are missing or do not fit."""
    folder = library_folder()
    names = ("ggml-base", "ggml-cpu", "ggml")
    paths = [_library_path(folder, name) for name in names]
    _find_dependencies(folder)
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


def _find_dependencies(folder: Path) -> None:
    """On Windows the libraries of CUDA and HIP are looked for where llama-cpp-python does."""
    if sys.platform == "win32":
        roots = [Path(os.environ[name]) for name in ("CUDA_PATH", "HIP_PATH") if name in os.environ]
        for place in (folder, *(root / part for root in roots for part in ("bin", "lib"))):
            if place.is_dir():
                os.add_dll_directory(str(place))


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
