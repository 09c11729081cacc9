"""With slots under a budget the engine computes what it computes with every expert resident.

Logits are compared bit for bit with those of an engine without a cache, after every step, on the
same device and with as many threads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from runner.config import CACHE_POLICIES, MISS_ACTIONS, MOE_CACHE_OFF, EngineConfig
from runner.engine import Engine
from runner.experts import expert_store
from runner.experts.cache_plan import slot_bytes
from runner.experts.expert_runner import ExpertRunner
from runner.experts.prefetcher import Load, Prefetcher
from runner.miss_policy import RoutingPlan
from tests.llama_cpp_oracle import LlamaCpp
from tests.page_cache import can_read_direct, write_to_disk
from tests.random_model import RandomModel, write_random_model

N_TOKENS = 500
OFF = EngineConfig(n_threads=1, n_batch=32, moe_cache_bytes=MOE_CACHE_OFF)

Logits = list[np.ndarray]  # of every step, (n_vocab,)
Play = Callable[[Engine, Sequence[int]], Logits]


@pytest.fixture(scope="module")
def tokens(demo_path: Path, held_out_text: str) -> list[int]:
    with LlamaCpp(demo_path) as model:
        found = model.tokenize(held_out_text)[:N_TOKENS]
    assert len(found) == N_TOKENS
    return found


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine that cannot have slots and file in memory together: experts are read direct."""
    if not can_read_direct(write_to_disk(tmp_path / "any", bytes(4096))):
        pytest.skip("this file system has no direct reads")
    monkeypatch.setattr("runner.placement.available_memory_bytes", lambda: 64 << 20)


@pytest.fixture(params=["roomy", "small"])
def machine(request: pytest.FixtureRequest) -> str:
    if request.param == "small":
        request.getfixturevalue("small_machine")
    return str(request.param)


def with_slots(n_slots: int, policy: str = "lru", miss: str = "load") -> EngineConfig:
    return replace(
        OFF,
        moe_cache_bytes=-1,
        moe_cache_slots=n_slots,
        moe_cache_policy=policy,
        moe_miss=miss,
    )


# what is played


def read_and_go_on(engine: Engine, tokens: Sequence[int], n_prompt: int = 100) -> Logits:
    """A prompt in batches of 32, 5, 32, 31 and so on, then one known token after the other."""
    logits = [engine.prefill(tokens[:37]).copy(), engine.prefill(tokens[:n_prompt]).copy()]
    return logits + [engine.decode(token).copy() for token in tokens[n_prompt:]]


def cancelled_prompts(engine: Engine, tokens: Sequence[int]) -> Logits:
    """Prompts that are stopped within a batch, and then gone on with."""
    logits = []
    for n_calls in (1, 4, 8, 15):  # layers of the first and the second batch
        engine.reset()
        steps = engine.generate(tokens[:90], np.argmax, 3, lambda token: False, after(n_calls))
        assert [step.stop_reason for step in steps] == ["cancelled"]
        logits += [engine.prefill(tokens[:90]).copy(), engine.decode(tokens[90]).copy()]
    return logits


def one_by_one(engine: Engine, tokens: Sequence[int]) -> Logits:
    return [engine.decode(token).copy() for token in tokens]


def after(n_calls: int) -> Callable[[], bool]:
    """A `cancelled` that says yes when it was asked so often."""
    calls = iter(range(n_calls))
    return lambda: next(calls, None) is None


def two_conversations(engine: Engine, tokens: Sequence[int]) -> Logits:
    logits = read_and_go_on(engine, tokens[:120], 60)
    engine.reset()
    return logits + read_and_go_on(engine, [tokens[0], *tokens[300:400]], 60)


def beginnings_again(engine: Engine, tokens: Sequence[int]) -> Logits:
    """Prompts that begin like the one before them, and are longer, shorter or the same."""
    logits = []
    for n, end in [(50, ()), (90, ()), (90, ()), (40, (7, 8, 9)), (41, ()), (200, (5,)), (1, ())]:
        logits.append(engine.prefill([*tokens[:n], *end]).copy())
        logits.append(engine.decode(tokens[n]).copy())
    return logits


def shifted_context(engine: Engine, tokens: Sequence[int]) -> Logits:
    """An answer of twice the context; needs context_shift and 128 tokens of context."""
    logits: Logits = []

    def sample(row: np.ndarray) -> int:
        logits.append(row.copy())
        return tokens[60 + len(logits)]

    steps = list(engine.generate(tokens[:60], sample, 200, lambda token: False))
    assert len(steps) == 200 and steps[-1].stop_reason == "length" and engine.n_past < 128
    return logits


# what must be true


@dataclass
class Seen:
    """The plans of every layer of every batch that was finished, and the batches' sizes."""

    plans: list[tuple[int, RoutingPlan]]
    missing: list[frozenset[int]]  # experts that no slot had before each plan
    kept: bool = True  # whether each plan's experts are still the router's when it is carried out


@contextmanager
def watched(engine: Engine) -> Iterator[Seen]:
    seen = Seen([], [])
    if engine._experts is None:
        yield seen
        return
    runner = engine._experts
    serve = ExpertRunner.serve

    def look(graph, layer: int, expert_ids: np.ndarray) -> RoutingPlan:  # type: ignore[no-untyped-def]
        chosen = expert_ids.copy()
        residents = engine.snapshot().residency[layer]
        plan = serve(runner, graph, layer, expert_ids)
        seen.plans.append((layer, replace(plan, experts=chosen)))
        seen.kept &= np.array_equal(plan.experts, chosen)
        seen.missing.append(frozenset(chosen.ravel().tolist()) - frozenset(residents))
        return plan

    runner.serve = look  # type: ignore[method-assign]
    yield seen


def assert_same(path: Path, play: Play, tokens: Sequence[int], config: EngineConfig) -> None:
    """Play with these slots and without a cache: the same bits, and every pair counted once."""
    expected = play_off(path, play, tokens, config)
    assert_same_as(expected, path, play, tokens, config)


def play_off(path: Path, play: Play, tokens: Sequence[int], config: EngineConfig) -> Logits:
    off = replace(config, moe_cache_bytes=MOE_CACHE_OFF, moe_cache_slots=0)
    engine = Engine(path, off)
    assert engine.snapshot().n_slots == ()
    logits = play(engine, tokens)
    engine.close()
    return logits


def assert_same_as(
    expected: Logits, path: Path, play: Play, tokens: Sequence[int], config: EngineConfig
) -> None:
    engine = Engine(path, config)
    assert engine.snapshot().n_slots
    with watched(engine) as seen:
        ours = play(engine, tokens)
    assert_same_bits(expected, ours)
    assert_plans_are_sound(engine, seen)
    assert_every_pair_is_counted(engine)
    assert_reads_are_counted(engine, seen)
    assert_slots_have_the_files_bytes(engine)
    engine.close()


def assert_same_bits(expected: Logits, ours: Logits) -> None:
    assert len(expected) == len(ours) and np.isfinite(expected).all()
    for step, (theirs, mine) in enumerate(zip(expected, ours, strict=True)):
        assert theirs.tobytes() == mine.tobytes(), f"step {step} differs"


def assert_plans_are_sound(engine: Engine, seen: Seen) -> None:
    """Each missing expert is loaded once or computed on the host, and nothing else is loaded."""
    for (_, plan), missing in zip(seen.plans, seen.missing, strict=True):
        served = [*plan.loads, *plan.on_host]
        assert len(served) == len(set(served)) <= len(np.unique(plan.experts))
        assert set(served) <= missing
        if engine.config.moe_miss == "load":
            assert not plan.on_host


def assert_every_pair_is_counted(engine: Engine) -> None:
    """Behind the last attention only one token of a batch goes on."""
    stats, model = engine.snapshot(), engine.model_config
    n_tokens = stats.n_tokens_prompt + stats.n_tokens_generated
    n_batches = stats.n_routings // model.n_layer
    assert stats.n_routings == n_batches * model.n_layer
    k = model.n_expert_used
    assert stats.pairs_per_layer == (k * n_tokens,) * (model.n_layer - 1) + (k * n_batches,)
    assert sum(stats.hit) + sum(stats.loaded) + sum(stats.on_host) == stats.n_pairs
    assert stats.n_pairs == k * ((model.n_layer - 1) * n_tokens + n_batches)
    assert not any(stats.substituted) and not any(stats.dropped)


def assert_reads_are_counted(engine: Engine, seen: Seen) -> None:
    """What was read came into a slot, and is there or was evicted.

    One read measures costs. Direct reads also fill slots before the first batch and bring guesses,
    whose whole blocks count and which may be wrong.
    """
    stats = engine.snapshot()
    n_loads = [int(layer == 0) for layer in range(engine.model_config.n_layer)]
    for layer, plan in seen.plans:
        n_loads[layer] += len(plan.loads)
    n_guesses = stats.prefetch_used + stats.prefetch_wasted
    for layer, residents in enumerate(stats.residency):
        n_bytes = expert_bytes(engine, layer)
        n_came = stats.n_evicted[layer] + sum(expert >= 0 for expert in residents)
        n_more_bytes = stats.bytes_read[layer] - n_came * n_bytes
        assert 0 <= n_more_bytes <= n_guesses * slot_bytes(n_bytes)
        n_most = n_loads[layer] + stats.n_slots[layer] if is_direct(engine) else n_loads[layer]
        assert n_loads[layer] <= n_came <= n_most
    assert not n_guesses or is_direct(engine)


def assert_slots_have_the_files_bytes(engine: Engine) -> None:
    """As the slots' device gives them back."""
    cache = engine._cache
    assert cache is not None
    for layer, residents in enumerate(engine.snapshot().residency):
        slabs = cache.slabs[layer]
        tensors = (slabs.ffn_gate_exps, slabs.ffn_up_exps, slabs.ffn_down_exps)
        for slot, expert in enumerate(residents):
            if expert >= 0:
                ranges = cache.store.ranges(layer, expert).parts
                for tensor, range in zip(tensors, ranges, strict=True):
                    data = np.empty(range.n_bytes, np.uint8)
                    engine.file.read(range, data)
                    seen = np.empty_like(data)
                    engine.backend.read(tensor, seen, slot * tensor.strides[2])
                    assert np.array_equal(seen, data), f"expert {expert} of layer {layer}"


def is_direct(engine: Engine) -> bool:
    assert engine._cache is not None
    return engine._cache.store.is_direct


def expert_bytes(engine: Engine, layer: int) -> int:
    assert engine._cache is not None
    return engine._cache.store.n_bytes(layer)


# the demo model, 500 tokens of real text


@pytest.fixture(scope="module")
def full_residency(demo_path: Path, tokens: list[int]) -> Logits:
    return play_off(demo_path, read_and_go_on, tokens, OFF)


SLOW = pytest.mark.slow
EVERY_DAY = [(2, "lru"), (8, "static")]
MATRIX = [
    pytest.param(n, policy, marks=[] if (n, policy) in EVERY_DAY else SLOW)
    for n in (2, 3, 4, 8)
    for policy in CACHE_POLICIES
]


@pytest.mark.parametrize(("n_slots", "policy"), MATRIX)
def test_500_tokens_have_the_logits_of_full_residency(
    n_slots: int, policy: str, demo_path: Path, tokens: list[int], full_residency: Logits
) -> None:
    config = with_slots(n_slots, policy)
    assert_same_as(full_residency, demo_path, read_and_go_on, tokens, config)


@SLOW
@pytest.mark.parametrize("miss", ["host", "auto"])
@pytest.mark.parametrize(("n_slots", "policy"), [(2, "lfu"), (3, "lru"), (4, "static"), (8, "lfu")])
def test_500_tokens_are_the_same_when_the_host_computes(
    n_slots: int,
    policy: str,
    miss: str,
    demo_path: Path,
    tokens: list[int],
    full_residency: Logits,
) -> None:
    config = with_slots(n_slots, policy, miss)
    assert_same_as(full_residency, demo_path, read_and_go_on, tokens, config)


@SLOW
@pytest.mark.parametrize(
    ("n_slots", "policy", "miss"),
    [
        (3, "lfu", "load"),
        (2, "static", "load"),
        (3, "lru", "auto"),
        (4, "lru", "host"),
    ],
)
def test_500_tokens_are_the_same_with_direct_reads(
    n_slots: int,
    policy: str,
    miss: str,
    small_machine: None,
    demo_path: Path,
    tokens: list[int],
    full_residency: Logits,
) -> None:
    config = with_slots(n_slots, policy, miss)
    assert_same_as(full_residency, demo_path, read_and_go_on, tokens, config)


@SLOW  # two threads that wait for each other crawl where something else runs
def test_two_threads_compute_what_two_threads_compute_with_full_residency(
    demo_path: Path, tokens: list[int]
) -> None:
    config = replace(with_slots(3, "lfu"), n_threads=2)
    assert_same(demo_path, read_and_go_on, tokens, config)


@pytest.mark.parametrize("n_batch", [1, 7, 512])
def test_batches_of_any_size_are_the_same(n_batch: int, demo_path: Path, tokens: list[int]) -> None:
    config = replace(with_slots(3, "lfu"), n_batch=n_batch)
    assert_same(demo_path, read_and_go_on, tokens[:110], config)


def test_layers_with_unlike_numbers_of_slots_are_the_same(
    demo_path: Path, tokens: list[int]
) -> None:
    per_slot = slot_bytes(3 * 139264)
    config = replace(with_slots(0, "lfu"), moe_cache_bytes=(3 * 8 + 5) * per_slot)
    engine = Engine(demo_path, config)
    assert sorted(engine.snapshot().n_slots) == [3, 3, 3, 4, 4, 4, 4, 4]
    engine.close()
    assert_same(demo_path, read_and_go_on, tokens[:200], config)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "miss"),
    [
        ("Q4_K", "load"),
        *(pytest.param("Q4_K", miss, marks=SLOW) for miss in ("host", "auto")),
        *(pytest.param("IQ4_XS", miss, marks=SLOW) for miss in MISS_ACTIONS),
    ],
)
def test_types_with_another_kernel_for_many_rows_are_the_same(
    name: str, miss: str, demo_in: Callable[[str], Path], tokens: list[int]
) -> None:
    config = with_slots(3, "lru", miss)
    assert_same(demo_in(name), read_and_go_on, tokens[:150], config)


@pytest.mark.slow
@pytest.mark.parametrize("piece_bytes", [4096, 10 * 4096])
def test_a_guess_is_copied_beside_what_is_read_and_never_over_it(
    piece_bytes: int,
    small_machine: None,
    demo_path: Path,
    tokens: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In small pieces a guess comes only so far, and here the copy comes last."""
    n_rests = 0

    def request(prefetcher: Prefetcher, load: Load) -> None:
        nonlocal n_rests
        if load.n_skipped_bytes:
            n_rests += 1
            prefetcher._n_under_way += 1
            prefetcher._read(load)
            prefetcher._finished.put((load, None, 1))
        else:
            real(prefetcher, load)

    real = Prefetcher.request
    monkeypatch.setattr(expert_store, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(Prefetcher, "request", request)
    assert_same(demo_path, read_and_go_on, tokens[:150], with_slots(3, "lfu"))
    assert n_rests > 20


def test_a_plan_that_was_carried_out_still_has_the_routers_choice(
    demo_path: Path, tokens: list[int]
) -> None:
    engine = Engine(demo_path, with_slots(8))
    with watched(engine) as seen:
        read_and_go_on(engine, tokens[:60], 50)
    engine.close()
    assert seen.kept


# what else can happen to a context


PLAYS = {
    "cancelled prompts": cancelled_prompts,
    "two conversations": two_conversations,
    "beginnings again": beginnings_again,
}
CACHES = [
    (2, "static", "load"),
    pytest.param(3, "lfu", "auto", marks=SLOW),
    pytest.param(5, "lru", "host", marks=SLOW),
]


@pytest.mark.slow
@pytest.mark.parametrize("play", PLAYS)
@pytest.mark.parametrize(("n_slots", "policy", "miss"), CACHES)
def test_contexts_that_are_cut_and_gone_on_with_are_the_same(
    play: str, n_slots: int, policy: str, miss: str, demo_path: Path, tokens: list[int]
) -> None:
    engine_config = with_slots(n_slots, policy, miss)
    expected = play_off(demo_path, PLAYS[play], tokens, engine_config)
    engine = Engine(demo_path, engine_config)
    assert_same_bits(expected, PLAYS[play](engine, tokens))
    assert_every_pair_is_counted(engine)
    assert_slots_have_the_files_bytes(engine)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize(("n_slots", "policy", "miss"), CACHES)
def test_a_shifted_context_is_the_same(
    n_slots: int, policy: str, miss: str, demo_path: Path, tokens: list[int]
) -> None:
    config = replace(with_slots(n_slots, policy, miss), n_ctx=128, context_shift=True, n_keep=4)
    assert_same(demo_path, shifted_context, tokens, config)


# other shapes


SHAPES = {
    "top-1 of 4": RandomModel(n_expert=4, n_expert_used=1),
    "top-4 of 16": RandomModel(n_expert=16, n_expert_used=4),
    "top-8 of 16": RandomModel(n_expert=16, n_expert_used=8),
    "all used": RandomModel(n_expert=4, n_expert_used=4),
    "one expert": RandomModel(n_expert=1, n_expert_used=1),
    "one layer": RandomModel(n_layer=1),
    "Q8_0, experts of half blocks": RandomModel(type=T.Q8_0, n_ff=256),
    "Q8_0, experts smaller than a block": RandomModel(type=T.Q8_0, n_embd=32, n_ff=32, n_head=1,
                                                      n_head_kv=1),
    "F32": RandomModel(type=T.F32),
    "biases": RandomModel(biases=True),
    "old layout": RandomModel(old_layout=True),
    "old layout, scattered": RandomModel(old_layout=True, scattered=True, n_expert=6),
    "old layout, half blocks": RandomModel(old_layout=True, type=T.Q8_0, n_ff=256),
    "split": RandomModel(n_layer=3, tensors_per_shard=7),
    "old layout, split": RandomModel(old_layout=True, tensors_per_shard=9, type=T.Q8_0, n_ff=256),
    "weights scaled": RandomModel(metadata={"expert_weights_scale": 2.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_are_the_same(name: str, small_machine: None, tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", SHAPES[name])
    assert_same(path, read_and_go_on, random_tokens(120), with_slots(middle(SHAPES[name]), "lfu"))


@SLOW
@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_are_the_same_with_every_setting(
    name: str, machine: str, tmp_path: Path
) -> None:
    model, tokens = SHAPES[name], random_tokens(150)
    path = write_random_model(tmp_path / "model.gguf", model)
    expected = play_off(path, read_and_go_on, tokens, OFF)
    for i, n_slots in enumerate(sorted({model.n_expert_used, middle(model), model.n_expert})):
        for j, miss in enumerate(MISS_ACTIONS):
            config = with_slots(n_slots, CACHE_POLICIES[(i + j) % 3], miss)
            assert_same_as(expected, path, read_and_go_on, tokens, config)


def test_a_cold_cache_serves_tokens_one_by_one(
    small_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of a token's experts are read at once, and the next layer's are read ahead."""
    monkeypatch.setattr(ExpertRunner, "start_filling", lambda runner: None)
    for n_used in (1, 4, 8, 12):
        model = RandomModel(n_layer=4, n_expert=16, n_expert_used=n_used)
        path = write_random_model(tmp_path / f"{n_used}.gguf", model)
        assert_same(path, one_by_one, random_tokens(20), with_slots(15, "lfu"))


def random_tokens(n: int) -> list[int]:
    return [1, *map(int, np.random.default_rng(7).integers(259, 320, n - 1))]


def middle(model: RandomModel) -> int:
    """Slots for half of the experts that a token does not need at once."""
    return (model.n_expert_used + model.n_expert) // 2


def test_direct_reads_and_staging_memory_are_what_the_shapes_go_through(
    small_machine: None, tmp_path: Path
) -> None:
    """Else the tests above would prove less than they say."""
    ways = {}
    for name in ("F32", "Q8_0, experts of half blocks"):
        path = write_random_model(tmp_path / f"{len(ways)}.gguf", SHAPES[name])
        engine = Engine(path, with_slots(2))
        cache = engine._cache
        assert cache is not None and cache.store.is_direct
        ways[name] = {
            part.offset % 4096 == target.start
            for expert in range(4)
            for part, target in zip(
                cache.store.ranges(0, expert).parts, cache._memory.parts(0, 0), strict=True
            )
        }
        engine.close()
    assert ways == {"F32": {True}, "Q8_0, experts of half blocks": {False}}
