"""Every policy can be made, and its opening decides how much it gives away."""

from dataclasses import replace

import numpy as np
import pytest

from runner.buddies import BuddyTable
from runner.config import BUDDY_POLICIES
from runner.miss_policy import DROPPED, Choice, Routing
from runner.standins.buddy_policy import BuddyPolicy
from runner.standins.make_policy import NEEDS_PROFILE, PolicySettings, make_policy
from tests.runner.standins.routings import odds, routed
from tests.runner.standins.streams import (
    N_EXPERT,
    N_LAYER,
    N_USED,
    measured_table,
    random_routing,
)
from tests.runner.test_buddies import make_table

pytestmark = pytest.mark.filterwarnings("error")

TABLE = measured_table()
A, B, C, D = range(4)


def opened(name: str, opening: float, min_rank: int = 1, table: BuddyTable = TABLE) -> BuddyPolicy:
    """A policy without a limit whose opening stays where it is."""
    policy = make_policy(PolicySettings(name, 1.0, min_rank), table.n_layer, table)
    policy.opening.value = opening
    return policy


def choose(policy: BuddyPolicy, routing: Routing, layer: int = 0) -> Choice:
    policy.begin(len(routing.expert_ids))
    return policy.choose(layer, routing)


def given_share(policy: BuddyPolicy, n_resident: int = 6) -> float:
    """The part of the missing experts' weight that is given away, of some hundred tokens."""
    rng, given, missing = np.random.default_rng(5), 0.0, 0.0
    for n_tokens in (1, 1, 1, 1, 20, 40, 150):
        for layer in range(N_LAYER):
            routing = random_routing(rng, n_tokens, n_resident)
            choice = choose(policy, routing, layer)
            given += routing.weights[choice.experts != routing.expert_ids].sum()
            missing += routing.weights[~routing.is_resident[routing.expert_ids]].sum()
    return float(given / missing)


@pytest.mark.parametrize("n_tokens", [1, 17])
@pytest.mark.parametrize("name", BUDDY_POLICIES)
def test_every_policy_is_made_and_chooses_residents_for_missing_experts(
    name: str, n_tokens: int
) -> None:
    policy = make_policy(PolicySettings(name, 0.3), N_LAYER, TABLE)
    assert (policy.name, policy.budget.share, policy.opening.value) == (name, 0.3, 0.2)
    policy.opening.value = 0.5
    rng, n_given = np.random.default_rng(1), 0
    for layer in (*range(N_LAYER), *range(N_LAYER)) * 5:
        routing = random_routing(rng, n_tokens)
        choice = choose(policy, routing, layer)
        given = choice.experts != routing.expert_ids
        n_given += given.sum()
        assert not given[:, 0].any(), "the router's first choice is protected by default"
        assert not routing.is_resident[routing.expert_ids[given]].any()
        stand_ins = choice.experts[given]
        assert (stand_ins == DROPPED).all() == (name == "drop") or not given.any()
        assert name == "drop" or routing.is_resident[stand_ins].all()
        assert choice.weights.dtype == np.float32 and np.isfinite(choice.weights).all()
    assert n_given > 0


@pytest.mark.parametrize("name", BUDDY_POLICIES)
def test_without_a_profile_only_those_are_made_that_need_none(name: str) -> None:
    settings = PolicySettings(name, 0.3)
    if name in NEEDS_PROFILE:
        with pytest.raises(AssertionError, match=f"{name} needs a profile"):
            make_policy(settings, N_LAYER, None)
    else:
        routing = random_routing(np.random.default_rng(1))
        assert choose(make_policy(settings, N_LAYER, None), routing).experts.shape == (1, N_USED)


def test_an_opening_to_begin_with_may_be_known() -> None:
    policy = make_policy(PolicySettings("router", 0.1, opening=0.37), N_LAYER, None)
    assert policy.opening.value == 0.37


@pytest.mark.parametrize("name", ["buddymoe", "similar"])
def test_each_layer_has_its_own_part_of_the_profile(name: str) -> None:
    table = make_table(N_LAYER, N_EXPERT)
    arrays = ("coactivation", "error", "tae_percentiles")
    like_the_last = replace(
        table, **{name: np.stack([getattr(table, name)[-1]] * N_LAYER) for name in arrays}
    )
    rng = np.random.default_rng(4)
    batches = [random_routing(rng, 50) for _ in range(4)]

    def choices(table: BuddyTable, layer: int) -> list[bytes]:
        policy = opened(name, 0.5, table=table)
        return [choose(policy, batch, layer).experts.tobytes() for batch in batches]

    last = choices(table, N_LAYER - 1)
    assert last == choices(like_the_last, 0)
    assert last != choices(table, 0)


def test_a_limit_of_1_opens_every_policy() -> None:
    for name in BUDDY_POLICIES:
        policy = make_policy(PolicySettings(name, 1.0, opening=0.3), N_LAYER, TABLE)
        assert policy.opening.value == 1.0 and not policy.is_bounded


@pytest.mark.parametrize("name", BUDDY_POLICIES)
def test_nearly_closed_a_policy_gives_nearly_nothing_away(name: str) -> None:
    assert given_share(opened(name, 0.001)) < 0.005


@pytest.mark.parametrize("name", ["blend", "router", "similar", "prior-router", "drop", "random"])
def test_open_a_policy_gives_everything_away(name: str) -> None:
    assert given_share(opened(name, 1.0)) == pytest.approx(1.0)


def test_open_a_policy_gives_away_all_that_it_can() -> None:
    assert given_share(opened("prior", 1.0)) > 0.98  # not the best expert to the worst resident
    assert given_share(opened("resident", 1.0)) == pytest.approx(1.0)
    # with a protected rank rows go whole or not at all
    assert 0.1 < given_share(opened("resident", 1.0, min_rank=2)) < 0.3
    assert given_share(opened("resident", 1.0), n_resident=N_USED - 1) == 0.0
    # the 15 % most confident tokens are closed
    assert given_share(opened("buddymoe", 1.0)) == pytest.approx(0.85, abs=0.03)


@pytest.mark.parametrize("name", BUDDY_POLICIES)
def test_the_wider_open_the_more_is_given_away(name: str) -> None:
    openings = (0.001, 0.02, 0.05, 0.1, 0.2, 0.35, 0.6, 1.0)
    shares = [given_share(opened(name, opening)) for opening in openings]
    assert np.diff(shares).min() >= -0.005, shares
    assert len({round(share, 3) for share in shares}) >= 5, shares


@pytest.mark.parametrize("name", BUDDY_POLICIES)
@pytest.mark.parametrize("min_rank", [2, 3, 4])
def test_protected_ranks_are_kept_wide_open(name: str, min_rank: int) -> None:
    rng, policy = np.random.default_rng(2), opened(name, 1.0, min_rank)
    for n_tokens in (1, 1, 1, 50):
        routing = random_routing(rng, n_tokens)
        choice = choose(policy, routing)
        kept = slice(min_rank - 1)
        assert np.array_equal(choice.experts[:, kept], routing.expert_ids[:, kept])


# what an opening means


def by_weight(*weights: float, missing: int) -> Routing:
    """One token of these weights, each its expert's, of whom one is missing; D can stand in."""
    z = odds((*weights, *[1e-6] * (4 - len(weights))))
    return routed(z, tuple({A, B, C, D} - {missing}), len(weights))


@pytest.mark.parametrize("name", ["router", "similar", "drop", "random"])
def test_the_opening_is_the_weight_up_to_which_pairs_are_given_away(name: str) -> None:
    table = measured_table_of_4()
    for opening, is_given in [(0.29, False), (0.31, True)]:
        routing = by_weight(0.7, 0.3, missing=B)
        choice = choose(opened(name, opening, table=table), routing)
        assert (choice.experts[0, 1] != B) == is_given


def measured_table_of_4(gram: np.ndarray | None = None, power: np.ndarray | None = None):  # type: ignore[no-untyped-def]
    table = measured_table()
    cut = {
        name: getattr(table, name)[:2, :4, :4]
        for name in ("coactivation", "scale", "error", "gram")
    }
    table = replace(
        table, **cut, uses=table.uses[:2, :4], tae_percentiles=table.tae_percentiles[:2],
        power=table.power[:2],
    )  # fmt: skip
    return table if gram is None else replace(table, gram=gram, power=power)


def test_of_blends_it_is_the_weight_up_to_which_the_worst_pair_is_given_away() -> None:
    """Experts have nothing in common: of layer 0 the harm is 1, of layer 1 it is 16."""
    gram = np.stack([np.eye(4), np.diag([2.0, 8.0, 2.0, 2.0])])
    table = measured_table_of_4(gram, np.array([1.0, 0.5]))
    routing = by_weight(0.7, 0.3, missing=B)
    for layer, limit in [(1, 0.3), (0, 0.075)]:
        for opening, is_given in [(limit - 0.001, False), (limit + 0.001, True)]:
            policy = opened("blend", opening, table=table)
            assert (choose(policy, routing, layer).experts[0, 1] != B) == is_given
    assert choose(opened("blend", 0.001, table=table), routing).experts[0, 1] == B


def test_blends_of_experts_that_put_out_nothing_can_be_made() -> None:
    table = measured_table_of_4(np.zeros((2, 4, 4)), np.ones(2))
    routing = by_weight(0.7, 0.3, missing=B)
    choice = choose(opened("blend", 0.1, table=table), routing)
    assert choice.experts.tolist() == [[A, C]] and choice.weights[0, 1] == 0


@pytest.mark.parametrize(("opening", "share"), [(0.2, 0.2), (0.5, 0.5), (0.85, 0.85), (1.0, 0.85)])
def test_of_buddymoe_it_is_the_share_of_tokens_that_are_open(opening: float, share: float) -> None:
    rng, policy = np.random.default_rng(3), opened("buddymoe", opening)
    routing = random_routing(rng, 3000, n_resident=9)
    missing = ~routing.is_resident[routing.expert_ids]
    given = choose(policy, routing).experts != routing.expert_ids
    assert given.any(axis=1)[missing.any(axis=1)].mean() == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize(("name", "opening"), [("prior", 0.3), ("prior-router", 0.6)])
def test_of_a_prior_it_is_the_bonus_as_a_share_of_the_scores_spread(
    name: str, opening: float
) -> None:
    """.3 of 10 are added to C, which then beats B; both get what their softmax says."""
    for score, is_given in [(3.1, True), (2.9, False)]:
        routing = routed([[10.0, 6.0, score, 0.0]], (A, C))
        policy = opened(name, opening)
        choice = choose(policy, routing)
        # prior-router may give a pair of so little weight to the router's next best as well
        if name == "prior" or is_given:
            assert (choice.experts[0, 1] == C) == is_given
        assert (choice.weights[0, 0] > routing.weights[0, 0]) == is_given


# chance


def random_choices(seed: int) -> list[bytes]:
    policy = make_policy(PolicySettings("random", 1.0, 1, seed), N_LAYER, None)
    rng = np.random.default_rng(7)
    return [choose(policy, random_routing(rng)).experts.tobytes() for _ in range(20)]


def test_the_same_seed_chooses_the_same_by_chance_and_another_something_else() -> None:
    assert random_choices(0) == random_choices(0) != random_choices(1)
