"""A token's routing comes back behind its graph: what comes, and that nobody looks too early."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from quant.devices import Device, cpu_device
from quant.ggml import Backend, Context
from quant.ggml_library import load_ggml
from quant.ggml_types import GGML_TYPES_BY_NAME
from runner.config import EngineConfig
from runner.devices import DeviceChoice
from runner.engine import Engine
from runner.readback import Readback
from tests.paths import DEMO

F32, I32 = GGML_TYPES_BY_NAME["F32"].id, GGML_TYPES_BY_NAME["I32"].id
SPOILED = 0x7F  # as an id beyond every expert
TOKENS = list(range(300, 312))


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    """The CPU, told as a device with memory of its own."""
    device = replace(cpu_device(), name="GPU0", kind="gpu")
    monkeypatch.setattr("runner.placement.choose_device", lambda name: DeviceChoice(device))
    return device


@pytest.fixture(params=["like_a_gpu", pytest.param("gpu_device", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    found: Device = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def late_copies(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What is read later comes when somebody waits, and is spoiled until then; yields the number
    of copies under way at each wait."""
    ggml = load_ggml()
    read, synchronize = ggml.backend_tensor_get_async, ggml.backend_synchronize
    under_way: list[tuple[Any, ...]] = []
    waits: list[int] = []

    def read_later(*arguments: Any) -> None:
        _, _, address, _, n_bytes = arguments
        ctypes.memset(address, SPOILED, n_bytes)
        under_way.append(arguments)

    def wait(handle: int) -> None:
        waits.append(len(under_way))
        for arguments in under_way:
            read(*arguments)
        under_way.clear()
        synchronize(handle)

    monkeypatch.setattr(ggml, "backend_tensor_get_async", read_later)
    monkeypatch.setattr(ggml, "backend_synchronize", wait)
    yield waits
    assert not under_way, "nobody waited for what was read"


def test_the_first_token_s_ids_and_input_are_here_after_one_wait(device: Device) -> None:
    ids = np.arange(12, dtype=np.int32).reshape(4, 3)
    inputs = np.linspace(-1, 1, 256, dtype=np.float32).reshape(4, 64)
    with Backend.on(device) as backend, Context(backend.ggml, 2) as context:
        id_tensor, input_tensor = context.tensor(I32, 3, 4), context.tensor(F32, 64, 4)
        with (
            context.allocate(backend),
            closing(Readback(backend, id_tensor, input_tensor)) as readback,
        ):
            assert not readback.expert_ids.any() and not readback.ffn_input.any()
            for _ in range(3):
                ids += 1
                inputs += 1
                backend.write(id_tensor, ids)
                backend.write(input_tensor, inputs)
                readback.start()
                backend.synchronize()
                assert (readback.expert_ids == ids[:1]).all()
                assert (readback.ffn_input == inputs[:1]).all()


def test_nobody_looks_at_what_is_under_way(device: Device, late_copies: list[int]) -> None:
    with closing(engine_on(device, moe_cache_slots=3, moe_miss="host")) as engine:
        engine.prefill(TOKENS[:4])
        late_copies.clear()
        assert np.isfinite([engine.decode(token) for token in TOKENS[4:]]).all()
        n_layer = engine.model_config.n_layer
        assert sum(engine.snapshot().on_host) > 0
    # Ids and input together, once a layer; no other wait has to bring anything.
    assert [n for n in late_copies if n] == [2] * n_layer * len(TOKENS[4:])


@pytest.mark.parametrize("n_slots", [1, 3])
def test_the_host_computes_the_missing_experts_of_a_token_bit_for_bit(
    like_a_gpu: Device, n_slots: int, late_copies: list[int]
) -> None:
    """With one kind of kernels for both, half of it on the host is the same as all in place."""
    found = logits_of(lambda: engine_on(like_a_gpu, moe_cache_slots=n_slots, moe_miss="host"))
    assert found.tobytes() == logits_of(lambda: Engine(DEMO, CONFIG)).tobytes()


CONFIG = EngineConfig(n_ctx=64, n_batch=8, n_threads=1)


def engine_on(device: Device, **settings: Any) -> Engine:
    return Engine(DEMO, replace(CONFIG, device=device.name, fit_margin_bytes=0, **settings))


def logits_of(make: Callable[[], Engine]) -> np.ndarray:
    with closing(make()) as engine:
        rows = [engine.prefill(TOKENS[:4]).copy()]
        return np.array([*rows, *(engine.decode(token).copy() for token in TOKENS[4:])])
