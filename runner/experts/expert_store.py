"""The host side of the experts: where their bytes are, how they are read and what that costs.

Knows no slots' bookkeeping and no graph. Reads go past the system's page cache where the file
system allows it, so that no second copy of an expert competes with the slots for memory; where
memory is left for the whole file they go through it, and what is there already is computed in
place, from the mapping. Mapped experts that are not in memory are never touched: page faults read
a file several times more slowly than it can be read.
"""

import mmap
import time
from collections.abc import Callable
from dataclasses import dataclass

from quant.errors import GGUFError
from quant.gguf_file import ByteRange, GGUFFile
from quant.read_only_file import BLOCK_BYTES, round_up
from runner.checks.file_check import check_unchanged
from runner.experts.slot_memory import Parts, SlotPart
from runner.experts.uploads import Piece
from runner.model_config import ModelConfig
from runner.model_sizes import ExpertRanges, expert_ranges

_PIECE_BYTES = 2 << 20  # of an expert read ahead: what an unwanted one may cost at most
_FORGETTING = 0.99
BELIEVED_S = 1.0  # how long an expert that was found in memory is taken to be there
_SMOOTHING = 0.1  # weight of the newest measurement in a running cost


@dataclass(frozen=True)
class ExpertCosts:
    """Seconds per byte of an expert, running averages; 0.0 = not measured yet."""

    read_s_per_byte: float = 0.0
    host_s_per_byte: float = 0.0  # computing one token's pair from the mapping
    slot_s_per_byte: float = 0.0  # computing one token's pair from a slot


class ExpertStore:
    """Reads experts; one thread at a time. Costs are written by the engine's thread."""

    def __init__(self, file: GGUFFile, config: ModelConfig, has_room: bool) -> None:
        """has_room: the file's pages and the slots fit into memory together."""
        self._file = file
        self._ranges = tuple(
            tuple(expert_ranges(file, config, layer, expert) for expert in range(config.n_expert))
            for layer in range(config.n_layer)
        )
        self.has_room = has_room
        self.is_direct = not has_room and file.open_direct()
        self._drops_pages = not has_room and not self.is_direct
        largest = max(part.n_bytes for row in self._ranges for part in row[0].parts)
        self._staging = memoryview(mmap.mmap(-1, round_up(largest, BLOCK_BYTES) + BLOCK_BYTES))
        self._believed_until_s: dict[tuple[int, int], float] = {}  # by layer and expert
        self._read_s_per_byte = 0.0  # running averages, 0.0 = not measured yet
        self._host_s_per_byte = 0.0
        self._slot_s_per_byte = 0.0
        self._host_growth = 1.0  # cost of each pair after the first, in the first one's
        self._slot_growth = 1.0

    @property
    def costs(self) -> ExpertCosts:
        """What reading and computing cost lately."""
        return ExpertCosts(self._read_s_per_byte, self._host_s_per_byte, self._slot_s_per_byte)

    def n_bytes(self, layer: int) -> int:
        """Bytes of one expert."""
        return self._ranges[layer][0].n_bytes

    def ranges(self, layer: int, expert: int) -> ExpertRanges:
        """Where an expert lies in the file."""
        return self._ranges[layer][expert]

    # reading

    def read(self, layer: int, expert: int, parts: Parts, n_ready_bytes: int = 0) -> None:
        """Read an expert's three matrices into a slot, whose first n_ready_bytes are there already.

        Raises GGUFError or ModelError that names the file: a read failed or came short, or the
        file is not the one that was opened any more. The slot's bytes are worthless then.
        """
        for part, target in zip(self._ranges[layer][expert].parts, parts, strict=True):
            if self.is_direct:
                n_skipped = min(n_ready_bytes, len(target.blocks))
                n_ready_bytes -= n_skipped
                self._read_direct(part, target, n_skipped)
            else:
                self._file.read(part, target.matrix)
                if self._drops_pages:
                    self._file.forget(part)
        check_unchanged(self._file)

    def read_piece(self, piece: Piece, memory: memoryview) -> memoryview:
        """Read a part of an expert into aligned memory that is two blocks larger; returns where
        it is. Raises GGUFError. See `check`."""
        if not self.is_direct:
            data = memory[: piece.n_bytes]
            part = ByteRange(piece.shard, piece.offset, piece.n_bytes)
            self._file.read(part, data)
            if self._drops_pages:
                self._file.forget(part)
            return data
        before = piece.offset % BLOCK_BYTES
        blocks = memory[: round_up(before + piece.n_bytes, BLOCK_BYTES)]
        self._file.read_direct(piece.shard, piece.offset - before, blocks)
        return blocks[before : before + piece.n_bytes]

    def check_direct(self, memory: memoryview) -> None:
        """Read through the page cache where the system cannot read past it into this memory, as
        into a driver's."""
        if not self.is_direct:
            return
        try:
            self._file.read_direct(0, 0, memory[:BLOCK_BYTES])
        except GGUFError:
            self.is_direct, self._drops_pages = False, True

    def check(self) -> None:
        """Raise ModelError when the file is not the one that was opened any more."""
        check_unchanged(self._file)

    def read_ahead(
        self, layer: int, expert: int, parts: Parts, is_wanted: Callable[[], bool]
    ) -> int:
        """Read an expert from its beginning, a piece at a time, for as long as it is wanted.

        Only where `can_read_ahead`. Returns how many bytes of the parts are there.
        """
        n_done = 0
        for part, target in zip(self._ranges[layer][expert].parts, parts, strict=True):
            blocks, offset = self._blocks_of(part, target)
            for start in range(0, len(blocks), _PIECE_BYTES):
                if not is_wanted():
                    return n_done
                piece = blocks[start : start + _PIECE_BYTES]
                self._file.read_direct(part.shard, offset + start, piece)
                n_done += len(piece)
            n_done += len(target.blocks) - len(blocks)
        return n_done

    def can_read_ahead(self, layer: int, expert: int, parts: Parts) -> bool:
        """Whether the expert can be read directly into memory that lies like `parts`."""
        places = zip(self._ranges[layer][expert].parts, parts, strict=True)
        return self.is_direct and all(p.offset % BLOCK_BYTES == t.start for p, t in places)

    def _read_direct(self, part: ByteRange, target: SlotPart, n_skipped: int) -> None:
        """Read the blocks around the matrix: into the slot if it lies alike, else by way of
        staging memory."""
        if part.offset % BLOCK_BYTES == target.start:
            blocks, offset = self._blocks_of(part, target)
            if n_skipped < len(blocks):
                self._file.read_direct(part.shard, offset + n_skipped, blocks[n_skipped:])
            return
        before = part.offset % BLOCK_BYTES
        blocks = self._staging[: round_up(before + part.n_bytes, BLOCK_BYTES)]
        self._file.read_direct(part.shard, part.offset - before, blocks)
        target.matrix[:] = blocks[before : before + part.n_bytes]

    def _blocks_of(self, part: ByteRange, target: SlotPart) -> tuple[memoryview, int]:
        """The whole blocks around a matrix in a slot that lies alike, and where they are."""
        n_bytes = round_up(target.start + part.n_bytes, BLOCK_BYTES)
        return target.blocks[:n_bytes], part.offset - target.start

    # what is cheaper

    def is_cheaper_on_host(self, layer: int, expert: int, n_pairs: int = 1) -> bool:
        """Whether computing n_pairs from the mapping beats reading into a slot and computing there.

        What later hits would save is left out: on the CPU a slot and the mapping compute equally
        fast, and for a device see `expert_to_upload`. Without room for the file's pages the answer
        is no: they would not stay, and asking for them brings some in.
        """
        if not self.has_room:
            return False
        host_s_per_byte = self._host_s_per_byte * (1.0 + (n_pairs - 1) * self._host_growth)
        slot_s_per_byte = self._slot_s_per_byte * (1.0 + (n_pairs - 1) * self._slot_growth)
        if host_s_per_byte > self._read_s_per_byte + slot_s_per_byte:
            return False
        return self._is_likely_in_memory(layer, expert)

    def _is_likely_in_memory(self, layer: int, expert: int) -> bool:
        """`is_in_memory`, which costs a dozen system calls: a yes is believed for a while."""
        now_s = time.monotonic()
        if now_s < self._believed_until_s.get((layer, expert), 0.0):
            return True
        if not self.is_in_memory(layer, expert):
            return False
        self._believed_until_s[layer, expert] = now_s + BELIEVED_S
        return True

    def is_in_memory(self, layer: int, expert: int) -> bool:
        """Whether the system holds the expert's pages, as far as a few of them tell."""
        return all(self._file.is_cached(part) for part in self._ranges[layer][expert].parts)

    def observe_read(self, n_bytes: int, duration_s: float, forgets: bool = True) -> None:
        """Keep the cost of reading current. forgets: it was read since the host seemed slower, so
        that this one gets another chance some time; not for batches, of which each needs many."""
        self._read_s_per_byte = _average(self._read_s_per_byte, duration_s / n_bytes)
        if forgets:
            self._host_s_per_byte *= _FORGETTING

    def observe_compute(self, n_bytes: int, duration_s: float, on_host: bool) -> None:
        """Keep the cost of computing one token's pairs by experts of n_bytes together current."""
        if on_host:
            self._host_s_per_byte = _average(self._host_s_per_byte, duration_s / n_bytes)
        else:
            self._slot_s_per_byte = _average(self._slot_s_per_byte, duration_s / n_bytes)

    def observe_more(self, growth: float, on_host: bool) -> None:
        """Take what a further pair of an expert costs, in what its first one does: less, since the
        weights are read once."""
        growth = min(1.0, max(0.0, growth))
        if on_host:
            self._host_growth = growth
        else:
            self._slot_growth = growth


def _average(old: float, new: float) -> float:
    return old + _SMOOTHING * (new - old) if old else new
