"""Blocks of any ggml type -> float32, by ggml's own conversions. Knows no file and no model."""

import numpy as np
from numpy.typing import NDArray

from quant import ggml_library
from quant.ggml_types import GGMLType


def dequantize(
    blocks: NDArray[np.uint8], type: GGMLType, into: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """The numbers that these bytes stand for, float32 (n,); written to `into` where it is given.

    `blocks` holds whole blocks of the type and nothing else. Raises BackendError for a type that
    ggml has no conversion for, as Q8_1 and the integers.
    """
    n_blocks, rest = divmod(blocks.nbytes, type.type_bytes)
    assert rest == 0, f"{blocks.nbytes} bytes are no whole blocks of {type.name}"
    assert blocks.dtype == np.uint8 and blocks.flags.c_contiguous
    n = n_blocks * type.block_size
    floats = np.empty(n, np.float32) if into is None else into
    assert floats.shape == (n,), f"room for {floats.shape} numbers, not {n}"
    assert floats.dtype == np.float32 and floats.flags.c_contiguous
    if type.name == "F32":  # nothing to convert, and ggml has no conversion for it
        floats.view(np.uint8)[:] = blocks.reshape(-1)
    else:
        ggml_library.to_float(type.id, type.type_bytes, blocks, floats)
    return floats
