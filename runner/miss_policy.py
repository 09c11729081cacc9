"""What happens to each (token, selected expert) pair: pure functions, no state, no ggml.

A policy sees one layer's routing and which experts are resident, and returns who computes each
pair (`Choice`); `plan` says how that is served (`RoutingPlan`). The policies are in
`runner/standins/`; this is where the rest of the program gets them from.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from runner.standins.blend import LayerBlend, blend
from runner.standins.buddymoe import BuddyLists, BuddyMoEParameters, buddymoe
from runner.standins.routing import DROPPED, Choice, Gate, Routing
from runner.standins.selection import prior, prior_then, resident
from runner.standins.substitution import drop, exact, random, router, similar

__all__ = [
    "DROPPED",
    "BuddyLists",
    "BuddyMoEParameters",
    "Choice",
    "Gate",
    "LayerBlend",
    "Routing",
    "RoutingPlan",
    "ServedWeight",
    "all_resident",
    "blend",
    "buddymoe",
    "drop",
    "exact",
    "exact_plan",
    "missing_experts",
    "plan",
    "prior",
    "prior_then",
    "random",
    "resident",
    "router",
    "served",
    "similar",
]

_N_WAYS = 5  # hit, loaded, on_host, substituted, dropped


@dataclass(frozen=True, slots=True)
class ServedWeight:
    """The router's weight of a batch's pairs, by how they are served; adds up to all of it."""

    hit: float
    loaded: float
    on_host: float
    substituted: float
    dropped: float


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Which expert computes each pair and how it is served; the counts add up to all pairs."""

    experts: np.ndarray  # (n_tokens, n_expert_used) int32, DROPPED where nobody does
    loads: tuple[int, ...]  # experts to read into slots
    on_host: tuple[int, ...]  # experts to compute where they are mapped
    n_hit: int  # pairs computed by the expert that the router chose, resident
    n_loaded: int  # pairs whose expert is read first
    n_on_host: int  # pairs computed on the host
    n_substituted: int = 0  # pairs computed by another expert than the router chose
    n_dropped: int = 0  # pairs that nobody computes
    weights: np.ndarray | None = None  # like experts, float32; None: the router's own
    weight: ServedWeight | None = None  # None where nobody counts it
    chosen: np.ndarray | None = None  # like experts, by the router; None where all pairs are hits

    @property
    def is_all_hits(self) -> bool:
        return not self.loads and not self.on_host


def all_resident(expert_ids: np.ndarray) -> RoutingPlan:
    """The plan of a layer that has every expert; expert_ids (n_tokens, n_expert_used) int32."""
    return RoutingPlan(expert_ids.copy(), (), (), expert_ids.size, 0, 0)


def missing_experts(expert_ids: np.ndarray, slot_of: np.ndarray) -> tuple[int, ...]:
    """The experts of a batch that are not resident, in ascending order.

    expert_ids (n_tokens, n_expert_used) int32. slot_of (n_expert,) int32 is the slot of each
    resident expert of the layer, below 0 for a missing one.
    """
    slots: list[int] = slot_of.tolist()
    chosen: list[int] = expert_ids[0].tolist()
    if len(expert_ids) > 1:
        chosen = np.flatnonzero(np.bincount(expert_ids.ravel())).tolist()
    return tuple(sorted(expert for expert in chosen if slots[expert] < 0))


def exact_plan(
    expert_ids: np.ndarray, slot_of: np.ndarray, on_host: frozenset[int] = frozenset()
) -> RoutingPlan:
    """Every pair is computed by the expert that the router chose, with the router's weight.

    Shapes as in `missing_experts`. Those in `on_host` are computed there, the others loaded.
    """
    return served(expert_ids, missing_experts(expert_ids, slot_of), on_host)


def served(
    expert_ids: np.ndarray, missing: tuple[int, ...], on_host: frozenset[int]
) -> RoutingPlan:
    """The same where the batch's `missing_experts` are known."""
    if not missing:
        return all_resident(expert_ids)
    loads = tuple(expert for expert in missing if expert not in on_host)
    host = tuple(expert for expert in missing if expert in on_host)
    n_loaded, n_on_host = len(loads), len(host)  # of one token: a pair each
    if len(expert_ids) > 1:
        counts = np.bincount(expert_ids.ravel())
        n_loaded, n_on_host = int(counts[list(loads)].sum()), int(counts[list(host)].sum())
    n_hit = expert_ids.size - n_loaded - n_on_host
    experts = expert_ids.copy()
    return RoutingPlan(experts, loads, host, n_hit, n_loaded, n_on_host, chosen=experts)


def plan(choice: Choice, routing: Routing, on_host: frozenset[int] = frozenset()) -> RoutingPlan:
    """How a choice is served: missing experts in `on_host` are computed there, others loaded.

    Both of one layer and batch. A pair of another expert than the router chose counts as
    substituted wherever it is computed, and its weight is the router's.
    """
    experts = choice.experts.ravel().tolist()
    router_weights = routing.weights.ravel().tolist()
    counts, weight = [0] * _N_WAYS, [0.0] * _N_WAYS
    for way, router_weight in zip(_ways(experts, routing, on_host), router_weights, strict=True):
        counts[way] += 1
        weight[way] += router_weight
    is_resident = routing.is_resident.tolist()
    missing = {expert for expert in experts if expert != DROPPED and not is_resident[expert]}
    n_hit, n_loaded, n_on_host, n_substituted, n_dropped = counts
    chosen = routing.expert_ids.copy()  # slots are written over the router's
    experts_of = choice.experts if choice.experts is not routing.expert_ids else chosen
    weights = None if choice.weights is routing.weights else choice.weights
    return RoutingPlan(
        experts_of,
        tuple(sorted(missing - on_host)),
        tuple(sorted(missing & on_host)),
        n_hit,
        n_loaded,
        n_on_host,
        n_substituted,
        n_dropped,
        None if weights is None or weights.ravel().tolist() == router_weights else weights,
        ServedWeight(*weight),
        chosen if n_hit < len(experts) else None,
    )


def _ways(experts: list[int], routing: Routing, on_host: frozenset[int]) -> Iterator[int]:
    """How each pair is served: the place of its way in `ServedWeight`."""
    is_resident = routing.is_resident.tolist()
    for expert, chosen in zip(experts, routing.expert_ids.ravel().tolist(), strict=True):
        if expert != chosen:
            yield 4 if expert == DROPPED else 3
        elif is_resident[expert]:
            yield 0
        else:
            yield 2 if expert in on_host else 1
