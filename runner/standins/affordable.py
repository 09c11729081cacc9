"""Which missing pairs are given away: what the gate asks for, and what the allowance affords.

Knows no policy: who stands in is asked of a function. One token, the usual case, has functions
of its own on lists: numpy's calls cost more than its work there.
"""

from bisect import bisect_right
from collections.abc import Callable

import numpy as np

from runner.standins.routing import Gate, Routing

Serve = Callable[[np.ndarray], np.ndarray]
"""asked (n_tokens, n_expert_used) bool -> experts, the same shape, int32: who computes each pair
when these are to be given away; the router's choice where nobody takes an asked one."""


def has_missing(routing: Routing) -> bool:
    """Whether any chosen expert is not resident."""
    if len(routing.expert_ids) == 1:
        return False in routing.is_resident[routing.expert_ids[0]].tolist()
    return not routing.is_resident[routing.expert_ids].all()


def asked_pairs(routing: Routing, gate: Gate) -> np.ndarray:
    """Pairs that may be given away but for the allowance: (n_tokens, n_expert_used) bool."""
    asked: np.ndarray = ~routing.is_resident[routing.expert_ids]
    asked &= routing.weights <= np.float64(gate.max_weight)
    asked[:, : gate.min_rank - 1] = False
    return asked


def affordable_ranks(routing: Routing, gate: Gate) -> list[int]:
    """The columns of the pairs that a lone token may give away and can afford, in rank order."""
    chosen = routing.expert_ids[0].tolist()
    is_resident = routing.is_resident[routing.expert_ids[0]].tolist()
    if False not in is_resident:
        return []
    weights, lowest, most = routing.weights[0].tolist(), gate.min_rank - 1, gate.max_weight
    asked = [
        rank
        for rank in range(lowest, len(chosen))
        if not is_resident[rank] and weights[rank] <= most
    ]
    if gate.allowance is None or not asked:
        return asked
    bound = float(gate.allowance[0])
    if bound <= 0.0:
        return []
    price, affordable = 0.0, []
    for rank in sorted(reversed(asked), key=weights.__getitem__):
        price += weights[rank]
        if price <= bound:
            affordable.append(rank)
    return sorted(affordable)


def give_away(
    routing: Routing, asked: np.ndarray, allowance: np.ndarray | None, serve: Serve
) -> np.ndarray:
    """Who computes each pair, (n_tokens, n_expert_used) int32, within the allowance.

    Tokens spend in their order. Of a token as many of the asked pairs are given away as it can
    afford together, the cheapest first; of equal ones the one of the later rank first. A pair
    that nobody takes costs nothing.
    """
    if allowance is None:
        return serve(asked)
    weights = np.where(asked, routing.weights, np.inf).astype(np.float64)
    last_first = np.argsort(weights[:, ::-1], axis=1, kind="stable")
    place = np.argsort(last_first, axis=1)[:, ::-1]  # of each pair, the cheapest one is 0
    options = [serve(asked & (place < n)) for n in range(1, asked.shape[1] + 1)]
    price = np.sort(weights, axis=1).cumsum(axis=1)
    costs = np.stack([given_weight(routing, experts) for experts in options], axis=1)
    n_given = n_affordable(price, costs, allowance)
    experts = routing.expert_ids.copy()
    for n, option in enumerate(options, start=1):
        experts[n_given == n] = option[n_given == n]
    return experts


def given_weight(routing: Routing, experts: np.ndarray) -> np.ndarray:
    """The router's weight of what others compute: (n_tokens,) float64."""
    given = experts != routing.expert_ids
    weight: np.ndarray = np.where(given, routing.weights, 0.0).sum(axis=1, dtype=np.float64)
    return weight


def n_affordable(price: np.ndarray, costs: np.ndarray, allowance: np.ndarray) -> np.ndarray:
    """How many of its things each token takes when tokens spend in their order: (n_tokens,) int.

    price (n_tokens, n) float64: what is needed to take the first 1, 2, ... of them, increasing,
    inf for what is not on offer. costs (n_tokens, n): what taking them really costs, at most
    the price. allowance as of a `Gate`.
    """
    n_taken = np.zeros(len(price), np.int64)
    bounds, spent = binding(allowance).tolist(), 0.0
    for token in np.flatnonzero(np.isfinite(price[:, 0])).tolist():
        left = bounds[token] - spent
        n = bisect_right(price[token].tolist(), left) if left > 0.0 else 0
        if n:
            n_taken[token] = n
            spent += float(costs[token, n - 1])
    return n_taken


def binding(allowance: np.ndarray) -> np.ndarray:
    """The same allowance where what a later token forbids is forbidden at once."""
    return np.minimum.accumulate(allowance[::-1])[::-1]
