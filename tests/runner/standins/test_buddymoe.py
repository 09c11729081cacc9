"""The definitions of BuddyMoE (arXiv 2511.10054), by examples computed on paper."""

import math
from dataclasses import replace

import numpy as np
import pytest

from runner.miss_policy import BuddyLists, BuddyMoEParameters, Gate, Routing, buddymoe
from runner.standins.buddymoe import buddy_lists, coactivation, missing_share, shares, tae
from tests.runner.standins.routings import odds, routed

A, B, C, D, E, F = range(6)
NOBODY = -1
SIX = (6.0, 4.0, 3.0, 2.0, 1.0, 1.0)  # odds: p = 6/17, 4/17, 3/17, 2/17, 1/17, 1/17
OPEN = BuddyMoEParameters(tau=-1.0, eta=0.0)


def six(*residents: int, n_expert_used: int = 2) -> Routing:
    return routed(odds(SIX), residents, n_expert_used)


def lists(hop: tuple[float, ...] = (0,) * 6, **buddies: dict[int, float]) -> BuddyLists:
    """Each expert's buddies and q, in the order of the list: B={C: 0.5, D: 0.3}."""
    experts, q = np.full((6, 5), NOBODY, np.int32), np.zeros((6, 5))
    for name, listed in buddies.items():
        row = "ABCDEF".index(name)
        experts[row, : len(listed)] = list(listed)
        q[row, : len(listed)] = list(listed.values())
    return BuddyLists(experts, q, np.array(hop, np.float64))


def stand_ins(
    routing: Routing,
    buddies: BuddyLists,
    parameters: BuddyMoEParameters = OPEN,
    gate: Gate | None = None,
) -> list[int]:
    """A lone token's experts, after seeing that a batch of three alike says the same."""
    gate = gate or Gate()
    three = Routing(
        np.tile(routing.expert_ids, (3, 1)),
        np.tile(routing.weights, (3, 1)),
        np.tile(routing.scores, (3, 1)),
        routing.is_resident,
    )
    alone, batch = (buddymoe(r, gate, buddies, parameters) for r in (routing, three))
    assert (batch.experts == alone.experts).all()
    assert alone.weights.tobytes() == routing.weights.tobytes(), "weights are kept"
    assert batch.weights.tobytes() == three.weights.tobytes()
    return alone.experts[0].tolist()


BUDDIES = lists(A={B: 0.5, C: 0.3, D: 0.2}, B={A: 0.5, C: 0.3, E: 0.2})


def test_m_counts_how_often_two_experts_are_chosen_together() -> None:
    ids = np.array([[A, B], [B, A], [A, C], [D, C]], np.int32)
    assert coactivation(ids, 5).tolist() == [
        [0, 2, 1, 0, 0],
        [2, 0, 0, 0, 0],
        [1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0],
    ]


def test_m_counts_every_pair_of_a_token_and_none_where_one_expert_is_used() -> None:
    assert coactivation(np.array([[A, B, C]], np.int32), 3).tolist() == [
        [0, 1, 1],
        [1, 0, 1],
        [1, 1, 0],
    ]
    assert not coactivation(np.array([[A], [A], [B]], np.int32), 3).any()
    assert not coactivation(np.zeros((0, 2), np.int32), 3).any()


def test_q_is_the_share_of_a_row_and_nothing_for_a_row_of_zeros() -> None:
    q = shares(np.array([[0, 3, 1], [3, 0, 0], [0, 0, 0]]))
    assert q.tolist() == [[0, 0.75, 0.25], [1, 0, 0], [0, 0, 0]]


def counts_of_a(*row: int) -> np.ndarray:
    """M with this row of A (from B on), the rest so that it is symmetric."""
    counts = np.zeros((len(row) + 1, len(row) + 1), np.int64)
    counts[0, 1:] = counts[1:, 0] = row
    return counts


def test_a_list_is_the_shortest_prefix_that_reaches_alpha() -> None:
    counts = counts_of_a(2, 5, 1, 2)  # q of B .2, C .5, D .1, E .2
    for alpha, expected in [
        (0.4, [C]),
        (0.5, [C]),  # reached, not passed
        (0.51, [C, B]),
        (0.7, [C, B]),
        (0.9, [C, B, E]),
        (0.95, [C, B, E, D]),
        (1.0, [C, B, E, D]),
    ]:
        listed = buddy_lists(counts, alpha, k_max=4).experts[A].tolist()
        assert listed == expected + [NOBODY] * (4 - len(expected)), alpha


def test_a_list_is_capped_at_k_max() -> None:
    buddies = buddy_lists(counts_of_a(2, 5, 1, 2), 0.95, k_max=2)
    assert buddies.experts.shape == buddies.shares.shape == (5, 2)
    assert buddies.experts[A].tolist() == [C, B] and buddies.experts.dtype == np.int32
    assert buddies.shares[A].tolist() == [0.5, 0.2]


def test_of_equal_q_the_lower_index_comes_first() -> None:
    assert buddy_lists(counts_of_a(1, 2, 2, 1), 1.0, 4).experts[A].tolist() == [C, D, B, E]


def test_who_was_never_used_with_an_expert_is_no_buddy_of_it() -> None:
    buddies = buddy_lists(counts_of_a(0, 3, 0), 1.0, 3)
    assert buddies.experts[A].tolist() == [C, NOBODY, NOBODY]
    assert buddies.experts[B].tolist() == [NOBODY] * 3
    assert buddies.shares[B].tolist() == [0, 0, 0]
    assert buddies.hop.tolist() == [0, 0, 0, 0]


def entropy(*numbers: float, k: int | None = None, temperature: float = 1.0) -> float:
    scores = odds(numbers)
    ids = np.arange(k or len(numbers))[None]
    return float(tae(scores, ids, temperature)[0])


def test_tae_is_the_entropy_of_the_selected_as_a_share_of_the_most_possible() -> None:
    assert entropy(1, 1) == 1.0
    assert entropy(1, 1, 1) == pytest.approx(1.0) and entropy(1, 1, 1) <= 1.0
    assert entropy(3, 1) == pytest.approx(0.8113, abs=1e-4)  # .75 log2(4/3) + .25 log2(4)
    assert entropy(2, 1, 1) == pytest.approx(1.5 / math.log2(3))  # 1.5 bits of log2(3)
    assert entropy(1, 1e-300) == pytest.approx(0.0, abs=1e-9)


def test_tae_renormalises_over_the_selected() -> None:
    assert entropy(3, 1, 50, 50, k=2) == pytest.approx(entropy(3, 1))


def test_tae_of_one_selected_expert_is_0() -> None:
    assert entropy(5, 1, k=1) == 0.0


def test_a_temperature_flattens_what_tae_is_taken_from() -> None:
    assert entropy(9, 1, temperature=2) == pytest.approx(entropy(3, 1))  # roots of 9 and 1
    assert entropy(9, 1, temperature=0.5) == pytest.approx(entropy(81, 1))


def test_tae_of_many_tokens() -> None:
    ids = np.array([[0, 1], [0, 2]])
    assert tae(odds((1, 1, 2), (3, 7, 1)), ids) == pytest.approx([1.0, 0.8113], abs=1e-4)


def test_a_missing_experts_pair_goes_to_its_first_buddy_that_is_resident() -> None:
    assert stand_ins(six(A, C, E), BUDDIES) == [A, C]
    assert stand_ins(six(A, D, E), BUDDIES) == [A, E]


def test_with_all_chosen_experts_resident_nothing_changes() -> None:
    assert stand_ins(six(A, B, C), BUDDIES) == [A, B]


def test_a_buddy_that_the_token_has_selected_is_skipped() -> None:
    """A is B's first buddy, and selected; so is B, A's first."""
    assert stand_ins(six(A, C), BUDDIES) == [A, C]
    assert stand_ins(six(B, C), BUDDIES) == [C, B]


def test_a_buddy_serves_one_pair_of_a_token() -> None:
    assert stand_ins(six(C, D, E), BUDDIES) == [C, E]  # A takes C, B would have
    assert stand_ins(six(C), BUDDIES) == [C, B]


def test_who_is_not_in_the_list_does_not_stand_in() -> None:
    assert stand_ins(six(A, D, F), BUDDIES) == [A, B]
    assert stand_ins(six(A, C), lists(A={C: 1.0})) == [A, B]


def test_a_confident_token_is_not_substituted() -> None:
    """The TAE of .6 and .4 is .971."""
    routing = six(A, C)
    assert stand_ins(routing, BUDDIES, replace(OPEN, tau=0.97)) == [A, C]
    assert stand_ins(routing, BUDDIES, replace(OPEN, tau=0.98)) == [A, B]


def test_a_tae_of_exactly_tau_is_not_substituted() -> None:
    halves = routed(odds((4, 4, 3, 1, 1, 1)), (A, C))
    assert stand_ins(halves, BUDDIES, replace(OPEN, tau=1.0)) == [A, B]
    assert stand_ins(halves, BUDDIES, replace(OPEN, tau=0.999)) == [A, C]


def test_the_gate_looks_at_each_token() -> None:
    routing = routed(odds(SIX, (60, 4, 3, 2, 1, 1)), (A, C))
    choice = buddymoe(routing, Gate(), BUDDIES, replace(OPEN, tau=0.5))
    assert choice.experts.tolist() == [[A, C], [A, B]]


def test_a_temperature_opens_the_gate() -> None:
    parameters = replace(OPEN, tau=0.98)
    assert stand_ins(six(A, C), BUDDIES, replace(parameters, temperature=4.0)) == [A, C]


def test_with_one_expert_used_no_token_is_unsure() -> None:
    assert stand_ins(six(C, n_expert_used=1), BUDDIES, replace(OPEN, tau=0.0)) == [A]
    assert stand_ins(six(C, n_expert_used=1), BUDDIES, replace(OPEN, tau=-1.0)) == [C]
    both = replace(OPEN, tau=-1.0, gamma=1.0)  # the lead over nobody is 1
    assert stand_ins(six(C, n_expert_used=1), BUDDIES, both) == [A]


def test_a_token_whose_first_choice_leads_by_the_margin_is_not_substituted() -> None:
    """The lead of .6 over .4 is .2."""
    assert stand_ins(six(A, C), BUDDIES, replace(OPEN, gamma=0.21)) == [A, C]
    assert stand_ins(six(A, C), BUDDIES, replace(OPEN, gamma=0.19)) == [A, B]
    halves = routed(odds((4, 4, 3, 1, 1, 1)), (A, C))
    assert stand_ins(halves, BUDDIES, replace(OPEN, gamma=0.0)) == [A, B]  # 0 >= 0


def test_the_missing_share_is_of_the_distinct_experts_of_the_batch() -> None:
    routing = routed(odds(SIX, SIX, (6, 1, 4, 1, 1, 1)), (A, D))  # A B, A B, A C
    assert missing_share(routing) == pytest.approx(2 / 3)
    assert missing_share(six(A)) == 0.5
    assert missing_share(six(A, B)) == 0.0


def test_with_too_many_missing_nobody_is_substituted() -> None:
    assert stand_ins(six(A, C), BUDDIES, replace(OPEN, beta=0.51)) == [A, C]
    assert stand_ins(six(A, C), BUDDIES, replace(OPEN, beta=0.5)) == [A, B]  # delta >= beta
    routing = routed(odds(SIX, (6, 1, 4, 1, 1, 1)), (A, E))  # 2 of 3 are missing
    for beta, expected in [(0.67, E), (0.66, B)]:
        choice = buddymoe(routing, Gate(), BUDDIES, replace(OPEN, beta=beta))
        assert choice.experts[0].tolist() == [A, expected]


def test_psi_weighs_the_tokens_own_probability_of_a_buddy() -> None:
    """C has q .3 and p 3/17, E .2 and 1/17, F .25 and 1/17."""
    buddies = lists(B={F: 0.35, C: 0.3})
    assert stand_ins(six(A, C, F), buddies, replace(OPEN, eta=0.0)) == [A, F]
    # .35 (1 + 1/17) = .371 against .3 (1 + 3/17) = .353
    assert stand_ins(six(A, C, F), buddies, replace(OPEN, eta=1.0)) == [A, F]
    # .35 (1 + 3/17) = .412 against .3 (1 + 9/17) = .459
    assert stand_ins(six(A, C, F), buddies, replace(OPEN, eta=3.0)) == [A, C]


def test_psi_makes_a_far_buddy_dearer() -> None:
    buddies = lists(hop=(0, 0, 1, 0, 0, 0), B={C: 0.5, D: 0.3})
    assert stand_ins(six(A, C, D), buddies, replace(OPEN, kappa=0.0)) == [A, C]
    assert stand_ins(six(A, C, D), buddies, replace(OPEN, kappa=0.3)) == [A, C]  # .35 > .3
    assert stand_ins(six(A, C, D), buddies, replace(OPEN, kappa=0.5)) == [A, D]  # .25 < .3
    assert stand_ins(six(A, C), buddies, replace(OPEN, kappa=2.0)) == [A, C]  # the only one


def test_of_equal_psi_the_earlier_buddy_stands_in() -> None:
    assert stand_ins(six(A, C, D), lists(B={D: 0.4, C: 0.4})) == [A, D]


def test_only_the_first_of_the_list_are_looked_at() -> None:
    routing = six(A, E)  # the third of B's buddies
    for depth, expected in [(0, B), (1, B), (2, B), (3, E), (9, E)]:
        parameters = replace(OPEN, search_depth=depth)
        assert stand_ins(routing, BUDDIES, parameters) == [A, expected]


def test_at_most_so_many_pairs_of_a_token_are_substituted() -> None:
    routing = six(C, D, E)
    for most, expected in [(0, [A, B]), (1, [C, B]), (2, [C, E])]:
        assert stand_ins(routing, BUDDIES, replace(OPEN, max_per_token=most)) == expected


def test_a_pair_without_a_buddy_does_not_use_up_the_tokens_limit() -> None:
    buddies = lists(B={C: 1.0})
    assert stand_ins(six(C, D), buddies, replace(OPEN, max_per_token=1)) == [A, C]


def test_the_common_gate_holds_too() -> None:
    routing = six(C, D, E)
    assert stand_ins(routing, BUDDIES, gate=Gate(min_rank=2)) == [A, C]
    assert stand_ins(routing, BUDDIES, gate=Gate(max_weight=0.5)) == [A, C]
    nothing = Gate(allowance=np.zeros(1))
    assert buddymoe(routing, nothing, BUDDIES, OPEN).experts.tolist() == [[A, B]]


def test_a_batch_spends_its_allowance_on_what_it_substitutes() -> None:
    """B's only buddy is selected by the first token, so the second one can afford its B (.4)."""
    routing = routed(odds((1, 4, 1, 1, 6, 1), SIX), (A, E))
    assert routing.expert_ids.tolist() == [[E, B], [A, B]]
    buddies = lists(B={E: 1.0})
    gate = Gate(allowance=np.array([0.5, 0.5]))
    assert buddymoe(routing, gate, buddies, OPEN).experts.tolist() == [[E, B], [A, E]]
