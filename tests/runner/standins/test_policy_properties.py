"""What every miss policy promises, on random routings; and what each selects, done another way."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from runner import miss_policy
from runner.miss_policy import DROPPED, Choice, Gate, Routing
from tests.runner.standins.routings import Situation, routings, situations, softmax

Policy = Callable[[Situation, Routing, Gate], Choice]

SUBSTITUTING: dict[str, Policy] = {
    "router": lambda s, routing, gate: miss_policy.router(routing, gate),
    "similar": lambda s, routing, gate: miss_policy.similar(routing, gate, s.error),
    "random": lambda s, routing, gate: miss_policy.random(routing, gate, np.random.default_rng(1)),
    "buddymoe": lambda s, routing, gate: miss_policy.buddymoe(
        routing, gate, s.buddies, s.parameters
    ),
    "drop": lambda s, routing, gate: miss_policy.drop(routing, gate),
}
SELECTING: dict[str, Policy] = {
    "prior": lambda s, routing, gate: miss_policy.prior(routing, s.strength, gate),
    "resident": lambda s, routing, gate: miss_policy.resident(routing, gate),
}


def after_prior(name: str) -> Policy:
    return lambda s, routing, gate: miss_policy.prior_then(
        routing, s.strength, gate, lambda after, left: SUBSTITUTING[name](s, after, left)
    )


PRIOR_THEN = {f"prior, then {name}": after_prior(name) for name in SUBSTITUTING}
POLICIES: dict[str, Policy] = SUBSTITUTING | SELECTING | PRIOR_THEN
SOME = settings(max_examples=250, deadline=None, derandomize=True)


def bits(weights: np.ndarray) -> bytes:
    assert weights.dtype == np.float32
    return weights.tobytes()


def is_exact(choice: Choice, routing: Routing) -> bool:
    """Bit for bit."""
    return np.array_equal(choice.experts, routing.expert_ids) and bits(choice.weights) == bits(
        routing.weights
    )


def expected_weights(name: str, s: Situation, experts: np.ndarray) -> tuple[np.ndarray, float]:
    """Those that the policy's definition gives, and the tolerance."""
    if name in PRIOR_THEN:
        weights = miss_policy.prior(s.routing, s.strength, s.gate).weights
        return np.where(experts == DROPPED, 0, weights), 0.0
    if name in SUBSTITUTING:
        return np.where(experts == DROPPED, 0, s.routing.weights), 0.0
    own = softmax(np.take_along_axis(s.routing.scores, experts, axis=1))
    return own, 2e-7


def check_stand_ins(s: Situation, experts: np.ndarray, may_drop: bool) -> None:
    routing = s.routing
    for chosen, used in zip(routing.expert_ids.tolist(), experts.tolist(), strict=True):
        computing = [expert for expert in used if expert != DROPPED]
        assert may_drop or len(computing) == len(used), "nobody computes a pair"
        assert len(set(computing)) == len(computing), "an expert twice in a token"
        for rank, (own, expert) in enumerate(zip(chosen, used, strict=True), start=1):
            if expert == own:
                continue
            assert not routing.is_resident[own], "a resident expert gave its pair away"
            assert rank >= s.gate.min_rank, "a protected rank gave its pair away"
            assert expert == DROPPED or routing.is_resident[expert], "a stand-in is missing"
            assert expert not in chosen, "a stand-in is one that the router chose"


def check_spending(s: Situation, experts: np.ndarray) -> None:
    weight = np.where(experts != s.routing.expert_ids, s.routing.weights, 0).astype(np.float64)
    assert weight.max() <= s.gate.max_weight
    if s.gate.allowance is not None:
        spent = weight.sum(axis=1).cumsum()
        assert (spent <= np.maximum(s.gate.allowance, 0) + 1e-9).all(), "more than is allowed"


def check_plan(s: Situation, choice: Choice, on_host: frozenset[int]) -> None:
    routing = s.routing
    plan = miss_policy.plan(choice, routing, on_host)
    given = choice.experts != routing.expert_ids
    is_there = routing.is_resident[choice.experts]
    hosted = np.isin(choice.experts, list(on_host))
    ways = {
        "hit": ~given & is_there,
        "loaded": ~given & ~is_there & ~hosted,
        "on_host": ~given & ~is_there & hosted,
        "substituted": given & (choice.experts != DROPPED),
        "dropped": choice.experts == DROPPED,
    }
    assert sum(way.sum() for way in ways.values()) == choice.experts.size
    assert plan.weight is not None
    for name, way in ways.items():
        assert getattr(plan, f"n_{name}") == way.sum(), name
        assert getattr(plan.weight, name) == pytest.approx(
            routing.weights[way].sum(dtype=np.float64)
        )
    assert set(plan.loads) == set(choice.experts[ways["loaded"]].tolist())
    assert set(plan.on_host) == set(choice.experts[ways["on_host"]].tolist())
    assert np.array_equal(plan.experts, choice.experts)
    assert not np.shares_memory(plan.experts, routing.expert_ids)
    served = routing.weights if plan.weights is None else plan.weights
    assert bits(served) == bits(choice.weights)
    assert (plan.weights is None) == (bits(choice.weights) == bits(routing.weights))


@SOME
@given(s=situations(), on_host=st.frozensets(st.integers(0, 15)))
def test_whatever_a_policy_chooses_keeps_the_rules(s: Situation, on_host: frozenset[int]) -> None:
    for name in POLICIES:
        note(name)
        check_choice(name, s, on_host)


def check_choice(name: str, s: Situation, on_host: frozenset[int]) -> None:
    routing = s.routing
    before = [a.copy() for a in (routing.expert_ids, routing.weights, routing.is_resident)]
    choice = POLICIES[name](s, routing, s.gate)
    after = (routing.expert_ids, routing.weights, routing.is_resident)
    assert all(map(np.array_equal, before, after)), "the routing was written to"
    assert choice.experts.shape == choice.weights.shape == routing.expert_ids.shape
    assert choice.experts.dtype == np.int32 and choice.weights.dtype == np.float32
    check_stand_ins(s, choice.experts, may_drop="drop" in name)
    if name == "buddymoe":
        n_given = (choice.experts != routing.expert_ids).sum(axis=1)
        assert n_given.max() <= s.parameters.max_per_token
    check_spending(s, choice.experts)
    check_plan(s, choice, on_host)
    changed = (choice.experts != routing.expert_ids).any(axis=1)
    assert bits(choice.weights[~changed]) == bits(routing.weights[~changed])
    weights, tolerance = expected_weights(name, s, choice.experts)
    assert np.allclose(choice.weights[changed], weights[changed], rtol=0, atol=tolerance)


@SOME
@given(s=situations())
def test_with_everything_resident_every_policy_is_exact(s: Situation) -> None:
    routing = replace(s.routing, is_resident=np.ones(s.routing.scores.shape[1], bool))
    for name, policy in POLICIES.items():
        assert is_exact(policy(s, routing, s.gate), routing), name


@SOME
@given(s=situations())
def test_where_nothing_is_allowed_every_policy_is_exact(s: Situation) -> None:
    gate = replace(s.gate, allowance=np.zeros(len(s.routing.expert_ids)))
    for name, policy in POLICIES.items():
        assert is_exact(policy(s, s.routing, gate), s.routing), name


def one_by_one(policy: Policy, s: Situation) -> tuple[np.ndarray, np.ndarray]:
    """The batch as lone tokens, each with what those before left of the allowance."""
    spent, experts, weights = 0.0, [], []
    for token in range(len(s.routing.expert_ids)):
        alone = slice(token, token + 1)
        lone = Routing(
            s.routing.expert_ids[alone],
            s.routing.weights[alone],
            s.routing.scores[alone],
            s.routing.is_resident,
        )
        allowance = s.gate.allowance
        left = None if allowance is None else allowance[token:].min(keepdims=True) - spent
        choice = policy(s, lone, replace(s.gate, allowance=left))
        given = choice.experts != lone.expert_ids
        spent += float(np.where(given, lone.weights, 0).sum(dtype=np.float64))
        experts.append(choice.experts[0])
        weights.append(choice.weights[0])
    return np.array(experts), np.array(weights)


@SOME
@given(s=situations())
def test_a_batch_is_served_like_its_tokens_one_by_one(s: Situation) -> None:
    """But for what spans tokens: the missing share, a prior that spends before the second, and
    what a random generator has drawn."""
    s = replace(s, parameters=replace(s.parameters, beta=2.0))
    unbound = replace(s, gate=replace(s.gate, allowance=None))
    for name, policy in POLICIES.items():
        if "random" in name:
            continue
        case = unbound if name in PRIOR_THEN else s
        choice = policy(case, case.routing, case.gate)
        experts, weights = one_by_one(policy, case)
        assert np.array_equal(choice.experts, experts), name
        assert np.allclose(choice.weights, weights, rtol=0, atol=1e-7), name


@SOME
@given(s=situations())
def test_prior_selects_the_best_of_the_raised_scores(s: Situation) -> None:
    routing, min_rank = s.routing, s.gate.min_rank
    choice = miss_policy.prior(routing, s.strength, Gate(min_rank=min_rank))
    for token, z in enumerate(routing.scores.astype(np.float64)):
        chosen = routing.expert_ids[token].tolist()
        raised = z + s.strength * (z.max() - z.min()) * routing.is_resident
        raised[chosen[: min_rank - 1]] = np.inf
        order = sorted(range(len(z)), key=lambda e: (-raised[e], e not in chosen, -z[e], e))
        assert set(choice.experts[token].tolist()) == set(order[: len(chosen)])


@SOME
@given(routing=routings())
def test_resident_selects_the_best_residents(routing: Routing) -> None:
    choice = miss_policy.resident(routing, Gate())
    residents = np.flatnonzero(routing.is_resident).tolist()
    n_expert_used = routing.expert_ids.shape[1]
    if len(residents) < n_expert_used:
        assert is_exact(choice, routing)
        return
    for token, z in enumerate(routing.scores):
        chosen = routing.expert_ids[token].tolist()
        order = sorted(residents, key=lambda e: (-z[e], e not in chosen, e))
        assert set(choice.experts[token].tolist()) == set(order[:n_expert_used])


@SOME
@given(s=situations())
def test_a_selection_is_taken_whole_or_not_at_all(s: Situation) -> None:
    for name, policy in SELECTING.items():
        ungated = policy(s, s.routing, Gate(min_rank=s.gate.min_rank)).experts
        gated = policy(s, s.routing, s.gate).experts
        for row, whole, chosen in zip(gated, ungated, s.routing.expert_ids, strict=True):
            assert row.tolist() in (whole.tolist(), chosen.tolist()), name
