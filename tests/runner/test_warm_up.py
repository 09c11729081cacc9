"""What a device computes at load leaves no trace but kernels that are ready."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quant.devices import cpu_device
from runner.batch_graph import BatchGraph
from runner.config import EngineConfig
from runner.devices import DeviceChoice
from runner.engine import Engine
from runner.errors import CancelledError
from tests.paths import DEMO
from tests.random_model import RandomModel, write_random_model

CONFIG = EngineConfig(
    n_ctx=256, n_batch=24, n_threads=1, moe_cache_slots=3, moe_miss="load", fit_margin_bytes=0
)
TOKENS = list(range(300, 340))


@pytest.fixture(params=["like a GPU", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a device; "like a GPU" is the CPU in the place of one with its own memory."""
    if request.param == "gpu":
        return str(request.getfixturevalue("gpu_device").name).lower()
    choice = DeviceChoice(replace(cpu_device(), name="GPU0", kind="gpu"))
    monkeypatch.setattr("runner.placement.choose_device", lambda name: choice)
    return "gpu"


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each batch that was begun, in order."""
    begun: list[int] = []
    begin = BatchGraph.begin

    def noted(self: BatchGraph, tokens: np.ndarray, *others: object) -> None:
        begun.append(len(tokens))
        begin(self, tokens, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(BatchGraph, "begin", noted)
    return begun


@pytest.fixture
def engines(device: str, sizes: list[int]) -> Iterator[list[Engine]]:
    """With and without a warm-up."""
    config = replace(CONFIG, device=device)
    made = [Engine(DEMO, config)]
    assert sizes == [24, 1], "the largest batch, then a single token"
    made.append(Engine(DEMO, replace(config, warmup=False)))
    assert sizes == [24, 1]
    yield made
    for engine in made:
        engine.close()


def test_the_logits_are_those_of_a_model_that_never_warmed_up(engines: list[Engine]) -> None:
    rows = []
    for engine in engines:
        prompt = engine.prefill(TOKENS[:30]).copy()
        rows.append([prompt, *(engine.decode(token).copy() for token in TOKENS[30:])])
    assert np.isfinite(rows[0]).all()
    assert np.array(rows[0]).tobytes() == np.array(rows[1]).tobytes()


def test_nobody_counts_it_and_the_context_is_empty(engines: list[Engine]) -> None:
    warm, cold = (engine.snapshot(with_experts=True) for engine in engines)
    for name in ("hit", "loaded", "on_host", "n_routings", "n_tokens_prompt", "n_tokens_generated"):
        assert getattr(warm, name) == getattr(cold, name), name
    for engine in engines:
        assert engine.n_past == 0
        assert engine._cache is not None and engine._cache.table.n_uses.sum() == 0
        kv = engine._parts.kv
        assert (kv.cells.n_used, kv._n_cleared) == (0, 0), "what was written is zeroed again"


def test_the_cpu_computes_nothing_at_load(sizes: list[int]) -> None:
    Engine(DEMO, replace(CONFIG, device="cpu")).close()
    assert sizes == []


def test_loading_can_be_cancelled_in_the_middle_of_it(device: str, sizes: list[int]) -> None:
    stages: list[str] = []
    with pytest.raises(CancelledError):
        Engine(
            DEMO,
            replace(CONFIG, device=device),
            lambda stage, done, total: stages.append(stage),
            lambda: bool(sizes),
        )
    assert sizes == [24], "the single token did not follow"
    assert stages[-1].startswith("warming up ")


@pytest.mark.parametrize("n_layer", [1, 2])
def test_models_of_one_layer_and_without_experts_warm_up_too(
    device: str, sizes: list[int], tmp_path: Path, n_layer: int
) -> None:
    path = tmp_path / "random.gguf"
    if n_layer == 1:
        write_random_model(path, RandomModel(n_layer=1))
    else:
        write_random_model(path, RandomModel(n_expert=0, n_expert_used=0))
    config = replace(CONFIG, device=device, moe_cache_slots=0, n_batch=8)
    engine = Engine(path, config)
    try:
        assert sizes == [8, 1]
        assert np.isfinite(engine.prefill(list(range(1, 7)))).all()
    finally:
        engine.close()
