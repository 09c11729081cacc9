"""Who stands in for whom, by hand-made routings whose answer is known on paper.

Experts A to F have the odds 6 4 3 2 1 0.5 where nothing else is said: of two chosen, A has the
router's weight .6 and B .4. Every case is tried with a lone token and in a batch of that token
and itself, which take different ways through the code.
"""

from collections.abc import Callable

import numpy as np
import pytest

from runner import miss_policy
from runner.miss_policy import DROPPED, Choice, Gate, Routing
from tests.runner.standins.routings import odds, routed

A, B, C, D, E, F = range(6)
SIX = (6.0, 4.0, 3.0, 2.0, 1.0, 0.5)
OPEN = Gate()


def six(*residents: int, n_expert_used: int = 2) -> Routing:
    return routed(odds(SIX), residents, n_expert_used)


def choice(policy: Callable[[Routing], Choice], routing: Routing) -> tuple[list[int], list[float]]:
    """Experts and weights of a lone token, which a batch of two alike has as well."""
    alone = policy(routing)
    twice = Routing(
        np.tile(routing.expert_ids, (2, 1)),
        np.tile(routing.weights, (2, 1)),
        np.tile(routing.scores, (2, 1)),
        routing.is_resident,
    )
    batch = policy(twice)
    for row in range(2):
        assert batch.experts[row].tolist() == alone.experts[0].tolist()
        assert batch.weights[row] == pytest.approx(alone.weights[0], abs=1e-7)
    return alone.experts[0].tolist(), [round(float(w), 4) for w in alone.weights[0]]


def routers(routing: Routing, gate: Gate = OPEN) -> list[int]:
    experts, weights = choice(lambda r: miss_policy.router(r, gate), routing)
    assert weights == [round(float(w), 4) for w in routing.weights[0]], "weights are kept"
    return experts


def test_exact_leaves_everything_to_the_experts_that_the_router_chose() -> None:
    assert choice(miss_policy.exact, six(C)) == ([A, B], [0.6, 0.4])


def test_a_missing_expert_is_replaced_by_the_best_resident_by_the_tokens_own_score() -> None:
    assert routers(six(A, D, E, C)) == [A, C]


def test_two_missing_experts_are_replaced_in_rank_order() -> None:
    assert routers(six(C, D, E)) == [C, D]


def test_a_stand_in_that_the_token_has_selected_already_is_skipped() -> None:
    assert routers(six(B, D, E)) == [D, B]


def test_with_no_candidate_left_the_pair_stays_exact() -> None:
    assert routers(six(A)) == [A, B]
    assert routers(six()) == [A, B]
    assert routers(six(C)) == [C, B]  # the better rank is served first


def test_with_one_expert_used_the_next_best_resident_takes_the_token() -> None:
    assert routers(six(C, D, n_expert_used=1)) == [C]
    assert routers(six(A, D, n_expert_used=1)) == [A]
    assert routers(six(n_expert_used=1)) == [A]


def test_of_equal_scores_the_lower_index_stands_in() -> None:
    assert routers(routed(odds((6, 4, 2, 3, 3, 1)), (A, E, D, F))) == [A, D]


def test_more_experts_used_than_two() -> None:
    assert routers(six(B, E, F, n_expert_used=4)) == [E, B, F, D]


def test_protected_ranks_are_never_given_away() -> None:
    assert routers(six(C, D), Gate(min_rank=2)) == [A, C]
    assert routers(six(C, D), Gate(min_rank=3)) == [A, B]
    assert routers(six(C, D), Gate(min_rank=9)) == [A, B]


def test_a_pair_of_more_weight_than_the_gate_lets_through_is_exact() -> None:
    assert routers(six(C, D), Gate(max_weight=0.5)) == [A, C]
    assert routers(six(C, D), Gate(max_weight=0.3)) == [A, B]
    halves = routed(odds((4, 4, 2, 1)), (C, D))  # .5 and .5
    assert routers(halves, Gate(max_weight=0.5)) == [C, D]
    assert routers(halves, Gate(max_weight=0.499)) == [A, B]


def test_the_gates_weight_is_not_rounded_to_the_weights_precision() -> None:
    """The float32 next to .4 is 6e-9 above it."""
    routing = six(A, C)
    routing.weights[:] = [0.6, 0.4]
    assert routers(routing, Gate(max_weight=0.4)) == [A, B]
    assert routers(routing, Gate(max_weight=0.4 + 1e-8)) == [A, C]


def test_similar_takes_the_resident_of_the_lowest_error() -> None:
    error = np.ones((6, 6), np.float32)
    error[B] = [0.0, 0.0, 0.5, 0.1, 0.3, 0.2]
    error[A] = [0.0, 0.0, 0.5, 0.4, 0.3, 0.6]

    def similar(routing: Routing, gate: Gate = OPEN) -> list[int]:
        return choice(lambda r: miss_policy.similar(r, gate, error), routing)[0]

    assert similar(six(A, C, D, E, F)) == [A, D]
    assert similar(six(A, C, E)) == [A, E]
    assert similar(six(C, D, E, F)) == [E, D]
    assert similar(six(C, E)) == [E, C]  # A, served first, took E
    assert similar(six(A)) == [A, B]
    assert similar(six(C, D, E, F), Gate(min_rank=2)) == [A, D]


def test_of_equal_errors_the_better_score_stands_in_and_then_the_lower_index() -> None:
    error = np.full((6, 6), 0.5, np.float32)
    similar = lambda r: miss_policy.similar(r, OPEN, error)  # noqa: E731
    assert choice(similar, six(A, F, D, E))[0] == [A, D]
    assert choice(similar, routed(odds((6, 4, 1, 2, 3, 3)), (A, F, E, D)))[0] == [A, E]


def test_a_dropped_pair_has_no_expert_and_no_weight_and_the_others_keep_theirs() -> None:
    def drop(routing: Routing, gate: Gate = OPEN) -> tuple[list[int], list[float]]:
        return choice(lambda r: miss_policy.drop(r, gate), routing)

    assert drop(six(A, C)) == ([A, DROPPED], [0.6, 0.0])
    assert drop(six()) == ([DROPPED, DROPPED], [0.0, 0.0])
    assert drop(six(), Gate(min_rank=2)) == ([A, DROPPED], [0.6, 0.0])
    assert drop(six(), Gate(max_weight=0.3)) == ([A, B], [0.6, 0.4])


def test_random_takes_any_free_resident_and_the_same_with_the_same_seed() -> None:
    routing = six(A, C, D, F)

    def experts(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        return miss_policy.random(routing, OPEN, rng).experts[0].tolist()

    picked = [experts(seed)[1] for seed in range(300)]
    assert all(picked.count(expert) > 70 for expert in (C, D, F))  # 100 each on average
    assert set(picked) == {C, D, F}
    assert picked == [experts(seed)[1] for seed in range(300)]


def test_random_draws_nothing_where_nothing_is_missing() -> None:
    rng = np.random.default_rng(0)
    miss_policy.random(six(A, B), OPEN, rng)
    assert rng.random() == np.random.default_rng(0).random()


# Scores 6 4 3 1: the spread is 5. The weights of the chosen two are 1 / (1 + e^-2) = .8808 and
# .1192; of the scores 6 and 3 they are 1 / (1 + e^-3) = .9526 and .0474.
FOUR = [[6.0, 4.0, 3.0, 1.0]]


def prior(
    residents: tuple[int, ...], strength: float, gate: Gate = OPEN, n_expert_used: int = 2
) -> tuple[list[int], list[float]]:
    routing = routed(FOUR, residents, n_expert_used)
    return choice(lambda r: miss_policy.prior(r, strength, gate), routing)


def test_prior_raises_residents_by_a_share_of_the_scores_spread() -> None:
    assert prior((A, C), 0.1) == ([A, B], [0.8808, 0.1192])  # 3 + .5 < 4
    assert prior((A, C), 0.3) == ([A, C], [0.9526, 0.0474])  # 3 + 1.5 > 4
    assert prior((A, C), 0.2) == ([A, B], [0.8808, 0.1192])  # 3 + 1 = 4: the router's choice
    assert prior((A, D), 0.5) == ([A, B], [0.8808, 0.1192])  # 1 + 2.5 < 4


def test_what_prior_leaves_missing_is_exact() -> None:
    assert prior((C, D), 0.3) == ([A, C], [0.9526, 0.0474])  # 3 + 1.5 > 4, but 1 + 1.5 < 6
    # C, being above A as well, displaces B; D is not above A: 1 + 3.5 < 6
    assert prior((C, D), 0.7) == ([A, C], [0.9526, 0.0474])


def test_prior_gives_the_first_displaced_place_to_the_best_newcomer() -> None:
    # 3 + 10 and 1 + 10 are above 6 and 4; softmax of 3 and 1 is .8808 and .1192
    assert prior((C, D), 2.0) == ([C, D], [0.8808, 0.1192])
    # A is displaced and B kept: softmax of 3 and 4
    assert prior((B, C), 2.0) == ([C, B], [0.2689, 0.7311])


def test_prior_always_selects_the_protected_ranks() -> None:
    assert prior((C, D), 2.0, Gate(min_rank=2)) == ([A, C], [0.9526, 0.0474])
    assert prior((C, D), 2.0, Gate(min_rank=3)) == ([A, B], [0.8808, 0.1192])


def test_prior_leaves_a_token_alone_that_would_displace_too_much() -> None:
    assert prior((A, C), 0.3, Gate(max_weight=0.12))[0] == [A, C]
    assert prior((A, C), 0.3, Gate(max_weight=0.11)) == ([A, B], [0.8808, 0.1192])
    assert prior((C, D), 2.0, Gate(max_weight=0.5)) == ([A, B], [0.8808, 0.1192])  # whole


def test_prior_with_one_expert_used() -> None:
    assert prior((C,), 0.5, n_expert_used=1) == ([A], [1.0])  # 3 + 2.5 < 6
    assert prior((C,), 0.7, n_expert_used=1) == ([C], [1.0])  # 3 + 3.5 > 6


@pytest.mark.parametrize(
    "policy",
    [
        lambda routing: miss_policy.prior(routing, 0.3, Gate(max_weight=0.45)),
        lambda routing: miss_policy.resident(routing, Gate(max_weight=0.45)),
    ],
)
def test_a_token_whose_selection_does_not_change_keeps_the_routers_weights(
    policy: Callable[[Routing], Choice],
) -> None:
    """Though they are others than the softmax of its scores; in one batch with one that changes."""
    routing = routed([*FOUR, *FOUR], (A, C))
    routing.weights[:] = [[0.5, 0.5], [0.6, 0.4]]
    weights = policy(routing).weights
    assert weights[0].tolist() == [0.5, 0.5]
    assert weights[1] == pytest.approx([0.9526, 0.0474], abs=1e-4)


def test_prior_without_newcomers_is_exact() -> None:
    assert prior((), 2.0)[0] == [A, B]
    assert prior((B,), 2.0)[0] == [A, B]


def resident(routing: Routing, gate: Gate = OPEN) -> tuple[list[int], list[float]]:
    return choice(lambda r: miss_policy.resident(r, gate), routing)


def test_resident_selects_and_weighs_among_residents_only() -> None:
    assert resident(six(C, D, F)) == ([C, D], [0.6, 0.4])  # 3 / 5, 2 / 5
    assert resident(six(A, C, F)) == ([A, C], [0.6667, 0.3333])  # 6 / 9, 3 / 9
    assert resident(six(B, D, F)) == ([D, B], [0.3333, 0.6667])  # B keeps its place


def test_resident_needs_as_many_residents_as_a_token_uses() -> None:
    assert resident(six(C)) == ([A, B], [0.6, 0.4])
    assert resident(six(A)) == ([A, B], [0.6, 0.4])
    assert resident(six(B, C, n_expert_used=3))[0] == [A, B, C]
    assert resident(six(C, n_expert_used=1)) == ([C], [1.0])


def test_resident_leaves_a_token_alone_that_the_gate_does_not_let_through() -> None:
    assert resident(six(C, D), Gate(min_rank=2)) == ([A, B], [0.6, 0.4])
    assert resident(six(A, D), Gate(min_rank=2)) == ([A, D], [0.75, 0.25])
    assert resident(six(C, D), Gate(max_weight=0.5)) == ([A, B], [0.6, 0.4])
    assert resident(six(A, D), Gate(max_weight=0.5)) == ([A, D], [0.75, 0.25])


def test_of_equal_residents_the_one_that_the_router_chose_is_kept() -> None:
    routing = routed(odds((6, 3, 3, 3, 1)), (B, C, D))
    assert resident(routing)[0] == [C, B]
    assert choice(lambda r: miss_policy.prior(r, 4.0, OPEN), routing)[0] == [C, B]


def prior_then_router(allowance: float | None, min_rank: int = 1) -> tuple[list[int], list[float]]:
    """C and D are resident: prior gives B's .1192 to C, the router A's .8808 to D."""
    bound = None if allowance is None else np.array([allowance])
    gate = Gate(min_rank=min_rank, allowance=bound)
    routing = routed(FOUR, (C, D))
    chosen = miss_policy.prior_then(routing, 0.3, gate, miss_policy.router)
    return chosen.experts[0].tolist(), [round(float(w), 4) for w in chosen.weights[0]]


def test_what_prior_leaves_missing_is_given_to_the_second_policy_with_its_new_weight() -> None:
    assert prior_then_router(None) == ([D, C], [0.9526, 0.0474])
    assert prior_then_router(None, min_rank=2) == ([A, C], [0.9526, 0.0474])


def test_the_second_policy_has_what_prior_left_of_the_allowance() -> None:
    assert prior_then_router(1.01) == ([D, C], [0.9526, 0.0474])
    assert prior_then_router(0.9) == ([A, C], [0.9526, 0.0474])  # .1192 + .8808 > .9
    assert prior_then_router(0.1) == ([A, B], [0.8808, 0.1192])


def test_where_prior_changes_nothing_the_second_policy_has_the_routers_weights() -> None:
    def both(routing: Routing) -> Choice:
        return miss_policy.prior_then(routing, 0.1, OPEN, miss_policy.router)

    assert choice(both, routed(FOUR, (A, C))) == ([A, C], [0.8808, 0.1192])


def test_what_is_dropped_after_prior_has_no_weight() -> None:
    def both(routing: Routing) -> Choice:
        return miss_policy.prior_then(routing, 0.3, OPEN, miss_policy.drop)

    assert choice(both, routed(FOUR, (C, D))) == ([DROPPED, C], [0.0, 0.0474])
