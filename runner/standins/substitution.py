"""Policies that keep the router's weights and let other experts, or nobody, compute a pair.

Each knows which resident expert it prefers; which pairs are given away is `affordable`'s.
"""

from collections.abc import Callable

import numpy as np

from runner.standins.affordable import affordable_ranks, asked_pairs, give_away, has_missing
from runner.standins.routing import DROPPED, Choice, Gate, Routing

NOBODY = -1
Pick = Callable[[int, np.ndarray], np.ndarray]
"""rank (the pairs' column), free (n_tokens, n_expert) bool: the resident experts that a token
does not use yet -> who takes the token's pair of that rank, (n_tokens,), or NOBODY."""
PickOne = Callable[[int, list[int]], int]
"""The same for a lone token: the chosen expert, the free ones (ascending) -> who, or NOBODY."""


def exact(routing: Routing) -> Choice:
    """Every pair as the router chose it."""
    return Choice(routing.expert_ids, routing.weights)


def router(routing: Routing, gate: Gate) -> Choice:
    """A pair goes to the best resident, unselected expert by this token's router score.

    Ties: the lower index.
    """
    return _highest(routing, gate, routing.scores)


def random(routing: Routing, gate: Gate, rng: np.random.Generator) -> Choice:
    """A control: any resident, unselected expert. Draws nothing where nothing is missing."""
    if not has_missing(routing):
        return exact(routing)
    return _highest(routing, gate, rng.random(routing.scores.shape))


def similar(routing: Routing, gate: Gate, error: np.ndarray) -> Choice:
    """A pair goes to the resident, unselected expert of the lowest measured output error.

    error (n_expert, n_expert) float32, error[e, b] of b standing in for e. Ties: the router's
    score, then the lower index.
    """
    if len(routing.expert_ids) == 1:

        def pick_one(expert: int, free: list[int]) -> int:
            errors, scores = error[expert].tolist(), routing.scores[0].tolist()
            return min(free, key=lambda buddy: (errors[buddy], -scores[buddy]))

        return substitute_one(routing, affordable_ranks(routing, gate), pick_one)

    def pick(rank: int, free: np.ndarray) -> np.ndarray:
        errors = np.where(free, error[routing.expert_ids[:, rank]], np.inf)
        return best_of(free & (errors == errors.min(axis=1, keepdims=True)), routing.scores)

    return substitute(routing, asked_pairs(routing, gate), gate.allowance, pick)


def drop(routing: Routing, gate: Gate) -> Choice:
    """A control: nobody computes the pair; the weights of the others stay as they are."""
    if not has_missing(routing):
        return exact(routing)

    def serve(asked: np.ndarray) -> np.ndarray:
        return np.where(asked, np.int32(DROPPED), routing.expert_ids)

    if len(routing.expert_ids) == 1:
        experts = routing.expert_ids.copy()
        experts[0, affordable_ranks(routing, gate)] = DROPPED
    else:
        experts = give_away(routing, asked_pairs(routing, gate), gate.allowance, serve)
    return Choice(experts, np.where(experts == DROPPED, np.float32(0.0), routing.weights))


def _highest(routing: Routing, gate: Gate, keys: np.ndarray) -> Choice:
    """The free expert of the highest key takes the pair; keys like the scores."""
    if len(routing.expert_ids) == 1:
        ranks = affordable_ranks(routing, gate)
        if not ranks:
            return exact(routing)
        key = keys[0].tolist().__getitem__
        return substitute_one(routing, ranks, lambda expert, free: max(free, key=key))
    asked = asked_pairs(routing, gate)
    return substitute(routing, asked, gate.allowance, lambda rank, free: best_of(free, keys))


def substitute_one(
    routing: Routing, ranks: list[int], pick_one: PickOne, max_per_token: int | None = None
) -> Choice:
    """Of a lone token, the pairs of these columns, ascending, are taken by whom `pick_one` says.

    Like `substitute` otherwise.
    """
    if not ranks:
        return exact(routing)
    experts = routing.expert_ids[0].tolist()
    resident = np.flatnonzero(routing.is_resident).tolist()
    free = [expert for expert in resident if expert not in experts]
    n_left = len(experts) if max_per_token is None else max_per_token
    for rank in ranks:
        if not free or n_left <= 0:
            break
        stand_in = pick_one(experts[rank], free)
        if stand_in != NOBODY:
            experts[rank] = stand_in
            free.remove(stand_in)
            n_left -= 1
    return Choice(np.array([experts], np.int32), routing.weights)


def substitute(
    routing: Routing,
    asked: np.ndarray,
    allowance: np.ndarray | None,
    pick: Pick,
    max_per_token: int | None = None,
) -> Choice:
    """The asked pairs are taken by whom `pick` says, with the router's weights.

    asked (n_tokens, n_expert_used) bool. A stand-in takes one pair of a token; a token's pairs
    are served in rank order; what nobody takes or the allowance forbids stays as it is.
    """
    if not asked.any():
        return exact(routing)
    n_tokens, n_expert_used = asked.shape
    n_most = n_expert_used if max_per_token is None else max_per_token

    def serve(asked: np.ndarray) -> np.ndarray:
        experts = routing.expert_ids.copy()
        free = np.tile(routing.is_resident, (n_tokens, 1))
        np.put_along_axis(free, routing.expert_ids, False, axis=1)
        n_left = np.full(n_tokens, n_most)
        for rank in range(n_expert_used):
            stand_in = pick(rank, free)
            taken = np.flatnonzero(asked[:, rank] & (stand_in != NOBODY) & (n_left > 0))
            experts[taken, rank] = stand_in[taken]
            free[taken, stand_in[taken]] = False
            n_left[taken] -= 1
        return experts

    return Choice(give_away(routing, asked, allowance, serve), routing.weights)


def best_of(possible: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Of each row the possible index of the highest key, the lower of equals, or NOBODY.

    possible (n, m) bool, keys (n, m), finite -> (n,) int.
    """
    best = np.where(possible, keys, -np.inf).argmax(axis=1)
    return np.where(possible[np.arange(len(best)), best], best, NOBODY)
