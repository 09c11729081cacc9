"""Sees to it that every pair of a layer is computed: by resident experts or by missing ones.

Decides what is read ahead, and counts. Which expert is read and computed when is `Streaming`'s.
"""

import time
from dataclasses import replace

import numpy as np

from runner.batch_graph import BatchGraph
from runner.expert_passes import ExpertPasses
from runner.experts.expert_cache import ExpertCache
from runner.experts.miss_planner import MissPlanner
from runner.experts.prefetcher import Load
from runner.experts.streaming import Streaming
from runner.experts.upload_choice import expert_to_upload
from runner.miss_policy import DROPPED, Routing, RoutingPlan
from runner.residency import Residency
from runner.stats_recorder import StatsRecorder

_N_WARM_UP = 2  # runs before those that are timed
_N_TIMED = 2
_N_FEW, _N_MANY = 8, 32  # tokens of batches whose costs tell those of others
_MAX_UPLOADS = 2  # under way at a time, so that they never queue up before what is asked for


class ExpertRunner:
    """Serves the experts of one batch after the other, layer by layer."""

    def __init__(
        self,
        cache: ExpertCache,
        passes: ExpertPasses,
        stats: StatsRecorder,
        planner: MissPlanner,
        n_expert_used: int,
        n_batch: int,
        counts_uses: bool = False,
    ) -> None:
        """n_expert_used: by a token in a layer; n_batch: most tokens of a batch; counts_uses: also
        where nothing is missing."""
        self._cache = cache
        self._n_expert_used = n_expert_used
        self._n_batch = n_batch
        self._passes = passes
        self._stats = stats
        self._planner = planner
        self._counts_uses = counts_uses
        self._guess: Load | None = None
        self._is_one_token = True  # the batch
        self.wait_ns = 0  # spent waiting for reads, since the model was loaded

    def is_needed(self, n_tokens: int) -> bool:
        """Whether there is anything to `serve` or to count in a batch of so many tokens: not when
        every expert is in its own slot and nobody asked for uses or weights."""
        counts = self._counts_uses or self._planner.counts_weight
        is_incomplete = self._cache.is_reading or not self._cache.table.has_everything
        return counts or is_incomplete or self._computes_apart(n_tokens)

    def _computes_apart(self, n_tokens: int) -> bool:
        """Whether each expert of a layer is computed by itself, resident or not: a device's kernel
        depends on how many pairs a call has, and a batch should not depend on what is resident."""
        return self._cache.is_on_device and n_tokens > 1

    def measure_costs(self) -> None:
        """Read one expert of the first layer and compute pairs with it, to know the costs."""
        cache, store = self._cache, self._cache.store
        favourites = cache.table.favourites(0)
        expert = favourites[0] if favourites else 0
        load = cache.start_load(0, expert)
        self.finish(load)
        if not favourites:
            cache.table.unpin(0, [expert])  # nobody has asked for it
        self._time_pairs(load.slot, on_host=False)
        if store.has_room and self._passes.has_host(0) and store.is_in_memory(0, expert):
            self._time_pairs(expert, on_host=True)

    def _time_pairs(self, slot: int, on_host: bool) -> None:
        """One token's pair, and beside a device, where slots and host differ, what further pairs
        cost: an expert's weights are read once for all of them."""
        store = self._cache.store
        one_s = self._fastest_s(slot, on_host, 1)
        store.observe_compute(store.n_bytes(0), one_s, on_host)
        if (
            self._cache.is_on_device and self._n_batch >= _N_MANY
        ):  # both of these build their graphs first
            few_s, many_s = (self._fastest_s(slot, on_host, n) for n in (_N_FEW, _N_MANY))
            store.observe_more((many_s - few_s) / (_N_MANY - _N_FEW) / one_s, on_host)

    def _fastest_s(self, slot: int, on_host: bool, n_tokens: int) -> float:
        pairs = np.arange(n_tokens) * self._n_expert_used
        slots = np.full_like(pairs, slot)
        runs = [
            self._passes.run(0, on_host, pairs, slots, n_tokens)
            for _ in range(_N_WARM_UP + _N_TIMED)
        ]
        return min(runs[_N_WARM_UP:]) / 1e9

    def start_filling(self) -> None:
        """Read experts into empty slots until the first batch comes.

        Not where slots are pinned to what is used first, nor where the file is likely in memory.
        """
        table, cache = self._cache.table, self._cache
        reads_slowly = cache.is_on_device or cache.store.is_direct
        if reads_slowly and (table.policy != "static" or table.favourites(0)):
            cache.start_filling()

    def _stop_filling(self) -> None:
        started = time.perf_counter_ns()
        loads = self._cache.stop_filling()
        self.wait_ns += time.perf_counter_ns() - started
        for load in loads:
            self._stats.record_read(load.layer, load.n_read_bytes, load.duration_ns, load.expert)

    def can_run_whole(self, n_tokens: int) -> bool:
        """Whether the host has nothing to decide about a batch: a single token whose router is
        restricted to residents, with every slot filled and enough of them for a token."""
        cache, table = self._cache, self._cache.table
        if n_tokens > 1 or not self._planner.is_restriction or cache.is_reading or cache.n_uploads:
            return False
        if min(table.n_slots) < self._n_expert_used:
            return False  # the router would choose somebody who has no slot
        return not any(table.has_empty(layer) for layer in range(len(table.n_slots)))

    def run_whole(self, graph: BatchGraph, residency: Residency) -> list[RoutingPlan]:
        """Compute all layers at once where `can_run_whole`; returns the plan of each."""
        table = self._cache.table
        residency.update(table.slot_of)
        graph.run_whole(is_restricted=True)
        expert_ids, weights, scores = residency.routed()
        plans = []
        for layer, is_resident in enumerate(table.slot_of >= 0):
            rows = slice(layer, layer + 1)
            routing = Routing(expert_ids[rows], weights[rows], scores[rows], is_resident)
            table.record_use(layer, routing.expert_ids)
            plans.append(self._planner.plan_routing(layer, routing))
        return plans

    def serve(self, graph: BatchGraph, layer: int, expert_ids: np.ndarray) -> RoutingPlan:
        """Decide how the routed layer's pairs are computed, and see that they can be.

        expert_ids (n, n_expert_used) int32. Raises what a failed read raised; then the layer's
        slots are in order and nothing of the batch may be used.
        """
        self._is_one_token = len(expert_ids) == 1
        if self._cache.is_reading:
            self._stop_filling()
        self._settle_uploads(layer)
        table, is_counted = self._cache.table, not self._planner.is_exact
        apart = self._computes_apart(len(expert_ids))
        if table.has_all(layer) and not apart:
            if is_counted:
                table.count_uses(layer, expert_ids)
            self._guess_ahead(graph, layer)
            return self._planner.plan_of_all(expert_ids)
        if is_counted:
            table.record_use(layer, expert_ids)
        counted = plan = self._planner.plan(graph, layer, expert_ids)
        if plan.n_dropped:
            plan = replace(plan, experts=self._with_filler(layer, plan.experts))
        guess = self._end_guess(layer, plan)
        extra = self._favourites_to_place(layer, plan) if graph.shape.n_tokens > 1 else []
        if plan.is_all_hits and not extra and not apart:
            slots = table.slot_of[layer][plan.experts]
            table.hold_only(layer, slots)
            graph.apply(slots, plan.weights)
            self._guess_ahead(graph, layer)
        elif len(plan.experts) == 1 and self._passes.has_device and not (plan.loads or extra):
            self._compute_with_host(layer, plan)
            graph.apply_passes(plan.weights)
        else:
            streaming = Streaming(self._cache, self._passes, layer, plan, guess)
            streaming.run(extra, self.finish, lambda: self._guess_ahead(graph, layer))
            graph.apply_passes(plan.weights)
        if len(expert_ids) == 1 and is_counted:
            self._upload_ahead(layer, plan)
        return counted

    def _compute_with_host(self, layer: int, plan: RoutingPlan) -> None:
        """Compute a token for which nothing is read: the device what is resident, and beside it
        the host what is not.

        What `Streaming` does with it, without the machinery for reads.
        """
        self._cache.table.release(layer)  # nobody takes a slot while this runs
        experts: list[int] = plan.experts[0].tolist()
        host_pairs = [rank for rank, expert in enumerate(experts) if expert in plan.on_host]
        on_host = [experts[rank] for rank in host_pairs]
        pairs = [rank for rank, expert in enumerate(experts) if expert not in plan.on_host]
        if pairs:
            slot_of = self._cache.table.slot_of[layer].tolist()
            slots = [slot_of[experts[rank]] for rank in pairs]
            spent_ns = self._passes.run_beside(layer, pairs, slots, host_pairs, on_host, 1)
        else:
            spent_ns = self._passes.run(layer, True, host_pairs, on_host, 1)
        store = self._cache.store
        store.observe_compute(store.n_bytes(layer) * len(on_host), spent_ns / 1e9, on_host=True)

    def _upload_ahead(self, layer: int, plan: RoutingPlan) -> None:
        """Bring to the device what the host had to compute, if that pays for tokens to come."""
        cache = self._cache
        if not (plan.on_host and cache.is_on_device and cache.n_uploads < _MAX_UPLOADS):
            return
        expert = expert_to_upload(cache.table, cache.store.costs, layer, plan.on_host)
        if expert is not None and cache.can_load(layer):
            cache.start_upload(layer, expert)

    def _settle_uploads(self, layer: int) -> None:
        if not self._cache.n_uploads:
            return
        started = time.perf_counter_ns()
        for load in self._cache.settle_uploads(layer):
            if load.error is None:
                self._count_read(load)
        self.wait_ns += time.perf_counter_ns() - started

    def _with_filler(self, layer: int, experts: np.ndarray) -> np.ndarray:
        """Pairs that nobody computes, of weight 0, go to a resident: ggml leaves none out."""
        return np.where(experts == DROPPED, self._cache.table.residents(layer)[0], experts)

    def _favourites_to_place(self, layer: int, plan: RoutingPlan) -> list[int]:
        """What a prompt reads besides its own experts, for the slots that would stay empty."""
        table = self._cache.table
        n_empty = table.n_empty(layer) - len(plan.loads)
        favourites = table.favourites(layer) if n_empty > 0 else []
        planned = {*plan.loads, *plan.on_host}
        missing = [e for e in favourites if table.slot_of[layer, e] < 0 and e not in planned]
        return missing[: max(0, n_empty)]

    def _guess_ahead(self, graph: BatchGraph, layer: int) -> None:
        """Begin to read what the next layer will probably ask for and does not have."""
        if not (graph.has_prediction(layer) and self._planner.may_read):
            return
        if self._guess is not None:  # left from a batch that failed
            self._cache.stop_guess(self._guess)
            self._guess = None
        slot_of = self._cache.table.slot_of[layer + 1]
        for expert in graph.predicted_experts():
            if slot_of[expert] < 0:
                self._guess = self._cache.start_guess(layer + 1, expert)
                return

    def _end_guess(self, layer: int, plan: RoutingPlan) -> Load | None:
        """Stop reading ahead; returns the guess if this plan wants it."""
        guess, self._guess = self._guess, None
        if guess is None:
            return None
        started = time.perf_counter_ns()
        self._cache.stop_guess(guess)
        self.wait_ns += time.perf_counter_ns() - started
        self._stats.record_read(guess.layer, guess.n_read_bytes, guess.duration_ns)
        is_right = guess.layer == layer and guess.expert in plan.loads and guess.error is None
        if guess.n_read_bytes and not self._planner.is_exact:
            self._stats.record_prefetch(int(is_right), int(not is_right))
        return guess if is_right else None

    def finish(self, load: Load) -> None:
        """Wait for a load and count it. Raises what the read raised."""
        started = time.perf_counter_ns()
        self._cache.finish(load)
        self.wait_ns += time.perf_counter_ns() - started
        self._count_read(load)

    def _count_read(self, load: Load) -> None:
        self._stats.record_read(load.layer, load.n_read_bytes, load.duration_ns, load.expert)
        if not load.n_skipped_bytes:  # the rest of an expert says little about a whole one
            seconds = load.duration_ns / 1e9
            self._cache.store.observe_read(load.n_read_bytes, seconds, forgets=self._is_one_token)
