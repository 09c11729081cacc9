"""Carries out a layer's plan: which expert is read when, and which pairs are computed meanwhile.

When all experts of a plan are resident the layer's graph computes them. Otherwise they run in
passes: what is resident is computed while the first missing experts are read, and each missing one
is computed when it is there, while the next is read. So a prompt that needs more experts than
there are slots streams them through the slots that it can spare, each read once.
"""

import time
from collections import deque
from collections.abc import Sequence

import numpy as np

from runner import miss_policy
from runner.batch_graph import BatchGraph
from runner.expert_pass import ExpertPasses
from runner.experts.expert_cache import ExpertCache
from runner.experts.prefetcher import Load
from runner.miss_policy import RoutingPlan
from runner.stats import StatsRecorder

_N_WARM_UP = 2  # runs before one that is timed
_N_SPARED = 2  # slots that streaming goes through when it must: one is filled, one computed


class ExpertRunner:
    """Serves the experts of one batch after the other, layer by layer."""

    def __init__(
        self, cache: ExpertCache, passes: ExpertPasses, stats: StatsRecorder, miss_action: str
    ) -> None:
        """miss_action: what happens to a missing expert: "load", "host" or "auto", the cheaper."""
        self._cache = cache
        self._passes = passes
        self._stats = stats
        self._miss_action = miss_action
        self.wait_ns = 0  # spent waiting for reads, since the model was loaded

    def measure_costs(self) -> None:
        """Read one expert of the first layer and compute one pair with it, to know the costs."""
        cache, store = self._cache, self._cache.store
        load = cache.start_load(0, 0)
        self.finish(load)
        pair = np.zeros(1, np.int64)
        n_bytes = store.n_bytes(0)
        for on_host in (False, True):
            if on_host and not (self._passes.has_host(0) and store.is_in_memory(0, 0)):
                continue
            slot = np.array([0 if on_host else load.slot])
            for _ in range(_N_WARM_UP + 1):
                spent_ns = self._passes.run(0, on_host, pair, slot)
            store.observe_compute(n_bytes, spent_ns / 1e9, on_host)

    def serve(self, graph: BatchGraph, layer: int, expert_ids: np.ndarray) -> RoutingPlan:
        """Decide how the routed layer's pairs are computed, and see that they can be.

        expert_ids (n, n_expert_used) int32. Raises what a failed read raised; then the layer's
        slots are in order and nothing of the batch may be used.
        """
        table = self._cache.table
        if not table.is_full(layer):
            table.record_use(layer, expert_ids)
        plan = self._plan(layer, expert_ids)
        if plan.is_all_hits:
            slots = table.slot_of[layer][plan.experts]
            table.hold_only(layer, slots)
            graph.apply(slots)
        else:
            _Streaming(self, layer, plan).run()
            graph.apply_passes()
        return plan

    def finish(self, load: Load) -> None:
        """Wait for a load and count it. Raises what the read raised."""
        started = time.perf_counter_ns()
        self._cache.finish(load)
        self.wait_ns += time.perf_counter_ns() - started
        n_bytes = self._cache.store.n_bytes(load.layer)
        self._stats.record_read(load.layer, n_bytes, load.duration_ns)
        self._cache.store.observe_read(n_bytes, load.duration_ns / 1e9)

    def _plan(self, layer: int, expert_ids: np.ndarray) -> RoutingPlan:
        slot_of = self._cache.table.slot_of[layer]
        plan = miss_policy.exact(expert_ids, slot_of)
        if plan.is_all_hits or self._miss_action == "load" or not self._passes.has_host(layer):
            return plan
        on_host = frozenset(
            expert
            for expert in plan.loads
            if self._miss_action == "host" or self._cache.store.is_cheaper_on_host(layer, expert)
        )
        return miss_policy.exact(expert_ids, slot_of, on_host) if on_host else plan


class _Streaming:
    """One layer of one batch whose experts are not all resident."""

    def __init__(self, runner: ExpertRunner, layer: int, plan: RoutingPlan) -> None:
        self._runner = runner
        self._cache = runner._cache
        self._table = runner._cache.table
        self._layer = layer
        self._plan = plan
        self._pairs_of = _pairs_by_expert(plan.experts)
        worth = self._table.worth(layer)
        self._waiting = deque(sorted(plan.loads, key=lambda expert: worth[expert]))
        missing = {*plan.loads, *plan.on_host}
        self._hits = sorted(self._pairs_of.keys() - missing, key=lambda expert: worth[expert])
        self._kept = self._worth_keeping(worth)
        self._reading: deque[Load] = deque()

    def run(self) -> None:
        table, layer = self._table, self._layer
        table.hold_only(layer, table.slot_of[layer][self._hits])
        try:
            self._read_on()
            self._compute_hits()
            for expert in self._plan.on_host:
                self._compute([expert], on_host=True)
            while self._reading:
                self._compute_next_loaded()
            assert not self._waiting
        finally:
            for load in self._reading:  # only after an error
                self._cache.settle(load)
            table.release(layer)

    def _worth_keeping(self, worth: np.ndarray) -> frozenset[int]:
        """The experts that should be resident when the layer is done."""
        pinned = set(self._table.pinned(self._layer))
        experts = {*self._table.residents(self._layer).tolist(), *self._plan.loads} - pinned
        ranked = sorted(experts, key=lambda expert: -worth[expert])
        return frozenset(ranked[: self._table.n_unpinned(self._layer)])

    def _read_on(self) -> None:
        """Begin to read as many waiting experts as there are slots for them."""
        while self._waiting and self._cache.can_load(self._layer):
            self._reading.append(self._cache.start_load(self._layer, self._waiting.popleft()))

    def _compute_hits(self) -> None:
        """Compute what is resident; first what has to make room for waiting experts."""
        makes_room = []
        if self._waiting:
            n_spared = max(0, _N_SPARED - len(self._reading))
            loose = [e for e in self._hits if e not in self._kept and self._can_go(e)]
            spared = [e for e in self._hits if self._can_go(e)][:n_spared]
            makes_room = loose if len(loose) >= n_spared else spared
        if makes_room:
            self._compute(makes_room)
            self._let_go(makes_room)
            self._read_on()
        others = [expert for expert in self._hits if expert not in makes_room]
        if others:
            self._compute(others)

    def _compute_next_loaded(self) -> None:
        load = self._reading.popleft()
        self._runner.finish(load)
        self._table.hold(self._layer, np.array([load.slot]))
        self._compute([load.expert])
        self._let_go([load.expert])
        self._read_on()

    def _let_go(self, experts: Sequence[int]) -> None:
        self._table.release(self._layer, self._table.slot_of[self._layer][list(experts)])

    def _can_go(self, expert: int) -> bool:
        return not self._table.is_pinned(self._layer, self._table.slot_of[self._layer, expert])

    def _compute(self, experts: Sequence[int], on_host: bool = False) -> None:
        """Compute all pairs of these experts, in the order of the batch."""
        pairs = np.sort(np.concatenate([self._pairs_of[expert] for expert in experts]))
        of_pair = self._plan.experts.ravel()[pairs]
        slots = of_pair if on_host else self._table.slot_of[self._layer][of_pair]
        spent_ns = self._runner._passes.run(self._layer, on_host, pairs, slots)
        if len(self._plan.experts) == 1:
            n_bytes = self._cache.store.n_bytes(self._layer) * len(experts)
            self._cache.store.observe_compute(n_bytes, spent_ns / 1e9, on_host)


def _pairs_by_expert(experts: np.ndarray) -> dict[int, np.ndarray]:
    """The pairs of each expert, counted token by token: expert -> (n,) int64."""
    flat = experts.ravel()
    order = np.argsort(flat, kind="stable")
    found, starts = np.unique(flat[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))
