"""Copies experts into a device's memory, through a ring of pinned memory: while one piece is
copied, the next is read. Knows no slots' bookkeeping and no policy.

It has a queue of its own on the device, so that copies run beside the graphs. Only one thread uses
it, the one that reads.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle

import numpy as np

from quant.ggml import Backend, Event, PinnedMemory, Tensor
from quant.read_only_file import BLOCK_BYTES, round_up

PIECE_BYTES = 16 << 20
N_PIECES = 4  # one read, one copied, and two so that neither waits for the other's odd moments


@dataclass(frozen=True)
class Piece:
    """A part of one matrix of an expert: where it lies in the file, and where it goes."""

    shard: int
    offset: int  # in the shard
    n_bytes: int
    tensor: Tensor
    tensor_offset: int


ReadPiece = Callable[[Piece, memoryview], memoryview]  # reads into aligned memory; its bytes there


class Uploads:
    """A copying queue on one device and the memory that it copies from."""

    def __init__(self, backend: Backend, piece_bytes: int, n_pieces: int = N_PIECES) -> None:
        """`backend` is for this alone; piece_bytes: most of one piece, see `Piece`."""
        self._backend = backend
        stride = round_up(piece_bytes, BLOCK_BYTES) + 2 * BLOCK_BYTES  # reads are of whole blocks
        with ExitStack() as owned:
            self._memory = PinnedMemory(backend, n_pieces * stride + BLOCK_BYTES)
            owned.callback(self._memory.close)
            start = -self._memory.array.ctypes.data % BLOCK_BYTES
            self._ring = []
            for i in range(n_pieces):
                first = start + i * stride
                event = Event(backend)
                owned.callback(event.close)
                self._ring.append((self._memory.array[first : first + stride], event))
            self._owned = owned.pop_all()
        self._next = cycle(self._ring)

    def close(self) -> None:
        self._ring.clear()
        self._next = cycle(())
        self._owned.close()

    @property
    def is_pinned(self) -> bool:
        """Whether the device copies from this memory at full speed."""
        return self._memory.is_pinned

    @property
    def memory(self) -> memoryview:
        """Of the first piece: what is read goes into memory of this kind."""
        return self._ring[0][0].data

    def send(self, pieces: Iterable[Piece], read: ReadPiece) -> None:
        """Copy pieces; when it returns they are on the device.

        Whatever `read` raises, nothing is under way afterwards.
        """
        try:
            for piece in pieces:
                memory, is_copied = next(self._next)
                is_copied.synchronize()  # what was here before has left
                data = read(piece, memory.data)
                self._backend.write_later(
                    piece.tensor, np.frombuffer(data, np.uint8), piece.tensor_offset
                )
                is_copied.record()
        finally:
            self._backend.synchronize()
