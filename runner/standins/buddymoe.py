"""The policy of BuddyMoE (arXiv 2511.10054): buddies are experts that are used together.

Equations of the paper, on one layer's arrays; knows no profile and no cache.
"""

import math
from dataclasses import dataclass

import numpy as np

from runner.standins.affordable import affordable_ranks, asked_pairs, has_missing
from runner.standins.routing import Choice, Gate, Routing
from runner.standins.substitution import NOBODY, best_of, exact, substitute, substitute_one

_ROUNDING = 1e-12  # a cumulative share this much below alpha has reached it


@dataclass(frozen=True, slots=True)
class BuddyMoEParameters:
    """The paper's symbols; the defaults are ours and close no gate but the paper's first."""

    tau: float  # a token is substituted where its TAE is above; of the layer, from a profile
    beta: float = math.inf  # and where a smaller share of the requested experts is missing
    gamma: float | None = None  # and the two highest probabilities differ by less; None: any
    eta: float = 1.0  # how much the token's own probability of a buddy counts
    kappa: float = 0.0  # how much a hop costs
    search_depth: int = 16  # H: so many of an expert's buddies are looked at
    max_per_token: int = 2**31 - 1  # rho
    temperature: float = 1.0  # of the probabilities that the TAE and the margin are taken from


@dataclass(frozen=True, slots=True)
class BuddyLists:
    """One layer's buddies of each expert, the most often used together first.

    experts (n_expert, n) int32, NOBODY beyond an expert's last; shares the same shape, float64:
    q(j|i), 0 there. hop (n_expert,) float64: how far each expert's device is, 0 for this one.
    """

    experts: np.ndarray
    shares: np.ndarray
    hop: np.ndarray


def coactivation(expert_ids: np.ndarray, n_expert: int) -> np.ndarray:
    """M(i, j): how many tokens chose both i and j; (n_expert, n_expert) int64, diagonal 0.

    expert_ids (n_tokens, n_expert_used).
    """
    chosen = np.zeros((len(expert_ids), n_expert))
    np.put_along_axis(chosen, expert_ids.astype(np.int64), 1.0, axis=1)
    counts = (chosen.T @ chosen).astype(np.int64)
    np.fill_diagonal(counts, 0)
    return counts


def shares(counts: np.ndarray) -> np.ndarray:
    """q(j|i) = M(i, j) / sum over j' of M(i, j'): (n_expert, n_expert) float64; 0 / 0 is 0.

    counts: M, as `coactivation` returns it.
    """
    totals = counts.sum(axis=1, keepdims=True)
    q: np.ndarray = counts / np.maximum(totals, 1)
    return q


def buddy_lists(
    counts: np.ndarray, alpha: float, k_max: int, hop: np.ndarray | None = None
) -> BuddyLists:
    """Each expert's buddies by cumulative frequency (Eq. 5); counts: M.

    Peers by q, the highest first (ties: the lower index), as few as reach alpha together, and
    at most k_max. Who was never used together with an expert is no buddy of it.
    """
    q = shares(counts)
    n_expert = len(q)
    order = np.argsort(-q, axis=1, kind="stable")[:, :k_max]
    listed = np.take_along_axis(q, order, axis=1)
    before = listed.cumsum(axis=1) - listed
    is_buddy = (listed > 0.0) & (before < alpha - _ROUNDING)
    return BuddyLists(
        np.where(is_buddy, order, NOBODY).astype(np.int32),
        np.where(is_buddy, listed, 0.0),
        np.zeros(n_expert) if hop is None else hop,
    )


def tae(scores: np.ndarray, expert_ids: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Token activating entropy (Eq. 1): -sum p log p / log k over the selected experts.

    scores (n_tokens, n_expert), expert_ids (n_tokens, k) -> (n_tokens,) float64 in [0, 1]; 1 is
    a router that does not know which. 0 for k = 1, where there is nothing to spread.
    """
    return _entropy(_probabilities(scores, expert_ids, temperature))


def missing_share(routing: Routing) -> float:
    """delta (Eq. 2): the missing ones of the distinct experts that a batch requests."""
    requested = routing.expert_ids[0]  # a token's are distinct
    if len(routing.expert_ids) > 1:
        requested = np.unique(routing.expert_ids)
    n_missing: int = routing.is_resident[requested].tolist().count(False)
    return n_missing / len(requested)


def buddymoe(
    routing: Routing, gate: Gate, buddies: BuddyLists, parameters: BuddyMoEParameters
) -> Choice:
    """A pair goes to the buddy of the highest Psi among the first of the chosen expert's list.

    Psi(j|i) = q(j|i) * (1 + eta * p_j) * (1 - kappa * hop_j) (Eq. 3), with p = softmax(z) of
    this token over all experts as the local compatibility. The router's weight is kept. Ties:
    the earlier buddy. No token is substituted whose TAE is at most tau, nor any of a batch of
    which a share of beta or more is missing (Eq. 2). The paper says both that tokens of low and
    that tokens of high TAE are the sensitive ones; here confident tokens keep their experts.
    """
    depth = min(parameters.search_depth, buddies.experts.shape[1])
    if not has_missing(routing) or depth < 1 or missing_share(routing) >= parameters.beta:
        return exact(routing)
    if len(routing.expert_ids) == 1:
        return _buddymoe_one(routing, gate, buddies, parameters)
    asked = asked_pairs(routing, gate) & _is_open(routing, parameters)[:, None]
    z = routing.scores.astype(np.float64)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    compatibility = (1.0 + parameters.eta * p) * (1.0 - parameters.kappa * buddies.hop)

    def pick(rank: int, free: np.ndarray) -> np.ndarray:
        chosen = routing.expert_ids[:, rank]
        listed = buddies.experts[chosen, :depth]
        is_free = (listed != NOBODY) & np.take_along_axis(free, listed, axis=1)
        psi = buddies.shares[chosen, :depth] * np.take_along_axis(compatibility, listed, axis=1)
        place = best_of(is_free, psi)
        found = listed[np.arange(len(place)), place]
        return np.where(place == NOBODY, NOBODY, found)

    return substitute(routing, asked, gate.allowance, pick, parameters.max_per_token)


def _is_open(routing: Routing, parameters: BuddyMoEParameters) -> np.ndarray:
    """Whether each token is unsure enough to be substituted: (n_tokens,) bool."""
    p = _probabilities(routing.scores, routing.expert_ids, parameters.temperature)
    is_open: np.ndarray = _entropy(p) > parameters.tau
    if parameters.gamma is not None:
        best = np.sort(p, axis=1)[:, ::-1]
        second = best[:, 1] if best.shape[1] > 1 else 0.0
        is_open &= best[:, 0] - second < parameters.gamma
    return is_open


def _probabilities(scores: np.ndarray, expert_ids: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax over the selected experts only: (n_tokens, k) float64."""
    z = np.take_along_axis(scores, expert_ids, axis=1).astype(np.float64) / temperature
    p: np.ndarray = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p


def _entropy(p: np.ndarray) -> np.ndarray:
    """Of each row, as a share of the most that it can be."""
    if p.shape[1] == 1:
        return np.zeros(len(p))
    terms = p * np.log(np.where(p > 0.0, p, 1.0))
    spread: np.ndarray = -terms.sum(axis=1) / math.log(p.shape[1])
    return spread.clip(0.0, 1.0)


def _buddymoe_one(
    routing: Routing, gate: Gate, buddies: BuddyLists, parameters: BuddyMoEParameters
) -> Choice:
    """The same for a lone token, on lists."""
    z = routing.scores[0].tolist()
    if not _is_open_one([z[e] for e in routing.expert_ids[0].tolist()], parameters):
        return exact(routing)
    top = max(z)
    total = sum(math.exp(score - top) for score in z)
    hop = buddies.hop.tolist()

    def pick_one(expert: int, free: list[int]) -> int:
        listed = buddies.experts[expert, : parameters.search_depth].tolist()
        best, best_psi = NOBODY, -math.inf
        for buddy, share in zip(listed, buddies.shares[expert].tolist(), strict=False):
            if buddy not in free:
                continue
            p = math.exp(z[buddy] - top) / total
            psi = share * ((1.0 + parameters.eta * p) * (1.0 - parameters.kappa * hop[buddy]))
            if psi > best_psi:
                best, best_psi = buddy, psi
        return best

    ranks = affordable_ranks(routing, gate)
    return substitute_one(routing, ranks, pick_one, parameters.max_per_token)


def _is_open_one(z: list[float], parameters: BuddyMoEParameters) -> bool:
    """`_is_open` of the selected experts' scores, the best first."""
    top = max(z)
    p = [math.exp((score - top) / parameters.temperature) for score in z]
    total = sum(p)
    p = [share / total for share in p]
    if parameters.gamma is not None:
        best = sorted(p, reverse=True)
        if best[0] - (best[1] if len(p) > 1 else 0.0) >= parameters.gamma:
            return False
    if len(p) == 1:
        return parameters.tau < 0.0
    entropy = -sum(share * math.log(share) for share in p if share > 0.0) / math.log(len(p))
    return min(entropy, 1.0) > parameters.tau
