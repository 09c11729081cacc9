"""What a batch may give away together, by amounts known on paper."""

import numpy as np
import pytest

from runner import miss_policy
from runner.miss_policy import Gate, Routing
from tests.runner.standins.routings import odds, routed

A, B, C, D = range(4)
TOKEN = (6.0, 4.0, 3.0, 2.0, 1.0)  # of two chosen, A has the weight .6 and B .4


def batch(n_tokens: int, *residents: int) -> Routing:
    return routed(odds(*[TOKEN] * n_tokens), residents)


def given(routing: Routing, *allowance: float, min_rank: int = 1) -> list[str]:
    """The ranks that each token gives away by the router's scores, such as "12" for both."""
    gate = Gate(min_rank=min_rank, allowance=np.array(allowance))
    experts = miss_policy.router(routing, gate).experts
    rows = experts != routing.expert_ids
    return ["".join(str(rank + 1) for rank in np.flatnonzero(row)) for row in rows]


def test_tokens_spend_in_their_order() -> None:
    # .4, then .8 > .5, then .4 + .4 <= .9
    assert given(batch(3, A, C), 0.5, 0.5, 0.9) == ["2", "", "2"]


def test_a_token_affords_its_cheap_pairs_first() -> None:
    for allowance, expected in [(0.3, ""), (0.5, "2"), (0.7, "2"), (1.01, "12")]:
        assert given(batch(1, C, D), allowance) == [expected]
        assert given(batch(2, C, D), allowance, allowance) == [expected, ""]


def test_a_protected_pair_does_not_use_up_anything() -> None:
    assert given(batch(2, C, D), 0.5, 0.9, min_rank=2) == ["2", "2"]


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_of_two_pairs_of_equal_weight_the_later_rank_goes_first(n_tokens: int) -> None:
    halves = routed(odds(*[(4, 4, 3, 2)] * n_tokens), (C, D))
    assert given(halves, *[0.6] * n_tokens) == ["2", ""][:n_tokens]


def test_what_a_later_token_forbids_is_not_spent_before() -> None:
    assert given(batch(2, A, C), 1.0, 0.0) == ["", ""]
    assert given(batch(3, A, C), 1.0, 0.5, 2.0) == ["2", "", "2"]


def test_a_debt_is_paid_before_anything_is_given_away() -> None:
    assert given(batch(3, A, C), -1.0, -0.1, 0.5) == ["", "", "2"]
    assert given(batch(1, A, C), -0.1) == [""]


def test_a_pair_that_nobody_takes_costs_nothing() -> None:
    """The first token uses the only resident expert itself, the second does not."""
    routing = routed(odds((6, 4, 3, 1), (1, 2, 6, 4)), (A,))
    assert given(routing, 0.4, 0.61) == ["", "2"]
    assert given(routing, 0.4, 1.01) == ["", "1"]  # both affordable, the better rank is served


@pytest.mark.parametrize("n_tokens", [1, 2])
def test_where_nothing_is_left_not_even_weight_0_is_given_away(n_tokens: int) -> None:
    routing = routed([[200.0, 0.0, -1.0]] * n_tokens, (A, C))
    assert routing.weights[0, 1] == 0.0
    assert given(routing, *[0.0] * n_tokens) == [""] * n_tokens
    assert given(routing, *[0.1] * n_tokens) == ["2"] * n_tokens


def test_no_allowance_is_no_bound() -> None:
    routing = batch(4, C, D)
    assert (miss_policy.router(routing, Gate()).experts == [C, D]).all()


@pytest.mark.parametrize("n_tokens", [1, 3])
def test_a_selection_is_paid_as_a_whole(n_tokens: int) -> None:
    routing = batch(n_tokens, C, D)
    for allowance, n_expected in [(0.9, 0), (1.01, 1)]:
        gate = Gate(allowance=np.full(n_tokens, allowance))
        for choice in (
            miss_policy.resident(routing, gate),
            miss_policy.prior(routing, 9.0, gate),
        ):
            changed = (choice.experts != routing.expert_ids).all(axis=1)
            assert changed.tolist() == [token < n_expected for token in range(n_tokens)]
            assert (choice.experts[~changed] == routing.expert_ids[~changed]).all()


def test_a_selection_that_is_too_dear_leaves_the_rest_to_later_tokens() -> None:
    routing = routed(odds((6, 4, 3, 1), (6, 1, 0.5, 0.2)), (A, C))  # B has 4 / 10, then 1 / 7
    gate = Gate(allowance=np.array([0.3, 0.3]))
    for choice in (
        miss_policy.resident(routing, gate),
        miss_policy.prior(routing, 1.0, gate),
    ):
        assert choice.experts.tolist() == [[A, B], [A, C]]
