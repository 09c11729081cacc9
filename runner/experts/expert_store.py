"""The host side of the experts: where their bytes are, how they are read and what that costs.

Knows no slots' bookkeeping and no graph. Reads go past the system's page cache where the file
system allows it, so that no second copy of an expert competes with the slots for memory; where
memory is left for the whole file they go through it, and what is there already is computed in
place, from the mapping. Mapped experts that are not in memory are never touched: page faults read
a file several times more slowly than it can be read.
"""

import mmap
from dataclasses import dataclass, replace

from quant.gguf_file import ByteRange, GGUFFile
from quant.read_only_file import BLOCK_BYTES, round_up
from runner.checks.file_check import check_unchanged
from runner.experts.slot_memory import SlotPart
from runner.model_config import ModelConfig
from runner.model_sizes import ExpertRanges, expert_ranges

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
        self.is_direct = not has_room and file.open_direct()
        self._drops_pages = not has_room and not self.is_direct
        largest = max(part.n_bytes for row in self._ranges for part in row[0].parts)
        self._staging = memoryview(mmap.mmap(-1, round_up(largest, BLOCK_BYTES) + BLOCK_BYTES))
        self.costs = ExpertCosts()

    def n_bytes(self, layer: int) -> int:
        """Bytes of one expert."""
        return self._ranges[layer][0].n_bytes

    def ranges(self, layer: int, expert: int) -> ExpertRanges:
        """Where an expert lies in the file."""
        return self._ranges[layer][expert]

    # reading

    def read(self, layer: int, expert: int, parts: tuple[SlotPart, SlotPart, SlotPart]) -> None:
        """Read an expert's three matrices into a slot.

        Raises GGUFError or ModelError that names the file: a read failed or came short, or the
        file is not the one that was opened any more. The slot's bytes are worthless then.
        """
        for part, target in zip(self._ranges[layer][expert].parts, parts, strict=True):
            if self.is_direct:
                self._read_direct(part, target)
            else:
                self._file.read(part, target.matrix)
                if self._drops_pages:
                    self._file.forget(part)
        check_unchanged(self._file)

    def _read_direct(self, part: ByteRange, target: SlotPart) -> None:
        """Read the blocks around the matrix: into the slot if it lies alike, else by way of
        staging memory."""
        before = part.offset % BLOCK_BYTES
        n_bytes = round_up(before + part.n_bytes, BLOCK_BYTES)
        is_alike = before == target.start
        blocks = (target.blocks if is_alike else self._staging)[:n_bytes]
        self._file.read_direct(part.shard, part.offset - before, blocks)
        if not is_alike:
            target.matrix[:] = blocks[before : before + part.n_bytes]

    # what is cheaper

    def is_cheaper_on_host(self, layer: int, expert: int) -> bool:
        """Whether computing from the mapping beats reading into a slot and computing there.

        A later hit saves nothing here, since a slot and the mapping compute equally fast.
        """
        costs = self.costs
        if costs.host_s_per_byte > costs.read_s_per_byte + costs.slot_s_per_byte:
            return False
        return self.is_in_memory(layer, expert)

    def is_in_memory(self, layer: int, expert: int) -> bool:
        """Whether the system holds the expert's pages, as far as a few of them tell."""
        return all(self._file.is_cached(part) for part in self._ranges[layer][expert].parts)

    def observe_read(self, n_bytes: int, duration_s: float) -> None:
        """Keep the cost of reading current."""
        average = _average(self.costs.read_s_per_byte, duration_s / n_bytes)
        self.costs = replace(self.costs, read_s_per_byte=average)

    def observe_compute(self, n_bytes: int, duration_s: float, on_host: bool) -> None:
        """Keep the cost of computing one token's pairs by experts of n_bytes together current."""
        if on_host:
            average = _average(self.costs.host_s_per_byte, duration_s / n_bytes)
            self.costs = replace(self.costs, host_s_per_byte=average)
        else:
            average = _average(self.costs.slot_s_per_byte, duration_s / n_bytes)
            self.costs = replace(self.costs, slot_s_per_byte=average)


def _average(old: float, new: float) -> float:
    return old + _SMOOTHING * (new - old) if old else new
