"""ExpertRunner: every pair is computed by the right bytes, however its expert comes into a slot."""

from collections import Counter
from contextlib import closing
from random import Random
from typing import Any

import numpy as np
import pytest

from runner.experts.expert_runner import ExpertRunner
from runner.experts.miss_planner import MissPlanner
from runner.stats_recorder import StatsRecorder
from tests.runner.experts.cache_programs import (
    OpenModel,
    OpenModels,
    TimedCache,
    check_contents,
    make_cache,
    reads_directly,
)
from tests.runner.experts.runner_programs import RunnerProgram, Witness
from tests.runner.experts.slot_model import run_programs

pytestmark = pytest.mark.usefixtures("small_pieces")


def run_batches(models: OpenModels, n_programs: int) -> Counter[str]:
    some = [models.get(shape) for shape in ("two", "alike", "unlike", "many")]
    return run_programs(lambda rng: RunnerProgram(some, rng), n_programs, n_steps=50)


def test_every_pair_is_computed_once_by_the_bytes_of_its_expert(
    models: OpenModels,
) -> None:
    n_done = run_batches(models, n_programs=15)
    assert min(n_done[name] for name in ("hit", "loaded", "on host", "error", "extra")) > 0


@pytest.mark.slow
def test_every_pair_of_ten_thousand_batches_is_computed_once_by_the_bytes_of_its_expert(
    models: OpenModels,
) -> None:
    n_done = run_batches(models, n_programs=300)
    assert n_done["batch"] + n_done["token"] >= 10_000
    assert min(n_done[name] for name in ("hit", "loaded", "on host")) >= 20_000
    assert min(n_done[name] for name in ("error", "extra")) >= 500
    if reads_directly(models):
        assert min(n_done[name] for name in ("guess used", "guess wasted")) >= 50


# streaming, on paper


def make_runner(cache: TimedCache, model: OpenModel, action: str) -> tuple[ExpertRunner, Witness]:
    witness = Witness(model, cache, Random(0))
    witness.hosts = [True] * model.config.n_layer
    stats = StatsRecorder(model.config.n_layer, cache.table.n_slots, n_expert=model.config.n_expert)
    planner = MissPlanner(cache, witness, action)
    return ExpertRunner(cache, witness, stats, planner, n_expert_used=2, n_batch=64), witness


def serve(
    runner: ExpertRunner, witness: Witness, layer: int, tokens: list[list[int]]
) -> list[set[int]]:
    """Serve a batch whose pairs must each be computed once; returns the experts of each pass."""
    expert_ids = np.array(tokens, np.int32)
    witness.begin(layer, expert_ids)
    runner.serve(witness, layer, expert_ids)
    witness.end()
    assert (witness.n_computed == 1).all()
    return witness.passes


def test_a_prompt_of_all_experts_streams_through_one_slot(
    models: OpenModels,
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 1, 1, 1)) as cache:
        runner, witness = make_runner(cache, model, "load")
        passes = serve(runner, witness, 0, [[5, 0], [1, 2], [4, 3]])
        assert sorted(map(tuple, passes)) == [(expert,) for expert in range(6)]
        assert len(cache.store.reads) == 6


def test_pins_that_come_while_a_prompt_streams_leave_a_slot_for_the_rest(
    models: OpenModels,
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 3, 1, 1, policy="static")) as cache:
        cache.table.expect(np.array([[9, 8, 7, 0, 0, 0]] * 3, float))
        for expert in (3, 4, 5):
            cache.finish(cache.start_load(0, expert))
        runner, witness = make_runner(cache, model, "load")
        serve(runner, witness, 0, [[0], [1], [2], [3]])
        assert sorted(cache.table.pinned(0)) == [0, 1]


def test_a_favourite_that_is_computed_on_the_host_is_not_computed_again(
    models: OpenModels,
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 4, 4, 4)) as cache:
        cache.table.expect(np.array([[9, 8, 7, 6, 0, 0]] * 3, float))
        runner, witness = make_runner(cache, model, "host")
        serve(runner, witness, 1, [[0, 5], [1, 0]])


def test_a_token_of_which_everything_is_missing_still_leaves_room_for_a_guess(
    models: OpenModels,
) -> None:
    model = models.get("many")
    with closing(make_cache(model, 16, 16, 16)) as cache:
        cache.is_late = True
        cache.store.allow(0)
        runner, witness = make_runner(cache, model, "load")
        for layer in range(3):
            serve(runner, witness, layer, [list(range(layer, layer + 12))])
        check_contents(model, cache)


# what things cost


def test_reads_for_a_token_give_the_host_another_chance_and_those_of_a_prompt_do_not(
    models: OpenModels,
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 2, 2, 2)) as cache:
        runner, witness = make_runner(cache, model, "load")
        cache.store.observe_compute(1000, 1.0, on_host=True)
        serve(runner, witness, 0, [[5, 0], [1, 2], [4, 3]])
        assert cache.store.costs.host_s_per_byte == 1e-3
        serve(runner, witness, 1, [[5, 0]])
        assert cache.store.costs.host_s_per_byte < 0.985e-3


class FakePasses:
    """Takes these nanoseconds for a pass: of one token, and for each token of several."""

    def __init__(self, one_ns: dict[bool, int], each_ns: dict[bool, int]) -> None:
        self._one_ns, self._each_ns = one_ns, each_ns

    def has_host(self, layer: int) -> bool:
        return True

    def run(
        self, layer: int, on_host: bool, pairs: np.ndarray, slots: np.ndarray, n_tokens: int
    ) -> int:
        assert len(pairs) == len(slots) == n_tokens
        assert (pairs == 2 * np.arange(n_tokens)).all(), "the first choice of each token"
        if n_tokens == 1:
            return self._one_ns[on_host]
        return 150_000 + n_tokens * self._each_ns[on_host]  # a graph is built first


@pytest.mark.parametrize(
    ("is_on_device", "n_batch", "growths"),
    [(True, 512, (0.25, 0.5)), (True, 31, (1.0, 1.0)), (False, 512, (1.0, 1.0))],
)
def test_what_further_pairs_cost_is_measured_at_load_beside_a_device(
    models: OpenModels,
    monkeypatch: pytest.MonkeyPatch,
    is_on_device: bool,
    n_batch: int,
    growths: tuple[float, float],
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 2, 2, 2, has_room=True)) as cache:
        store = cache.store
        monkeypatch.setattr(type(cache), "is_on_device", is_on_device)
        monkeypatch.setattr(store, "is_in_memory", lambda layer, expert: True)
        passes: Any = FakePasses({False: 40_000, True: 80_000}, {False: 10_000, True: 40_000})
        stats = StatsRecorder(3, (2, 2, 2), n_expert=6)
        planner = MissPlanner(cache, passes, "auto")
        runner = ExpertRunner(cache, passes, stats, planner, n_expert_used=2, n_batch=n_batch)
        runner.measure_costs()
        assert store.costs.slot_s_per_byte == pytest.approx(40e-6 / store.n_bytes(0))
        assert store.costs.host_s_per_byte == pytest.approx(80e-6 / store.n_bytes(0))
        assert (store._slot_growth, store._host_growth) == pytest.approx(growths)
