"""The engine against llama.cpp: same file, same tokens, same numbers."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from runner.batch_graph import BatchGraph, BatchShape
from runner.config import EngineConfig
from runner.engine import Engine
from runner.errors import BackendError, CancelledError, ContextFullError, OptionError
from runner.graph_cache import GraphCache
from runner.layer_trace import LayerTrace
from tests.llama_cpp_oracle import FILE_TYPES, LlamaCpp, mean_kl
from tests.numpy_oracle import numpy_logits
from tests.random_model import RandomModel, write_metadata, write_random_model, write_vocabulary

THREADS = EngineConfig(n_threads=1)


def teacher_forced(engine: Engine, tokens: list[int]) -> np.ndarray:
    engine.reset()
    return np.array([engine.decode(token).copy() for token in tokens])


def greedy(engine: Engine, prompt: list[int], n: int) -> list[int]:
    engine.reset()
    steps = engine.generate(prompt, lambda logits: int(logits.argmax()), n, lambda token: False)
    return [step.token for step in steps]


EVERY_DAY = ("Q8_0", "Q4_K")


@pytest.mark.parametrize(
    "name", [n if n in EVERY_DAY else pytest.param(n, marks=pytest.mark.slow) for n in FILE_TYPES]
)
def test_the_demo_model_has_llama_cpps_numbers(name, demo_in, held_out_text) -> None:
    path = demo_in(name)
    engine = Engine(path, THREADS)
    with LlamaCpp(path) as reference:
        tokens = reference.tokenize(held_out_text)[:520]
        assert len(tokens) == 520
        expected = reference.teacher_forced(tokens)
        ours = teacher_forced(engine, tokens)
        assert mean_kl(expected, ours) < 1e-4
        assert (expected.argmax(axis=1) == ours.argmax(axis=1)).mean() >= 0.995
        assert np.array_equal(expected, ours), "the same operations in the same order"
        assert greedy(engine, tokens[:24], 64) == reference.greedy(tokens[:24], 64)
    engine.close()


SHAPES = {
    "odd head count": RandomModel(n_embd=96, n_head=3, n_head_kv=3),
    "gqa 8": RandomModel(n_embd=256, n_head=8, n_head_kv=1),
    "4 experts, top-1": RandomModel(n_expert=4, n_expert_used=1),
    "16 experts, top-4": RandomModel(n_expert=16, n_expert_used=4),
    "all experts used": RandomModel(n_expert=4, n_expert_used=4),
    "head size of its own": RandomModel(n_embd=128, n_head=4, n_head_kv=2, n_embd_head=64),
    "tied output": RandomModel(tied_output=True),
    "biases": RandomModel(biases=True),
    "one layer": RandomModel(n_layer=1),
    "dense": RandomModel(n_expert=0, n_layer=3),
    "Q8_0": RandomModel(type=T.Q8_0, n_ff=256),
    "F32": RandomModel(type=T.F32),
    "linear rope": RandomModel(
        metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    ),
    "yarn": RandomModel(
        metadata={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 256,
        }
    ),
    "llama 3 factors": RandomModel(
        rope_freqs=tuple(1.0 + i / 2 for i in range(16)), metadata={"rope.freq_base": 500000.0}
    ),
    "longrope, long": RandomModel(
        rope_factors_long=tuple(1.0 + i / 3 for i in range(16)),
        rope_factors_short=tuple(1.0 + i / 9 for i in range(16)),
        metadata={
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": 512,
            "rope.scaling.attn_factor": 1.19,
        },
    ),
    "longrope, short": RandomModel(
        rope_factors_long=tuple(1.0 + i / 3 for i in range(16)),
        rope_factors_short=tuple(1.0 + i / 9 for i in range(16)),
        metadata={
            "rope.scaling.type": "longrope",
            "rope.scaling.original_context_length": 1024,
        },
    ),
    "no rope scaling": RandomModel(
        metadata={"rope.scaling.type": "none", "rope.scaling.factor": 4.0}
    ),
    "expert weights scaled": RandomModel(metadata={"expert_weights_scale": 2.5}),
    "attention scale": RandomModel(metadata={"attention.scale": 0.3}),
}


SHAPES_OF_EVERY_DAY = (
    "odd head count", "gqa 8", "16 experts, top-4", "head size of its own", "tied output", "biases",
    "dense", "F32", "yarn", "longrope, long",
)  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [n if n in SHAPES_OF_EVERY_DAY else pytest.param(n, marks=pytest.mark.slow) for n in SHAPES],
)
def test_other_shapes_have_llama_cpps_numbers(name: str, tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", SHAPES[name])
    assert_same_numbers(path, path)


def test_a_split_file_has_the_whole_models_numbers(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "m.gguf", RandomModel(tensors_per_shard=7))
    assert path.name.startswith("m-00001-of-0000")
    assert_same_numbers(path, path)


@pytest.mark.parametrize("scattered", [False, True])
def test_one_tensor_per_expert_has_the_merged_files_numbers(scattered, tmp_path: Path) -> None:
    old = RandomModel(old_layout=True, scattered=scattered, type=T.F32, seed=3)
    old_path = write_random_model(tmp_path / "old.gguf", old)
    merged_path = merge_experts(old_path, tmp_path / "merged.gguf", old)
    engine = assert_same_numbers(old_path, merged_path)
    assert any("scattered" in note for note in engine.notes) == scattered


def merge_experts(old: Path, merged: Path, m: RandomModel) -> Path:
    """The same weights with each layer's experts in one tensor, through the gguf package."""
    tensors = {t.name: np.array(t.data) for t in gguf.GGUFReader(old).tensors}
    w = gguf.GGUFWriter(merged, "llama")
    write_metadata(w, m)
    write_vocabulary(w, m)
    for name, data in tensors.items():
        part = re.fullmatch(r"(blk\.\d+\.ffn_\w+)\.(\d+)\.weight", name)
        if part is None:
            w.add_tensor(name, data)
        elif part[2] == "0":
            stack = [tensors[f"{part[1]}.{e}.weight"] for e in range(m.n_expert)]
            w.add_tensor(f"{part[1]}_exps.weight", np.stack(stack))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return merged


def assert_same_numbers(path: Path, reference_path: Path) -> Engine:
    rng = np.random.default_rng(5)
    tokens = [1, *map(int, rng.integers(259, 320, 519))]
    engine = Engine(path, THREADS)
    with LlamaCpp(reference_path) as reference:
        expected = reference.teacher_forced(tokens)
        ours = teacher_forced(engine, tokens)
        assert mean_kl(expected, ours) < 1e-6
        assert (expected.argmax(axis=1) == ours.argmax(axis=1)).mean() >= 0.995
        assert greedy(engine, tokens[:24], 64) == reference.greedy(tokens[:24], 64)
        tokens = tokens[:300]
        reference.reset()
        in_one_batch = reference.decode(tokens)
        engine.reset()
        assert np.allclose(engine.prefill(tokens), in_one_batch, atol=1e-4)
    engine.close()
    return engine


def test_a_prompt_in_several_batches_gives_the_same_logits(demo_path, held_out_text) -> None:
    engine = Engine(demo_path, EngineConfig(n_threads=1, n_batch=64))
    with LlamaCpp(demo_path, n_batch=64) as reference:
        tokens = reference.tokenize(held_out_text)[:300]
        reference.reset()
        for start in range(0, 300, 64):
            expected = reference.decode(tokens[start : start + 64])
    assert np.allclose(engine.prefill(tokens), expected, atol=1e-5)
    engine.close()


def test_the_router_chooses_what_its_scores_say(demo_path, held_out_text) -> None:
    engine = Engine(demo_path, THREADS)
    seen: list[LayerTrace] = []
    engine.trace([0, *range(300, 340)], lambda layer, trace: seen.append(trace))
    for trace in seen:
        ids, weights, scores = trace.expert_ids, trace.weights, trace.scores
        expected_ids = np.argsort(-scores, axis=1, kind="stable")[:, :2]
        assert (ids == expected_ids).all()
        chosen = np.exp(np.take_along_axis(scores, expected_ids, axis=1).astype(np.float64))
        assert np.allclose(weights, chosen / chosen.sum(axis=1, keepdims=True), atol=1e-6)
    assert [len(trace.expert_ids) for trace in seen] == [41] * 8
    engine.close()


def test_a_trace_leaves_the_context_that_a_prompt_leaves(demo_path) -> None:

    engine = Engine(demo_path, EngineConfig(n_threads=1, n_batch=16))
    tokens = [0, *range(300, 340)]
    seen: dict[int, list[LayerTrace]] = {}
    engine.trace(tokens, lambda layer, trace: seen.setdefault(layer, []).append(trace))
    assert [len(trace.ffn_input) for trace in seen[7]] == [16, 16, 9]
    after_trace = engine.decode(50).copy()
    engine.reset()
    engine.prefill(tokens)
    assert np.array_equal(engine.decode(50), after_trace)
    engine.close()


def test_a_sliding_window_hides_what_is_too_far_back(tmp_path: Path) -> None:
    window = RandomModel(type=T.F32, metadata={"attention.sliding_window": 16})
    path = write_random_model(tmp_path / "window.gguf", window)
    tokens = [1, *range(260, 319)]
    engine = Engine(path, THREADS)
    ours = teacher_forced(engine, tokens)
    assert np.allclose(ours, numpy_logits(path, window, tokens, sliding_window=16), atol=0.02)
    assert not np.allclose(ours, numpy_logits(path, window, tokens), atol=0.02)
    engine.close()


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_kv_cache_types_stay_close_to_numpys_float32(kind, tmp_path: Path) -> None:
    m = RandomModel(type=T.F32)
    path = write_random_model(tmp_path / "model.gguf", m)
    tokens = [1, *range(260, 319)]
    engine = Engine(path, EngineConfig(n_threads=1, cache_type_k=kind, cache_type_v=kind))
    kl = mean_kl(numpy_logits(path, m, tokens), teacher_forced(engine, tokens))
    assert kl < {"f16": 1e-5, "q8_0": 0.03}[kind]
    engine.close()


def test_a_repeated_beginning_is_not_computed_again(demo_path) -> None:
    engine = Engine(demo_path, THREADS)
    prompt = [0, *range(300, 400)]
    first = engine.prefill(prompt).copy()
    seen = []
    again = engine.prefill([*prompt, 7], on_prompt=lambda *n: seen.append(n))
    assert seen == [(101, 102, 101), (102, 102, 101)]
    assert engine.n_past == 102 and not np.allclose(first, again)
    engine.reset()
    assert mean_kl(engine.prefill([*prompt, 7])[None], again[None]) < 1e-3
    engine.close()


def test_a_changed_end_forgets_the_old_one(demo_path) -> None:
    engine = Engine(demo_path, THREADS)
    beginning = [0, *range(300, 360)]
    engine.prefill([*beginning, *range(900, 1000)])
    changed = engine.prefill([*beginning, 5, 6, 7]).copy()
    engine.reset()
    engine.prefill(beginning)
    fresh = engine.prefill([*beginning, 5, 6, 7])
    assert mean_kl(fresh[None], changed[None]) < 1e-3
    engine.close()


def test_a_prompt_longer_than_the_context_is_refused_with_counts(demo_path) -> None:
    engine = Engine(demo_path, EngineConfig(n_threads=1, n_ctx=64))
    with pytest.raises(ContextFullError, match=r"64 tokens and the context holds 64"):
        list(engine.generate([5] * 64, np.argmax, 4, lambda token: False))
    assert engine.n_past == 0
    engine.close()


def test_an_answer_that_reaches_the_end_of_the_context_stops_there(demo_path) -> None:
    engine = Engine(demo_path, EngineConfig(n_threads=1, n_ctx=64))
    steps = list(engine.generate([5] * 60, lambda x: 300, -1, lambda token: False))
    assert [step.token for step in steps] == [300] * 5 + [-1]
    assert steps[-1].stop_reason == "context"
    assert engine.n_past == 64
    engine.close()


def test_generation_ends_at_n_predict_and_at_a_stop_token(demo_path) -> None:
    engine = Engine(demo_path, THREADS)
    steps = list(engine.generate([0, 300], lambda x: 301, 3, lambda token: False))
    assert [(s.token, s.stop_reason) for s in steps] == [(301, None)] * 2 + [(301, "length")]
    steps = list(engine.generate([0, 300], lambda x: 2, 3, lambda token: token == 2))
    assert [(s.token, s.stop_reason) for s in steps] == [(2, "eos")]
    assert list(engine.generate([0, 300], lambda x: 2, 0, lambda token: True)) == []
    engine.close()


@pytest.mark.parametrize("n_expert", [0, 4])
def test_a_cancelled_prompt_keeps_what_was_computed(n_expert: int, tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", RandomModel(n_expert=n_expert))
    config = EngineConfig(n_threads=1, n_threads_batch=2, n_batch=32)
    engine, fresh = Engine(path, config), Engine(path, config)
    done, threads = [], []
    engine.backend.set_n_threads = threads.append  # type: ignore[method-assign]
    steps = list(
        engine.generate(
            [1] * 200, np.argmax, 4, lambda token: False,
            cancelled=lambda: len(done) >= 3,
            on_prompt=lambda n, total, cached: done.append(n),
        )
    )  # fmt: skip
    assert [(s.token, s.stop_reason) for s in steps] == [(-1, "cancelled")]
    assert engine.n_past == 64
    assert threads == [2, 1]
    assert engine.snapshot().n_tokens_prompt == 64
    assert np.array_equal(engine.prefill([1] * 200), fresh.prefill([1] * 200))
    engine.close()
    fresh.close()


@pytest.mark.parametrize("error", [BackendError("failed"), MemoryError(), CancelledError()])
def test_a_batch_that_fails_leaves_no_trace(error, demo_path, monkeypatch) -> None:
    engine, fresh = Engine(demo_path, THREADS), Engine(demo_path, THREADS)
    for each in (engine, fresh):
        each.prefill([0, 300, 301])

    def fail(graph: BatchGraph, is_restricted: bool) -> None:
        raise error

    with monkeypatch.context() as m, pytest.raises(type(error)):
        m.setattr(BatchGraph, "run_whole", fail)
        engine.decode(7)
    assert engine.n_past == 3 and engine.snapshot().n_tokens_generated == 0
    assert np.array_equal(engine.decode(8), fresh.decode(8))
    engine.close()
    fresh.close()


def test_numbers_that_overflowed_do_not_outlive_their_context(tmp_path: Path) -> None:
    m = RandomModel(type=T.F32, n_layer=2)
    path = write_random_model(tmp_path / "model.gguf", m)
    poison_embedding(path, token=300)
    engine = Engine(path, THREADS)
    clean = [1, *range(259, 299)] * 2
    expected = engine.prefill(clean).copy()
    assert np.isfinite(expected).all()
    assert np.isnan(engine.prefill([*clean, *[300] * 30])).any()
    engine.reset()
    assert np.array_equal(engine.prefill(clean), expected)
    assert np.isfinite(engine.decode(260)).all()
    engine.close()


def poison_embedding(path: Path, token: int) -> None:
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(t for t in reader.tensors if t.name == "token_embd.weight")
    tensor.data[token] = np.nan
    reader.data.flush()


def test_a_prompt_of_one_token_counts_as_a_prompt(demo_path) -> None:
    engine = Engine(demo_path, THREADS)
    engine.prefill([0])
    stats = engine.snapshot()
    assert (stats.n_tokens_prompt, stats.n_tokens_generated) == (1, 0)
    engine.close()


def test_keys_and_values_that_do_not_fit_memory_are_refused_at_once(demo_path) -> None:
    with pytest.raises(OptionError, match=r"-c 16000000: .* GB and .* free: use a smaller -c"):
        Engine(demo_path, EngineConfig(n_ctx=16_000_000))


def test_a_context_shift_drops_the_oldest_half_and_goes_on(demo_path) -> None:
    config = EngineConfig(n_threads=1, n_ctx=256, context_shift=True, n_keep=4)
    engine = Engine(demo_path, config)
    prompt = [0, *range(300, 500)]
    steps = list(engine.generate(prompt, lambda x: int(x.argmax()), 120, lambda token: False))
    assert len(steps) == 120 and steps[-1].stop_reason == "length"
    kept = list(engine._context.tokens)
    # The first token and 4 more stay, then half of the other 251 is gone.
    assert kept[:5] == prompt[:5] and kept[5] == prompt[5 + 125]
    ours = engine.decode(300).copy()
    fresh = Engine(demo_path, config)
    fresh.prefill(kept)
    assert mean_kl(fresh.decode(300)[None], ours[None]) < 0.05
    engine.close()
    fresh.close()


YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}


@pytest.mark.parametrize("rope", [{}, YARN, {"rope.scaling.attn_factor": 2.0}])
def test_shifted_keys_equal_keys_computed_at_the_new_positions(rope, tmp_path: Path) -> None:
    m = RandomModel(n_layer=1, n_expert=0, metadata=rope)
    path = write_random_model(tmp_path / "model.gguf", m)
    config = EngineConfig(n_threads=1, n_ctx=256, context_shift=True, n_keep=7)
    engine, fresh = Engine(path, config), Engine(path, config)
    tokens = [1, *range(259, 319)] * 4
    engine.prefill(tokens)
    assert engine._context.make_room()
    fresh.prefill(tokens[:8] + tokens[8 + 124 :])
    # In one layer K and V depend on the token alone, so nothing but rounding may differ.
    assert np.allclose(engine.decode(300), fresh.decode(300), atol=0.02)
    engine.close()
    fresh.close()


def test_a_shift_that_fails_leaves_an_empty_context(demo_path, monkeypatch) -> None:
    engine = Engine(demo_path, EngineConfig(n_threads=1, n_ctx=256, context_shift=True))
    engine.prefill([0, *range(300, 555)])

    def fail(*_: object) -> None:
        raise BackendError("out of memory")

    monkeypatch.setattr("runner.context_shift.rotate_keys", fail)
    with pytest.raises(BackendError):
        engine._context.make_room()
    seen = []
    engine.prefill([0, 300, 301], on_prompt=lambda *n: seen.append(n))
    assert seen == [(0, 3, 0), (3, 3, 0)]
    engine.close()


def test_a_prompt_too_long_for_a_shifting_context_loses_its_oldest_part(demo_path) -> None:
    engine = Engine(demo_path, EngineConfig(n_threads=1, n_ctx=64, context_shift=True, n_keep=2))
    prompt = [0, *range(300, 450)]
    list(engine.generate(prompt, np.argmax, 1, lambda token: False))
    assert engine._context.tokens[:3] == prompt[:3]
    assert engine._context.tokens[-10:] == prompt[-10:]
    assert 32 <= engine.n_past < 64
    engine.close()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (EngineConfig(n_ctx=1), "-c 1"),
        (EngineConfig(n_batch=0), "-b 0"),
        (EngineConfig(n_threads=9999), "-t 9999"),
        (EngineConfig(cache_type_k="q4_7"), "-ctk q4_7"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_its_flag(config, words, demo_path) -> None:
    with pytest.raises(OptionError, match=words):
        Engine(demo_path, config)


def test_every_pair_is_counted_once(demo_path) -> None:
    engine = Engine(demo_path, THREADS)
    engine.prefill([0, *range(300, 340)])
    engine.decode(7)
    stats = engine.snapshot()
    # Behind the last attention only one token of the prompt goes on.
    assert stats.hit == (84,) * 7 + (4,)
    assert stats.n_tokens_prompt == 41 and stats.n_tokens_generated == 1
    assert stats.n_routings == 16 and stats.compute_s > 0
    engine.close()


@pytest.mark.slow
def test_graphs_of_many_sizes_come_and_go_without_changing_a_number(demo_path) -> None:
    engine, fresh = Engine(demo_path, THREADS), Engine(demo_path, THREADS)
    engine._graphs = GraphCache(engine._parts, BatchShape(1, 256))  # its memory has to grow
    first = engine.decode(0).copy()
    for n in range(20, 300, 14):
        tokens = [0, *range(300, 300 + n)]
        for each in (engine, fresh):
            each.reset()
        assert np.array_equal(engine.prefill(tokens), fresh.prefill(tokens))
    engine.reset()
    assert np.array_equal(engine.decode(0), first)
    engine.close()
    fresh.close()
