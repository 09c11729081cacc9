"""Computes some pairs of a batch by some experts, apart from the graphs of the layers.

Where a layer's experts are not all resident at once, they run one pass after the other: each
gathers the inputs of its pairs, computes them and puts the outputs where `sum_of_experts` finds
them. All pairs that an expert has in the batch belong into one pass: see `expert_outputs`.
"""

import time

import numpy as np

from quant.ggml import GraphAllocator
from quant.graph import Graph, HostPort
from runner import model
from runner.device_state import EngineParts
from runner.weights import ExpertSlabs

_MAX_NODES = 16


class ExpertPass:
    """One graph: n_pairs pairs computed by the experts of one layer's slabs."""

    def __init__(self, parts: EngineParts, slabs: ExpertSlabs, n_pairs: int) -> None:
        state = parts.state
        self._graph = g = Graph(parts.backend, _MAX_NODES)
        tokens = g.matrix(state.pass_tokens, n_pairs, 1)
        x = g.get_rows(state.ffn_input, tokens)  # (n_embd, n_pairs)
        outputs = model.expert_outputs(g, slabs, x, g.first_rows(state.pass_slots, n_pairs))
        rows = g.reshape_2d(outputs, parts.config.n_embd, n_pairs)
        g.expand(g.set_rows(state.pair_outputs, rows, g.matrix(state.pass_pairs, n_pairs, 1)))
        backend = parts.backend
        self._tokens = HostPort(backend, state.pass_tokens, np.zeros(n_pairs, np.int32))
        self._slots = HostPort(backend, state.pass_slots, np.zeros(n_pairs, np.int32))
        self._pairs = HostPort(backend, state.pass_pairs, np.zeros(n_pairs, np.int64))
        self._n_expert_used = parts.config.n_expert_used

    def close(self) -> None:
        self._graph.close()

    def reserve(self, allocator: GraphAllocator) -> None:
        self._graph.reserve(allocator)

    def lay_out(self, allocator: GraphAllocator) -> None:
        self._graph.lay_out_within(allocator)

    def run(self, pairs: np.ndarray, slots: np.ndarray) -> None:
        """Compute pairs (n_pairs,), each token * n_expert_used + rank; slots (n_pairs,)."""
        self._pairs.array[:] = pairs
        np.floor_divide(pairs, self._n_expert_used, out=self._tokens.array, casting="unsafe")
        self._slots.array[:] = slots
        for port in (self._pairs, self._tokens, self._slots):
            port.upload()
        self._graph.compute()


class ExpertPasses:
    """Builds passes and keeps the small ones, which decoding needs again and again."""

    def __init__(self, parts: EngineParts, n_batch: int, allocator: GraphAllocator) -> None:
        """Reserve memory for a pass of all pairs of n_batch tokens, where passes are possible."""
        self._parts = parts
        self._allocator = allocator
        self._kept: dict[tuple[int, bool, int], ExpertPass] = {}
        self.compute_ns = 0  # inside ggml, since the model was loaded
        slabs = next((slabs for slabs in parts.slabs if slabs is not None), None)
        if slabs is not None and parts.state.has_passes:
            largest = ExpertPass(parts, slabs, n_batch * parts.config.n_expert_used)
            largest.reserve(allocator)
            largest.close()

    def run(self, layer: int, on_host: bool, pairs: np.ndarray, slots: np.ndarray) -> int:
        """Compute pairs by the layer's slots, or by the experts where they are mapped.

        Shapes as in `ExpertPass.run`; on the host a slot is an expert. Returns nanoseconds.
        """
        key = (layer, on_host, len(pairs))
        experts = self._kept.get(key) or self._build(key)
        started = time.perf_counter_ns()
        try:
            experts.run(pairs, slots)
        finally:
            if key not in self._kept:
                experts.close()
        spent_ns = time.perf_counter_ns() - started
        self.compute_ns += spent_ns
        return spent_ns

    def has_host(self, layer: int) -> bool:
        """Whether the layer's experts can be computed where they are mapped."""
        return self._parts.weights.layers[layer].experts is not None

    def close(self) -> None:
        self.drop_all()

    def drop_all(self) -> None:
        for experts in self._kept.values():
            experts.close()
        self._kept.clear()

    def _build(self, key: tuple[int, bool, int]) -> ExpertPass:
        layer, on_host, n_pairs = key
        slabs = self._parts.weights.layers[layer].experts if on_host else self._parts.slabs[layer]
        assert slabs is not None, "a layer without experts has no passes"
        experts = ExpertPass(self._parts, slabs, n_pairs)
        experts.lay_out(self._allocator)
        if n_pairs <= self._parts.config.n_expert_used:
            self._kept[key] = experts
        return experts
