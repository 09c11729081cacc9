"""ExpertCache: the slots' memory and the bookkeeping of what is in it; alone it fills slots.

Knows no graph and no policy of misses.
"""

from contextlib import ExitStack

from quant.ggml import Backend
from quant.gguf_file import GGUFFile
from runner.experts.expert_store import ExpertStore
from runner.experts.prefetcher import Load, Prefetcher
from runner.experts.slot_memory import SlotMemory
from runner.experts.slot_table import SlotTable
from runner.model_config import ModelConfig
from runner.weights import ExpertSlabs

_MAX_WAITING = 8  # loads asked for ahead; more would only wait in the queue


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
            self._memory = SlotMemory(backend, file, config, n_slots)
            owned.callback(self._memory.close)
            self._prefetcher = Prefetcher(store.read, _MAX_WAITING)
            owned.callback(self._prefetcher.close)
            self._owned = owned.pop_all()
        self._under_way: list[Load] = []

    def close(self) -> None:
        self._owned.close()

    @property
    def slabs(self) -> tuple[ExpertSlabs, ...]:
        """The slots of each layer as tensors."""
        return self._memory.slabs

    @property
    def n_bytes(self) -> int:
        """Memory of all slots."""
        return self._memory.n_bytes

    def can_load(self, layer: int) -> bool:
        """Whether `start_load` would find a slot."""
        return self._prefetcher.can_request and self.table.can_take(layer)

    def start_load(self, layer: int, expert: int) -> Load:
        """Begin to read a missing expert into the slot of the one worth least."""
        slot = self.table.take(layer, expert)
        load = Load(layer, expert, slot, self._memory.parts(layer, slot))
        self._prefetcher.request(load)
        self._under_way.append(load)
        return load

    def load_under_way(self, layer: int, expert: int) -> Load | None:
        """The load that is bringing this expert, if one was started ahead."""
        found = (load for load in self._under_way if (load.layer, load.expert) == (layer, expert))
        return next(found, None)

    def finish(self, load: Load) -> None:
        """Wait for a load and make its expert resident. Raises what the read raised."""
        self.settle(load)
        if load.error is not None:
            raise load.error

    def settle(self, load: Load) -> None:
        """Wait for a load; its slot then has the expert or, see `load.error`, is empty."""
        self._prefetcher.wait(load)
        self._under_way.remove(load)
        if load.error is None:
            self.table.commit(load.layer, load.slot)
        else:
            self.table.fail(load.layer, load.slot)

    def take_finished(self) -> list[Load]:
        """Settle the loads that are done, without waiting; returns them."""
        self._prefetcher.poll()
        finished = [load for load in self._under_way if load.is_done]
        for load in finished:
            self.settle(load)
        return finished
