"""What an engine on a device keeps in order: who stands in, what is uploaded beside the batches,
what fails or is cancelled midway, steps that are verified, contexts that are shifted."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quant.devices import Device
from runner.engine import Engine
from runner.errors import GGUFError
from runner.experts import expert_runner
from runner.experts.expert_runner import ExpertRunner
from runner.experts.expert_store import ExpertStore
from runner.experts.uploads import Piece
from runner.stats import StatsSnapshot
from runner.tokenizer import Tokenizer
from tests.llama_cpp_oracle import mean_kl
from tests.random_model import RandomModel, write_random_model
from tests.runner.buddy_books import (
    assert_counted,
    assert_stand_ins_are_there,
    assert_within_budget,
    watched,
)
from tests.runner.experts.test_exact import after, assert_slots_have_the_files_bytes
from tests.runner.test_device_engine import opened

pytestmark = pytest.mark.gpu

N_PROMPT, N_DECODED = 20, 12


@pytest.fixture(scope="module")
def tokens(demo_path: Path, held_out_text: str) -> list[int]:
    with Tokenizer(demo_path) as tokenizer:
        return tokenizer.tokenize(held_out_text, add_special=True, parse_special=False)


@pytest.fixture
def vulkan(gpu_device: Device) -> str:
    return gpu_device.name


def play(engine: Engine, tokens: Sequence[int], n_decoded: int = N_DECODED) -> np.ndarray:
    """A prompt in two batches, then known tokens one by one: (2 + n, n_vocab)."""
    rows = [engine.prefill(tokens[:12]).copy(), engine.prefill(tokens[:N_PROMPT]).copy()]
    rows += [engine.decode(token).copy() for token in tokens[N_PROMPT : N_PROMPT + n_decoded]]
    assert np.isfinite(rows).all()
    return np.array(rows)


def greedy(engine: Engine, prompt: Sequence[int], n: int) -> list[int]:
    steps = engine.generate(prompt, lambda row: int(row.argmax()), n, lambda token: False)
    return [step.token for step in steps]


# who stands in


@pytest.mark.parametrize(
    ("settings", "budget"),
    [
        ({"buddy": "router"}, 0.1),
        ({"buddy": "blend"}, 0.05),
        ({"buddy": "prior-router"}, 0.05),
        ({"buddy": "drop"}, 0.1),
        ({"buddy": "resident", "buddy_min_rank": 1}, 1.0),
        ({"buddy": "drop", "buddy_min_rank": 1}, 1.0),
        ({"buddy": "router", "moe_miss": "host"}, 0.1),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_every_pair_is_computed_once_by_whom_the_policy_says_and_counted(
    vulkan: str, demo_path: Path, tokens: list[int], settings: dict[str, Any], budget: float
) -> None:
    settings = {"moe_cache_slots": 4, "moe_miss": "load", "buddy_budget": budget, **settings}
    with opened(demo_path, vulkan, **settings) as engine, watched(engine) as books:
        play(engine, tokens)
        found = engine.snapshot()
        assert sum(found.substituted) + sum(found.dropped) > 0
        assert (sum(found.on_host) > 0) == (settings["moe_miss"] == "host")
        assert_counted(books, found)
        assert_stand_ins_are_there(books)
        assert_slots_have_the_files_bytes(engine)
        if budget < 1.0:
            assert_within_budget(books, budget)


def restricted_run(
    path: Path, device: str, tokens: Sequence[int], is_whole: bool = True
) -> tuple[np.ndarray, StatsSnapshot]:
    """Single tokens whose router chooses among the first four experts of each layer."""
    settings = {"buddy": "resident", "buddy_budget": 1.0, "buddy_min_rank": 1}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(ExpertRunner, "start_filling", lambda runner: None)
        if not is_whole:
            m.setattr(ExpertRunner, "can_run_whole", lambda runner, n_tokens: False)
        with opened(path, device, moe_cache_slots=4, **settings) as engine:
            cache = engine._cache
            assert cache is not None
            for layer in range(engine.model_config.n_layer):
                for expert in sorted({0, 1, 2, 3} - set(cache.table.residents(layer).tolist())):
                    cache.finish(cache.start_load(layer, expert))
            rows = np.array([engine.decode(token).copy() for token in tokens])
            graphs = engine._graphs._graphs.values()
            assert sum(len(graph._whole) for graph in graphs) == is_whole
            return rows, engine.snapshot()


def test_a_restricted_token_as_one_graph_is_the_token_layer_by_layer_and_as_on_the_cpu(
    vulkan: str, demo_in: Callable[[str], Path], tokens: list[int]
) -> None:
    path, some = demo_in("F16"), tokens[:20]
    whole, counted = restricted_run(path, vulkan, some)
    layers, counted_by_layer = restricted_run(path, vulkan, some, is_whole=False)
    on_cpu, _ = restricted_run(path, "cpu", some)
    assert mean_kl(layers, whole) <= 1e-6  # there the host computes the weights of stand-ins
    assert mean_kl(on_cpu, whole) <= 1e-4
    for name in ("hit", "loaded", "on_host", "substituted", "dropped", "residency"):
        assert getattr(counted, name) == getattr(counted_by_layer, name)
    assert sum(counted.hit) > 0 and sum(counted.substituted) > 0 == sum(counted.loaded)
    n_layer = len(counted.hit)
    assert counted.n_pairs == 2 * 20 * n_layer
    assert counted.weight == pytest.approx(20 * n_layer, abs=1e-3)
    by_layer = counted_by_layer.substituted_weight
    assert counted.substituted_weight == pytest.approx(by_layer, rel=1e-3)


# uploads beside the batches


@pytest.fixture
def uploads_always(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Whatever the host computed is uploaded; the list gets each expert."""
    chosen: list[int] = []

    def choose(table: Any, costs: Any, layer: int, on_host: Sequence[int]) -> int:
        chosen.append(on_host[0])
        return on_host[0]

    monkeypatch.setattr(expert_runner, "expert_to_upload", choose)
    return chosen


@pytest.mark.parametrize("policy", ["lfu", "static"])
def test_uploads_beside_the_batches_change_no_number_and_bring_the_right_bytes(
    vulkan: str, demo_path: Path, tokens: list[int], uploads_always: list[int], policy: str
) -> None:
    settings = {"moe_cache_slots": 3, "moe_cache_policy": policy}
    with opened(demo_path, vulkan, moe_miss="load", **settings) as engine:
        expected = play(engine, tokens, 16)
    with opened(demo_path, vulkan, moe_miss="host", **settings) as engine:
        before = engine.snapshot()
        found = play(engine, tokens, 16)
        assert len(uploads_always) > 8
        after_it = engine.snapshot()
        assert sum(after_it.on_host) > 0 and sum(after_it.loaded) == 0
        assert sum(after_it.bytes_read) > sum(before.bytes_read)
        assert_slots_have_the_files_bytes(engine)
        greedy(engine, tokens[:10], 5)  # closing comes with uploads under way
    assert mean_kl(expected, found) <= 1e-3


def test_an_upload_that_fails_is_no_error_and_leaves_its_slot_empty_or_right(
    vulkan: str, demo_path: Path, tokens: list[int], uploads_always: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with opened(demo_path, vulkan, moe_cache_slots=3, moe_miss="host") as engine:
        play(engine, tokens, 4)
        expected = [engine.decode(token).copy() for token in tokens[40:44]]
    with opened(demo_path, vulkan, moe_cache_slots=3, moe_miss="host") as engine:
        play(engine, tokens, 4)
        with failing_reads(monkeypatch, every=2):
            found = [engine.decode(token).copy() for token in tokens[40:44]]
        assert_slots_have_the_files_bytes(engine)
    assert mean_kl(np.array(expected), np.array(found)) <= 1e-3


# what fails midway


@contextmanager
def failing_reads(monkeypatch: pytest.MonkeyPatch, every: int) -> Iterator[None]:
    """Each so-manieth piece cannot be read."""
    n_pieces, read_piece = 0, ExpertStore.read_piece

    def read(store: ExpertStore, piece: Piece, memory: memoryview) -> memoryview:
        nonlocal n_pieces
        n_pieces += 1
        if n_pieces % every == 0:
            raise GGUFError("this piece was spoiled by the test")
        return read_piece(store, piece, memory)

    with monkeypatch.context() as m:
        m.setattr(ExpertStore, "read_piece", read)
        yield


@pytest.mark.parametrize("every", [1, 5, 30])
def test_after_failed_reads_the_next_try_has_the_same_bits(
    vulkan: str, demo_path: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    settings = {"moe_cache_slots": 3, "moe_miss": "load"}
    with opened(demo_path, vulkan, **settings) as engine:
        expected = play(engine, tokens, 3)
    with opened(demo_path, vulkan, **settings) as engine:
        with failing_reads(monkeypatch, every), pytest.raises(GGUFError, match="spoiled"):
            engine.prefill(tokens[:12])
        assert engine.n_past == 0
        assert_slots_have_the_files_bytes(engine)
        assert play(engine, tokens, 3).tobytes() == expected.tobytes()


def test_prompts_that_are_cancelled_midway_have_the_same_bits_for_every_number_of_slots(
    vulkan: str, demo_path: Path, tokens: list[int]
) -> None:
    runs = []
    for n_slots in (8, 3):
        settings = {"moe_cache_slots": n_slots, "moe_miss": "load", "n_batch": 12}
        with opened(demo_path, vulkan, **settings) as engine:
            for n_calls in (1, 4, 13):  # before the first layer, and within both batches
                engine.reset()
                prompt, stop = tokens[:N_PROMPT], after(n_calls)
                steps = engine.generate(prompt, np.argmax, 3, lambda token: False, stop)
                assert [step.stop_reason for step in steps] == ["cancelled"]
                assert engine.n_past == (12 if n_calls == 13 else 0)
                runs.append(play(engine, tokens, 3).tobytes())
    assert runs[:3] == runs[3:]


# steps that are verified


@pytest.mark.parametrize("buddy", ["router", "resident"])
def test_verified_steps_are_judged(
    vulkan: str, demo_path: Path, tokens: list[int], buddy: str
) -> None:
    settings = {"buddy": buddy, "buddy_budget": 0.1, "moe_cache_slots": 4, "moe_miss": "load"}
    with opened(demo_path, vulkan, verify_every=2, **settings) as engine:
        greedy(engine, tokens[:N_PROMPT], 9)
        found = engine.snapshot()
        assert found.n_verified == 4
        assert 0 <= found.verified_kl_sum < 1.0
        assert engine.n_past == N_PROMPT + 8


def test_a_step_without_stand_ins_is_the_exact_step(
    vulkan: str, demo_path: Path, tokens: list[int]
) -> None:
    settings = {"buddy": "router", "buddy_budget": 1e-9, "moe_miss": "load", "verify_every": 1}
    with opened(demo_path, vulkan, moe_cache_slots=3, **settings) as engine:
        verified = greedy(engine, tokens[:N_PROMPT], 9)
        found = engine.snapshot()
        assert found.n_verified == found.n_verified_agree == 8
        assert found.verified_kl_sum == found.verified_kl_max == 0.0
    with opened(demo_path, vulkan, moe_cache_slots=8) as engine:
        assert greedy(engine, tokens[:N_PROMPT], 9) == verified


# the context


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_a_shifted_context_goes_on_as_on_the_cpu(vulkan: str, tmp_path: Path, kv_type: str) -> None:
    """In one layer K and V depend on the token alone: a fresh context of the rest is the same."""
    m = RandomModel(n_layer=1, n_expert=4, seed=3, rope_freqs=tuple(1 + i / 2 for i in range(16)))
    path = write_random_model(tmp_path / "m.gguf", m)
    settings = {"n_ctx": 64, "context_shift": True, "n_keep": 3, "moe_cache_slots": 2}
    kinds = {"cache_type_k": kv_type, "cache_type_v": kv_type}
    some = [1, *range(260, 319), 20, 21, 22, 23]
    rows: list[np.ndarray] = []
    for device in ("cpu", vulkan, vulkan):
        is_fresh = len(rows) == 2
        with opened(path, device, **settings, **kinds) as engine:
            if is_fresh:
                engine.prefill([*some[:4], *some[4 + 30 :]])
            else:
                engine.prefill(some)
                assert engine._context.make_room()
            assert engine.n_past == 64 - 30
            rows.append(np.array([engine.decode(token).copy() for token in range(300, 310)]))
    each = [mean_kl(rows[1][i : i + 1], rows[0][i : i + 1]) for i in range(10)]
    assert np.median(each) <= (1e-3 if kv_type == "f16" else 1e-2)
    each = [mean_kl(rows[1][i : i + 1], rows[2][i : i + 1]) for i in range(10)]
    assert np.median(each) <= (1e-3 if kv_type == "f16" else 3e-2)


def test_an_answer_of_many_contexts_goes_on_and_on(
    vulkan: str, demo_path: Path, tokens: list[int]
) -> None:
    settings = {"n_ctx": 32, "context_shift": True, "moe_cache_slots": 8}
    with opened(demo_path, vulkan, **settings) as engine:
        assert len(greedy(engine, tokens[:24], 60)) == 60
        assert engine.n_past < 32
        rest = list(engine._context.tokens)
        expected = engine.prefill([*rest, 7]).copy()
        engine.reset()
        assert mean_kl(engine.prefill([*rest, 7])[None], expected[None]) < 0.5


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_keys_and_values_on_the_device_stay_close_to_the_cpus(
    vulkan: str, tmp_path: Path, kv_type: str
) -> None:
    path = write_random_model(tmp_path / "m.gguf", RandomModel(n_expert=0, seed=3))
    kinds, rows = {"cache_type_k": kv_type, "cache_type_v": kv_type}, []
    for device in ("cpu", vulkan):
        with opened(path, device, **kinds) as engine:
            rows.append(play(engine, list(range(260, 319))))
    assert mean_kl(*rows) <= (1e-3 if kv_type == "f16" else 3e-2)


def test_a_changed_end_of_the_prompt_forgets_the_old_one(
    vulkan: str, demo_path: Path, tokens: list[int]
) -> None:
    with opened(demo_path, vulkan, moe_cache_slots=3, moe_miss="load") as engine:
        beginning = tokens[:N_PROMPT]
        engine.prefill(beginning)
        engine.prefill([*beginning, *tokens[100:110]])
        changed = engine.prefill([*beginning, 5, 6, 7]).copy()
        engine.reset()
        engine.prefill(beginning)
        assert engine.prefill([*beginning, 5, 6, 7]).tobytes() == changed.tobytes()
