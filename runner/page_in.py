"""Reads parts of the mapped model into memory at load time, so that the first answer does not wait.

Only touches pages; it holds no copy of them.
"""

import mmap
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from quant.gguf_file import ByteRange, GGUFFile
from runner.errors import CancelledError
from runner.hardware import available_memory_bytes

_CHUNK_BYTES = 64 << 20


def page_in(
    file: GGUFFile,
    parts: Iterable[ByteRange],
    on_progress: Callable[[str, int, int], None],
    cancelled: Callable[[], bool],
) -> bool:
    """Touch every page of these parts; False, and nothing touched, when memory is too small.

    Raises CancelledError.
    """
    chunks = [chunk for part in parts for chunk in _chunks(part)]
    total, done = sum(chunk.n_bytes for chunk in chunks), 0
    available = available_memory_bytes()
    if available is not None and total > available:
        return False
    for chunk in chunks:
        if cancelled():
            raise CancelledError
        file.will_need(chunk.shard, chunk.offset, chunk.n_bytes)
        pages = file.mapping(chunk.shard)[chunk.offset : chunk.offset + chunk.n_bytes]
        np.max(pages[:: mmap.PAGESIZE])
        done += chunk.n_bytes
        on_progress("reading the model", done, total)
    return True


def _chunks(part: ByteRange) -> Iterator[ByteRange]:
    for start in range(0, part.n_bytes, _CHUNK_BYTES):
        n_bytes = min(_CHUNK_BYTES, part.n_bytes - start)
        yield ByteRange(part.shard, part.offset + start, n_bytes)
