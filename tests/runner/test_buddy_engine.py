"""An engine whose missing experts are stood in for: what it computes, counts and spends."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from quant.gguf_file import GGUFFile
from runner.buddies import default_path
from runner.config import BUDDY_POLICIES, MOE_CACHE_OFF, EngineConfig
from runner.engine import Engine
from runner.errors import CancelledError, GGUFError, OptionError
from runner.model_hash import model_hash
from runner.tokenizer import Tokenizer
from tests.numpy_oracle import numpy_logits
from tests.random_model import RandomModel, write_random_model
from tests.runner.buddy_books import (
    Books,
    assert_counted,
    assert_stand_ins_are_there,
    assert_within_budget,
    watched,
)
from tests.runner.experts.test_exact import (
    after,
    assert_slots_have_the_files_bytes,
    small_machine,
)
from tests.runner.experts.test_failures import at_read, fail_with_eio
from tests.runner.test_buddies import make_table

SLOW = pytest.mark.slow
EXACTLY = EngineConfig(n_threads=1, n_ctx=1024, n_batch=16, moe_cache_slots=3, moe_miss="load")
ROUTER = replace(EXACTLY, buddy="router", buddy_profile="off", buddy_budget=0.05)
NOTHING_GIVEN = 1e-9  # a budget

__all__ = ["small_machine"]  # a fixture


@pytest.fixture(scope="module")
def tokens(demo_path: Path, held_out_text: str) -> list[int]:
    with Tokenizer(demo_path) as tokenizer:
        return tokenizer.tokenize(held_out_text, add_special=True, parse_special=False)


@contextmanager
def engine_of(path: Path, config: EngineConfig, **changes: Any) -> Iterator[Engine]:
    with closing(Engine(path, replace(config, **changes))) as engine:
        yield engine


def play(engine: Engine, tokens: Sequence[int], n_prompt: int = 40) -> list[np.ndarray]:
    """A prompt in batches, then known tokens one by one; the logits of each step."""
    logits = [engine.prefill(tokens[:n_prompt]).copy()]
    return logits + [engine.decode(token).copy() for token in tokens[n_prompt:]]


def bits(logits: Sequence[np.ndarray]) -> list[bytes]:
    assert all(np.isfinite(row).all() for row in logits)
    return [row.tobytes() for row in logits]


def assert_sound(books: Books, share: float) -> None:
    assert_counted(books, books.engine.snapshot())
    assert_stand_ins_are_there(books)
    assert_slots_have_the_files_bytes(books.engine)
    if share < 1.0:
        assert_within_budget(books, share)


# every policy on the demo model, with its profile

EVERY_DAY = [("blend", 0.05), ("prior-router", 0.05), ("drop", 0.05), ("router", 1.0)]
POLICIES = [
    pytest.param(name, budget, marks=[] if (name, budget) in EVERY_DAY else SLOW)
    for name in BUDDY_POLICIES
    for budget in (0.05, 1.0)
]


@pytest.mark.parametrize(("name", "budget"), POLICIES)
def test_every_pair_is_computed_once_by_whom_the_policy_says_within_the_budget(
    name: str, budget: float, demo_path: Path, tokens: list[int]
) -> None:
    with (
        engine_of(demo_path, EXACTLY, buddy=name, buddy_budget=budget) as engine,
        watched(engine) as books,
    ):
        assert engine.buddies.name == name
        bits(play(engine, tokens[:70]))
        found = engine.snapshot()
        n_given = sum(found.substituted) + sum(found.dropped)
        assert n_given > 0 and (sum(found.dropped) == n_given) == (name == "drop")
        assert (found.buddy, found.buddy_budget) == (name, budget)
        assert_sound(books, budget)
        assert not any(served.given[:, 0].any() for served in books.served), "rank 1 is protected"
        assert found.standin_share <= budget + 1e-6 or budget == 1.0
    spent, weight = books.spent_and_weight()
    assert found.standin_share == pytest.approx(spent.sum() / weight.sum())
    assert found.substituted_weight_share == pytest.approx(spent.sum() / weight.sum())


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "n_slots"), [(0.05, 2), (0.2, 4), (1.0, 2)])
@pytest.mark.parametrize("name", BUDDY_POLICIES)
def test_long_texts_and_long_prompts_keep_the_rules(
    name: str, budget: float, n_slots: int, demo_path: Path, tokens: list[int]
) -> None:
    """Windows of 256 tokens pass over lone tokens, short batches and ones longer than they are."""
    config = replace(
        EXACTLY, moe_cache_slots=n_slots, n_batch=512, buddy=name, buddy_budget=budget,
        buddy_min_rank=1,
    )  # fmt: skip
    with engine_of(demo_path, config) as engine, watched(engine) as books:
        assert len(tokens) > 900
        bits(play(engine, tokens[:300], n_prompt=20))
        shares = [engine.snapshot().standin_share]
        engine.prefill(tokens[:700])
        engine.prefill(tokens[:760])
        for token in tokens[760:900]:
            assert np.isfinite(engine.decode(token)).all()
            shares.append(engine.snapshot().standin_share)
        assert max(shares) <= budget + 1e-6
        assert_sound(books, budget)
        assert sum(served.given.sum() for served in books.served) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blend", "router", "prior", "resident", "drop"])
@pytest.mark.parametrize(("miss", "eviction"), [("host", "lru"), ("auto", "static")])
def test_what_is_not_given_away_is_read_or_computed_on_the_host(
    name: str, miss: str, eviction: str, demo_path: Path, tokens: list[int]
) -> None:
    changes = {"buddy": name, "buddy_budget": 0.1, "moe_miss": miss, "moe_cache_policy": eviction}
    with engine_of(demo_path, EXACTLY, **changes) as engine, watched(engine) as books:
        bits(play(engine, tokens[:200], n_prompt=70))
        assert_sound(books, 0.1)
        found = engine.snapshot()
        assert sum(found.substituted) + sum(found.dropped) > 0
        assert miss == "auto" or (sum(found.on_host) > 0 and sum(found.loaded) < 300)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["blend", "router", "drop"])
def test_where_experts_are_read_ahead_the_rules_are_the_same(
    name: str, demo_path: Path, tokens: list[int], small_machine: None
) -> None:
    with (
        engine_of(demo_path, EXACTLY, buddy=name, buddy_budget=0.1) as engine,
        watched(engine) as books,
    ):
        bits(play(engine, tokens[:200], n_prompt=70))
        assert_sound(books, 0.1)
        found = engine.snapshot()
        assert found.prefetch_used > 0 and found.standin_share > 0


# the numbers, by a second implementation


@pytest.fixture(scope="module")
def random_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a made-up profile beside it."""
    path = write_random_model(tmp_path_factory.mktemp("random") / "model.gguf", RANDOM)
    with GGUFFile.open(path) as file:
        table = make_table(RANDOM.n_layer, RANDOM.n_expert)
        replace(table, model_hash=model_hash(file)).save(default_path(path))
    return path


RANDOM = RandomModel(n_layer=3, n_expert=8, n_expert_used=3, type=T.F32, seed=4)


def serving_of(books: Books) -> list[tuple[np.ndarray, np.ndarray]]:
    """Who computed every token's pairs in each layer, with what weights; nobody is weight 0."""
    n_tokens = sum(n for n, _ in books.batches)
    shape = RANDOM.n_layer, n_tokens, RANDOM.n_expert_used
    experts, weights, position = np.zeros(shape, int), np.zeros(shape), 0
    for n, layers in books.batches:
        position += n
        for served in layers:
            rows = slice(position - len(served.chosen), position)
            experts[served.layer, rows] = served.plan.experts
            weights[served.layer, rows] = served.weights
    return list(zip(experts, weights, strict=True))


@pytest.mark.parametrize("name", BUDDY_POLICIES)
def test_the_logits_are_those_of_the_experts_and_weights_that_the_policy_chose(
    name: str, random_path: Path
) -> None:
    sequence = [1, *map(int, np.random.default_rng(5).integers(259, 320, 35))]
    config = replace(EXACTLY, moe_cache_slots=5, buddy=name, buddy_budget=1.0, n_batch=8)
    with engine_of(random_path, config) as engine, watched(engine) as books:
        logits = play(engine, sequence, n_prompt=20)
        assert_sound(books, 1.0)
        given = [served for served in books.served if served.given.any()]
        assert any(served.plan.loads for served in given) or name == "resident"
        assert not all(served.plan.loads for served in given)
    expected = numpy_logits(random_path, RANDOM, sequence, serving=serving_of(books))[19:]
    assert np.allclose(logits, expected, atol=0.05)
    exact = numpy_logits(random_path, RANDOM, sequence)[19:]
    assert not np.allclose(logits, exact, atol=1)


# where nobody can stand in


@pytest.mark.parametrize("name", ["router", "blend"])
def test_with_a_slot_for_every_expert_the_logits_are_those_without_a_cache(
    name: str, demo_path: Path, tokens: list[int]
) -> None:
    config = replace(EXACTLY, buddy=name, buddy_budget=1.0, buddy_min_rank=1)
    with engine_of(demo_path, config, moe_cache_slots=8, counts_weight=True) as engine:
        ours = bits(play(engine, tokens[:60]))
        found = engine.snapshot()
        assert found.substituted_weight_share == 0 and not any(found.substituted)
        for token in range(300, 400):  # until all experts are there
            engine.decode(token)
        assert engine._cache is not None and engine._cache.table.has_everything
        assert engine.snapshot().weight == pytest.approx(7 * 160 + 123, abs=1e-3)
    with engine_of(demo_path, config, moe_cache_slots=0, moe_cache_bytes=MOE_CACHE_OFF) as engine:
        assert bits(play(engine, tokens[:60])) == ours


def test_only_layers_that_lack_slots_have_stand_ins(random_path: Path) -> None:
    """One layer has a slot for every expert; what it computes is counted all the same."""
    with GGUFFile.open(random_path) as file:
        n_bytes = 3 * file.tensors["blk.0.ffn_up_exps.weight"].n_bytes // RANDOM.n_expert
    budget = (3 * 7 + 1) * (n_bytes + 3 * 4096)
    config = replace(ROUTER, moe_cache_slots=0, moe_cache_bytes=budget, buddy_budget=1.0)
    sequence = [1, *map(int, np.random.default_rng(6).integers(259, 320, 79))]
    with engine_of(random_path, config) as engine, watched(engine) as books:
        assert sorted(engine.snapshot().n_slots) == [7, 7, 8]
        play(engine, sequence, n_prompt=30)
        assert_counted(books, engine.snapshot())
        found = engine.snapshot()
        for layer, n_slots in enumerate(found.n_slots):
            assert (found.substituted[layer] > 0) == (n_slots == 7)


def test_with_nothing_to_spend_the_logits_are_the_exact_ones(
    demo_path: Path, tokens: list[int]
) -> None:
    with engine_of(demo_path, EXACTLY) as engine:
        expected = bits(play(engine, tokens[:50]))
    for name in ("blend", "drop"):
        config = replace(EXACTLY, buddy=name, buddy_budget=NOTHING_GIVEN)
        with engine_of(demo_path, config) as engine:
            assert bits(play(engine, tokens[:50])) == expected
            found = engine.snapshot()
            assert not any(found.substituted) and not any(found.dropped)
            assert found.weight == pytest.approx(7 * 50 + 13, abs=1e-3)


@pytest.mark.parametrize("name", ["drop", "resident"])
def test_nobody_stands_in_and_nothing_is_dropped_before_all_slots_are_filled(
    name: str, demo_path: Path, tokens: list[int]
) -> None:
    config = replace(ROUTER, buddy=name, buddy_budget=1.0, buddy_min_rank=1, moe_cache_slots=4)
    with engine_of(demo_path, config) as engine, watched(engine) as books:
        for token in tokens[:12]:
            engine.decode(token)
        filled = {served.layer: False for served in books.served}
        for served in books.served:
            if not filled[served.layer]:
                assert not served.given.any()
            filled[served.layer] = served.is_resident.sum() + len(served.plan.loads) >= 4
        assert all(filled.values()) and sum(served.given.sum() for served in books.served) > 0


def test_fewer_slots_than_a_token_needs_are_refused_whatever_the_policy(demo_path: Path) -> None:
    for name in ("drop", "resident"):
        with pytest.raises(OptionError, match="expected 2 to 8"):
            Engine(demo_path, replace(ROUTER, buddy=name, moe_cache_slots=1))


@pytest.mark.parametrize(
    "name", ["drop", "resident", *(pytest.param(n, marks=SLOW) for n in ("router", "blend"))]
)
def test_with_as_few_slots_as_a_token_needs_every_policy_works(
    name: str, demo_path: Path, tokens: list[int]
) -> None:
    config = replace(EXACTLY, buddy=name, buddy_budget=1.0, buddy_min_rank=1, moe_cache_slots=2)
    with engine_of(demo_path, config) as engine, watched(engine) as books:
        bits(play(engine, tokens[:40], n_prompt=25))
        assert_sound(books, 1.0)
        assert sum(engine.snapshot().loaded[i] for i in range(8)) < 8 * 30


# prompts


def test_an_expert_that_is_read_for_one_token_serves_the_whole_prompt(
    demo_path: Path, tokens: list[int]
) -> None:
    with engine_of(demo_path, ROUTER, n_batch=48) as engine, watched(engine) as books:
        play(engine, tokens[:48], 48)
        engine.reset()
        books.batches.clear()
        engine.prefill(tokens[48:96])
        assert_stand_ins_are_there(books)
        (_, layers) = books.batches[0]
        assert any(len(served.plan.loads) for served in layers)
        for served in layers:
            read = np.isin(served.chosen, served.plan.loads)
            assert not (read & served.given).any()


# what comes between


def state_of(engine: Engine) -> tuple[object, ...]:
    policy = engine.buddies.policy
    assert policy is not None
    return (
        engine.n_past, list(policy.budget._history), policy.budget.spent_share,
        policy.opening.value, engine.snapshot().n_pairs, engine.snapshot().weight,
    )  # fmt: skip


def assert_goes_on(engine: Engine, tokens: Sequence[int], share: float) -> None:
    assert_slots_have_the_files_bytes(engine)
    with watched(engine) as books:
        for token in tokens:
            assert np.isfinite(engine.decode(token)).all()
        assert_stand_ins_are_there(books)
        assert sum(served.given.sum() for served in books.served) > 0
    assert engine.snapshot().standin_share <= share + 1e-6


@pytest.mark.parametrize("n_calls", [3, 11])  # layers of the first and the second batch
def test_a_prompt_that_is_cancelled_spends_only_what_its_finished_batches_did(
    n_calls: int, demo_path: Path, tokens: list[int]
) -> None:
    with engine_of(demo_path, ROUTER, buddy_budget=0.2) as engine:
        play(engine, tokens[:60])
        before = state_of(engine)
        with pytest.raises(CancelledError):
            engine.prefill(tokens[:100], after(n_calls))
        if n_calls < 8:
            assert state_of(engine) == before
        assert engine.n_past == 60 + 16 * (n_calls // 8)
        assert_goes_on(engine, tokens[engine.n_past : 120], 0.2)


@pytest.mark.parametrize(("number", "n_tokens"), [(8, 16), (1, 1)])
def test_a_read_that_fails_within_a_batch_costs_nothing_and_leaves_the_slots_usable(
    number: int, n_tokens: int, demo_path: Path, tokens: list[int]
) -> None:
    with engine_of(demo_path, ROUTER, buddy_budget=0.2) as engine:
        play(engine, tokens[:60])
        n = 60
        with at_read(number, fail_with_eio), pytest.raises(GGUFError, match="input/output error"):
            while True:  # a lone token may have everything
                before, n = state_of(engine), n + n_tokens
                engine.prefill(tokens[:n])
        assert state_of(engine) == before and engine.n_past == n - n_tokens
        assert_goes_on(engine, tokens[engine.n_past : 120], 0.2)


def test_answers_with_a_shifted_context_keep_the_budget(demo_path: Path, tokens: list[int]) -> None:
    config = replace(ROUTER, n_ctx=64, context_shift=True, buddy_budget=0.1)
    with engine_of(demo_path, config) as engine, watched(engine) as books:
        steps = list(
            engine.generate(tokens[:50], lambda z: int(z.argmax()), 70, lambda token: False)
        )  # fmt: skip
        assert len(steps) == 70 and engine.n_past < 64
        assert_sound(books, 0.1)
        assert sum(served.given.sum() for served in books.served) > 0


# the same again


@pytest.mark.parametrize("name", [pytest.param("blend", marks=SLOW), "random"])
def test_equal_settings_have_equal_logits_and_other_seeds_others(
    name: str, demo_path: Path, tokens: list[int]
) -> None:
    def run(seed: int) -> list[bytes]:
        config = replace(EXACTLY, buddy=name, buddy_budget=0.3, buddy_seed=seed)
        with engine_of(demo_path, config) as engine:
            return bits(play(engine, tokens[:50]))

    first = run(0)
    assert run(0) == first
    assert (run(1) == first) == (name != "random")
