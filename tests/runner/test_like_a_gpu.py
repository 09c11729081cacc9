"""What the engine asks of a device with memory of its own, shown by the CPU told as one."""

from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quant.devices import Device, cpu_device
from quant.errors import GGUFError
from quant.ggml import Backend
from quant.gguf_file import GGUFFile
from quant.read_only_file import BLOCK_BYTES
from runner import model
from runner.batch_graph import BatchGraph
from runner.config import EngineConfig
from runner.devices import DeviceChoice
from runner.engine import Engine
from runner.errors import BackendError, OptionError
from runner.expert_pass import ExpertPass
from runner.expert_passes import ExpertPasses
from tests.paths import DEMO

CONFIG = EngineConfig(n_ctx=64, n_batch=32, n_threads=1, moe_cache_slots=3, moe_miss="load")
TOKENS = list(range(300, 316))


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = replace(cpu_device(), name="GPU0", kind="gpu")
    monkeypatch.setattr("runner.placement.choose_device", lambda name: DeviceChoice(device))
    return device


def test_a_kernel_sees_the_one_slot_that_a_batch_is_computed_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[set[int]] = []
    build, outputs = ExpertPass.__init__, model.expert_outputs

    def build_pass(self: ExpertPass, *settings: Any) -> None:
        def expert_outputs(g: Any, slabs: Any, x: Any, slot_ids: Any) -> Any:
            has_one_token = settings[5]
            if not has_one_token:
                seen.append({tensor.shape[2] for tensor in slabs.all})
            return outputs(g, slabs, x, slot_ids)

        with monkeypatch.context() as patch:
            patch.setattr(model, "expert_outputs", expert_outputs)
            build(self, *settings)

    with closing(Engine(DEMO, CONFIG)) as engine:
        monkeypatch.setattr(ExpertPass, "__init__", build_pass)
        engine.prefill(TOKENS)
        n_layers_of_batch = engine.model_config.n_layer - 1  # the last has one token left
    assert len(seen) > 3 * n_layers_of_batch and seen == [{1}] * len(seen)


@pytest.mark.parametrize("n_tokens", [1, 32])
def test_what_it_cannot_compute_is_told_at_load_for_prompts_and_for_single_tokens(
    n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    supports = Backend.supports

    def supports_but_one(self: Backend, node: Any) -> bool:
        is_attention = self.ggml.op_desc(node).startswith(b"FLASH_ATTN")
        return supports(self, node) and not (is_attention and node.contents.ne[2] == n_tokens)

    monkeypatch.setattr(Backend, "supports", supports_but_one)
    with pytest.raises(BackendError, match="cannot compute FLASH_ATTN.* or equal -ctk and -ctv"):
        Engine(DEMO, CONFIG)


def test_memory_that_direct_reads_cannot_reach_is_found_out_at_load(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with closing(Engine(DEMO, CONFIG)) as engine:
        expected = engine.prefill(TOKENS).copy()
    monkeypatch.setattr("runner.placement.available_memory_bytes", lambda: 64 << 20)
    read_direct = GGUFFile.read_direct

    def refuse(self: GGUFFile, shard: int, offset: int, memory: memoryview) -> None:
        if len(memory) == BLOCK_BYTES:
            raise GGUFError("bad address")
        read_direct(self, shard, offset, memory)

    for is_refused in (False, True):
        if is_refused:
            monkeypatch.setattr(GGUFFile, "read_direct", refuse)
        with closing(Engine(DEMO, CONFIG)) as engine:
            assert engine._cache is not None and not engine._cache.store.has_room
            if not is_refused and not engine._cache.store.is_direct:
                pytest.skip("this file system has no direct reads")
            assert engine._cache.store.is_direct != is_refused
            assert (engine.prefill(TOKENS) == expected).all()


def test_a_context_is_judged_by_the_memory_that_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runner.engine_limits.available_memory_bytes", lambda: 1 << 10)
    with closing(Engine(DEMO, CONFIG)) as engine:
        assert engine.n_ctx == 64
    monkeypatch.setattr("runner.placement.choose_device", lambda name: DeviceChoice(cpu_device()))
    with pytest.raises(OptionError, match="-c 64"):
        Engine(DEMO, CONFIG)


@pytest.mark.parametrize(("n_slots", "is_whole"), [(1, False), (2, True)])
def test_a_router_is_restricted_on_the_device_where_a_token_finds_enough_residents(
    monkeypatch: pytest.MonkeyPatch, n_slots: int, is_whole: bool
) -> None:
    settings = {"buddy": "resident", "buddy_budget": 1.0, "buddy_min_rank": 1, "moe_miss": "auto"}
    n_runs = 0
    run_whole = BatchGraph.run_whole

    def counted(graph: BatchGraph, is_restricted: bool) -> None:
        nonlocal n_runs
        n_runs += 1
        run_whole(graph, is_restricted)

    monkeypatch.setattr(BatchGraph, "run_whole", counted)
    with closing(Engine(DEMO, replace(CONFIG, moe_cache_slots=n_slots, **settings))) as engine:
        engine.prefill(TOKENS)
        rows = np.array([engine.decode(token).copy() for token in TOKENS])
    assert np.isfinite(rows).all()
    assert (n_runs > 0) == is_whole


def test_the_experts_that_a_host_computes_for_a_prompt_are_one_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    n_experts: list[int] = []
    run = ExpertPasses.run

    def noted(
        self: ExpertPasses, layer: int, on_host: bool, pairs: Any, slots: Any, n_tokens: int
    ) -> int:
        if on_host and n_tokens > 1:
            n_experts.append(len(set(slots)))
        return run(self, layer, on_host, pairs, slots, n_tokens)

    with closing(Engine(DEMO, replace(CONFIG, moe_miss="host"))) as engine:
        monkeypatch.setattr(ExpertPasses, "run", noted)
        rows = engine.prefill(TOKENS).copy()
        assert 1 < max(n_experts) <= 8 and len(n_experts) <= engine.model_config.n_layer
        assert sum(engine.snapshot().on_host) > 0
    with closing(Engine(DEMO, CONFIG)) as engine:
        assert np.abs(engine.prefill(TOKENS) - rows).max() < 0.1
