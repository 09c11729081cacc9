"""Decides how each pair of a layer is served: by its expert, or by a buddy if there are any.

Knows the residents, the budget and the costs; reads and computes nothing.
"""

from dataclasses import replace

import numpy as np

from runner import miss_policy
from runner.batch_graph import BatchGraph
from runner.expert_passes import ExpertPasses
from runner.experts.expert_cache import ExpertCache
from runner.miss_policy import Choice, Routing, RoutingPlan, ServedWeight
from runner.standins.buddy_policy import BuddyPolicy

_NONE: frozenset[int] = frozenset()


class MissPlanner:
    """Makes the plan of one layer after the other; `begin` and `end` frame a batch."""

    def __init__(
        self,
        cache: ExpertCache,
        passes: ExpertPasses,
        miss_action: str,
        buddies: BuddyPolicy | None = None,
        counts_weight: bool = False,
    ) -> None:
        """miss_action: what happens to a missing expert: "load", "host" or "auto", the cheaper;
        buddies: who may stand in for it before; counts_weight: the router's, also without them."""
        self._table = cache.table
        self._store = cache.store
        self._passes = passes
        self._miss_action = miss_action
        self._counts_weight = counts_weight
        self.is_exact = False  # the batch: nobody stands in
        self.set_buddies(buddies)

    def set_buddies(self, buddies: BuddyPolicy | None) -> None:
        """Who may stand in from the next batch on."""
        self._buddies = buddies
        self.counts_weight = self._counts_weight or buddies is not None

    @property
    def may_read(self) -> bool:
        """Whether a missing expert may have to be read, with every slot filled."""
        return self._buddies is None or self.is_exact or not self._buddies.takes_every_miss

    @property
    def is_restriction(self) -> bool:
        """Whether the batch's router is restricted to residents, whatever it asks for."""
        return self._buddies is not None and not self.is_exact and self._buddies.is_restriction

    def begin(self, n_tokens: int, is_exact: bool = False) -> None:
        """A batch comes. is_exact: nobody stands in, and the budget does not notice."""
        self.is_exact = is_exact
        if self._buddies is not None and not is_exact:
            self._buddies.begin(n_tokens)

    def end(self) -> None:
        """The batch is finished."""
        if self._buddies is not None and not self.is_exact:
            self._buddies.end()

    def plan(self, graph: BatchGraph, layer: int, expert_ids: np.ndarray) -> RoutingPlan:
        """expert_ids (n, n_expert_used) int32, what the graph's router just chose."""
        slot_of = self._table.slot_of[layer]
        if not self.counts_weight:
            missing = miss_policy.missing_experts(expert_ids, slot_of)
            on_host = self._to_compute_on_host(layer, expert_ids, missing)
            return miss_policy.served(expert_ids, missing, on_host)
        is_resident = slot_of >= 0
        if is_resident[expert_ids].all():
            return self.plan_of_all(expert_ids)
        weights, scores = graph.router_weights(), graph.router_scores()
        return self.plan_routing(layer, Routing(expert_ids, weights, scores, is_resident))

    def plan_routing(self, layer: int, routing: Routing) -> RoutingPlan:
        """The plan of a layer whose routing is known as a whole."""
        choice = self._choose(layer, routing)
        plan = miss_policy.plan(choice, routing)
        on_host = self._to_compute_on_host(layer, plan.experts, plan.loads)
        return miss_policy.plan(choice, routing, on_host) if on_host else plan

    def plan_of_all(self, expert_ids: np.ndarray) -> RoutingPlan:
        """The plan of a layer whose experts are all resident for good."""
        plan = miss_policy.all_resident(expert_ids)
        if not self.counts_weight:
            return plan
        return replace(plan, weight=ServedWeight(float(len(expert_ids)), 0.0, 0.0, 0.0, 0.0))

    def _choose(self, layer: int, routing: Routing) -> Choice:
        """An empty slot is for what is missing, so nobody stands in before all are filled."""
        if self._buddies is None or self.is_exact or self._table.has_empty(layer):
            return miss_policy.exact(routing)
        choice = self._buddies.choose(layer, routing)
        if len(routing.expert_ids) > 1:
            choice = self._choose_again(layer, routing, choice)
        self._buddies.spend(routing, choice)
        return choice

    def _choose_again(self, layer: int, routing: Routing, choice: Choice) -> Choice:
        """An expert that is read for one token is there for the whole batch."""
        assert self._buddies is not None
        is_there = routing.is_resident.copy()
        is_there[choice.experts[choice.experts >= 0]] = True
        if is_there.sum() == routing.is_resident.sum():
            return choice
        return self._buddies.choose(layer, replace(routing, is_resident=is_there))

    def _to_compute_on_host(
        self, layer: int, experts: np.ndarray, missing: tuple[int, ...]
    ) -> frozenset[int]:
        """Which missing experts are rather computed where they are mapped than loaded.

        experts (n_tokens, n_expert_used) int32, who computes each pair.
        """
        if not missing or self._miss_action == "load" or not self._passes.has_host(layer):
            return _NONE
        if self._miss_action == "host":
            return frozenset(missing)
        if self._table.has_empty(layer):  # empty slots are for loads
            missing = missing[self._table.n_empty(layer) :]
        n_pairs = [1] * len(missing)  # of one token
        if len(experts) > 1:
            n_pairs = [int((experts == expert).sum()) for expert in missing]
        return frozenset(
            expert
            for expert, n in zip(missing, n_pairs, strict=True)
            if self._store.is_cheaper_on_host(layer, expert, n)
        )
