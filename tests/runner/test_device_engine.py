"""The engine on a device beside the CPU: the same bits for every number of slots, and numbers as
the CPU has them but for rounding."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from quant.devices import Device, cpu_device
from runner.config import EngineConfig
from runner.engine import Engine
from runner.tokenizer import Tokenizer
from tests.device_divergence import Ours, text_kl, windows
from tests.llama_cpp_oracle import mean_kl
from tests.random_model import RandomModel, write_random_model

pytestmark = pytest.mark.gpu

_N_PROMPT, _N_DECODED, _N_GREEDY = 48, 8, 24
_MOST_KL = 1e-3


@contextmanager
def opened(path: Path, device: str, **settings: object) -> Iterator[Engine]:
    config = EngineConfig(n_ctx=256, n_batch=32, n_threads=2, device=device, warmup=False)
    config = replace(config, **settings)
    engine = Engine(path, config)
    try:
        yield engine
    finally:
        engine.close()


def logits_of(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Of the prompt's end and of tokens fed one by one, (1 + n, n_vocab)."""
    engine.reset()
    rows = [engine.prefill(tokens[:_N_PROMPT]).copy()]
    rows += [engine.decode(token).copy() for token in tokens[_N_PROMPT:]]
    return np.array(rows)


@pytest.fixture(scope="module")
def tokens(demo_path: Path, held_out_text: str) -> list[int]:
    with Tokenizer(demo_path) as tokenizer:
        text = tokenizer.tokenize(held_out_text, add_special=True, parse_special=False)
    return text[: _N_PROMPT + _N_DECODED]


@pytest.mark.parametrize("file_type", ["F16", "Q8_0", "Q4_K"])
def test_exact_with_misses_loaded_has_the_same_bits_for_every_number_of_slots(
    gpu_device: Device, demo_in: Callable[[str], Path], tokens: list[int], file_type: str
) -> None:
    runs = []
    for n_slots in (8, 4, 2, 1):
        settings = {"moe_cache_slots": n_slots, "moe_miss": "load"}
        with opened(demo_in(file_type), gpu_device.name, **settings) as engine:
            runs.append(logits_of(engine, tokens))
            snapshot = engine.snapshot()
            assert sum(snapshot.on_host) == sum(snapshot.substituted) == 0
            assert n_slots == 8 or sum(snapshot.loaded) > 0
    assert np.isfinite(runs[0]).all()
    assert all(run.tobytes() == runs[0].tobytes() for run in runs[1:])


@pytest.mark.parametrize("n_slots", [4, 1])
def test_misses_computed_on_the_host_stay_near_those_that_are_loaded(
    gpu_device: Device, demo_in: Callable[[str], Path], tokens: list[int], n_slots: int
) -> None:
    runs = []
    for action in ("load", "host"):
        settings = {"moe_cache_slots": n_slots, "moe_miss": action}
        with opened(demo_in("F16"), gpu_device.name, **settings) as engine:
            runs.append(logits_of(engine, tokens))
            assert (sum(engine.snapshot().on_host) > 0) == (action == "host")
    assert mean_kl(*runs) <= _MOST_KL


@pytest.mark.parametrize("file_type", ["F16", "Q8_0"])
def test_the_device_writes_what_the_cpu_writes(
    gpu_device: Device, demo_in: Callable[[str], Path], file_type: str
) -> None:
    path = demo_in(file_type)
    with Tokenizer(path) as tokenizer:
        prompt = tokenizer.tokenize("Once upon a time there was", True, False)
    answers, rows = [], []
    for device in ("cpu", gpu_device.name):
        with opened(path, device, moe_cache_slots=4) as engine:
            logits, answer, seen = engine.prefill(prompt), [], []
            for _ in range(_N_GREEDY):
                answer.append(int(logits.argmax()))
                seen.append(logits.copy())
                logits = engine.decode(answer[-1])
            answers.append(answer)
            rows.append(np.array(seen))
    assert answers[0] == answers[1]
    assert mean_kl(*rows) <= _MOST_KL


@pytest.mark.timeout(1200)  # a device in software computes 1,536 tokens in minutes
def test_four_bit_weights_stay_near_the_cpu_in_every_kind_of_text(
    gpu_device: Device, demo_in: Callable[[str], Path]
) -> None:
    """The CPU's kernels round inputs to 8 bits, and so llama.cpp's own differ: docs/gpu.md."""
    path = demo_in("Q4_K")
    with Tokenizer(path) as tokenizer:
        texts = windows(tokenizer)
    assert [len(text) for text in texts] == [256] * 6
    with closing(Ours(path, cpu_device())) as base, closing(Ours(path, gpu_device)) as other:
        assert text_kl(base, other, texts) <= _MOST_KL


SHAPES = {
    "top1": RandomModel(n_expert=4, n_expert_used=1),
    "sixteen": RandomModel(n_expert=16, n_expert_used=4),
    "all used": RandomModel(n_expert=4, n_expert_used=4),
    "one expert": RandomModel(n_expert=1, n_expert_used=1),
    "one layer": RandomModel(n_layer=1),
    "biases": RandomModel(biases=True),
    "tied output": RandomModel(tied_output=True),
    "gqa 8": RandomModel(n_embd=256, n_head=8, n_head_kv=1),
    "head size of its own": RandomModel(n_embd_head=64),
    "odd rows": RandomModel(n_embd=96, n_ff=80, n_head=3, n_head_kv=3),
    "default": RandomModel(),
    "split": RandomModel(tensors_per_shard=7, n_layer=3),
    "old layout": RandomModel(old_layout=True),
    "scattered": RandomModel(n_expert=5, old_layout=True, scattered=True),
    "sliding window": RandomModel(metadata={"attention.sliding_window": 16}),
    "llama 3 factors": RandomModel(rope_freqs=tuple(1.0 + i / 2 for i in range(16))),
    "dense": RandomModel(n_expert=0, n_expert_used=0),
    "dense, biases, tied": RandomModel(n_expert=0, biases=True, tied_output=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_other_shapes_agree_with_the_cpu(gpu_device: Device, tmp_path: Path, name: str) -> None:
    m = replace(SHAPES[name], type=T.F32, seed=3)  # else routers have near ties, that fall any way
    path = write_random_model(tmp_path / "model.gguf", m)
    some = list(range(20, 20 + _N_PROMPT + _N_DECODED))
    with opened(path, "cpu") as engine:
        expected = logits_of(engine, some)
    runs = []
    for n_slots in sorted({0, min(1, m.n_expert), (m.n_expert + 1) // 2}):  # 0 = all that there are
        with opened(path, gpu_device.name, moe_cache_slots=n_slots, moe_miss="load") as engine:
            runs.append(logits_of(engine, some))
    assert all(run.tobytes() == runs[0].tobytes() for run in runs[1:])
    each = [mean_kl(*(run[i : i + 1] for run in (expected, runs[0]))) for i in range(len(expected))]
    assert np.median(each) <= _MOST_KL


@pytest.mark.parametrize("settings", [
    {"buddy": "router", "buddy_budget": 0.2},
    {"buddy": "drop", "buddy_budget": 1.0, "buddy_min_rank": 1},
    {"buddy": "resident", "buddy_budget": 1.0, "buddy_min_rank": 1},
], ids=["router", "drop", "resident"])  # fmt: skip
def test_stand_ins_are_counted_on_a_device(
    gpu_device: Device, demo_path: Path, tokens: list[int], settings: dict[str, object]
) -> None:
    with opened(demo_path, gpu_device.name, moe_cache_slots=4, **settings) as engine:
        logits = logits_of(engine, tokens)
        snapshot = engine.snapshot()
        n_layer, n_used = engine.model_config.n_layer, engine.model_config.n_expert_used
    assert np.isfinite(logits).all()
    # In the last layer only the last token of each of the prompt's batches goes on.
    n_batches = -(-_N_PROMPT // 32)
    pairs = n_used * ((n_layer - 1) * len(tokens) + n_batches + _N_DECODED)
    assert snapshot.n_pairs == pairs
    assert sum(snapshot.substituted) + sum(snapshot.dropped) > 0


def test_a_token_as_one_graph_is_the_token_layer_by_layer(
    gpu_device: Device, demo_path: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for is_whole in (True, False):
        with opened(demo_path, gpu_device.name, moe_cache_slots=8) as engine:
            engine.prefill(tokens[:_N_PROMPT])
            experts = engine._experts
            assert experts is not None
            for layer in range(engine.model_config.n_layer):  # what the prompt did not ask for
                for expert in np.flatnonzero(experts._cache.table.slot_of[layer] < 0).tolist():
                    experts.finish(experts._cache.start_load(layer, expert))
            if not is_whole:
                monkeypatch.setattr(experts, "is_needed", lambda n_tokens: True)
            runs.append([engine.decode(token).copy() for token in tokens[_N_PROMPT:]])
            graph = engine._graphs.get(next(reversed(engine._graphs._graphs)))
            assert bool(graph._whole) == is_whole
    assert np.array(runs[0]).tobytes() == np.array(runs[1]).tobytes()


def test_a_context_shift_and_a_quantized_context_work(
    gpu_device: Device, demo_path: Path, tokens: list[int]
) -> None:
    settings = {"n_ctx": 64, "context_shift": True, "cache_type_k": "q8_0", "cache_type_v": "q8_0"}
    with opened(demo_path, gpu_device.name, moe_cache_slots=4, **settings) as engine:
        steps = list(
            engine.generate(tokens[:_N_PROMPT], lambda row: int(row.argmax()), 30, lambda t: False)
        )
    assert len(steps) == 30 and steps[-1].stop_reason == "length"
