"""Who computes a layer's pairs: the chosen expert, one that is read anyway, or a stand-in."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runner.config import BUDDY_POLICIES
from runner.experts.miss_planner import MissPlanner
from runner.experts.slot_table import SlotTable
from runner.miss_policy import DROPPED, Routing, RoutingPlan
from runner.standins.buddy_policy import BuddyPolicy
from runner.standins.make_policy import PolicySettings, make_policy
from tests.runner.standins.routings import odds, routed
from tests.runner.standins.streams import N_EXPERT, N_LAYER, measured_table, random_routing

A, B, C, D = range(4)
TOKEN = (6, 4, 3, 2)  # of two chosen, A has the weight .6 and B .4


class Graph:
    """Routes as it is told."""

    def __init__(self, routing: Routing) -> None:
        self._routing = routing

    def router_weights(self) -> np.ndarray:
        return self._routing.weights

    def router_scores(self) -> np.ndarray:
        return self._routing.scores


class Desk:
    """A planner with a table of its own, one layer with some residents in full slots."""

    def __init__(
        self,
        residents: Sequence[int],
        buddies: BuddyPolicy | None = None,
        n_expert: int = 4,
        n_empty: int = 0,
        **settings: Any,
    ) -> None:
        self.cheap_on_host: set[int] = set()
        self.table = SlotTable((len(residents) + n_empty,) * N_LAYER, n_expert, "lru")
        for expert in residents:
            self.table.commit(0, self.table.take(0, expert))
        self.n_pairs_of: dict[int, int] = {}  # what the store was asked about
        store = SimpleNamespace(is_cheaper_on_host=self._is_cheap)
        passes = SimpleNamespace(has_host=lambda layer: True)
        cache: Any = SimpleNamespace(table=self.table, store=store)
        miss_action = settings.pop("miss_action", "load")
        self.planner = MissPlanner(cache, passes, miss_action, buddies, **settings)  # type: ignore[arg-type]

    def _is_cheap(self, layer: int, expert: int, n_pairs: int) -> bool:
        self.n_pairs_of[expert] = n_pairs
        return expert in self.cheap_on_host

    def plan(self, scores: Any, n_used: int = 2, is_exact: bool = False) -> RoutingPlan:
        routing = routed(scores, tuple(self.table.residents(0).tolist()), n_used)
        self.planner.begin(len(routing.expert_ids), is_exact)
        graph: Any = Graph(routing)
        plan = self.planner.plan(graph, 0, routing.expert_ids)
        self.planner.end()
        return plan


def router(budget: float = 1.0, min_rank: int = 1, opening: float = 1.0) -> BuddyPolicy:
    return make_policy(PolicySettings("router", budget, min_rank, 0, opening), N_LAYER, None)


def ways(plan: RoutingPlan) -> list[int]:
    return [plan.n_hit, plan.n_loaded, plan.n_on_host, plan.n_substituted, plan.n_dropped]


def test_a_missing_expert_with_a_resident_stand_in_is_not_read() -> None:
    plan = Desk([A, C, D], router()).plan(odds(TOKEN))
    assert plan.experts.tolist() == [[A, C]] and plan.loads == ()
    assert ways(plan) == [1, 0, 0, 1, 0]
    assert plan.weight is not None and plan.weight.substituted == pytest.approx(0.4)


def test_nobody_stands_in_before_all_slots_are_filled() -> None:
    buddies = router()
    plan = Desk([A, C], buddies, n_empty=1).plan(odds(TOKEN))
    assert plan.loads == (B,) and ways(plan) == [1, 1, 0, 0, 0]
    assert buddies.budget.spent_share == 0.0


def test_an_exact_batch_has_no_stand_ins_and_costs_no_budget() -> None:
    buddies = router(budget=0.9, opening=0.5)
    desk = Desk([A, C, D], buddies)
    assert desk.plan(odds(TOKEN)).n_substituted == 1
    spent = buddies.budget.spent_share, buddies.opening.value
    plan = desk.plan(odds(TOKEN), is_exact=True)
    assert plan.loads == (B,) and plan.weights is None
    assert (buddies.budget.spent_share, buddies.opening.value) == spent
    assert desk.plan(odds(TOKEN)).n_substituted == 1


def test_when_the_budget_is_used_up_misses_are_exact() -> None:
    desk = Desk([A, C, D], router(budget=0.1))
    plans = [desk.plan(odds(TOKEN)) for _ in range(40)]
    assert 1 <= sum(plan.n_substituted for plan in plans) <= 0.1 * 40 * N_LAYER / 0.4
    exact = [plan for plan in plans if not plan.n_substituted]
    assert all(plan.loads == (B,) for plan in exact)


def test_without_stand_ins_weight_is_counted_only_where_somebody_asked_for_it() -> None:
    assert Desk([A, C, D]).plan(odds(TOKEN)).weight is None
    plan = Desk([A, C, D], counts_weight=True).plan(odds(TOKEN))
    assert plan.weight is not None and plan.loads == (B,)
    assert [plan.weight.hit, plan.weight.loaded] == pytest.approx([0.6, 0.4])
    all_there = Desk([A, B, C], counts_weight=True).plan(odds(TOKEN, TOKEN))
    assert all_there.weight is not None and all_there.weight.hit == 2.0


def test_what_nobody_computes_is_read_for_no_other_token_either() -> None:
    buddies = make_policy(PolicySettings("drop", 1.0, 1), N_LAYER, None)
    plan = Desk([A, C], buddies).plan(odds((6, 4, 3, 2), (6, 2, 3, 4)))
    assert plan.experts.tolist() == [[A, DROPPED], [A, DROPPED]]
    assert plan.loads == () and ways(plan) == [2, 0, 0, 0, 2]


def test_empty_slots_are_for_experts_that_would_be_computed_on_the_host() -> None:
    desk = Desk([A], router(), n_empty=1, miss_action="auto")
    desk.cheap_on_host = {B, C}
    plan = desk.plan(odds(TOKEN), n_used=3)
    assert (plan.loads, plan.on_host) == ((B,), (C,))


def test_the_host_is_weighed_with_all_pairs_that_a_batch_has_for_an_expert() -> None:
    desk = Desk([A], miss_action="auto")
    desk.cheap_on_host = {B}
    plan = desk.plan(odds((6, 4, 3, 2), (6, 4, 3, 2), (4, 3, 6, 2)))
    assert plan.experts.tolist() == [[A, B], [A, B], [C, A]]
    assert desk.n_pairs_of == {B: 2, C: 1}
    assert (plan.loads, plan.on_host) == ((C,), (B,)) and ways(plan) == [3, 1, 2, 0, 0]


def test_what_is_left_to_read_may_be_computed_on_the_host() -> None:
    """B and C are missing: D has B's pair, C's is nobody's."""
    token = odds((6, 4, 3, 2))
    for action, cheap, expected in [
        ("load", {C}, [1, 1, 0, 1, 0]),
        ("host", set(), [1, 0, 1, 1, 0]),
        ("auto", {C}, [1, 0, 1, 1, 0]),
        ("auto", {B}, [1, 1, 0, 1, 0]),
    ]:
        desk = Desk([A, D], router(), miss_action=action)
        desk.cheap_on_host = cheap
        plan = desk.plan(token, n_used=3)
        assert plan.experts.tolist() == [[A, D, C]]
        assert ways(plan) == expected
        assert (plan.loads or plan.on_host) == (C,)
        assert plan.weight is not None and plan.weight.substituted == pytest.approx(4 / 13)


@pytest.mark.parametrize("action", ["load", "host"])
def test_an_expert_that_is_read_for_one_token_serves_the_whole_batch(action: str) -> None:
    """.39 may be given away by the first three tokens, enough for the last one's B only."""
    tokens = odds((6, 4, 3, 2), (6, 4, 3, 2), (2, 1, 3, 6), (7, 3, 1, 2))
    desk = Desk([A, C, D], router(budget=0.13, opening=0.13), miss_action=action)
    plan = desk.plan(tokens)
    assert plan.experts.tolist() == [[A, B], [A, B], [D, C], [A, B]]
    assert plan.n_substituted == 0 and (plan.loads or plan.on_host) == (B,)


def test_reading_ahead_is_of_use_where_an_expert_may_still_have_to_be_read() -> None:
    assert Desk([A]).planner.may_read
    assert Desk([A], router(budget=0.9)).planner.may_read
    desk = Desk([A], router(budget=1.0))
    assert not desk.planner.may_read
    desk.planner.begin(1, is_exact=True)
    assert desk.planner.may_read
    desk.planner.begin(1)
    assert not desk.planner.may_read


# random batches

TABLE = measured_table()


@pytest.mark.parametrize("name", BUDDY_POLICIES)
@pytest.mark.parametrize("budget", [0.04, 0.3, 1.0])
def test_of_a_batch_nobody_stands_in_for_an_expert_that_is_read(name: str, budget: float) -> None:
    rng = np.random.default_rng(11)
    buddies = make_policy(PolicySettings(name, budget, 1, 0, 0.5), N_LAYER, TABLE)
    n_given = n_read = 0
    for n_tokens in (2, 3, 5, 9, 20, 60, 300) * 3:
        residents = rng.choice(N_EXPERT, 5, replace=False).tolist()
        desk = Desk(residents, buddies, N_EXPERT)
        routing = random_routing(rng, n_tokens)
        plan = desk.plan(routing.scores, n_used=3)
        given = plan.experts != routing.expert_ids
        n_given += given.sum()
        n_read += len(plan.loads)
        assert not set(routing.expert_ids[given].tolist()) & set(plan.loads)
        kept = set(plan.experts[~given].tolist())
        assert set(plan.loads) == kept - set(residents), "read for a stand-in only"
        stand_ins = set(plan.experts[given].tolist()) - {DROPPED}
        assert stand_ins <= {*residents, *plan.loads}
        assert sum(ways(plan)) == plan.experts.size
        assert plan.n_substituted + plan.n_dropped == given.sum()
    assert n_given > 0 and (n_read > 0 or budget == 1.0)
