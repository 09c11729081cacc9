"""What a miss policy is given and what it answers: values only, they know no policy."""

from dataclasses import dataclass

import numpy as np

DROPPED = -1  # in the place of an expert: nobody computes the pair


@dataclass(frozen=True, slots=True)
class Routing:
    """One layer's routing of a batch as the router left it, and what is resident.

    expert_ids (n_tokens, n_expert_used) int32, the best first: rank 1 is the first column.
    weights (n_tokens, n_expert_used) float32. scores (n_tokens, n_expert) float32: the router's
    logits, finite. is_resident (n_expert,) bool.
    """

    expert_ids: np.ndarray
    weights: np.ndarray
    scores: np.ndarray
    is_resident: np.ndarray


@dataclass(frozen=True, slots=True)
class Choice:
    """Who computes each pair, and with what weight.

    experts (n_tokens, n_expert_used) int32, DROPPED where nobody does; weights the same shape,
    float32. A chosen expert that is kept keeps its place, and a stand-in has the place of the
    expert it stands in for. The arrays may be the routing's own: not to be written to.
    """

    experts: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class Gate:
    """Which missing pairs may be given away, by the router's weight of them and their rank.

    max_weight: a pair of more weight is not given away. min_rank: pairs of ranks below are not
    (2 protects the router's first choice). allowance (n_tokens,) float64: the weight given away
    by tokens 0 to t together is at most allowance[t]; nothing is given away, not even weight 0,
    where nothing is left; None is no bound.
    """

    max_weight: float = 1.0
    min_rank: int = 1
    allowance: np.ndarray | None = None
