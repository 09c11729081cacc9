"""Routings made by hand, and random ones, as a router with softmax over its best would make."""

from dataclasses import dataclass, replace

import numpy as np
from hypothesis import strategies as st

from runner.miss_policy import BuddyLists, BuddyMoEParameters, Gate, Routing
from runner.standins.buddymoe import buddy_lists


def softmax(z: np.ndarray) -> np.ndarray:
    """Of each row, in float64."""
    shares = np.exp(z.astype(np.float64) - z.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def routed(
    scores: list[list[float]] | np.ndarray, residents: tuple[int, ...], n_expert_used: int = 2
) -> Routing:
    """The best by score are chosen (ties: the lower index), weighed by their softmax."""
    z = np.asarray(scores, np.float32)
    ids = np.argsort(-z, axis=1, kind="stable")[:, :n_expert_used].astype(np.int32)
    weights = softmax(np.take_along_axis(z, ids, axis=1)).astype(np.float32)
    is_resident = np.zeros(z.shape[1], bool)
    is_resident[list(residents)] = True
    return Routing(ids, weights, z, is_resident)


def odds(*tokens: tuple[float, ...]) -> np.ndarray:
    """Scores whose softmax over any selection are these numbers over their sum."""
    return np.log(np.array(tokens))


@dataclass(frozen=True)
class Situation:
    """A random batch, what may be given away of it, and what the policies need besides."""

    routing: Routing
    gate: Gate
    strength: float
    error: np.ndarray
    buddies: BuddyLists
    parameters: BuddyMoEParameters

    @property
    def n_expert_used(self) -> int:
        return self.routing.expert_ids.shape[1]


rngs = st.integers(0, 2**32).map(np.random.default_rng)


@st.composite
def routings(draw: st.DrawFn) -> Routing:
    """1 to 40 tokens, 2 to 16 experts of which 1 to 4 are used; ties and weights of 0 included.

    The weights are a bit off what the scores say, as other arithmetic would have them. What is
    in the arrays comes from a generator, since hypothesis would rather have most of it alike.
    """
    n_tokens, n_expert = draw(st.just(1) | st.integers(2, 40)), draw(st.integers(2, 16))
    rng = draw(rngs)
    scores = rng.integers(-9, 10, (n_tokens, n_expert)) * draw(st.sampled_from([0.1, 0.5, 60.0]))
    share = draw(st.sampled_from([0.5, 0.5, 0.3, 0.7, 0.7, 0.0, 1.0]))
    residents = tuple(np.flatnonzero(rng.random(n_expert) < share).tolist())
    routing = routed(scores, residents, draw(st.integers(1, min(4, n_expert))))
    return replace(routing, weights=np.nextafter(routing.weights, np.float32(0.0)))


@st.composite
def gates(draw: st.DrawFn, n_tokens: int) -> Gate:
    """Open, closed and in between; an allowance may also fall from token to token."""
    steps = draw(rngs).random(n_tokens) * draw(st.sampled_from([0.2, 1.0, 2.0]))
    falling = (steps - 0.1).cumsum()
    constant = np.full(n_tokens, 2 * steps[0])
    allowance = draw(st.sampled_from([None, constant, steps, steps.cumsum(), falling]))
    max_weight = draw(st.sampled_from([1.0, 1.0, 1.0, 0.5, 0.3, 0.0]))
    return Gate(max_weight, draw(st.sampled_from([1, 1, 2, 3])), allowance)


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """A routing, a gate and parameters for every policy."""
    routing = draw(routings())
    n_tokens, n_expert = routing.scores.shape
    rng = draw(rngs)
    counts = rng.integers(0, 6, (n_expert, n_expert)) * (rng.random((n_expert, n_expert)) < 0.7)
    counts += counts.T
    np.fill_diagonal(counts, 0)
    parameters = BuddyMoEParameters(
        tau=draw(st.sampled_from([-1.0, 0.0, 0.4, 0.8])),
        beta=draw(st.sampled_from([2.0, 0.5])),
        gamma=draw(st.sampled_from([None, 0.3])),
        eta=draw(st.sampled_from([0.0, 1.0, 5.0])),
        kappa=draw(st.sampled_from([0.0, 0.3, 2.0])),
        search_depth=draw(st.sampled_from([16, 3, 1, 0])),
        max_per_token=draw(st.sampled_from([4, 2, 1, 0])),
        temperature=draw(st.sampled_from([1.0, 0.5, 4.0])),
    )
    return Situation(
        routing,
        draw(gates(n_tokens)),
        draw(st.sampled_from([0.3, 0.5, 1.0, 4.0, 0.1, 0.0])),
        rng.integers(0, 5, (n_expert, n_expert)).astype(np.float32) / 4,
        buddy_lists(counts, 0.9, n_expert - 1, rng.integers(0, 3, n_expert).astype(float)),
        parameters,
    )
