"""Random programs for ExpertRunner: batches with any routing, of which some reads or passes fail.

Graphs and passes are stood in for by a witness, who looks at the moment of computing whether the
slot has the bytes of the expert that was chosen.
"""

from collections import Counter, deque
from collections.abc import Sequence
from math import inf
from random import Random
from types import SimpleNamespace

import numpy as np

from runner.config import CACHE_POLICIES, MISS_ACTIONS
from runner.errors import BackendError, GGUFError
from runner.experts.expert_cache import ExpertCache
from runner.experts.expert_runner import ExpertRunner
from runner.experts.miss_planner import MissPlanner
from runner.experts.slot_table import SlotTable
from runner.miss_policy import RoutingPlan
from runner.stats_recorder import StatsRecorder
from tests.runner.experts.cache_programs import (
    SPOILED,
    WAYS_TO_SPOIL,
    CommandedStore,
    OpenModel,
    TimedCache,
    check_contents,
)
from tests.runner.experts.slot_model import check_homes


class Witness:
    """Stands in for graphs and passes: looks whose bytes the slots have when they compute."""

    def __init__(self, model: OpenModel, cache: ExpertCache, rng: Random) -> None:
        self._model, self._cache, self._rng = model, cache, rng
        self.hosts = [rng.random() < 0.7 for _ in range(model.config.n_layer)]
        self._applied: np.ndarray | None = None  # slots, for the next graph
        self.passes_before_failure = inf

    def begin(self, layer: int, expert_ids: np.ndarray) -> None:
        """Run the next graph, which ends with this routing."""
        if self._applied is not None:
            self._look(self._applied.ravel(), self._chosen)
        self._applied = None
        self._layer, self._shape, self._chosen = layer, expert_ids.shape, expert_ids.ravel()
        self.shape = SimpleNamespace(n_tokens=len(expert_ids))
        self.n_computed = np.zeros(expert_ids.size, int)  # how often each pair was
        self.passes: list[set[int]] = []  # the experts of each

    # a graph

    def has_prediction(self, layer: int) -> bool:
        return self.shape.n_tokens == 1 and layer + 1 < self._model.config.n_layer

    def predicted_experts(self) -> list[int]:
        return self._rng.sample(range(self._model.config.n_expert), self._shape[1])

    def apply(self, slot_ids: np.ndarray, weights: np.ndarray | None = None) -> None:
        assert slot_ids.shape == self._shape and weights is None
        self._applied = slot_ids.copy()
        self.n_computed += 1

    def apply_passes(self, weights: np.ndarray | None = None) -> None:
        assert self.passes and weights is None

    def end(self) -> None:
        """The layer is served. A graph that was told nothing reads slots numbered like experts."""
        if self._applied is None and not self.passes:
            self.apply(self._chosen.reshape(self._shape))

    # the passes

    def has_host(self, layer: int) -> bool:
        return self.hosts[layer]

    has_device = False

    def run(
        self, layer: int, on_host: bool, pairs: np.ndarray, slots: np.ndarray, n_tokens: int
    ) -> int:
        if len(self.passes) >= self.passes_before_failure:
            raise BackendError(f"this pass was {SPOILED}")
        experts = self._chosen[pairs]
        assert layer == self._layer, "computed in another layer"
        assert (np.diff(pairs) > 0).all(), "the pairs are not in the batch's order"
        self.passes.append(set(experts.tolist()))
        self.n_computed[pairs] += 1
        if on_host:
            assert self.hosts[layer] and slots.tolist() == experts.tolist()
        else:
            self._look(slots, experts)
        return 1000

    def _look(self, slots: np.ndarray, experts: np.ndarray) -> None:
        layer = self._layer
        for slot, expert in set(zip(slots.tolist(), experts.tolist(), strict=True)):
            n_slots = self._cache.table.n_slots[layer]
            assert 0 <= slot < n_slots, "computed by a slot that is not there"
            seen = self._model.bytes_in_slot(self._cache, layer, slot)
            assert seen == self._model.experts[layer][expert], "computed with other bytes"


class RunnerProgram:
    """Batches with random routings, some with a read or a pass that fails."""

    operations = (*("batch",) * 5, *("token",) * 10, "pin", *("unpin",) * 2, "expect")

    def __init__(
        self,
        models: Sequence[OpenModel],
        rng: Random,
        cache_type: type[TimedCache] = TimedCache,
        table_type: type[SlotTable] = SlotTable,
        runner_type: type[ExpertRunner] = ExpertRunner,
    ) -> None:
        self.rng, self.model = rng, rng.choice(models)
        config = self.model.config
        self.n_expert, self.n_layer = config.n_expert, config.n_layer
        self.k = rng.randint(1, min(4, config.n_expert))
        lowest = rng.choice((1, self.k, config.n_expert))
        n_slots = tuple(rng.randint(lowest, config.n_expert) for _ in range(config.n_layer))
        policy = rng.choice(CACHE_POLICIES)
        self.store = CommandedStore(self.model.file, config, has_room=rng.random() < 0.2)
        self.cache = cache_type(
            self.model.backend, self.model.file, config, self.store, n_slots, policy
        )
        self.cache.table = self.table = table_type(n_slots, config.n_expert, policy)
        self.cache.is_late = rng.random() < 0.5
        self.store.allow(0 if self.cache.is_late else inf)
        self.witness = Witness(self.model, self.cache, rng)
        self.stats = StatsRecorder(config.n_layer, n_slots, n_expert=config.n_expert)
        self.miss_action = rng.choice(MISS_ACTIONS)
        planner = MissPlanner(self.cache, self.witness, self.miss_action)
        sizes = (config.n_expert_used, 64)
        self.runner = runner_type(self.cache, self.witness, self.stats, planner, *sizes)
        self.n_done: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=40)
        self._layer = 0  # of the latest batch

    def close(self) -> None:
        counted = self.stats.snapshot(0, 0)
        self.n_done["guess used"] = counted.prefetch_used
        self.n_done["guess wasted"] = counted.prefetch_wasted
        self.store.allow(inf)
        self.cache.close()

    def step(self) -> None:
        follows = self.rng.random() < 0.7
        layer = (self._layer + 1) % self.n_layer if follows else self.rng.randrange(self.n_layer)
        self._layer, name = layer, self.rng.choice(self.operations)
        self.log.append(f"{name} in layer {layer}")
        self.n_done[name] += 1
        pinned = [set(self.table.pinned(i)) for i in range(self.n_layer)]
        getattr(self, name)(layer)
        self.check()
        if name != "unpin":
            now = [set(self.table.pinned(i)) for i in range(self.n_layer)]
            assert all(a <= b for a, b in zip(pinned, now, strict=True)), "a pin was lost"

    # operations

    def token(self, layer: int) -> None:
        self._serve(layer, 1)

    def batch(self, layer: int) -> None:
        self._serve(layer, self.rng.randint(2, 40))

    def pin(self, layer: int) -> None:
        residents = self.table.residents(layer).tolist()
        if residents and self.table.n_unpinned(layer) > 1:
            self.table.pin(layer, [self.rng.choice(residents)])

    def unpin(self, layer: int) -> None:
        self.table.unpin(layer, self.table.pinned(layer))

    def expect(self, layer: int) -> None:
        counts = np.array([self.rng.choices(range(9), k=self.n_expert)] * self.n_layer)
        self.table.expect(counts.astype(np.float64))

    def _serve(self, layer: int, n_tokens: int) -> None:
        liked = self.rng.sample(range(self.n_expert), self.rng.randint(self.k, self.n_expert))
        tokens = [self.rng.sample(liked, self.k) for _ in range(n_tokens)]
        expert_ids = np.array(tokens, np.int32)
        self._spoil()
        self.witness.begin(layer, expert_ids)
        here = set(self.table.residents(layer).tolist())
        n_reads, n_evicted = len(self.store.reads), self.table.n_evicted[layer]
        try:
            plan = self.runner.serve(self.witness, layer, expert_ids)
        except (GGUFError, BackendError) as error:
            self.n_done["error"] += 1
            assert SPOILED in str(error)
            assert self.table.can_take(layer), "a slot is still held"
        else:
            assert len(self.store.reads) <= min(self.store.spoiled, default=inf), "a lost error"
            self._check_plan(layer, plan, expert_ids, here)
            self._check_reads(layer, plan, n_reads, n_evicted)
        experts = [expert for _, expert in self.store.reads[n_reads:]]
        assert len(set(experts)) == len(experts), "an expert was read twice"
        assert not here & set(experts), "a resident expert was read"

    def _spoil(self) -> None:
        """Choose whether a read, a pass or nothing fails."""
        self.store.spoiled.clear()
        self.witness.passes_before_failure = inf
        if self.rng.random() < 0.2:
            number = len(self.store.reads) + self.rng.randrange(4)
            self.store.spoiled[number] = self.rng.choice(WAYS_TO_SPOIL)
        elif self.rng.random() < 0.1:
            self.witness.passes_before_failure = self.rng.randrange(3)

    def _check_plan(
        self, layer: int, plan: RoutingPlan, expert_ids: np.ndarray, here: set[int]
    ) -> None:
        chosen, loads, host = expert_ids.ravel().tolist(), set(plan.loads), set(plan.on_host)
        assert plan.experts.tolist() == expert_ids.tolist()
        assert loads | host == set(chosen) - here and not loads & host, "not what is missing"
        counts = [sum(expert in group for expert in chosen) for group in (here, loads, host)]
        assert [plan.n_hit, plan.n_loaded, plan.n_on_host] == counts
        assert plan.n_substituted == plan.n_dropped == 0
        if self.miss_action != "auto":
            is_host = self.miss_action == "host" and self.witness.has_host(layer)
            assert not (loads if is_host else host)
        self.witness.end()
        self.n_done["hit"] += plan.n_hit
        self.n_done["loaded"] += plan.n_loaded
        self.n_done["on host"] += plan.n_on_host
        assert (self.witness.n_computed == 1).all(), "a pair was not computed once"
        passes = self.witness.passes
        assert sum(map(len, passes)) == len(set[int]().union(*passes)), "an expert in two passes"

    def _check_reads(self, layer: int, plan: RoutingPlan, n_reads: int, n_evicted: int) -> None:
        reads = self.store.reads[n_reads:]
        experts = {expert for _, expert in reads}
        assert all(read_layer == layer for read_layer, _ in reads), "read in another layer"
        assert set(plan.loads) <= experts, "a missing expert was not read"
        if extra := experts - set(plan.loads):
            self.n_done["extra"] += len(extra)
            assert extra <= set(self.table.favourites(layer))
            assert self.table.n_evicted[layer] == n_evicted, "an expert left for one not needed"
        if self.witness.passes:
            assert self.table.can_take(layer), "a slot is still held"

    # what is true after every batch

    def check(self) -> None:
        for layer in range(self.n_layer):
            residents = check_homes(self.table, layer)
            assert self.table.has_all(layer) == (len(residents) == self.n_expert)
            filling = [self.table.is_filling(layer, expert) for expert in range(self.n_expert)]
            assert not any(filling), "a slot is left filling"
        check_contents(self.model, self.cache)
