"""Uploads to a device that copies as late as it may: whose bytes arrive, in any order of waits.

Programs of sends are random: sizes of pieces, how many, which reads fail. The same programs that
the real class passes find other bytes where one wait is left out.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from quant.ggml import Backend, Tensor
from quant.read_only_file import BLOCK_BYTES, round_up
from runner.errors import GGUFError
from runner.experts.uploads import N_PIECES, Piece, ReadPiece, Uploads
from tests.runner.experts.late_device import LateGgml, bytes_of, late_queue, late_tensor

FILE_BYTES = 1 << 16
TENSOR_BYTES = 20_000
N_TENSORS = 3

OTHER_BYTES = "other bytes arrived"
UNDER_WAY = "copies are under way"


@dataclass
class Program:
    """Sends to one queue, one after the other, and what must be on the device then."""

    uploads: Uploads
    ggml: LateGgml
    piece_bytes: int
    rng: Random
    n_sent: int = 0
    n_failed: int = 0
    file: bytes = b""
    tensors: list[Tensor] = field(default_factory=list)
    expected: list[bytearray] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.file = self.rng.randbytes(FILE_BYTES)
        self.tensors = [late_tensor(TENSOR_BYTES) for _ in range(N_TENSORS)]
        self.expected = [bytearray(TENSOR_BYTES) for _ in range(N_TENSORS)]

    def step(self) -> None:
        """Send some pieces; one of the reads may fail."""
        pieces = [self._piece() for _ in range(self.rng.choice((0, 1, 2, 3, 5, 9, 14)))]
        fails_at = self.rng.randrange(len(pieces)) if pieces and self.rng.random() < 0.3 else -1
        if fails_at < 0:
            self.uploads.send(iter(pieces), self._read_all_but())
        else:
            with pytest.raises(GGUFError, match="spoiled"):
                self.uploads.send(iter(pieces), self._read_all_but(pieces[fails_at]))
        self.n_sent += fails_at < 0
        self.n_failed += fails_at >= 0
        for piece in pieces[:fails_at] if fails_at >= 0 else pieces:
            target = self.expected[self.tensors.index(piece.tensor)]
            data = self.file[piece.offset : piece.offset + piece.n_bytes]
            target[piece.tensor_offset : piece.tensor_offset + piece.n_bytes] = data
        assert [bytes_of(tensor) for tensor in self.tensors] == self.expected, OTHER_BYTES
        is_idle = not any(queue.waiting for queue in self.ggml.queues.values())
        assert is_idle, UNDER_WAY

    def _piece(self) -> Piece:
        n_bytes = self.rng.choice((1, 7, self.piece_bytes, self.rng.randint(1, self.piece_bytes)))
        return Piece(
            shard=0,
            offset=self.rng.randrange(FILE_BYTES - n_bytes),
            n_bytes=n_bytes,
            tensor=self.rng.choice(self.tensors),
            tensor_offset=self.rng.randrange(TENSOR_BYTES - n_bytes),
        )

    def _read_all_but(self, spoiled: Piece | None = None) -> ReadPiece:
        """A read of whole blocks: it leaves other bytes of the file around the piece's."""

        def read(piece: Piece, memory: memoryview) -> memoryview:
            assert np.frombuffer(memory, np.uint8).ctypes.data % BLOCK_BYTES == 0
            before = piece.offset % BLOCK_BYTES
            blocks = memory[: round_up(before + piece.n_bytes, BLOCK_BYTES)]
            data = self.file[piece.offset - before :][: len(blocks)]
            if piece is spoiled:
                blocks[: len(data) // 2] = data[: len(data) // 2]
                raise GGUFError("this read was spoiled")
            blocks[: len(data)] = data
            return blocks[before : before + piece.n_bytes]

        return read


def make_program(
    rng: Random,
    uploads_type: Callable[..., Uploads] = Uploads,
    backend_type: Callable[..., Backend] = Backend,
    **device: Any,
) -> Program:
    device = {"eagerness": rng.choice((0.0, 0.0, 0.5)), **device}
    queue = late_queue(rng, backend_type=backend_type, **device)
    piece_bytes = rng.choice((1, 100, BLOCK_BYTES, rng.randint(2, 3 * BLOCK_BYTES)))
    uploads = uploads_type(queue, piece_bytes, rng.choice((1, 2, 3, N_PIECES)))
    assert isinstance(queue.ggml, LateGgml)
    return Program(uploads, queue.ggml, piece_bytes, rng)


def run(n_programs: int, n_steps: int = 12, **parts: Any) -> tuple[int, int]:
    """Run random programs; returns how many sends went well and how many did not."""
    n_sent = n_failed = 0

    @settings(
        max_examples=n_programs, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.randoms(use_true_random=True))
    def run_one(rng: Random) -> None:
        nonlocal n_sent, n_failed
        program = make_program(rng, **parts)
        with closing(program.uploads):
            for _ in range(n_steps):
                program.step()
        n_sent, n_failed = n_sent + program.n_sent, n_failed + program.n_failed

    run_one()
    return n_sent, n_failed


# any order of waits


@pytest.mark.parametrize("has_pinned", [True, False])
@pytest.mark.parametrize("has_events", [True, False])
def test_every_piece_arrives_however_late_the_device_copies(
    has_events: bool, has_pinned: bool
) -> None:
    n_sent, n_failed = run(60, has_events=has_events, has_pinned=has_pinned)
    assert n_sent > 300 and n_failed > 100


def test_with_events_a_piece_waits_for_its_own_memory_only() -> None:
    """Else reading and copying would take turns."""
    n_waiting = []
    queue = late_queue(Random(1))
    tensor, ggml = late_tensor(4096), queue.ggml
    assert isinstance(ggml, LateGgml)

    def read(piece: Piece, memory: memoryview) -> memoryview:
        n_waiting.append(len(ggml.queues[queue.handle].waiting))
        return memory[: piece.n_bytes]

    with closing(Uploads(queue, 64, n_pieces=3)) as uploads:
        uploads.send((Piece(0, 0, 64, tensor, 64 * i) for i in range(7)), read)
    assert n_waiting == [0, 1, 2, 2, 2, 2, 2]


def test_the_memory_is_pinned_where_the_device_has_such() -> None:
    for has_pinned in (True, False):
        with closing(Uploads(late_queue(Random(1), has_pinned=has_pinned), 100)) as uploads:
            assert uploads.is_pinned == has_pinned


def test_pieces_that_cannot_be_listed_leave_nothing_under_way() -> None:
    queue, tensor = late_queue(Random(1)), late_tensor(64)
    assert isinstance(queue.ggml, LateGgml)

    def pieces() -> Iterator[Piece]:
        yield Piece(0, 0, 64, tensor, 0)
        raise KeyboardInterrupt

    def read(piece: Piece, memory: memoryview) -> memoryview:
        memory[:64] = b"x" * 64
        return memory[:64]

    with closing(Uploads(queue, 64)) as uploads:
        with pytest.raises(KeyboardInterrupt):
            uploads.send(pieces(), read)
        assert not queue.ggml.queues[queue.handle].waiting
        assert bytes_of(tensor) == b"x" * 64


def test_closing_gives_everything_back_once() -> None:
    queue = late_queue(Random(1))
    assert isinstance(queue.ggml, LateGgml)
    uploads = Uploads(queue, 100)
    assert queue.ggml.n_owned == 1 + N_PIECES + 1  # the queue, events, memory
    uploads.close()
    uploads.close()
    assert queue.ggml.n_owned == 1
    queue.close()
    assert (queue.ggml.n_owned, queue.ggml.n_freed_under_way) == (0, 0)


def test_without_memory_for_all_events_none_is_kept() -> None:
    queue, n_made = late_queue(Random(1)), 0
    assert isinstance(queue.ggml, LateGgml)
    new = queue.ggml.backend_event_new

    def fail_at_the_third(device: int) -> int:
        nonlocal n_made
        n_made += 1
        if n_made == 3:
            raise MemoryError
        return new(device)

    queue.ggml.backend_event_new = fail_at_the_third  # type: ignore[method-assign]
    with pytest.raises(MemoryError):
        Uploads(queue, 100)
    assert queue.ggml.n_owned == 1


# waits that are left out


class OneEventIsNotWaitedFor(Uploads):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._ring[-1][1].synchronize = lambda: None  # type: ignore[method-assign]


class OneEventIsNotRecorded(Uploads):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._ring[0][1].record = lambda: None  # type: ignore[method-assign]


class EventsAreRecordedBeforeTheirCopies(Uploads):
    """The event of a piece says when the piece before it has left."""

    def send(self, pieces: Any, read: ReadPiece) -> None:
        try:
            for piece in pieces:
                memory, is_copied = next(self._next)
                is_copied.synchronize()
                data = np.frombuffer(read(piece, memory.data), np.uint8)
                is_copied.record()
                self._backend.write_later(piece.tensor, data, piece.tensor_offset)
        finally:
            self._backend.synchronize()


class TwoPiecesShareMemory(Uploads):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._ring[-1] = self._ring[0][0], self._ring[-1][1]


class ReturnsBeforeTheEnd(Backend):
    def synchronize(self) -> None:
        pass


class ReturnsBeforeTheEndAfterAnError(Uploads):
    def send(self, pieces: Any, read: ReadPiece) -> None:
        for piece in pieces:
            memory, is_copied = next(self._next)
            is_copied.synchronize()
            data = np.frombuffer(read(piece, memory.data), np.uint8)
            self._backend.write_later(piece.tensor, data, piece.tensor_offset)
            is_copied.record()
        self._backend.synchronize()


@pytest.mark.parametrize("has_events", [True, False])
@pytest.mark.parametrize(
    "bug", [OneEventIsNotWaitedFor, OneEventIsNotRecorded, TwoPiecesShareMemory]
)
def test_a_wait_that_is_left_out_lets_other_bytes_arrive(
    bug: type[Uploads], has_events: bool
) -> None:
    with pytest.raises(AssertionError, match=OTHER_BYTES):
        run(60, uploads_type=bug, has_events=has_events)


def test_an_event_that_is_recorded_too_early_lets_other_bytes_arrive() -> None:
    with pytest.raises(AssertionError, match=OTHER_BYTES):
        run(60, uploads_type=EventsAreRecordedBeforeTheirCopies)


@pytest.mark.parametrize("has_events", [True, False])
def test_an_end_that_is_not_waited_for_is_found(has_events: bool) -> None:
    with pytest.raises(AssertionError, match=OTHER_BYTES):
        run(60, backend_type=ReturnsBeforeTheEnd, has_events=has_events)
    with pytest.raises(AssertionError, match=OTHER_BYTES):
        run(60, uploads_type=ReturnsBeforeTheEndAfterAnError, has_events=has_events)
