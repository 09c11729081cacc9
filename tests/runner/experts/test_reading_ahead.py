"""Reading the next layer's experts ahead: the guess itself, and that it changes no number."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from quant.graph import HostPort
from runner.config import EngineConfig
from runner.engine import Engine

TOKENS = [int(t) for t in np.random.default_rng(4).integers(300, 4000, 160)]


@pytest.fixture
def scarce_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """So little memory that the file's pages have no room beside the slots."""
    monkeypatch.setattr("runner.placement.available_memory_bytes", lambda: 20 << 20)


@pytest.fixture
def engine(demo_path: Path, scarce_memory: None) -> Iterator[Engine]:
    config = EngineConfig(n_threads=1, moe_cache_slots=3, moe_miss="load")
    engine = Engine(demo_path, config)
    if not engine._cache.store.is_direct:
        engine.close()
        pytest.skip("this file system has no direct reads")
    yield engine
    engine.close()


def test_what_is_read_ahead_changes_no_logits(engine: Engine, demo_path: Path) -> None:
    reference = Engine(demo_path, EngineConfig(n_threads=1, moe_cache_bytes=0))
    try:
        assert engine.prefill(TOKENS[:40]).tobytes() == reference.prefill(TOKENS[:40]).tobytes()
        before = engine.snapshot()
        for token in TOKENS[40:]:
            assert engine.decode(token).tobytes() == reference.decode(token).tobytes()
    finally:
        reference.close()
    counted = engine.snapshot().counted_since(before)
    assert counted.prefetch_used > 50
    assert counted.prefetch_wasted > 50
    n_loads, n_bytes = sum(counted.loaded), engine._cache.store.n_bytes(0)
    assert n_loads * n_bytes <= sum(counted.bytes_read)
    most = (n_loads + counted.prefetch_wasted) * (n_bytes + 3 * 4096)
    assert sum(counted.bytes_read) <= most


def test_the_guess_is_the_next_router_on_this_layers_input(engine: Engine, demo_path: Path) -> None:
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(demo_path).tensors}
    guesses: list[list[int]] = []
    expected: list[list[int]] = []
    serve = engine._experts.serve
    residual = HostPort(engine.backend, engine._parts.state.residual, np.zeros(256, np.float32))

    def spy(graph, layer, expert_ids):  # type: ignore[no-untyped-def]
        if graph.has_prediction(layer):
            x = residual.download().astype(np.float64)
            x = x / np.sqrt((x * x).mean() + engine.model_config.norm_rms_eps)
            x = x * weights[f"blk.{layer + 1}.ffn_norm.weight"]
            scores = weights[f"blk.{layer + 1}.ffn_gate_inp.weight"].astype(np.float64) @ x
            expected.append(np.argsort(-scores)[:2].tolist())
            guesses.append(graph.predicted_experts())
        return serve(graph, layer, expert_ids)

    engine._experts.serve = spy
    engine.prefill(TOKENS[:4])
    for token in TOKENS[4:24]:
        engine.decode(token)
    assert len(guesses) == 20 * 7
    assert guesses == expected


def test_a_prompt_is_not_guessed_at(engine: Engine) -> None:
    engine.prefill(TOKENS[:60])
    stats = engine.snapshot()
    assert stats.prefetch_used == stats.prefetch_wasted == 0


def test_with_room_for_the_files_pages_nothing_is_read_ahead(demo_path: Path) -> None:
    engine = Engine(demo_path, EngineConfig(n_threads=1, moe_cache_slots=3, moe_miss="load"))
    try:
        assert not engine._cache.store.is_direct
        for token in TOKENS[:20]:
            engine.decode(token)
        assert engine.snapshot().prefetch_used == engine.snapshot().prefetch_wasted == 0
    finally:
        engine.close()


def test_slots_fill_between_loading_and_the_first_batch(engine: Engine) -> None:
    cache = engine._cache
    for load in list(cache._under_way):
        cache.settle(load)
    assert all(cache.table.n_empty(layer) == 0 for layer in range(8))
    before = sum(engine.snapshot().bytes_read)
    engine.prefill(TOKENS[:60])
    read = sum(engine.snapshot().bytes_read) - before
    assert read <= (8 * 8 - 8 * 3) * cache.store.n_bytes(0), "no expert was read a second time"


def test_filling_stops_for_the_first_batch_and_nothing_is_left_half_read(
    engine: Engine, demo_path: Path
) -> None:
    reference = Engine(demo_path, EngineConfig(n_threads=1, moe_cache_bytes=0))
    try:
        assert engine.prefill(TOKENS[:3]).tobytes() == reference.prefill(TOKENS[:3]).tobytes()
        assert not engine._cache.is_reading
        table = engine._cache.table
        assert not any(table.is_filling(layer, e) for layer in range(8) for e in range(8))
    finally:
        reference.close()


def test_memory_goes_back_at_once_when_a_model_is_closed_while_it_fills(
    demo_path: Path, scarce_memory: None
) -> None:
    config = EngineConfig(n_threads=1, moe_cache_slots=3, moe_miss="load")
    for _ in range(3):
        engine = Engine(demo_path, config)
        memory, staging = engine._cache._memory, engine._cache._staging
        engine.close()
        assert memory._mapping.closed
        staging.release()


def test_static_pins_nobody_before_something_is_asked_for(demo_path: Path) -> None:
    config = EngineConfig(
        n_threads=1, moe_cache_slots=3, moe_miss="load", moe_cache_policy="static"
    )
    engine = Engine(demo_path, config)
    try:
        assert all(engine._cache.table.pinned(layer) == [] for layer in range(8))
    finally:
        engine.close()
