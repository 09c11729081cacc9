"""What policies would cost with a model, computed from what its profile recorded. Runs no model.

The routing of the calibration text is served once more, token by token, by a cache with few slots;
what a policy changes in each layer's output follows from the products of the experts' outputs.
Errors do not add up over layers here, so only policies can be compared with each other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from runner.buddies import BuddyTable, PolicyEstimate
from runner.config import DEFAULT_BUDDY_BUDGET
from runner.experts.slot_table import SlotTable
from runner.miss_policy import Choice, Routing, exact, plan
from runner.standins.buddy_policy import BuddyPolicy
from runner.standins.make_policy import PolicySettings, make_policy

POLICIES = ("blend", "router", "similar", "prior", "prior-router", "buddymoe")
BUDGETS = (0.02, 0.05, DEFAULT_BUDDY_BUDGET, 0.2, 1.0)
N_TOKENS = 768  # at most, of the beginning
_N_SETTLING = 128  # tokens until slots and openings are as they will be
_EVICTION = "lfu"


@dataclass(frozen=True)
class LayerRouting:
    """What one layer did with the counted tokens in their order, and the products of some."""

    expert_ids: np.ndarray  # (n, n_expert_used) int32, best first
    weights: np.ndarray  # (n, n_expert_used) float32
    scores: np.ndarray  # (n, n_expert) float32, the router's logits
    sampled: np.ndarray  # (n_sampled,) the tokens whose experts were compared, rising
    gram: np.ndarray  # (n_sampled, n_expert, n_expert) float32


def estimate(
    layers: Sequence[LayerRouting], table: BuddyTable, on_done: Callable[[int, int], None]
) -> tuple[PolicyEstimate, ...]:
    """All policies with a quarter, half and three quarters of the experts in slots.

    on_done(done, total) before each; it may raise to end this.
    """
    n_expert, n_used = table.n_expert, layers[0].expert_ids.shape[1]
    slots = sorted({max(n_used, round(n_expert * part)) for part in (0.25, 0.5, 0.75)})
    jobs = list(product([n for n in slots if n < n_expert], POLICIES, BUDGETS))
    found = []
    for number, (n_slots, name, budget) in enumerate(jobs):
        on_done(number, len(jobs))
        policy = make_policy(PolicySettings(name, budget), len(layers), table)
        found.append(_Simulation(layers, table, n_slots, policy).run())
    return tuple(found)


class _Simulation:
    """One policy with one cache over all tokens."""

    def __init__(
        self, layers: Sequence[LayerRouting], table: BuddyTable, n_slots: int, policy: BuddyPolicy
    ) -> None:
        self._layers = layers
        self._power = table.power.tolist()
        self._n_slots = n_slots
        self._policy = policy
        self._slots = SlotTable((n_slots,) * len(layers), table.n_expert, _EVICTION)
        self._harm = 0.0
        self._n_judged = self._n_missed = self._n_pairs = 0

    def run(self) -> PolicyEstimate:
        n_tokens = min(N_TOKENS, len(self._layers[0].expert_ids))
        settled = min(_N_SETTLING, n_tokens // 2)
        places = {token: place for place, token in enumerate(self._layers[0].sampled.tolist())}
        openings = []
        for token in range(n_tokens):
            place = places.get(token) if token >= settled else None
            self._serve(token, place, is_settled=token >= settled)
            if token >= settled:
                openings.append(self._policy.opening.value)
        return PolicyEstimate(
            policy=self._policy.name,
            n_slots=self._n_slots,
            budget=self._policy.budget.share,
            harm=self._harm / max(1, self._n_judged),
            miss_share=self._n_missed / max(1, self._n_pairs),
            opening=float(np.median(openings)),
        )

    def _serve(self, token: int, place: int | None, is_settled: bool) -> None:
        self._policy.begin(1)
        rows = slice(token, token + 1)
        for layer, record in enumerate(self._layers):
            expert_ids, is_resident = record.expert_ids[rows], self._slots.slot_of[layer] >= 0
            self._slots.record_use(layer, expert_ids)
            self._n_pairs += expert_ids.size * is_settled
            if is_resident[expert_ids].all():
                continue
            routing = Routing(expert_ids, record.weights[rows], record.scores[rows], is_resident)
            choice = self._choose(layer, routing)
            loads = plan(choice, routing).loads
            self._load(layer, choice, loads)
            self._n_missed += len(loads) * is_settled
            if place is not None and choice.experts is not expert_ids:
                changed = _change(routing, choice)
                self._harm += float(changed @ record.gram[place] @ changed) / self._power[layer]
        self._policy.end()
        self._n_judged += place is not None

    def _choose(self, layer: int, routing: Routing) -> Choice:
        if self._slots.has_empty(layer):
            return exact(routing)
        choice = self._policy.choose(layer, routing)
        self._policy.spend(routing, choice)
        return choice

    def _load(self, layer: int, choice: Choice, loads: Sequence[int]) -> None:
        """Bring missing experts into slots; what the token uses stays."""
        if not loads:
            return
        slots = self._slots
        used = slots.slot_of[layer, choice.experts[choice.experts >= 0]]
        slots.hold_only(layer, used[used >= 0])
        for expert in loads:
            if not slots.can_take(layer):
                slots.release(layer)
            slots.commit(layer, slots.take(layer, expert))
        slots.release(layer)


def _change(routing: Routing, choice: Choice) -> np.ndarray:
    """How much less of each expert's output there is: (n_expert,) float64."""
    change = np.zeros(routing.scores.shape[1])
    change[routing.expert_ids[0]] += routing.weights[0]
    there = choice.experts[0] >= 0
    change[choice.experts[0][there]] -= choice.weights[0][there]
    return change
