"""A run's policy: what it wants, what its budget lets it have, and how both are counted."""

from dataclasses import replace

import numpy as np
import pytest

from runner import miss_policy
from runner.config import BUDDY_POLICIES
from runner.miss_policy import Choice, Gate, Routing
from runner.standins.buddy_policy import BuddyPolicy, Choose
from runner.standins.budget import WINDOW, Budget, Opening
from runner.standins.make_policy import PolicySettings, make_policy
from tests.runner.standins.routings import odds, routed
from tests.runner.standins.streams import N_EXPERT, N_LAYER, measured_table, random_routing

A, B, C, D = range(4)
TOKEN = odds((6, 4, 3, 2))  # of two chosen, A has the weight .6 and B .4
MISSES_B = routed(TOKEN, (A, C, D))


def drop_all(layer: int, routing: Routing, gate: Gate, opening: float) -> Choice:
    return miss_policy.drop(routing, gate)


class Witness:
    """Gives missing pairs to nobody, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, Gate, float]] = []

    def __call__(self, layer: int, routing: Routing, gate: Gate, opening: float) -> Choice:
        self.asked.append((layer, gate, opening))
        return drop_all(layer, routing, gate, opening)


def policy_of(
    choose: Choose = drop_all, share: float = 0.1, n_layer: int = 2, min_rank: int = 1
) -> BuddyPolicy:
    return BuddyPolicy("some", choose, Budget(share, n_layer), Opening(share, 0.5), min_rank)


def n_given(policy: BuddyPolicy, routing: Routing, layer: int = 0) -> int:
    """Choose and spend; how many pairs went away."""
    choice = policy.choose(layer, routing)
    policy.spend(routing, choice)
    return int((choice.experts != routing.expert_ids).sum())


def test_a_policy_is_asked_for_its_wish_and_again_only_if_that_is_too_much() -> None:
    witness = Witness()
    policy = policy_of(witness, share=0.5, min_rank=2)
    policy.begin(1)
    assert n_given(policy, MISSES_B, layer=0) == 1  # .4 <= .5
    assert witness.asked == [(0, Gate(min_rank=2), 0.5)]
    assert n_given(policy, MISSES_B, layer=1) == 1  # .8 <= 1
    policy.end()
    policy.begin(1)
    witness.asked.clear()
    policy.budget.spend(np.array([0.4]))
    assert n_given(policy, MISSES_B, layer=0) == 0
    (_, wish, _), (layer, gate, opening) = witness.asked
    assert wish == Gate(min_rank=2)
    assert (layer, gate.min_rank, gate.max_weight) == (0, 2, 1.0)
    assert gate.allowance is not None and gate.allowance == pytest.approx([0.3])  # 1.5 - .8 - .4
    assert opening == policy.opening.value


def test_without_a_limit_everything_wanted_is_given_and_counted() -> None:
    witness = Witness()
    policy = policy_of(witness, share=1.0)
    assert not policy.is_bounded
    for _ in range(300):
        policy.begin(1)
        assert [n_given(policy, MISSES_B, layer) for layer in range(2)] == [1, 1]
        policy.end()
    assert policy.budget.spent_share == pytest.approx(0.4)
    policy.begin(400)
    assert n_given(policy, routed(np.repeat(TOKEN, 400, axis=0), (C, D))) == 800
    policy.end()
    assert {gate.allowance for _, gate, _ in witness.asked} == {None}
    assert policy.opening.value == 1.0


def test_what_is_only_looked_at_is_not_spent_and_a_second_look_counts() -> None:
    policy = policy_of(share=0.5)
    policy.begin(1)
    policy.choose(0, routed(TOKEN, (C, D)))
    for _ in range(3):
        choice = policy.choose(0, MISSES_B)
    policy.spend(MISSES_B, choice)
    policy.end()
    assert policy.budget.spent_share == pytest.approx(0.2)  # .4 of the weight of two layers


def test_a_layer_of_which_nothing_is_missing_spends_nothing() -> None:
    policy = policy_of(share=0.5)
    policy.begin(1)
    everything = routed(TOKEN, (A, B, C, D))
    choice = policy.choose(0, everything)
    assert choice.experts is everything.expert_ids
    policy.spend(everything, choice)
    policy.end()
    assert policy.budget.spent_share == 0.0


def test_the_routers_weight_is_spent_whatever_weight_the_stand_in_gets() -> None:
    def heavy(layer: int, routing: Routing, gate: Gate, opening: float) -> Choice:
        return Choice(np.array([[A, C]], np.int32), np.array([[-3.0, 9.0]], np.float32))

    policy = policy_of(heavy, share=1.0)
    policy.begin(1)
    n_given(policy, MISSES_B)
    policy.end()
    assert policy.budget.spent_share == pytest.approx(0.2)


def test_in_the_last_layer_of_a_batch_its_last_token_has_what_all_left() -> None:
    witness = Witness()
    policy = policy_of(witness, share=0.11, n_layer=2)
    batch = routed(np.repeat(TOKEN, 5, axis=0), (A, C, D))
    policy.begin(5)
    # the allowance of the fourth token is .44
    choice = policy.choose(0, batch)
    assert (choice.experts != batch.expert_ids)[:, 1].tolist() == [False] * 3 + [True, False]
    policy.spend(batch, choice)
    assert n_given(policy, MISSES_B, layer=1) == 0
    gate = witness.asked[-1][1]
    assert gate.allowance is not None and gate.allowance == pytest.approx([0.66 - 0.4])
    policy.end()
    assert policy.budget.spent_share == pytest.approx(0.4 / 6)

    policy.begin(5)
    assert n_given(policy, MISSES_B, layer=1) == 1, "the others' layers were spent on nothing"
    policy.end()
    assert policy.budget.spent_share == pytest.approx(0.8 / 12)


def test_a_token_of_a_batch_does_not_spend_what_later_ones_will_have() -> None:
    scores = np.concatenate([odds((6, 4, 3, 2)), *[odds((6, 1, 4, 2))] * 9])  # B once, then C
    for residents, expected in [((A, C, D), []), ((A, B, D), [4, 8])]:
        policy = policy_of(share=0.09, n_layer=5)
        policy.begin(10)
        batch = routed(scores, residents)
        choice = policy.choose(0, batch)
        assert np.flatnonzero((choice.experts != batch.expert_ids)[:, 1]).tolist() == expected


def test_a_batch_that_was_not_finished_leaves_nothing_behind() -> None:
    policies = policy_of(share=0.5), policy_of(share=0.5)
    for policy in policies:
        policy.begin(1)
        n_given(policy, MISSES_B)
        policy.end()
    policies[0].begin(7)
    n_given(policies[0], routed(np.repeat(TOKEN, 7, axis=0), (C, D)))
    for policy in policies:
        policy.begin(1)
        policy.end()
    assert policies[0].budget.spent_share == policies[1].budget.spent_share
    assert policies[0].opening.value == policies[1].opening.value


def test_the_opening_follows_what_is_wanted_and_not_what_the_budget_lets_it() -> None:
    policy = policy_of(share=0.1)  # wants .4 in both layers, and gets a quarter of that
    for _ in range(400):
        policy.begin(1)
        for layer in range(2):
            n_given(policy, MISSES_B, layer)
        policy.end()
    assert policy.budget.spent_share == pytest.approx(0.1, rel=0.05)
    assert policy.opening.value == 0.001


def test_what_is_wanted_in_all_layers_of_a_batch_moves_the_opening_once() -> None:
    policy, expected = policy_of(share=0.1), Opening(0.1, 0.5)
    policy.begin(3)
    n_given(policy, routed(np.repeat(TOKEN, 3, axis=0), (A, C, D)), layer=0)  # 3 * .4
    n_given(policy, routed(TOKEN, (C, D)), layer=1)  # 1
    policy.end()
    expected.follow(2.2 / 4, 3)
    assert policy.opening.value == pytest.approx(expected.value)


# with real policies

TABLE = measured_table()
SHARE = 0.08


EVERY_DAY = ("blend", "prior-router", "buddymoe")


@pytest.mark.parametrize(
    "name",
    [n if n in EVERY_DAY else pytest.param(n, marks=pytest.mark.slow) for n in BUDDY_POLICIES],
)
def test_every_policy_keeps_the_budget_and_uses_it(name: str) -> None:
    """Tokens and now and then a prompt; the books are kept here, from choices and routings."""
    policy = make_policy(PolicySettings(name, SHARE), N_LAYER, TABLE)
    rng = np.random.default_rng(6)
    spent: list[float] = []
    weight: list[int] = []
    while len(spent) < 800:
        n_tokens = 60 if rng.random() < 0.01 else 1
        given, all_of = np.zeros(n_tokens), np.zeros(n_tokens, int)
        policy.begin(n_tokens)
        for layer in range(N_LAYER):
            n_routed = n_tokens if layer < N_LAYER - 1 else 1
            rows = slice(n_tokens - n_routed, None)
            routing = random_routing(rng, n_routed, int(rng.integers(3, N_EXPERT)))
            choice = policy.choose(layer, routing)
            policy.spend(routing, choice)
            given[rows] += (routing.weights * (choice.experts != routing.expert_ids)).sum(axis=1)
            all_of[rows] += 1
        policy.end()
        spent += given.tolist()
        weight += all_of.tolist()
        last = slice(-WINDOW, None)
        assert sum(spent[last]) <= SHARE * sum(weight[last]) + 1e-6
        assert policy.budget.spent_share == pytest.approx(sum(spent[last]) / sum(weight[last]))
    used = sum(spent[300:]) / sum(weight[300:])
    assert used > 0.8 * SHARE


def test_a_protected_rank_is_nobodys_whatever_the_budget() -> None:
    policy = make_policy(PolicySettings("router", 1.0, min_rank=2), 2, None)
    policy.begin(1)
    choice = policy.choose(0, replace(MISSES_B, is_resident=np.array([False, False, True, True])))
    assert choice.experts.tolist() == [[A, C]]
