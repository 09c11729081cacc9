"""What happens to each (token, selected expert) pair: pure functions, no state, no ggml.

A policy sees one layer's routing and which experts are resident, and returns a `RoutingPlan`.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Which expert computes each pair and how it is served; the counts add up to all pairs."""

    experts: np.ndarray  # (n_tokens, n_expert_used) int32
    loads: tuple[int, ...]  # experts to read into slots
    on_host: tuple[int, ...]  # experts to compute where they are mapped
    n_hit: int  # pairs computed by the expert that the router chose, resident
    n_loaded: int  # pairs whose expert is read first
    n_on_host: int  # pairs computed on the host
    n_substituted: int = 0  # pairs computed by another expert than the router chose
    n_dropped: int = 0  # pairs that nobody computes

    @property
    def is_all_hits(self) -> bool:
        return not self.loads and not self.on_host


def all_resident(expert_ids: np.ndarray) -> RoutingPlan:
    """The plan of a layer that has every expert; expert_ids (n_tokens, n_expert_used) int32."""
    return RoutingPlan(expert_ids.copy(), (), (), expert_ids.size, 0, 0)


def exact_plan(
    expert_ids: np.ndarray, slot_of: np.ndarray, on_host: frozenset[int] = frozenset()
) -> RoutingPlan:
    """Every pair is computed by the expert that the router chose, with the router's weight.

    expert_ids (n_tokens, n_expert_used) int32. slot_of (n_expert,) int32 is the slot of each
    resident expert of the layer, below 0 for a missing one. Missing experts in `on_host` are
    computed there, the others loaded.
    """
    counts = np.bincount(expert_ids.ravel(), minlength=len(slot_of))
    missing = np.flatnonzero((slot_of < 0) & (counts > 0)).tolist()
    if not missing:
        return all_resident(expert_ids)
    loads = tuple(expert for expert in missing if expert not in on_host)
    host = tuple(expert for expert in missing if expert in on_host)
    n_loaded, n_on_host = int(counts[list(loads)].sum()), int(counts[list(host)].sum())
    n_hit = expert_ids.size - n_loaded - n_on_host
    return RoutingPlan(expert_ids.copy(), loads, host, n_hit, n_loaded, n_on_host)
