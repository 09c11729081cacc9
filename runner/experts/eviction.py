"""How much a resident expert is worth: the one seam of all eviction policies. Owns no state.

The expert worth least leaves first. What is pinned never leaves; `SlotTable` sees to that.
"""

import numpy as np

LFU_HALF_LIFE = 64  # tokens of a layer after which a use counts half


def worth(policy: str, last_used: np.ndarray, frequency: np.ndarray) -> np.ndarray:
    """The worth of every expert of one layer, (n_expert,); only the order matters.

    last_used (n_expert,) int64 is the token that asked last; frequency (n_expert,) float64 the
    aged count of uses. `lru` ranks by the former, `lfu` by the latter; `static` pins what came
    first and ranks the slot that is left by the former.
    """
    return frequency if policy == "lfu" else last_used


def n_pinned_at_most(policy: str, n_slots: int) -> int:
    """How many experts of a layer `policy` pins: one slot must stay free to be filled."""
    return n_slots - 1 if policy == "static" else 0


def frequency_of(uses: np.ndarray, n_expert_used: int) -> np.ndarray:
    """The aged counts that a long run with these uses ends with; uses (n_layer, n_expert).

    Weights that halve every LFU_HALF_LIFE tokens add up to LFU_HALF_LIFE / ln 2 tokens.
    """
    total = np.maximum(uses.sum(axis=1, keepdims=True), 1)
    frequency: np.ndarray = uses / total * (n_expert_used * LFU_HALF_LIFE / np.log(2))
    return frequency
