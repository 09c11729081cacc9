"""Counters of a run: every pair once, shares known on paper, snapshots from any thread."""

import json
import sys
import threading
import timeit
from collections.abc import Iterator

import numpy as np
import pytest

from runner import message_values, protocol
from runner.miss_policy import RoutingPlan
from runner.stats import StatsSnapshot
from runner.stats_recorder import StatsRecorder

N_LAYER, N_USED = 3, 2


def plan(
    n_hit: int = 0,
    n_loaded: int = 0,
    n_on_host: int = 0,
    n_substituted: int = 0,
    n_dropped: int = 0,
) -> RoutingPlan:
    n_pairs = n_hit + n_loaded + n_on_host + n_substituted + n_dropped
    experts = np.zeros((n_pairs // N_USED, N_USED), np.int32)
    return RoutingPlan(experts, (), (), n_hit, n_loaded, n_on_host, n_substituted, n_dropped)


def record(recorder: StatsRecorder, *plans: RoutingPlan, is_prompt: bool = False) -> None:
    """A batch that took 1 s: 600 ms in ggml, 300 ms waiting."""
    n_tokens = len(plans[0].experts)
    recorder.record_batch(n_tokens, plans, 10**9, 600 * 10**6, 300 * 10**6, is_prompt)


def take(recorder: StatsRecorder) -> StatsSnapshot:
    return recorder.snapshot(7, 64)


def test_every_class_is_counted_in_its_layer() -> None:
    recorder = StatsRecorder(N_LAYER, (4, 5, 6))
    plans = (
        plan(n_hit=4),
        plan(n_hit=1, n_loaded=2, n_on_host=1),
        plan(n_substituted=3, n_dropped=1),
    )
    record(recorder, *plans, is_prompt=True)
    record(recorder, plan(n_hit=2), plan(n_loaded=2), plan(n_hit=1, n_on_host=1))
    now = take(recorder)
    assert now.hit == (6, 1, 1)
    assert now.loaded == (0, 4, 0)
    assert now.on_host == (0, 1, 1)
    assert now.substituted == (0, 0, 3)
    assert now.dropped == (0, 0, 1)
    assert now.pairs_per_layer == (6, 6, 6)
    assert now.n_pairs == 3 * N_USED * N_LAYER
    assert (now.n_tokens_prompt, now.n_tokens_generated, now.n_routings) == (2, 1, 6)
    assert (now.n_slots, now.n_past, now.n_ctx) == ((4, 5, 6), 7, 64)


def test_shares_are_of_all_pairs() -> None:
    recorder = StatsRecorder(1)
    record(recorder, plan(10, 5, 3, 1, 1))
    now = take(recorder)
    assert (now.hit_share, now.loaded_share, now.on_host_share) == (0.5, 0.25, 0.15)
    assert (now.substituted_share, now.dropped_share) == (0.05, 0.05)


def test_a_share_of_nothing_is_zero() -> None:
    recorder = StatsRecorder(0)
    now = take(recorder)
    assert (now.n_pairs, now.hit_share, now.dropped_share, now.read_gb_per_s) == (0, 0.0, 0.0, 0.0)
    assert set(vars(now.since(now)).values()) == {0.0}


def test_time_is_split_into_compute_waiting_and_python() -> None:
    recorder = StatsRecorder(1)
    record(recorder, plan(2), is_prompt=True)
    record(recorder, plan(2))
    now = take(recorder)
    assert (now.prompt_s, now.generation_s) == (1.0, 1.0)
    assert (now.compute_s, now.wait_s, now.python_s) == (1.2, 0.6, 0.2)
    rates = now.since(take(StatsRecorder(1)))
    assert (rates.compute_share, rates.wait_share, rates.python_share) == (0.6, 0.3, 0.1)


def test_reads_count_in_their_layer_and_have_a_speed() -> None:
    recorder = StatsRecorder(2, (4, 4))
    recorder.record_read(1, 3 * 10**9, 10**9)
    recorder.record_read(1, 10**9, 10**9)
    now = take(recorder)
    assert (now.bytes_read, now.read_s, now.read_gb_per_s) == ((0, 4 * 10**9), 2.0, 2.0)


def test_experts_read_ahead_were_used_or_wasted() -> None:
    recorder = StatsRecorder(1)
    recorder.record_prefetch(3, 1)
    recorder.record_prefetch(0, 2)
    assert (take(recorder).prefetch_used, take(recorder).prefetch_wasted) == (3, 3)


def test_rates_are_of_the_time_between_two_snapshots() -> None:
    recorder = StatsRecorder(1, (4,))
    record(recorder, plan(n_hit=100), is_prompt=True)
    recorder.record_read(0, 9 * 10**9, 10**9)
    before = take(recorder)
    record(recorder, plan(n_hit=30, n_loaded=10), is_prompt=True)
    record(recorder, plan(n_hit=1, n_on_host=1))
    record(recorder, plan(n_loaded=2))
    recorder.record_read(0, 10**9, 10**9)
    rates = take(recorder).since(before)
    assert (rates.prompt_tokens_per_s, rates.generation_tokens_per_s) == (20.0, 1.0)
    assert (rates.hit_share, rates.loaded_share) == (31 / 44, 12 / 44)
    assert (rates.on_host_share, rates.substituted_share, rates.dropped_share) == (1 / 44, 0, 0)
    assert rates.read_gb_per_s == 1.0


def test_counts_between_two_snapshots_keep_what_is_now() -> None:
    recorder = StatsRecorder(2, (1, 1))
    record(recorder, plan(2), plan(1, 1))
    before = recorder.snapshot(1, 64, ((3,), (-1,)), (5, 0))
    record(recorder, plan(0, 2), plan(2))
    counted = recorder.snapshot(2, 64, ((4,), (2,)), (6, 2)).counted_since(before)
    assert (counted.hit, counted.loaded, counted.n_evicted) == ((0, 2), (2, 0), (1, 2))
    assert (counted.n_tokens_generated, counted.n_routings) == (1, 2)
    assert (counted.n_past, counted.n_slots, counted.residency) == (2, (1, 1), ((4,), (2,)))


def test_verified_steps_are_counted_and_give_a_mean_and_an_agreement() -> None:
    recorder = StatsRecorder(1, (4,), buddy_budget=0.25)
    assert (take(recorder).verified_kl, take(recorder).verified_agreement) == (0.0, 0.0)
    recorder.record_verified(0.5, False, 10**9)
    before = take(recorder)
    recorder.record_verified(0.25, True, 10**9)
    recorder.record_verified(0.0, True, 2 * 10**9)
    recorder.record_standins(0.125)
    recorder.record_output(2.0, 0.5)
    now = take(recorder)
    counted = now.counted_since(before)
    assert (now.n_verified, now.verified_kl, now.verified_agreement) == (3, 0.25, 2 / 3)
    assert (now.verified_kl_max, now.verify_s, now.generation_s) == (0.5, 4.0, 0.0)
    assert (counted.n_verified, counted.verified_kl, counted.verified_agreement) == (2, 0.125, 1.0)
    assert (counted.verified_kl_max, counted.verify_s) == (0.5, 3.0)
    assert (counted.standin_share, counted.buddy_budget) == (0.125, 0.25)
    assert (counted.output_entropy, counted.repeated_4grams) == (2.0, 0.5)


def test_without_a_cache_nothing_was_evicted() -> None:
    recorder = StatsRecorder(2)
    record(recorder, plan(2), plan(2))
    now = take(recorder)
    assert (now.n_slots, now.residency, now.n_evicted) == ((), (), (0, 0))
    assert now.hit_share == 1.0


def test_a_snapshot_holds_tuples_only_and_cannot_change() -> None:
    recorder = StatsRecorder(2, (1, 1))
    before = recorder.snapshot(1, 64, ((3,), (-1,)), (5, 0))
    hash(before)  # a list anywhere in it would raise
    record(recorder, plan(2), plan(2))
    assert before.hit == (0, 0)
    with pytest.raises(AttributeError):
        before.n_past = 2  # type: ignore[misc]


def test_a_snapshot_survives_the_way_to_the_terminal() -> None:
    recorder = StatsRecorder(2, (2, 1))
    record(recorder, plan(2), plan(1, 1))
    recorder.record_read(1, 4096, 1234)
    now = recorder.snapshot(1, 64, ((3, -1), (0,)), (5, 0))
    message = json.loads(protocol.encode({"type": "stats", "snapshot": now}))
    assert message_values.parse(StatsSnapshot, message["snapshot"]) == now


@pytest.fixture
def busy_threads() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("busy_threads")
def test_a_snapshot_in_the_middle_of_a_batch_counts_whole_batches() -> None:
    n_layer = 48
    recorder = StatsRecorder(n_layer, (4,) * n_layer)
    plans = [plan(*np.roll((4, 3, 2, 1, 0), layer).tolist()) for layer in range(n_layer)]
    is_over = threading.Event()

    def compute() -> None:
        for _ in range(2000):
            record(recorder, *plans)
            recorder.record_read(5, 10, 10**9)
        is_over.set()

    engine = threading.Thread(target=compute)
    engine.start()
    n_taken = 0
    while not is_over.is_set():
        now = take(recorder)
        n_tokens = now.n_tokens_generated
        assert now.n_pairs == n_tokens * N_USED * n_layer
        assert now.pairs_per_layer == (n_tokens * N_USED,) * n_layer
        assert now.n_routings * len(plans[0].experts) == n_tokens * n_layer
        assert sum(now.bytes_read) == 10 * now.read_s
        n_taken += 1
    engine.join()
    assert n_taken > 10 and take(recorder).n_tokens_generated == 10_000


def test_a_plan_costs_less_than_a_microsecond_to_count() -> None:
    recorder = StatsRecorder(32, (4,) * 32)
    plans = [plan(1, 1)] * 32
    times = timeit.repeat(
        lambda: recorder.record_batch(1, plans, 3, 2, 1, False), number=100, repeat=20
    )
    assert min(times) / 100 / 32 < 1e-6
