"""What a model is loaded with after the memory of a GPU ran out."""

from dataclasses import replace

import pytest

from runner.config import MOE_CACHE_AUTO, MOE_CACHE_OFF, EngineConfig
from runner.device_memory import DeviceMemory
from runner.process.less_memory import with_less_memory
from tests.runner.chat_fakes import INFO

MEMORY = DeviceMemory("CUDA0", *(1 << 20,) * 6)
ENGINE = EngineConfig(device="cuda0", n_ctx=512)


def test_a_margin_that_was_too_small_at_load_is_doubled_and_at_least_the_usual_one() -> None:
    for margin_bytes, wider_bytes in ((0, 1 << 30), (600 << 20, 1200 << 20), (1 << 30, 2 << 30)):
        less = with_less_memory(replace(ENGINE, fit_margin_bytes=margin_bytes), None)
        assert less is not None
        assert less[0] == replace(ENGINE, fit_margin_bytes=wider_bytes)


def test_a_size_that_was_named_is_what_becomes_smaller_at_load() -> None:
    less = with_less_memory(replace(ENGINE, moe_cache_bytes=100 << 20), None)
    assert less is not None
    assert less[0] == replace(ENGINE, moe_cache_bytes=85 << 20) and "--moe-cache 85MiB" in less[1]
    less = with_less_memory(replace(ENGINE, moe_cache_bytes=MOE_CACHE_OFF), None)  # no experts
    assert less is not None and "--fit-margin" in less[1]
    less = with_less_memory(replace(ENGINE, moe_cache_slots=8), None)
    assert less is not None and less[0] == replace(ENGINE, moe_cache_slots=6)
    assert with_less_memory(replace(ENGINE, moe_cache_slots=1), None) is None


def test_restarts_that_die_at_load_again_have_fewer_slots_each_time() -> None:
    info = replace(INFO, device_memory=MEMORY, moe_cache_slots=(8, 8))
    engine, tried = ENGINE, []
    while (less := with_less_memory(engine, info)) is not None:
        engine = less[0]
        tried.append(engine.moe_cache_slots)
    assert tried == [6, 5, 4, 3, 2, 1]


@pytest.mark.parametrize(("n_slots", "fewer"), [(100, 85), (8, 6), (3, 2), (2, 1)])
def test_slots_that_were_too_many_become_fewer_by_a_sixth_or_by_one(
    n_slots: int, fewer: int
) -> None:
    info = replace(INFO, device_memory=MEMORY, moe_cache_slots=(n_slots + 1, n_slots))
    less = with_less_memory(replace(ENGINE, moe_cache_bytes=1 << 30), info)
    assert less is not None
    assert less[0] == replace(ENGINE, moe_cache_slots=fewer, moe_cache_bytes=MOE_CACHE_AUTO)
    assert f"{fewer} slots per layer now instead of {n_slots}." in less[1]


def test_one_slot_or_none_cannot_be_fewer() -> None:
    for n_slots in ((1, 1), ()):
        info = replace(INFO, device_memory=MEMORY, moe_cache_slots=n_slots)
        assert with_less_memory(ENGINE, info) is None
    assert with_less_memory(ENGINE, replace(INFO, moe_cache_slots=(8,))) is None, "no GPU"
