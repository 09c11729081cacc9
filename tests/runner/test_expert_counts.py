"""What is counted for every expert: known on paper, and adding up to what layers count."""

import numpy as np
import pytest

from runner.config import EngineConfig
from runner.engine import Engine
from runner.expert_counts import ExpertCounter
from runner.miss_policy import DROPPED, Routing, exact, exact_plan, plan
from runner.standins.routing import Choice
from runner.stats import StatsSnapshot
from tests.paths import DEMO

RESIDENT = np.array([True, True, False, False])  # of 4 experts


def routing(*chosen: tuple[int, int]) -> Routing:
    ids = np.array(chosen, np.int32)
    weights = np.full(ids.shape, 0.5, np.float32)
    return Routing(ids, weights, np.zeros((len(ids), 4), np.float32), RESIDENT)


def given(asked: Routing, *experts: tuple[int, int]) -> Choice:
    return Choice(np.array(experts, np.int32), asked.weights)


def test_loads_and_host_count_as_misses_of_the_expert_that_was_chosen() -> None:
    counter = ExpertCounter(2, 4)
    slot_of = np.array([0, 1, -1, -1], np.int32)
    counter.record_plan(1, exact_plan(np.array([[0, 2]], np.int32), slot_of))
    counter.record_plan(1, exact_plan(np.array([[3, 2]], np.int32), slot_of, frozenset({3})))
    counts = counter.counts()
    assert counts.missed == ((0, 0, 0, 0), (0, 0, 2, 1))
    assert counts.substituted == counts.stood_in == ((0,) * 4,) * 2
    assert counts.buddies == ()


def test_a_stand_in_is_named_with_whom_it_stood_in_for() -> None:
    counter = ExpertCounter(1, 4)
    asked = routing((0, 2), (3, 2), (3, 0))
    counter.record_plan(0, plan(given(asked, (0, 1), (0, 1), (DROPPED, 0)), asked))
    counts = counter.counts()
    assert counts.used == ((2, 0, 2, 2),)
    assert counts.missed == counts.substituted == ((0, 0, 2, 2),)
    assert counts.stood_in == ((1, 2, 0, 0),), "nobody stood in for the dropped pair"
    assert counts.buddies == ((0, 2, 1, 2), (0, 3, 0, 1), (0, 3, DROPPED, 1))


def test_only_the_three_most_frequent_stand_ins_are_named_and_stay_up_to_date() -> None:
    counter = ExpertCounter(1, 8)
    resident = np.arange(8) != 7
    weights, scores = np.ones((1, 1), np.float32), np.zeros((1, 8), np.float32)
    asked = Routing(np.array([[7]], np.int32), weights, scores, resident)
    for by in (1, 2, 2, 3, 3, 3, 4, 4, 4, 4):
        counter.record_plan(0, plan(Choice(np.array([[by]], np.int32), weights), asked))
    assert [row[2:] for row in counter.counts().buddies] == [(4, 4), (3, 3), (2, 2)]
    for _ in range(5):
        counter.record_plan(0, plan(Choice(np.array([[1]], np.int32), weights), asked))
    assert [row[2:] for row in counter.counts().buddies] == [(1, 6), (4, 4), (3, 3)]


def test_of_very_many_experts_only_the_most_frequent_stand_in_is_named() -> None:
    counter = ExpertCounter(500, 4)
    asked = routing((2, 3))
    for experts in ((0, 1), (1, 0), (1, 0)):
        counter.record_plan(0, plan(given(asked, experts), asked))
    assert counter.counts().buddies == ((0, 2, 1, 2), (0, 3, 0, 2))


def test_a_plan_keeps_what_was_chosen_when_slots_are_written_over_the_router_s_array() -> None:
    counter = ExpertCounter(1, 4)
    asked = routing((0, 2))
    made = plan(exact(asked), asked)
    asked.expert_ids[:] = 1
    counter.record_plan(0, made)
    assert counter.counts().missed == ((0, 0, 1, 0),)


def test_loads_are_counted_by_expert() -> None:
    counter = ExpertCounter(2, 3)
    for expert in (2, 2, 0):
        counter.record_load(1, expert)
    assert counter.counts().loaded == ((0, 0, 0), (1, 0, 2))


@pytest.mark.parametrize("buddy", ["off", "router", "blend", "prior", "drop", "resident"])
def test_experts_of_a_real_run_add_up_to_what_its_layers_count(buddy: str) -> None:
    config = EngineConfig(n_ctx=128, moe_cache_slots=3, buddy=buddy, buddy_budget=0.5, n_threads=1)
    engine = Engine(DEMO, config)
    try:
        engine.prefill(list(range(300, 340)))
        for token in range(400, 430):
            engine.decode(token)
        now = engine.snapshot(with_experts=True)
        assert engine.snapshot().experts is None
    finally:
        engine.close()
    assert now.experts is not None
    assert_adds_up(now)
    assert (sum(now.substituted) + sum(now.dropped) > 0) == (buddy != "off")
    if buddy == "drop":
        assert now.experts.buddies
        assert {by for _, _, by, _ in now.experts.buddies} == {DROPPED}


@pytest.mark.parametrize("slots", [0, 8])
def test_choices_are_counted_where_everything_is_resident_too(slots: int) -> None:
    engines = [
        Engine(DEMO, EngineConfig(n_ctx=128, moe_cache_slots=n, n_threads=1)) for n in (slots, 3)
    ]
    used = []
    for engine in engines:
        engine.prefill(list(range(300, 340)))
        for token in range(400, 420):
            engine.decode(token)
        now = engine.snapshot(with_experts=True)
        engine.close()
        assert now.experts is not None
        assert_adds_up(now) if now.residency else None
        used.append(now.experts.used)
    assert used[0] == used[1], "as an exact run with misses counts them"


def assert_adds_up(now: StatsSnapshot) -> None:
    experts = now.experts
    assert experts is not None
    ways = zip(now.loaded, now.on_host, now.substituted, now.dropped, strict=True)
    assert tuple(map(sum, experts.missed)) == tuple(map(sum, ways))
    given_away = zip(now.substituted, now.dropped, strict=True)
    assert tuple(map(sum, experts.substituted)) == tuple(map(sum, given_away))
    assert tuple(map(sum, experts.stood_in)) == now.substituted
    assert tuple(map(sum, experts.used)) == now.pairs_per_layer
    for layer, row in enumerate(experts.loaded):
        n_resident = sum(expert >= 0 for expert in now.residency[layer])
        assert sum(row) == n_resident + now.n_evicted[layer], "who came stays or was evicted"
