"""The memory of all expert slots on a device, and how an expert gets there from the file.

Each slab is shaped like the file's tensor with as many experts as there are slots.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from quant.ggml import Backend, Context
from quant.gguf_file import GGUFFile
from runner.experts.expert_store import ExpertStore
from runner.experts.prefetcher import Load
from runner.experts.uploads import PIECE_BYTES, Piece, Uploads
from runner.model_config import ModelConfig
from runner.weights import ExpertSlabs

_PROJECTIONS = ("gate", "up", "down")


class DeviceSlots:
    """One buffer of the device for all slots of all layers."""

    staging_bytes = 0

    def __init__(
        self,
        backend: Backend,
        file: GGUFFile,
        config: ModelConfig,
        store: ExpertStore,
        n_slots: Sequence[int],
    ) -> None:
        """Raises OutOfMemoryError."""
        self._store = store
        with ExitStack() as owned:
            context = owned.enter_context(Context(backend.ggml, 3 * config.n_layer))
            self.slabs = tuple(
                _slabs(context, file, layer, n_slots[layer]) for layer in range(config.n_layer)
            )
            buffer = owned.enter_context(context.allocate(backend))
            self.n_bytes = buffer.n_bytes
            queue = owned.enter_context(Backend.on(backend.device))
            self._uploads = Uploads(queue, PIECE_BYTES)
            owned.callback(self._uploads.close)
            store.check_direct(self._uploads.memory)
            self._owned = owned.pop_all()

    def close(self) -> None:
        self._owned.close()

    def parts(self, layer: int, slot: int) -> None:
        """A slot has no memory on the host."""

    def staging_parts(self, layer: int, memory: memoryview) -> None:
        """Nothing is read ahead of what is asked for: it would take the link from what is."""

    def fill(self, load: Load) -> None:
        """Bring an expert into its slot; on the reading thread. Raises as `ExpertStore.read`."""
        self._uploads.send(self._pieces(load), self._store.read_piece)
        self._store.check()
        load.n_read_bytes = self._store.n_bytes(load.layer)

    def _pieces(self, load: Load) -> Iterator[Piece]:
        ranges = self._store.ranges(load.layer, load.expert).parts
        for part, tensor in zip(ranges, self.slabs[load.layer].all, strict=True):
            for start in range(0, part.n_bytes, PIECE_BYTES):
                yield Piece(
                    part.shard,
                    part.offset + start,
                    min(PIECE_BYTES, part.n_bytes - start),
                    tensor,
                    load.slot * tensor.strides[2] + start,
                )


def _slabs(context: Context, file: GGUFFile, layer: int, n_slots: int) -> ExpertSlabs:
    tensors = []
    for name in _PROJECTIONS:
        merged = f"blk.{layer}.ffn_{name}_exps.weight"
        info = file.tensors.get(merged) or file.tensors[f"blk.{layer}.ffn_{name}.0.weight"]
        tensors.append(context.tensor(info.type.id, info.shape[0], info.shape[1], n_slots))
    return ExpertSlabs(*tensors)
