"""Reads the mapped model into memory at load time, so that the first answer does not wait.

Only touches pages; it holds no copy of them.
"""

import mmap
from collections.abc import Callable

import numpy as np

from quant.gguf_file import GGUFFile
from runner.errors import CancelledError
from runner.hardware import available_memory_bytes

_CHUNK_BYTES = 64 << 20


def page_in(
    file: GGUFFile, on_progress: Callable[[str, int, int], None], cancelled: Callable[[], bool]
) -> bool:
    """Touch every page of every shard; False, and nothing touched, when memory is too small.

    Raises CancelledError.
    """
    available = available_memory_bytes()
    if available is not None and file.size_bytes > available:
        return False
    done = 0
    for shard in range(len(file.paths)):
        pages = file.mapping(shard)
        for start in range(0, len(pages), _CHUNK_BYTES):
            if cancelled():
                raise CancelledError
            file.will_need(shard, start, _CHUNK_BYTES)
            np.max(pages[start : start + _CHUNK_BYTES : mmap.PAGESIZE])
            done += min(_CHUNK_BYTES, len(pages) - start)
            on_progress("reading the model", done, file.size_bytes)
    return True
