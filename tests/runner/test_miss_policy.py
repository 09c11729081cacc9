"""How each pair is served, by hand-made routings whose answer is known on paper."""

import numpy as np
import pytest

from runner import miss_policy
from runner.miss_policy import DROPPED, Choice, Routing, RoutingPlan, ServedWeight

A, B, C, D, E, F = range(6)
NOWHERE = -1


def routing(*tokens: tuple[int, ...]) -> np.ndarray:
    return np.array(tokens, np.int32)


def slots(*residents: int, n_expert: int = 6) -> np.ndarray:
    """The slot of each expert when these are resident in slots 0, 1, ..."""
    slot_of = np.full(n_expert, NOWHERE, np.int32)
    slot_of[list(residents)] = range(len(residents))
    return slot_of


def counts(plan: RoutingPlan) -> tuple[int, ...]:
    return plan.n_hit, plan.n_loaded, plan.n_on_host, plan.n_substituted, plan.n_dropped


def test_a_token_whose_experts_are_resident_hits() -> None:
    plan = miss_policy.exact_plan(routing((C, A)), slots(A, B, C))
    assert plan.is_all_hits
    assert (plan.loads, plan.on_host, counts(plan)) == ((), (), (2, 0, 0, 0, 0))


def test_a_token_whose_experts_are_missing_loads_them() -> None:
    plan = miss_policy.exact_plan(routing((E, D)), slots(A, B, C))
    assert not plan.is_all_hits
    assert (set(plan.loads), plan.on_host, counts(plan)) == ({D, E}, (), (0, 2, 0, 0, 0))


def test_a_slot_of_number_0_is_a_slot() -> None:
    assert miss_policy.exact_plan(routing((D,)), slots(D)).is_all_hits
    assert miss_policy.exact_plan(routing((A,)), slots(D)).loads == (A,)


def test_an_expert_that_many_tokens_miss_is_loaded_once_and_each_pair_counts() -> None:
    batch = routing((A, D), (D, B), (C, D), (D, E))
    plan = miss_policy.exact_plan(batch, slots(A, B, C))
    assert sorted(plan.loads) == [D, E]
    assert counts(plan) == (3, 5, 0, 0, 0)


def test_missing_experts_are_computed_on_the_host_where_that_is_said() -> None:
    batch = routing((A, D), (D, B), (C, D), (D, E), (F, E))
    plan = miss_policy.exact_plan(batch, slots(A, B, C), frozenset({D}))
    assert (sorted(plan.loads), plan.on_host) == ([E, F], (D,))
    assert counts(plan) == (3, 3, 4, 0, 0)


def test_with_every_missing_expert_on_the_host_nothing_is_loaded() -> None:
    plan = miss_policy.exact_plan(routing((D, E), (A, E)), slots(A), frozenset({D, E, F}))
    assert (plan.loads, set(plan.on_host), counts(plan)) == ((), {D, E}, (1, 0, 3, 0, 0))
    assert not plan.is_all_hits


def test_a_resident_expert_hits_even_where_the_host_could_compute_it() -> None:
    plan = miss_policy.exact_plan(routing((A, D)), slots(A, B), frozenset({A, B, D}))
    assert (plan.on_host, counts(plan)) == ((D,), (1, 0, 1, 0, 0))
    assert miss_policy.exact_plan(routing((A, B)), slots(A, B), frozenset({A})).is_all_hits


def test_experts_that_nobody_asked_for_are_left_alone() -> None:
    plan = miss_policy.exact_plan(routing((A, B)), slots(A), frozenset({E, F}))
    assert (plan.loads, plan.on_host) == ((B,), ())


def test_an_empty_cache_loads_all_and_a_full_one_nothing() -> None:
    batch = routing((A, B), (C, D), (E, F))
    assert sorted(miss_policy.exact_plan(batch, slots()).loads) == [A, B, C, D, E, F]
    assert miss_policy.exact_plan(batch, slots(F, E, D, C, B, A)).is_all_hits


@pytest.mark.parametrize("resident", [(), (A,), (A, B, C), (F, E, D, C, B, A)])
@pytest.mark.parametrize("on_host", [(), (D,), (A, B, C, D, E, F)])
def test_every_pair_keeps_its_expert_and_is_counted_once(
    resident: tuple[int, ...], on_host: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(6)[:3] for _ in range(40)]
    batch = np.array(chosen, np.int32)
    slot_of = slots(*resident)
    before = batch.copy(), slot_of.copy()
    plan = miss_policy.exact_plan(batch, slot_of, frozenset(on_host))
    assert np.array_equal(plan.experts, before[0]) and plan.experts.dtype == np.int32
    assert np.array_equal(batch, before[0]) and np.array_equal(slot_of, before[1])
    missing = set(range(6)) - set(resident)
    assert len(plan.loads) == len(set(plan.loads)) and len(plan.on_host) == len(set(plan.on_host))
    assert set(plan.on_host) == missing & set(on_host)
    assert set(plan.loads) == missing - set(on_host)
    assert plan.n_hit == np.isin(batch, resident).sum()
    assert plan.n_on_host == np.isin(batch, plan.on_host).sum()
    assert plan.n_loaded == np.isin(batch, plan.loads).sum()
    assert sum(counts(plan)) == batch.size


def test_the_counts_are_plain_numbers_that_json_can_carry() -> None:
    for plan in (
        miss_policy.all_resident(routing((A, B))),
        miss_policy.exact_plan(routing((A, D), (E, D)), slots(A), frozenset({D})),
    ):
        assert all(type(n) is int for n in (*counts(plan), *plan.loads, *plan.on_host))


def test_a_layer_that_has_every_expert_hits_with_every_pair() -> None:
    batch = routing((A, B), (C, B))
    plan = miss_policy.all_resident(batch)
    assert plan.is_all_hits and np.array_equal(plan.experts, batch)
    assert counts(plan) == (4, 0, 0, 0, 0)


def test_a_plan_keeps_its_experts_when_slots_are_written_over_the_routers_choice() -> None:
    for residents in [(A, B, C), (A,), ()]:
        batch = routing((A, B), (C, B))
        plan = miss_policy.exact_plan(batch, slots(*residents))
        batch[:] = 0
        assert np.array_equal(plan.experts, routing((A, B), (C, B)))


def test_one_expert_used_of_one() -> None:
    assert miss_policy.exact_plan(routing((A,), (A,)), slots(A, n_expert=1)).is_all_hits
    assert miss_policy.exact_plan(routing((A,), (A,)), slots(n_expert=1)).loads == (A,)


def routed(
    ids: np.ndarray, *residents: int, weights: tuple[tuple[float, ...], ...] = ((0.75, 0.25),)
) -> Routing:
    """Six experts, of which these are resident; scores do not matter to a plan."""
    is_resident = np.zeros(6, bool)
    is_resident[list(residents)] = True
    return Routing(ids, np.array(weights, np.float32), np.zeros((len(ids), 6)), is_resident)


def chosen(routing: Routing, *tokens: tuple[int, ...]) -> Choice:
    """These experts with the router's weights."""
    return Choice(np.array(tokens, np.int32), routing.weights)


def weights(plan: RoutingPlan) -> tuple[float, ...]:
    weight = plan.weight
    assert weight is not None
    return weight.hit, weight.loaded, weight.on_host, weight.substituted, weight.dropped


def test_an_exact_choice_is_planned_like_a_batch_without_a_policy() -> None:
    ids = routing((A, D), (D, E))
    case = routed(ids, A, weights=((0.75, 0.25), (0.5, 0.5)))
    for on_host in (frozenset[int](), frozenset({D}), frozenset({A, D, E, F})):
        plan = miss_policy.plan(miss_policy.exact(case), case, on_host)
        same = miss_policy.exact_plan(ids, slots(A), on_host)
        assert np.array_equal(plan.experts, same.experts)
        assert (plan.loads, plan.on_host) == (same.loads, same.on_host)
        assert counts(plan) == counts(same)
        assert plan.weights is None


def test_the_routers_weight_is_summed_by_how_its_pair_is_served() -> None:
    case = routed(routing((A, D), (D, E)), A, weights=((0.75, 0.25), (0.625, 0.375)))
    plan = miss_policy.plan(miss_policy.exact(case), case, frozenset({D}))
    assert weights(plan) == (0.75, 0.375, 0.875, 0, 0)  # A, E, D twice
    assert all(type(weight) is float for weight in weights(plan))
    assert plan.weight == ServedWeight(0.75, 0.375, 0.875, 0.0, 0.0)


def test_a_pair_of_a_stand_in_counts_as_substituted_with_the_routers_weight() -> None:
    case = routed(routing((A, D)), A, B)
    plan = miss_policy.plan(chosen(case, (A, B)), case)
    assert plan.is_all_hits and plan.experts.tolist() == [[A, B]]
    assert counts(plan) == (1, 0, 0, 1, 0)
    assert weights(plan) == (0.75, 0, 0, 0.25, 0)


def test_a_dropped_pair_is_computed_and_read_by_nobody() -> None:
    case = routed(routing((A, D)), A)
    choice = Choice(routing((A, DROPPED)), np.array([[0.75, 0.0]], np.float32))
    plan = miss_policy.plan(choice, case, frozenset({D}))
    assert plan.is_all_hits and (plan.loads, plan.on_host) == ((), ())
    assert counts(plan) == (1, 0, 0, 0, 1)
    assert weights(plan) == (0.75, 0, 0, 0, 0.25)
    assert plan.weights is not None and plan.weights.tolist() == [[0.75, 0.0]]


def test_a_plan_names_weights_only_where_they_are_not_the_routers() -> None:
    case = routed(routing((A, D)), A, B)
    same = Choice(routing((A, B)), case.weights.copy())
    assert miss_policy.plan(same, case).weights is None
    own = np.array([[0.5, 0.5]], np.float32)
    plan = miss_policy.plan(Choice(routing((A, B)), own), case)
    assert plan.weights is own and weights(plan) == (0.75, 0, 0, 0.25, 0)


def test_a_missing_expert_that_is_only_a_stand_in_is_seen_to_as_well() -> None:
    """One that is about to be read for another token may stand in."""
    case = routed(routing((A, D), (E, A)), A, weights=((0.75, 0.25), (0.75, 0.25)))
    plan = miss_policy.plan(chosen(case, (A, E), (E, A)), case)
    assert plan.loads == (E,)
    assert counts(plan) == (2, 1, 0, 1, 0)
    assert miss_policy.plan(chosen(case, (A, F), (B, A)), case, frozenset({B})).loads == (F,)


def test_a_plan_of_a_choice_is_not_changed_by_what_is_written_over_the_routers() -> None:
    case = routed(routing((A, D)), A)
    plan = miss_policy.plan(miss_policy.exact(case), case)
    case.expert_ids[:] = 0
    assert plan.experts.tolist() == [[A, D]]


def test_the_counts_of_a_choice_are_plain_numbers_that_json_can_carry() -> None:
    case = routed(routing((A, D), (D, E)), A, weights=((0.75, 0.25), (0.625, 0.375)))
    plan = miss_policy.plan(miss_policy.exact(case), case, frozenset({D}))
    assert all(type(n) is int for n in (*counts(plan), *plan.loads, *plan.on_host))
