"""One graph that computes some pairs by some experts of one layer, and the graphs of all layers.

A pass gathers the inputs of its pairs, computes them and puts the outputs where `sum_of_experts`
finds them. All pairs that an expert has in the batch belong into one pass: see `expert_outputs`.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

import numpy as np

from quant.ggml import Backend, GraphAllocator, Tensor
from quant.graph import Graph, HostPort
from runner import model
from runner.device_state import PassTensors
from runner.model_config import ModelConfig
from runner.weights import ExpertSlabs

Numbers = np.ndarray | Sequence[int]  # a few integers: lists are faster for one token's pairs

_MAX_NODES = 16
_ALIGNMENT_BYTES = 256  # where every device lets a view begin; experts of real models do


class ExpertPass:
    """One graph: n_pairs pairs computed by the experts of one layer's slabs."""

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        tensors: PassTensors,
        slabs: ExpertSlabs,
        n_pairs: int,
        has_one_token: bool,
        slot: int | None = None,
    ) -> None:
        """has_one_token: the batch, so that all pairs have the same input; slot: of all pairs, if
        known. Then a kernel sees this one expert and no other slot: see `PassSet`."""
        self._graph = g = Graph(backend, _MAX_NODES)
        self._has_one_token = has_one_token
        self._has_one_slot = slot is not None
        if slot is not None:
            slabs = _one_slot(g, slabs, slot)
        if has_one_token:  # the shape that the layer's graph has, so the same kernel
            x = g.first_rows(tensors.ffn_input, 1)
            slot_ids = g.matrix(tensors.slots, n_pairs, 1)
        else:
            x = g.get_rows(tensors.ffn_input, g.matrix(tensors.tokens, n_pairs, 1))
            slot_ids = g.first_rows(tensors.slots, n_pairs)  # (1, n_pairs)
        outputs = model.expert_outputs(g, slabs, x, slot_ids)
        rows = g.reshape_2d(outputs, config.n_embd, n_pairs)
        g.expand(g.set_rows(tensors.outputs, rows, g.matrix(tensors.pairs, n_pairs, 1)))
        self._tokens = _port(backend, tensors.tokens, n_pairs, np.int32)
        self._slots = _port(backend, tensors.slots, n_pairs, np.int32)
        self._pairs = _port(backend, tensors.pairs, n_pairs, np.int64)
        self._n_expert_used = config.n_expert_used

    def close(self) -> None:
        self._graph.close()

    def check_support(self) -> None:
        """Raise BackendError when the device cannot compute it."""
        self._graph.check_support()

    def reserve(self, allocator: GraphAllocator) -> None:
        self._graph.reserve(allocator)

    def lay_out(self, allocator: GraphAllocator) -> None:
        self._graph.lay_out_within(allocator)

    def start(self, pairs: Numbers, slots: Numbers) -> None:
        """Begin to compute pairs (n_pairs,), each token * n_expert_used + rank; slots (n_pairs,).

        `Backend.synchronize` waits for the end.
        """
        self._pairs.array[:] = pairs
        self._slots.array[:] = 0 if self._has_one_slot else slots
        self._pairs.upload()
        self._slots.upload()
        if not self._has_one_token:
            np.floor_divide(pairs, self._n_expert_used, out=self._tokens.array, casting="unsafe")
            self._tokens.upload()
        self._graph.start()


def _one_slot(g: Graph, slabs: ExpertSlabs, slot: int) -> ExpertSlabs:
    """Views of one expert in each slab."""
    views = []
    for slab in slabs.all:
        (ne0, ne1, *_), (_, nb1, nb2, _) = slab.shape, slab.strides
        views.append(g.view_3d(slab, (ne0, ne1, 1), (nb1, nb2), slot * nb2))
    return ExpertSlabs(*views)


def _can_view_slots(slabs: ExpertSlabs | None) -> bool:
    return slabs is not None and not any(s.strides[2] % _ALIGNMENT_BYTES for s in slabs.all)


def _port(backend: Backend, tensor: Tensor, n: int, kind: type[np.generic]) -> HostPort:
    if backend.is_host:
        return HostPort(backend, tensor, backend.view(tensor).view(kind)[:n])
    return HostPort(backend, tensor, np.zeros(n, kind))


class PassSet:
    """The passes over all layers' slabs on one backend; keeps the small ones, which decoding
    needs again and again.

    On a device the experts of a batch are computed one by one, each in a slab of one slot: a
    kernel may divide its work, and so round, by the number of slots in the slab and by which of
    them is meant. What is computed must not depend on either.
    """

    def __init__(
        self,
        backend: Backend,
        config: ModelConfig,
        tensors: PassTensors,
        slabs: tuple[ExpertSlabs | None, ...],
        allocator: GraphAllocator,
    ) -> None:
        """slabs of each layer; `allocator` must have been reserved, see `reserve`."""
        self._backend = backend
        self._config = config
        self._tensors = tensors
        self._slabs = slabs
        self._allocator = allocator
        self._kept: dict[tuple[int, int, bool], ExpertPass] = {}
        self._views_slots = tuple(not backend.is_host and _can_view_slots(s) for s in slabs)

    def reserve(self, n_batch: int) -> None:
        """Make the allocator large enough for a pass of all pairs of n_batch tokens.

        Raises BackendError when the backend cannot compute passes.
        """
        layer = next((i for i, slabs in enumerate(self._slabs) if slabs is not None), None)
        if layer is None:
            return
        k = self._config.n_expert_used
        with closing(self._make(layer, n_batch * k, n_batch == 1)) as largest:
            largest.reserve(self._allocator)
            largest.check_support()
        with closing(self._make(layer, k, True)) as single:
            single.check_support()

    def has(self, layer: int) -> bool:
        """Whether the layer has slabs."""
        return self._slabs[layer] is not None

    def run(
        self,
        layer: int,
        pairs: Numbers,
        slots: Numbers,
        n_tokens: int,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> None:
        """Compute pairs (n_pairs,) by slots (n_pairs,) of the layer's slabs, and call `meanwhile`.

        n_tokens: of the batch.
        """
        slot = None
        if n_tokens > 1 and self._views_slots[layer]:
            slot = int(slots[0])
            assert (np.asarray(slots) == slot).all(), "on a device one expert at a time"
        key = (layer, len(pairs), n_tokens == 1)
        experts = None if slot is not None else self._kept.get(key)
        if experts is None:
            experts = self._build(key, slot)
        try:
            experts.start(pairs, slots)
            meanwhile()
        finally:
            try:
                self._backend.synchronize()
            finally:
                if experts is not self._kept.get(key):
                    experts.close()

    def drop_all(self) -> None:
        """Forget what was laid out."""
        for experts in self._kept.values():
            experts.close()
        self._kept.clear()

    def _build(self, key: tuple[int, int, bool], slot: int | None) -> ExpertPass:
        layer, n_pairs, has_one_token = key
        experts = self._make(layer, n_pairs, has_one_token, slot)
        with ExitStack() as undo:
            undo.callback(experts.close)
            experts.lay_out(self._allocator)
            undo.pop_all()
        if slot is None and n_pairs <= self._config.n_expert_used:
            self._kept[key] = experts
        return experts

    def _make(
        self, layer: int, n_pairs: int, has_one_token: bool, slot: int | None = None
    ) -> ExpertPass:
        slabs = self._slabs[layer]
        assert slabs is not None, "a layer without experts has no passes"
        settings = (self._backend, self._config, self._tensors, slabs, n_pairs, has_one_token)
        return ExpertPass(*settings, slot)
