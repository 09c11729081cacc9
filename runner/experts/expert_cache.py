"""ExpertCache: the slots' memory and the bookkeeping of what is in it; alone it fills slots.

Knows no graph and no policy of misses.
"""

import mmap
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import numpy as np

from quant.ggml import Backend
from quant.gguf_file import GGUFFile
from runner.experts.device_slots import DeviceSlots
from runner.experts.expert_store import ExpertStore
from runner.experts.prefetcher import Load, Prefetcher
from runner.experts.slot_memory import Parts, SlotMemory, private_memory
from runner.experts.slot_table import EMPTY, SlotTable
from runner.model_config import ModelConfig
from runner.weights import ExpertSlabs

_NO_SLOT = -1
_N_GUESSES = 1  # at a time


class ExpertCache:
    """Experts of every layer in slots. One thread uses it; a thread of its own reads."""

    def __init__(
        self,
        backend: Backend,
        file: GGUFFile,
        config: ModelConfig,
        store: ExpertStore,
        n_slots: tuple[int, ...],
        policy: str,
    ) -> None:
        """Reserve the memory of n_slots[layer] slots in each layer; they fill as they are used."""
        self.table = SlotTable(n_slots, config.n_expert, policy)
        self.store = store
        with ExitStack() as owned:
            self._memory: SlotMemory | DeviceSlots
            if backend.is_host:
                self._memory = SlotMemory(backend, file, config, n_slots)
                read: Callable[[Load], None] = partial(_read, store)
            else:
                self._memory = DeviceSlots(backend, file, config, store, n_slots)
                read = self._memory.fill
            owned.callback(self._memory.close)
            self._staging = memoryview(private_memory(max(1, self._memory.staging_bytes)))
            if self.reads_ahead:  # take the memory now, not when a guess first comes so far
                np.frombuffer(self._staging, np.uint8)[:: mmap.PAGESIZE] = 0
            self._prefetcher = Prefetcher(read, sum(n_slots) + _N_GUESSES)
            owned.callback(self._prefetcher.close)
            self._owned = owned.pop_all()
        self._under_way: list[Load] = []  # asked for by a batch, or to fill empty slots
        self._uploads: list[Load] = []  # under way beside the batches
        self._guess: Load | None = None  # the latest

    def close(self) -> None:
        """End the reading thread, after the read that it is at, and free the slots."""
        self._forget_loads()
        self._owned.close()

    def _forget_loads(self) -> None:
        """Stop them, and let go of their views of the memory."""
        for load in (*self._under_way, *self._uploads):
            load.is_unwanted = True
        if self._guess is not None:
            self._guess.is_unwanted = True
        self._under_way.clear()
        self._uploads.clear()
        self._guess = None

    @property
    def slabs(self) -> tuple[ExpertSlabs, ...]:
        """The slots of each layer as tensors."""
        return self._memory.slabs

    @property
    def is_on_device(self) -> bool:
        """Whether the slots are in memory of their own, not the host's."""
        return isinstance(self._memory, DeviceSlots)

    @property
    def n_bytes(self) -> int:
        """Memory of all slots."""
        return self._memory.n_bytes

    @property
    def reads_ahead(self) -> bool:
        """Whether guesses can be read: directly, and in a layer that lacks experts."""
        layers = [i for i in range(len(self.table.n_slots)) if not self.table.is_full(i)]
        return any(self._can_guess(layer, 0) for layer in layers)

    @property
    def is_reading(self) -> bool:
        """Whether loads are under way."""
        return bool(self._under_way)

    def can_load(self, layer: int) -> bool:
        """Whether `start_load` would find a slot."""
        return self._prefetcher.can_request and self.table.can_take(layer)

    def start_load(self, layer: int, expert: int, guess: Load | None = None) -> Load:
        """Begin to read a missing expert into the slot of the one worth least.

        What a guess that was right has read already is copied, while the rest is read.
        """
        slot = self.table.take(layer, expert)
        load = Load(layer, expert, slot, self._memory.parts(layer, slot))
        load.n_skipped_bytes = guess.n_read_bytes if guess is not None else 0
        self._prefetcher.request(load)
        self._under_way.append(load)
        if guess is not None:
            assert guess.parts is not None and load.parts is not None
            _copy_start(guess.parts, load.parts, guess.n_read_bytes)
        return load

    def finish(self, load: Load) -> None:
        """Wait for a load and make its expert resident. Raises what the read raised."""
        self.settle(load)
        if load.error is not None:
            raise load.error

    def settle(self, load: Load) -> None:
        """Wait for a load; its slot then has the expert or, see `load.error`, is empty.

        Does nothing the second time.
        """
        if load not in self._under_way:
            return
        self._prefetcher.wait(load)
        self._under_way.remove(load)
        self._settle_slot(load)

    def _settle_slot(self, load: Load) -> None:
        if load.error is None:
            self.table.commit(load.layer, load.slot)
        else:
            self.table.fail(load.layer, load.slot)

    # uploads beside the batches

    @property
    def n_uploads(self) -> int:
        """Uploads under way."""
        return len(self._uploads)

    def start_upload(self, layer: int, expert: int) -> None:
        """Begin to bring an expert into the slot of the one worth least, for tokens to come.

        Ask `can_load` first. Call `settle_uploads` of the layer before it is served again.
        """
        load = self.start_load(layer, expert)
        self._under_way.remove(load)
        self._uploads.append(load)

    def settle_uploads(self, layer: int) -> list[Load]:
        """Make resident what has come, waiting only for this layer's; returns what was settled.

        A failed one left its slot empty and has its `error`: the next read of it will tell.
        """
        self._prefetcher.take_back_done()
        settled = [load for load in self._uploads if load.is_done or load.layer == layer]
        for load in settled:
            self._prefetcher.wait(load)
            self._uploads.remove(load)
            self._settle_slot(load)
        return settled

    # filling while nothing else is to do

    def start_filling(self) -> None:
        """Begin to read experts into empty slots: favourites, or else any. Call `stop_filling`
        before anything else is asked for."""
        for rank in range(max(self.table.n_slots)):
            for layer, n_slots in enumerate(self.table.n_slots):
                order = self.table.favourites(layer) or range(n_slots)
                if rank < n_slots and self.table.slot_of[layer, order[rank]] == EMPTY:
                    self.start_load(layer, order[rank])

    def stop_filling(self) -> list[Load]:
        """Begin no further loads; returns those that are done, their experts resident."""
        loads = list(self._under_way)
        for load in reversed(loads):  # what would begin last is stopped first
            load.is_unwanted = True
        for load in loads:
            self.settle(load)
        return [load for load in loads if load.error is None]

    # guesses

    def start_guess(self, layer: int, expert: int) -> Load | None:
        """Begin to read an expert that is not asked for yet into staging memory, when everything
        else is read; None where that cannot be. Only one guess at a time."""
        if not self._can_guess(layer, expert):
            return None
        parts = self._memory.staging_parts(layer, self._staging)
        assert parts is not None
        self._guess = guess = Load(layer, expert, _NO_SLOT, parts)
        self._prefetcher.request(guess)
        return guess

    def stop_guess(self, guess: Load) -> None:
        """Read no further; `guess.n_read_bytes` tells how far it came."""
        guess.is_unwanted = True
        self._prefetcher.wait(guess)

    def _can_guess(self, layer: int, expert: int) -> bool:
        parts = self._memory.staging_parts(layer, self._staging)
        return parts is not None and self.store.can_read_ahead(layer, expert, parts)


def _read(store: ExpertStore, load: Load) -> None:
    """What the prefetcher's thread does with a load into memory of the host."""
    assert load.parts is not None
    if load.slot == _NO_SLOT:
        load.n_read_bytes = store.read_ahead(
            load.layer, load.expert, load.parts, lambda: not load.is_unwanted
        )
        return
    store.read(load.layer, load.expert, load.parts, load.n_skipped_bytes)
    load.n_read_bytes = max(0, store.n_bytes(load.layer) - load.n_skipped_bytes)


def _copy_start(source: Parts, target: Parts, n_bytes: int) -> None:
    """Copy the first n_bytes of an expert's blocks."""
    for a, b in zip(source, target, strict=True):
        n = min(n_bytes, len(a.blocks))
        np.copyto(np.frombuffer(b.blocks[:n], np.uint8), np.frombuffer(a.blocks[:n], np.uint8))
        n_bytes -= n
