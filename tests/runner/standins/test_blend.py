"""Blends of a kept expert and a stand-in: the least squares, who is taken, with what weights."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner import miss_policy
from runner.miss_policy import Choice, Gate, LayerBlend, Routing
from runner.standins.blend import NOBODY
from tests.runner.standins.routings import Situation, odds, rngs, routed, situations
from tests.runner.standins.test_policy_properties import (
    bits,
    check_plan,
    check_spending,
    check_stand_ins,
    is_exact,
)

pytestmark = pytest.mark.filterwarnings("error")

A, B, C, D, E, F = range(6)
OPEN = Gate()


def layer_of(*outputs: Sequence[float] | np.ndarray, power: float = 1.0) -> LayerBlend:
    """A layer whose experts always put out these vectors."""
    vectors = np.array(outputs)
    return LayerBlend((vectors @ vectors.T).astype(np.float32), power)


def blended(layer: LayerBlend, missing: int, kept: int, buddy: int) -> tuple[float, float, float]:
    """Harm, the kept expert's part and the buddy's."""
    row = layer.row(missing, kept)
    return row.harm[buddy], row.kept_part[buddy], row.buddy_part[buddy]


# the normal equations


def test_an_identical_expert_takes_all_and_leaves_no_harm() -> None:
    layer = layer_of((1, 2, 0), (0, 0, 1), (1, 2, 0))
    assert blended(layer, A, B, C) == (0, 0, 1)
    assert blended(layer, A, NOBODY, C) == (0, 0, 1)


def test_orthogonal_experts_take_nothing_and_leave_all_of_the_harm() -> None:
    layer = layer_of((3, 0, 0), (0, 1, 0), (0, 0, 1), power=2.0)
    assert blended(layer, A, B, C) == (4.5, 0, 0)
    assert blended(layer, A, NOBODY, C) == (4.5, 0, 0)


def test_two_halves_of_an_expert_replace_it_together() -> None:
    assert blended(layer_of((2, 3), (1, 0), (0, 1)), A, B, C) == (0, 2, 3)


def test_where_the_kept_expert_says_it_all_the_buddy_gets_nothing() -> None:
    assert blended(layer_of((2, 0), (1, 0), (0, 1)), A, B, C) == (0, 2, 0)


def test_the_kept_expert_makes_up_for_what_the_buddy_has_too_much() -> None:
    assert blended(layer_of((0, 1), (1, 0), (1, 1)), A, B, C) == (0, -1, 1)


def test_what_neither_has_is_left_as_harm() -> None:
    # (1, 1, 1) against the plane of (1, 0, 0) and (1, 1, 0): the third coordinate is left
    assert blended(layer_of((1, 1, 1), (1, 0, 0), (1, 1, 0)), A, B, C) == (1, 0, 1)


def test_without_a_kept_expert_the_buddy_alone_is_scaled() -> None:
    # (1, 1) drawn on (2, 0) is half of it, and (0, 1) is left
    assert blended(layer_of((1, 1), (0, 1), (2, 0), power=4.0), A, NOBODY, C) == (0.25, 0, 0.5)


def test_beside_a_kept_expert_a_multiple_of_it_adds_nothing() -> None:
    layer = layer_of((1, 1), (2, 0), (-4, 0), (2, 0))
    for buddy in (C, D):
        assert blended(layer, A, B, buddy) == (1, 0.5, 0)


@pytest.mark.parametrize("noise", [0.0, 1e-8, 1e-6, 1e-4, 1e-2])
def test_experts_that_float32_hardly_tells_apart_make_no_monstrous_blend(noise: float) -> None:
    rng = np.random.default_rng(3)
    missing, kept = rng.standard_normal((2, 64))
    likes = np.outer(rng.uniform(0.1, 3, 500), kept) + noise * rng.standard_normal((500, 64))
    row = layer_of(missing, kept, *likes).row(A, B)
    for harm, x, y, like in zip(
        row.harm[2:], row.kept_part[2:], row.buddy_part[2:], likes, strict=True
    ):
        left = missing - x * kept - y * like
        assert left @ left == pytest.approx(harm, rel=0.01), "the harm is not what it says"
        assert left @ left < 1.01 * missing @ missing
        assert abs(x) + abs(y) < 2000


def test_blends_are_the_least_squares_of_numpy() -> None:
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((5, 12))  # (n_expert, n_embd)
    layer = LayerBlend(vectors @ vectors.T, 7.0)
    for missing, kept, buddy in np.ndindex(5, 5, 5):
        if len({missing, kept, buddy}) == 3:
            columns = vectors[[kept, buddy]].T
            parts, left, *_ = np.linalg.lstsq(columns, vectors[missing], rcond=None)
            expected = (left[0] / 7.0, *parts)
            assert blended(layer, missing, kept, buddy) == pytest.approx(expected)
        if missing != buddy:
            parts, left, *_ = np.linalg.lstsq(vectors[[buddy]].T, vectors[missing], rcond=None)
            expected = (left[0] / 7.0, 0.0, parts[0])
            assert blended(layer, missing, NOBODY, buddy) == pytest.approx(expected)


def test_a_mean_over_tokens_is_minimised_over_all_of_them() -> None:
    """With one blend for all tokens, not one for each."""
    rng = np.random.default_rng(2)
    outputs = rng.standard_normal((30, 3, 8))  # (n_tokens, n_expert, n_embd)
    gram = np.einsum("tid,tjd->ij", outputs, outputs) / 30
    missing, kept, buddy = outputs.transpose(1, 0, 2).reshape(3, -1)
    parts, left, *_ = np.linalg.lstsq(np.stack([kept, buddy], axis=1), missing, rcond=None)
    assert blended(LayerBlend(gram, 1.0), A, B, C) == pytest.approx((left[0] / 30, *parts))


def test_an_expert_that_puts_out_nothing_helps_nobody_and_harms_nobody() -> None:
    layer = layer_of((0, 0), (1, 1), (2, 0), (0, 0))
    assert blended(layer, B, A, C) == blended(layer, B, NOBODY, C) == (1, 0, 0.5)
    assert blended(layer, B, C, A) == (1, 0.5, 0)
    assert blended(layer, B, NOBODY, A) == (2, 0, 0)
    assert blended(layer, A, B, C) == blended(layer, A, NOBODY, B) == (0, 0, 0)
    assert blended(layer, A, D, D) == blended(layer, D, NOBODY, A) == (0, 0, 0)
    assert blended(layer, B, A, D) == (2, 0, 0)


def test_a_row_is_made_once() -> None:
    layer = layer_of((1, 0), (0, 1))
    assert layer.row(A, B) is layer.row(A, B)
    assert layer.row(A, NOBODY) is not layer.row(A, B)


# who is taken, with what weight

# A, B and C are chosen, of the weights .5, .3 and .2. D is half of B, E nearly C, F useless.
CHOSEN = odds((5, 3, 2, 1, 0.9, 0.8))
OUTPUTS = ((1, 0, 0, 0), (0, 2, 0, 0), (1, 0, 2, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 5))
LAYER = layer_of(*OUTPUTS)


def token(*residents: int) -> Routing:
    return routed(CHOSEN, residents, n_expert_used=3)


def blend(
    routing: Routing, gate: Gate = OPEN, max_harm: float = math.inf, layer: LayerBlend = LAYER
) -> tuple[list[int], list[float]]:
    """A lone token's choice; without an allowance it is the same as two such tokens' together."""
    choice = miss_policy.blend(routing, gate, layer, max_harm)
    if gate.allowance is None:
        doubled = [np.concatenate([a, a]) for a in (routing.expert_ids, routing.weights)]
        two = Routing(*doubled, np.tile(routing.scores, (2, 1)), routing.is_resident)
        of_two = miss_policy.blend(two, gate, layer, max_harm)
        for theirs, ours in ((of_two.experts, choice.experts), (of_two.weights, choice.weights)):
            assert np.array_equal(theirs, np.concatenate([ours, ours]))
    return choice.experts[0].tolist(), [round(float(w), 4) for w in choice.weights[0]]


def test_the_expert_that_leaves_the_least_harm_takes_the_pair_whatever_the_router_says() -> None:
    # C = A + 2 E: A gets .2 more, E .4; D would leave 4, and so would F
    assert blend(token(A, B, D, E, F)) == ([A, B, E], [0.7, 0.3, 0.4])


def test_the_other_experts_keep_their_weights() -> None:
    # B = 2 D: D gets .6, nothing is added to A
    assert blend(token(A, C, D, E, F)) == ([A, D, C], [0.5, 0.6, 0.2])


def test_all_blends_of_a_token_add_to_its_heaviest_kept_expert() -> None:
    layer = layer_of((1, 0, 0), (1, 1, 0), (2, 0, 1), (0, 1, 0), (0, 0, 1))
    routing = routed(odds((5, 3, 2, 1, 0.9)), (A, D, E), n_expert_used=3)
    # B = A + D and C = 2 A + E: A gets .5 + .3 + 2 * .2
    assert blend(routing, layer=layer) == ([A, D, E], [1.2, 0.3, 0.2])


def test_a_kept_expert_may_be_one_that_is_missing_too() -> None:
    assert blend(token(B, D, E, F), Gate(min_rank=2)) == ([A, B, E], [0.7, 0.3, 0.4])


def test_the_heaviest_that_is_kept_may_have_a_later_rank() -> None:
    # A and C go, B is kept: nothing of B is in them. D, E and F are worth nothing for A: the
    # lowest takes it; C = A + 2 E, of which E gives 2.
    assert blend(token(B, D, E, F)) == ([D, B, E], [0.0, 0.3, 0.4])


def test_when_all_pairs_are_given_away_each_buddy_stands_alone() -> None:
    # Nobody is like A: the lowest, D, takes it with no weight; then E has B, and F has C
    assert blend(token(D, E, F)) == ([D, E, F], [0.0, 0.0, 0.0])
    assert blend(token(D, E), Gate(min_rank=1, max_weight=0.4)) == ([A, D, E], [0.7, 0.6, 0.4])


def test_of_equal_harms_the_lower_index_takes_the_pair() -> None:
    layer = layer_of((1, 0), (1, 1), (0, 3), (0, 2), (0, 1))
    for residents, taken, weight in [((A, C, D, E), C, 0.1333), ((A, D, E), D, 0.2)]:
        routing = routed(odds((3, 2, 0.1, 0.3, 0.9)), residents)
        assert blend(routing, layer=layer) == ([A, taken], [1.0, weight])


def test_a_stand_in_is_taken_once_in_a_token() -> None:
    layer = layer_of((1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 1, 0), (0, 1, 1))
    routing = routed(odds((5, 3, 2, 1, 0.9)), (A, D, E), n_expert_used=3)
    assert blend(routing, layer=layer) == ([A, D, E], [0.5, 0.3, 0.1])  # E is twice as long


def test_without_anybody_free_a_pair_stays_exact() -> None:
    assert blend(token(A, B)) == ([A, B, C], [0.5, 0.3, 0.2])
    assert blend(token()) == ([A, B, C], [0.5, 0.3, 0.2])
    assert blend(token(A, D)) == ([A, D, C], [0.5, 0.6, 0.2])  # rank 2 comes first


def test_a_pair_that_would_do_too_much_harm_stays_exact() -> None:
    # C by D: 4 of harm are left, of a pair that weighs .2, so that .16 are done
    for max_harm, experts in [(0.1599, [A, B, C]), (0.1601, [A, B, D]), (0.0, [A, B, C])]:
        assert blend(token(A, B, D), max_harm=max_harm)[0] == experts


def test_harm_is_counted_in_parts_of_the_residual_stream() -> None:
    layer = layer_of(*OUTPUTS, power=100.0)
    for max_harm, experts in [(0.001599, [A, B, C]), (0.001601, [A, B, D])]:
        assert blend(token(A, B, D), max_harm=max_harm, layer=layer)[0] == experts


def test_a_blend_without_harm_is_always_open() -> None:
    assert blend(token(A, B, E), max_harm=0.0) == ([A, B, E], [0.7, 0.3, 0.4])


def test_a_harmful_pair_leaves_its_stand_in_to_the_next() -> None:
    # B by E leaves 4 * .09; C by E nothing
    assert blend(token(A, E), max_harm=0.3) == ([A, B, E], [0.7, 0.3, 0.4])


def test_protected_and_heavy_pairs_stay_exact() -> None:
    assert blend(token(A, D, E), Gate(min_rank=3)) == ([A, B, E], [0.7, 0.3, 0.4])
    assert blend(token(A, D, E), Gate(min_rank=4)) == ([A, B, C], [0.5, 0.3, 0.2])
    assert blend(token(A, D, E), Gate(max_weight=0.25)) == ([A, B, E], [0.7, 0.3, 0.4])
    assert blend(token(A, D, E), Gate(max_weight=0.1)) == ([A, B, C], [0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("allowance", "experts"),
    [(-1, [A, B, C]), (0, [A, B, C]), (0.19, [A, B, C]), (0.21, [A, B, E]), (0.51, [A, D, E])],
)
def test_the_allowance_pays_for_the_cheap_pairs_first(allowance: float, experts: list[int]) -> None:
    assert blend(token(A, D, E, F), Gate(allowance=np.array([allowance])))[0] == experts


def test_tokens_of_a_batch_spend_in_their_order_and_what_is_not_taken_costs_nothing() -> None:
    routing = routed(np.repeat(CHOSEN, 4, axis=0), (A, B, D, E, F), n_expert_used=3)
    allowance = np.array([0.1, 0.3, 0.35, 0.5])
    choice = miss_policy.blend(routing, Gate(allowance=allowance), LAYER, math.inf)
    assert choice.experts[:, 2].tolist() == [C, E, C, E]
    choice = miss_policy.blend(routing, Gate(allowance=allowance), LAYER, -1.0)
    assert is_exact(choice, routing)
    falling = np.array([0.5, 0.5, 0.5, 0.3])
    choice = miss_policy.blend(routing, Gate(allowance=falling), LAYER, math.inf)
    assert choice.experts[:, 2].tolist() == [E, C, C, C]


# what holds on random routings


@st.composite
def layers(draw: st.DrawFn, n_expert: int) -> LayerBlend:
    """Experts that have much, little or nothing in common; some put out nothing."""
    rng = draw(rngs)
    vectors = rng.standard_normal((n_expert, draw(st.sampled_from([1, 2, 20]))))
    vectors *= rng.random((n_expert, 1)) < draw(st.sampled_from([1.0, 0.7, 0.0]))
    return LayerBlend((vectors @ vectors.T).astype(np.float32), draw(st.sampled_from([1.0, 50.0])))


Case = tuple[Situation, LayerBlend, float]
cases = situations().flatmap(
    lambda s: st.tuples(
        st.just(s),
        layers(s.routing.scores.shape[1]),
        st.sampled_from([math.inf, 0.1, 0.01, 0.0]),
    )
)
SOME = settings(max_examples=60, deadline=None, derandomize=True)


@SOME
@given(case=cases, on_host=st.frozensets(st.integers(0, 15)))
def test_whatever_is_blended_keeps_the_rules(case: Case, on_host: frozenset[int]) -> None:
    s, layer, max_harm = case
    before = [a.copy() for a in (s.routing.expert_ids, s.routing.weights)]
    choice = miss_policy.blend(s.routing, s.gate, layer, max_harm)
    assert all(map(np.array_equal, before, (s.routing.expert_ids, s.routing.weights)))
    assert choice.experts.dtype == np.int32 and choice.weights.dtype == np.float32
    check_stand_ins(s, choice.experts, may_drop=False)
    check_spending(s, choice.experts)
    check_plan(s, choice, on_host)
    check_weights(s.routing, layer, choice, max_harm)


def check_weights(routing: Routing, layer: LayerBlend, choice: Choice, max_harm: float) -> None:
    """A stand-in has its part of the pair's weight, one kept expert all kept parts besides its
    own weight, and the others exactly the router's."""
    tokens = zip(
        routing.expert_ids, routing.weights, choice.experts, choice.weights, strict=True
    )  # fmt: skip
    for chosen, before, experts, after in tokens:
        given = np.flatnonzero(experts != chosen)
        kept = np.flatnonzero(experts == chosen)
        changed = [rank for rank in kept if bits(after[rank]) != bits(before[rank])]
        assert len(changed) <= 1 and (len(given) or not changed)
        beside = changed or [*kept.tolist(), NOBODY]
        assert any(
            has_weights_beside(layer, rank, chosen, before, experts, after) for rank in beside
        )
        for rank in given:
            harms = [
                layer.row(chosen[rank], kept_expert).harm[experts[rank]]
                for kept_expert in (*chosen[kept], NOBODY)
            ]
            assert float(before[rank]) ** 2 * min(harms) <= max_harm + 1e-12


def has_weights_beside(
    layer: LayerBlend,
    kept: int,
    chosen: np.ndarray,
    before: np.ndarray,
    experts: np.ndarray,
    after: np.ndarray,
) -> bool:
    """Whether these are the weights of blends beside the kept expert of this rank."""
    expected = before.astype(np.float64)
    for rank in np.flatnonzero(experts != chosen):
        row = layer.row(chosen[rank], chosen[kept] if kept != NOBODY else NOBODY)
        weight, buddy = float(before[rank]), experts[rank]
        expected[rank] = weight * row.buddy_part[buddy]
        if kept != NOBODY:
            expected[kept] += weight * row.kept_part[buddy]
    return bits(expected.astype(np.float32)) == bits(after)


@SOME
@given(case=cases)
def test_a_batch_is_blended_like_its_tokens_one_by_one(case: Case) -> None:
    s, layer, max_harm = case
    choice = miss_policy.blend(s.routing, s.gate, layer, max_harm)
    spent = 0.0
    for token in range(len(s.routing.expert_ids)):
        one = slice(token, token + 1)
        lone = replace(
            s.routing,
            expert_ids=s.routing.expert_ids[one],
            weights=s.routing.weights[one],
            scores=s.routing.scores[one],
        )
        bound = s.gate.allowance
        left = None if bound is None else bound[token:].min(keepdims=True) - spent
        own = miss_policy.blend(lone, replace(s.gate, allowance=left), layer, max_harm)
        spent += float(lone.weights[own.experts != lone.expert_ids].sum(dtype=np.float64))
        assert np.array_equal(choice.experts[one], own.experts)
        assert bits(choice.weights[one]) == bits(own.weights)


@SOME
@given(case=cases)
def test_where_nothing_is_missing_or_allowed_a_blend_is_exact(case: Case) -> None:
    s, layer, max_harm = case
    everything = replace(s.routing, is_resident=np.ones(s.routing.scores.shape[1], bool))
    assert is_exact(miss_policy.blend(everything, s.gate, layer, max_harm), everything)
    closed = replace(s.gate, allowance=np.zeros(len(s.routing.expert_ids)))
    assert is_exact(miss_policy.blend(s.routing, closed, layer, max_harm), s.routing)
