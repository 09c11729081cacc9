"""How many slots a budget buys: answers known on paper, and memory as ggml allocates it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.byte_sizes import parse_bytes
from runner.config import MOE_CACHE_OFF, EngineConfig
from runner.engine import Engine
from runner.errors import OptionError
from runner.experts.cache_plan import CachePlan, plan_cache, share_out, slot_bytes
from runner.experts.other_memory import (
    HEADROOM_BYTES,
    HEADROOM_SHARE,
    graph_bytes,
    other_memory,
    state_bytes,
)
from runner.model_config import ModelConfig, RopeConfig
from runner.model_sizes import ModelSizes
from tests.random_model import RandomModel, write_random_model

ROPE = RopeConfig(64, 1e4, 1.0, 4096, 0.0, 1.0, 32.0, 1.0, "none")
MODEL = ModelConfig(
    architecture="llama", name="paper", n_vocab=1000, n_ctx_train=4096, n_embd=256, n_layer=4,
    n_head=4, n_head_kv=2, n_embd_head=64, n_ff=512, n_expert=8, n_expert_used=2, n_ff_exp=512,
    norm_rms_eps=1e-5, attention_scale=0.125, rope=ROPE, sliding_window=0, file_type="F16",
    has_merged_experts=True,
)  # fmt: skip
DENSE = replace(MODEL, n_expert=0, n_expert_used=0, n_ff_exp=0)
EXPERT = 245 * 4096
SLOT = 1_015_808
SIZES = ModelSizes(0, 0, (EXPERT,) * 4, 0, 32 * EXPERT, 5_000_000)
DENSE_SIZES = ModelSizes(0, 0, (), 0, 0, 5_000_000)
PLENTY = 1 << 34


def plan(
    n_bytes: int | None = None,
    n_slots: int = 0,
    available: int | None = PLENTY,
    model: ModelConfig = MODEL,
) -> CachePlan:
    config = EngineConfig(moe_cache_slots=n_slots)
    if n_bytes is not None:
        config = replace(config, moe_cache_bytes=n_bytes)
    sizes = SIZES if model.is_moe else DENSE_SIZES
    return plan_cache(config, model, sizes, 512, 64, available)


def test_a_slot_is_an_expert_and_three_gaps() -> None:
    assert slot_bytes(EXPERT) == EXPERT + 3 * 4096 == SLOT


def test_the_slot_of_an_odd_sized_expert_is_planned_large_enough() -> None:
    for n_bytes in (1, 4096, 4097, 100_000):
        taken = 3 * (-(-n_bytes // 4096) * 4096 + 4096)  # as SlotMemory lays matrices out
        assert taken <= slot_bytes(3 * n_bytes) <= taken + 3 * 4096


@pytest.mark.parametrize(
    ("n_affordable", "n_slots"),
    [
        (8, (2, 2, 2, 2)),
        (12, (3, 3, 3, 3)),
        (13, (3, 3, 4, 3)),
        (14, (3, 4, 3, 4)),
        (15, (4, 3, 4, 4)),
        (31, (8, 7, 8, 8)),
        (32, (8, 8, 8, 8)),
        (99, (8, 8, 8, 8)),
    ],
)
def test_what_is_over_buys_one_slot_more_in_layers_all_over_the_depth(
    n_affordable: int, n_slots: tuple[int, ...]
) -> None:
    made = plan(n_affordable * SLOT)
    assert made.n_slots == n_slots
    assert made.n_bytes == sum(n_slots) * SLOT
    assert made.budget_bytes == n_affordable * SLOT
    assert plan(n_affordable * SLOT + SLOT - 1).n_slots == n_slots


def test_a_layer_with_larger_experts_costs_more() -> None:
    assert share_out(20, (3, 1, 1, 3), 8) == (2, 3, 2, 3)  # 16, then layers 1 and 3 for 4
    assert share_out(19, (3, 1, 1, 3), 8) == (2, 2, 3, 2)


@given(st.integers(0, 2000), st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_a_share_never_costs_more_than_the_budget_and_is_even(
    budget: int, costs: list[int]
) -> None:
    n_slots = share_out(budget, costs, 8)
    spent = sum(n * cost for n, cost in zip(n_slots, costs, strict=True))
    assert spent <= budget
    assert min(n_slots) >= 0 and max(n_slots) <= min(8, min(n_slots) + 1)
    assert min(n_slots) == 8 or budget < (min(n_slots) + 1) * sum(costs)


def test_the_error_of_a_small_budget_names_the_smallest_that_works() -> None:
    with pytest.raises(OptionError) as refused:
        plan(7 * SLOT)
    text = str(refused.value)
    assert text.startswith("--moe-cache: a token needs 2 of a layer's experts at once, and 7.11 MB")
    named = re.search(r"smallest that works is --moe-cache (\w+) \(8.13 MB\)$", text)
    assert named is not None
    smallest = parse_bytes(named[1])
    assert plan(smallest).n_slots == (2, 2, 2, 2)
    with pytest.raises(OptionError):
        plan(smallest - 1024)


def test_auto_makes_no_cache_when_everything_fits_or_memory_is_unknown() -> None:
    assert plan() == CachePlan((), 0, 0, PLENTY, plan().other_bytes)
    assert plan(available=None).n_slots == ()
    assert plan(available=None).left_bytes is None


def test_auto_begins_where_the_experts_no_longer_fit() -> None:
    fixed = other_memory(EngineConfig(), MODEL, SIZES, 512, 64, available=0).n_bytes
    enough = round((fixed + SIZES.all_experts_bytes) / (1 - HEADROOM_SHARE)) + 10
    assert plan(available=enough).n_slots == ()
    tight = plan(available=enough - 1000)
    assert tight.available_bytes is not None
    assert tight.budget_bytes == tight.available_bytes - tight.other_bytes
    assert sum(tight.n_slots) == 31, "gaps take a slot that the experts alone would not"
    assert tight.n_bytes <= tight.budget_bytes < tight.n_bytes + SLOT
    assert tight.left_bytes == tight.budget_bytes - tight.n_bytes


def test_auto_without_memory_says_what_takes_it() -> None:
    with pytest.raises(OptionError) as refused:
        plan(available=110_000_000)
    text = str(refused.value)
    assert "--moe-cache auto: 110 MB of memory are free" in text
    assert "weights 5.00 MB, keys and values 1.05 MB" in text  # 512 tokens of 4 x 2 x 256 bytes
    assert "a smaller -c or -b" in text and "--moe-cache 7936KiB (8.13 MB)" in text


def test_slots_can_be_counted_instead() -> None:
    assert plan(n_slots=3).n_slots == (3, 3, 3, 3)
    assert plan(n_slots=3).budget_bytes == plan(n_slots=3).n_bytes == 12 * SLOT
    assert plan(12 * SLOT, n_slots=3).n_slots == (3, 3, 3, 3)
    assert plan(n_slots=8, available=None).n_slots == (8, 8, 8, 8)


@pytest.mark.parametrize("n_slots", [1, 9])
def test_a_count_of_slots_outside_the_models_range_is_refused(n_slots: int) -> None:
    with pytest.raises(OptionError, match=f"--moe-cache-slots {n_slots}: expected 2 to 8"):
        plan(n_slots=n_slots)


def test_flags_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(OptionError, match="--moe-cache-slots 3 contradicts --moe-cache off"):
        plan(MOE_CACHE_OFF, n_slots=3)
    with pytest.raises(OptionError, match="slots 4 takes 16.3 MB and --moe-cache allows 12.2 MB"):
        plan(12 * SLOT, n_slots=4)


def test_a_dense_model_has_no_cache_and_refuses_one() -> None:
    assert plan(model=DENSE).n_slots == ()
    assert plan(MOE_CACHE_OFF, model=DENSE).n_slots == ()
    with pytest.raises(OptionError, match="--moe-cache: this model has no experts"):
        plan(SLOT, model=DENSE)
    with pytest.raises(OptionError, match="--moe-cache-slots 2: this model has no experts"):
        plan(n_slots=2, model=DENSE)


def test_off_means_no_cache_however_little_memory_there_is() -> None:
    made = plan(MOE_CACHE_OFF, available=1 << 20)
    assert (made.n_slots, made.n_bytes, made.notes) == ((), 0, ())


def test_more_than_the_machine_has_is_refused_and_a_tight_fit_is_told() -> None:
    with pytest.raises(OptionError, match="the slots take 32.5 MB and 30.0 MB of memory are free"):
        plan(PLENTY, available=30_000_000)
    made = plan(PLENTY, available=40_000_000)
    assert made.left_bytes is not None and made.left_bytes < 0
    assert len(made.notes) == 1 and "40.0 MB are free" in made.notes[0]


def test_other_memory_is_weights_context_and_headroom() -> None:
    config = EngineConfig(cache_type_v="q8_0")
    other = other_memory(config, MODEL, SIZES, 1000, 64, 100_000_000)
    assert other.weights_bytes == 5_000_000
    assert other.kv_bytes == 1000 * 4 * (128 * 2 + 128 // 32 * 34)
    assert other.headroom_bytes == HEADROOM_BYTES + 2_000_000
    assert other.n_bytes == 5_000_000 + other.kv_bytes + other.compute_bytes + other.headroom_bytes


SHAPES = {
    "mixtral": RandomModel(n_embd=256, n_ff=896, n_head_kv=1, n_expert=8),
    "many small experts": RandomModel(n_embd=256, n_ff=96, n_expert=16, n_expert_used=8),
    "experts of 32": RandomModel(n_expert=64, n_expert_used=4, n_ff=32),
    "wide heads": RandomModel(n_ff=64, n_head=16, n_head_kv=16, n_embd_head=64, n_expert_used=1),
    "biases": RandomModel(biases=True),
    "dense": RandomModel(n_embd=256, n_ff=896, n_expert=0),
    "dense, small": RandomModel(n_embd=256, n_ff=64, n_head=8, n_head_kv=8, n_expert=0),
    "large vocabulary": RandomModel(n_vocab=20000, n_embd=64, n_ff=64),
}


@pytest.mark.parametrize("n_batch", [1, 64])
@pytest.mark.parametrize("has_cache", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_graphs_take_at_most_the_estimate_and_at_least_half(
    shape: str, has_cache: bool, n_batch: int, tmp_path: Path
) -> None:
    m = SHAPES[shape]
    n_slots = m.n_expert - 1 if has_cache and m.n_expert else 0
    path = write_random_model(tmp_path / "m.gguf", m)
    config = EngineConfig(n_ctx=512, n_batch=n_batch, n_threads=1, moe_cache_slots=n_slots)
    engine = Engine(path, config)
    graphs, state = engine._graphs._allocator.n_bytes, engine._parts.state._buffer.n_bytes
    engine.close()
    assert graphs <= graph_bytes(engine.model_config, n_batch) <= 2 * graphs
    assert state <= state_bytes(engine.model_config, 512, n_batch)
