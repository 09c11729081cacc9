"""What happens to each (token, selected expert) pair: pure functions, no state, no ggml.

A policy sees one layer's routing and which experts are resident, and returns a `RoutingPlan`.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Which slot computes each pair, and how the pairs were served."""

    slot_ids: np.ndarray  # (n_tokens, n_expert_used) int32
    n_hit: int  # pairs computed by the expert that the router chose, resident


def exact(expert_ids: np.ndarray, slot_of: np.ndarray | None) -> RoutingPlan:
    """Every pair is computed by the expert that the router chose, with the router's weight.

    expert_ids (n_tokens, n_expert_used) int32. slot_of (n_expert,) int32 is this layer's slot of
    each expert, all of them resident; None when every expert has the slot of its own number.
    """
    slot_ids = expert_ids if slot_of is None else slot_of[expert_ids]
    return RoutingPlan(slot_ids, expert_ids.size)
