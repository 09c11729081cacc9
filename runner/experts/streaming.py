"""The order in which a layer's missing experts are read and its pairs computed.

What is resident is computed while the first missing experts are read, and each missing one is
computed when it is there, while the next is read. So a prompt that needs more experts than there
are slots streams them through the slots that it can spare, each read once. The least valuable go
first, so that the most valuable stay. Knows no policy of misses and no statistics.
"""

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from runner.expert_passes import ExpertPasses
from runner.experts.expert_cache import ExpertCache
from runner.experts.prefetcher import Load
from runner.miss_policy import RoutingPlan

_N_SPARED = 2  # slots that experts go through when they must: one is filled, one computed


class Streaming:
    """One layer of one batch whose experts are not all resident."""

    def __init__(
        self,
        cache: ExpertCache,
        passes: ExpertPasses,
        layer: int,
        plan: RoutingPlan,
        guess: Load | None = None,
    ) -> None:
        """guess: a read ahead, now ended, of one of the plan's loads."""
        self._cache = cache
        self._passes = passes
        self._table = cache.table
        self._layer = layer
        self._plan = plan
        self._guess = guess
        self._pairs_of = _pairs_by_expert(plan.experts)
        worth = self._table.worth(layer)
        self._waiting = deque(sorted(plan.loads, key=lambda expert: worth[expert]))
        missing = {*plan.loads, *plan.on_host}
        self._hits = sorted(self._pairs_of.keys() - missing, key=lambda expert: worth[expert])
        self._reading: deque[Load] = deque()

    def run(
        self,
        extra: Sequence[int],
        finish: Callable[[Load], None],
        on_all_asked: Callable[[], None],
    ) -> None:
        """Compute every pair of the plan.

        `extra` experts are read too, when the plan's are; `finish` waits for a load and raises
        when it failed; on_all_asked is called when nothing of this layer waits to be read.
        Whatever is raised, none of these loads is under way afterwards and no slot held.
        """
        table, layer = self._table, self._layer
        self._waiting.extend(extra)
        table.hold_only(layer, table.slot_of[layer][self._hits])
        try:
            self._read_on()
            if not self._waiting:
                on_all_asked()
            self._compute_resident_and_host()
            while self._reading or self._waiting:
                if not self._reading:  # what was spared is pinned now; the hits are computed
                    table.release(layer)
                    self._read_on()
                self._compute_next_loaded(finish)
        finally:
            for load in self._reading:  # only after an error
                self._cache.settle(load)
            table.release(layer)

    def _worth_keeping(self) -> frozenset[int]:
        """The experts that should be resident when the layer is done."""
        worth = self._table.worth(self._layer)
        pinned = set(self._table.pinned(self._layer))
        experts = {*self._table.residents(self._layer).tolist(), *self._plan.loads} - pinned
        ranked = sorted(experts, key=lambda expert: -worth[expert])
        return frozenset(ranked[: self._table.n_unpinned(self._layer)])

    def _read_on(self) -> None:
        """Begin to read as many waiting experts as there are slots for them."""
        while self._waiting and self._cache.can_load(self._layer):
            expert = self._waiting.popleft()
            guess = self._guess if self._guess and self._guess.expert == expert else None
            self._reading.append(self._cache.start_load(self._layer, expert, guess))

    def _compute_hits(self) -> None:
        """Compute what is resident; first what has to make room for waiting experts."""
        makes_room = self._hits_that_make_room() if self._waiting else []
        if makes_room:
            self._compute(makes_room)
            self._let_go(makes_room)
            self._read_on()
        others = [expert for expert in self._hits if expert not in makes_room]
        if others:
            self._compute(others)

    def _compute_resident_and_host(self) -> None:
        """With a device both at once, unless residents have to make room first."""
        on_host = self._plan.on_host
        is_one_token = len(self._plan.experts) == 1
        if is_one_token and on_host and self._hits and self._passes.has_device:
            self._compute_beside(self._hits, on_host)
            return
        self._compute_hits()
        if on_host:
            self._compute(on_host, on_host=True)

    def _hits_that_make_room(self) -> list[int]:
        """The resident experts that leave: those not worth keeping, and never too few."""
        kept = self._worth_keeping()
        can_go = [expert for expert in self._hits if self._can_go(expert)]
        n_loose = sum(expert not in kept for expert in can_go)
        n_spared = max(0, _N_SPARED - len(self._reading))
        return can_go[: max(n_loose, n_spared)]  # the least worth come first

    def _compute_next_loaded(self, finish: Callable[[Load], None]) -> None:
        load = self._reading[0]  # it stays there until it is finished, whatever interrupts
        finish(load)
        self._reading.popleft()
        self._table.hold(self._layer, np.array([load.slot]))
        if load.expert in self._pairs_of:
            self._compute([load.expert])
        self._let_go([load.expert])
        self._read_on()

    def _let_go(self, experts: Sequence[int]) -> None:
        self._table.release(self._layer, self._table.slot_of[self._layer][list(experts)])

    def _can_go(self, expert: int) -> bool:
        return not self._table.is_pinned(self._layer, self._table.slot_of[self._layer, expert])

    def _compute(self, experts: Sequence[int], on_host: bool = False) -> None:
        """Compute all pairs of these experts, in the order of the batch; by a device's slots one
        expert after the other, unless all pairs are of one token: see `ExpertRunner`."""
        is_apart = self._passes.has_device and not on_host
        if is_apart and len(experts) > 1 and len(self._plan.experts) > 1:
            for expert in experts:
                self._compute([expert])
            return
        pairs, of_pair = self._pairs(experts)
        slots = of_pair if on_host else self._table.slot_of[self._layer][of_pair]
        n_tokens = len(self._plan.experts)
        spent_ns = self._passes.run(self._layer, on_host, pairs, slots, n_tokens)
        self._observe(experts, spent_ns, on_host)

    def _compute_beside(self, hits: Sequence[int], on_host: Sequence[int]) -> None:
        """Compute the hits' pairs on the device while the host computes the others'."""
        pairs, of_pair = self._pairs(hits)
        slots = self._table.slot_of[self._layer][of_pair]
        n_tokens = len(self._plan.experts)
        host_ns = self._passes.run_beside(
            self._layer, pairs, slots, *self._pairs(on_host), n_tokens
        )
        self._observe(on_host, host_ns, on_host=True)

    def _pairs(self, experts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of these experts in the order of the batch, and the expert of each."""
        pairs = self._pairs_of[experts[0]]
        if len(experts) > 1:
            pairs = np.sort(np.concatenate([self._pairs_of[expert] for expert in experts]))
        return pairs, self._plan.experts.ravel()[pairs]

    def _observe(self, experts: Sequence[int], spent_ns: int, on_host: bool) -> None:
        """Keep the cost of one token's pairs current."""
        if len(self._plan.experts) == 1:
            n_bytes = self._cache.store.n_bytes(self._layer) * len(experts)
            self._cache.store.observe_compute(n_bytes, spent_ns / 1e9, on_host)


def _pairs_by_expert(experts: np.ndarray) -> dict[int, np.ndarray]:
    """The pairs of each expert, counted token by token: expert -> (n,) int64."""
    flat = experts.ravel()
    order = np.argsort(flat, kind="stable")
    counts = np.bincount(flat)
    ends = np.cumsum(counts)
    return {
        expert: order[ends[expert] - counts[expert] : ends[expert]]
        for expert in np.flatnonzero(counts).tolist()
    }
