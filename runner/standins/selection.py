"""Policies that select again, with residents preferred, and weigh what they selected anew.

A token is selected again whole or stays as the router chose it.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from runner.standins.affordable import binding, given_weight, has_missing, n_affordable
from runner.standins.routing import DROPPED, Choice, Gate, Routing
from runner.standins.substitution import exact

Second = Callable[[Routing, Gate], Choice]


def prior(routing: Routing, strength: float, gate: Gate) -> Choice:
    """Cache-prior routing (arXiv 2412.00099): the best n_expert_used by z + strength * (max z -
    min z) * is_resident, weighed by the softmax of z over them; z are the token's scores.

    The protected ranks are always selected. A token that would displace a pair of more weight
    than the gate's, or more than the allowance affords, stays as the router chose it. What is
    still missing is exact. Ties: the router's choice, then the lower index.
    """
    if not has_missing(routing):
        return exact(routing)
    if len(routing.expert_ids) == 1:
        return _reselect_one(routing, gate, strength)
    z = routing.scores.astype(np.float64)
    missing = ~routing.is_resident[routing.expert_ids]
    missing[:, : gate.min_rank - 1] = False
    newcomers, newcomer_z = _residents_not_chosen(routing)
    # The best newcomer displaces the last missing pair, the second best the last but one, ...
    from_last = missing[:, ::-1].cumsum(axis=1)[:, ::-1] - missing
    rival_z = np.take_along_axis(newcomer_z, from_last, axis=1)
    bonus = strength * (z.max(axis=1, keepdims=True) - z.min(axis=1, keepdims=True))
    displaced = missing & (rival_z + bonus > np.take_along_axis(z, routing.expert_ids, axis=1))
    return _reselect(routing, gate, displaced, newcomers)


def resident(routing: Routing, gate: Gate) -> Choice:
    """The router restricted to residents: the best n_expert_used of them by z, weighed by the
    softmax of z over them.

    A token that would displace a protected rank, a pair of more weight than the gate's, or more
    than the allowance affords, stays as the router chose it; all do where fewer experts than
    n_expert_used are resident. Ties: the router's choice, then the lower index.
    """
    n_resident = np.count_nonzero(routing.is_resident)
    if n_resident < routing.expert_ids.shape[1] or not has_missing(routing):
        return exact(routing)
    if len(routing.expert_ids) == 1:
        return _reselect_one(routing, gate, None)
    missing = ~routing.is_resident[routing.expert_ids]
    missing &= ~missing[:, : gate.min_rank - 1].any(axis=1, keepdims=True)
    newcomers, _ = _residents_not_chosen(routing)
    return _reselect(routing, gate, missing, newcomers)


def prior_then(routing: Routing, strength: float, gate: Gate, second: Second) -> Choice:
    """`prior`, then a policy of substitution for what still misses, with what prior left.

    second(routing after prior, its gate) keeps weights or drops; it sees the router's weights,
    and the pairs that it gives away have the weights that prior gave them.
    """
    first = prior(routing, strength, gate)
    if first.experts is routing.expert_ids:
        return second(routing, gate)
    after = replace(routing, expert_ids=first.experts)
    if not has_missing(after):
        return first
    if gate.allowance is not None:
        spent = given_weight(routing, first.experts).cumsum()
        gate = replace(gate, allowance=binding(gate.allowance) - spent)
    experts = second(after, gate).experts
    if experts is first.experts:
        return first
    return Choice(experts, np.where(experts == DROPPED, np.float32(0.0), first.weights))


def _residents_not_chosen(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """Each token's, best first, and their scores: (n_tokens, n_expert_used), -inf for none."""
    n_tokens, n_expert_used = routing.expert_ids.shape
    free = np.tile(routing.is_resident, (n_tokens, 1))
    np.put_along_axis(free, routing.expert_ids, False, axis=1)
    z = np.where(free, routing.scores.astype(np.float64), -np.inf)
    order = np.argsort(-z, axis=1, kind="stable")[:, :n_expert_used]
    return order.astype(np.int32), np.take_along_axis(z, order, axis=1)


def _reselect(routing: Routing, gate: Gate, displaced: np.ndarray, newcomers: np.ndarray) -> Choice:
    """The best newcomer takes the first displaced pair's place, ..., where the gate lets it.

    displaced (n_tokens, n_expert_used) bool, newcomers the same shape, int32.
    """
    weight = np.where(displaced, routing.weights, 0.0).astype(np.float64)
    changed = displaced.any(axis=1) & (weight.max(axis=1) <= gate.max_weight)
    if gate.allowance is not None:
        price = np.where(changed, weight.sum(axis=1), np.inf)[:, None]
        changed = n_affordable(price, price, gate.allowance) > 0
    if not changed.any():
        return exact(routing)
    displaced = displaced & changed[:, None]
    nth = np.maximum(displaced.cumsum(axis=1) - 1, 0)
    experts = np.where(displaced, np.take_along_axis(newcomers, nth, axis=1), routing.expert_ids)
    return Choice(experts, np.where(changed[:, None], _softmax(routing, experts), routing.weights))


def _softmax(routing: Routing, experts: np.ndarray) -> np.ndarray:
    """The router's weights had it selected these: (n_tokens, n_expert_used) float32."""
    z = np.take_along_axis(routing.scores, experts, axis=1).astype(np.float64)
    shares = np.exp(z - z.max(axis=1, keepdims=True))
    weights: np.ndarray = shares / shares.sum(axis=1, keepdims=True)
    return weights.astype(np.float32)


def _reselect_one(routing: Routing, gate: Gate, strength: float | None) -> Choice:
    """Both policies for a lone token that misses something; strength None: residents only."""
    experts, z = routing.expert_ids[0].tolist(), routing.scores[0].tolist()
    is_resident = routing.is_resident.tolist()
    missing = [rank for rank, expert in enumerate(experts) if not is_resident[expert]]
    free = [e for e, is_there in enumerate(is_resident) if is_there and e not in experts]
    free.sort(key=z.__getitem__, reverse=True)
    if strength is None:
        displaced = missing if missing[0] >= gate.min_rank - 1 else []
    else:
        bonus = strength * (max(z) - min(z))
        last_first = [rank for rank in reversed(missing) if rank >= gate.min_rank - 1]
        rivals = zip(last_first, free, strict=False)
        displaced = [rank for rank, rival in rivals if z[rival] + bonus > z[experts[rank]]]
        displaced.reverse()
    if not displaced or not _may_displace(routing, gate, displaced):
        return exact(routing)
    for rank, newcomer in zip(displaced, free, strict=False):
        experts[rank] = newcomer
    best = max(z[expert] for expert in experts)
    shares = [math.exp(z[expert] - best) for expert in experts]
    total = sum(shares)
    weights = [share / total for share in shares]
    return Choice(np.array([experts], np.int32), np.array([weights], np.float32))


def _may_displace(routing: Routing, gate: Gate, displaced: list[int]) -> bool:
    """Whether the gate lets a lone token give away these pairs together."""
    weights = routing.weights[0].tolist()
    given = [weights[rank] for rank in displaced]
    if max(given) > gate.max_weight:
        return False
    bound = math.inf if gate.allowance is None else float(gate.allowance[0])
    return bound > 0.0 and sum(given) <= bound
