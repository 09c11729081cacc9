"""Slots in the memory of a device: whose bytes are where, as the device gives them back."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from math import inf
from pathlib import Path
from random import Random

import numpy as np
import pytest

from quant.devices import Device
from quant.gguf_file import GGUFFile
from runner.config import CACHE_POLICIES
from runner.errors import BuddyrunError, GGUFError, OutOfMemoryError
from runner.experts.device_slots import DeviceSlots
from runner.experts.expert_store import ExpertStore
from runner.experts.slot_table import EMPTY
from runner.weights import ExpertSlabs
from tests.runner.experts.cache_programs import (
    SHAPES,
    SPOILED,
    WAYS_TO_SPOIL,
    CacheProgram,
    NoDirectFile,
    OpenModel,
    OpenModels,
    TimedCache,
    check_contents,
    make_cache,
)
from tests.runner.experts.slot_model import run_programs

pytestmark = pytest.mark.gpu

WAYS = {  # of reading: the model, its file, and whether the file's pages have room beside the slots
    "direct": ("unlike", GGUFFile, False),
    "scattered": ("scattered", GGUFFile, False),
    "buffered": ("many", GGUFFile, True),
    "buffered, pages dropped": ("alike", NoDirectFile, False),
}
ONE_PIECE = 1 << 20  # bytes; more than a matrix has


@pytest.fixture(scope="module")
def device_models(
    tmp_path_factory: pytest.TempPathFactory, gpu_device: Device
) -> Iterator[OpenModels]:
    with closing(OpenModels(tmp_path_factory.mktemp("experts"), gpu_device)) as models:
        yield models


@pytest.fixture(params=[5000, ONE_PIECE], ids=["many pieces", "one piece"], autouse=True)
def piece_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Matrices of 4096 to 15360 bytes go in several pieces, more than there is memory for, or
    each in one."""
    monkeypatch.setattr("runner.experts.device_slots.PIECE_BYTES", request.param)
    return int(request.param)


# any order


def run_loads(model: OpenModel, n_programs: int) -> Counter[str]:
    return run_programs(lambda rng: CacheProgram(model, rng), n_programs, n_steps=100)


@pytest.mark.parametrize("shape", ["alike", "unlike", "scattered"])
def test_late_and_failed_loads_in_any_order_leave_what_the_model_says(
    shape: str, device_models: OpenModels
) -> None:
    n_done = run_loads(device_models.get(shape), n_programs=10)
    assert n_done["start"] > 100 and n_done["uploads settled"] > 10


# the bytes of every load


def load_at_random(model: OpenModel, cache: TimedCache, rng: Random, n_loads: int) -> int:
    """Load missing experts; some reads fail. Returns how many did."""
    n_failed, table, n_expert = 0, cache.table, model.config.n_expert
    for number in range(n_loads):
        layer = rng.randrange(model.config.n_layer)
        expert = rng.choice(np.flatnonzero(table.slot_of[layer] == EMPTY).tolist())
        table.record_use(layer, np.array([[rng.randrange(n_expert)]]))
        is_spoiled = rng.random() < 0.1
        if is_spoiled:
            cache.store.spoiled[number] = rng.choice(WAYS_TO_SPOIL)
        load = cache.start_load(layer, expert)
        cache.settle(load)
        assert (load.error is not None) == is_spoiled
        assert table.expert_in[layer, load.slot] == (EMPTY if is_spoiled else expert)
        n_failed += is_spoiled
        if number % 5 == 0 or is_spoiled:
            check_contents(model, cache)
    return n_failed


@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_are_the_files_after_thousands_of_loads_of_which_some_fail(
    way: str, device_models: OpenModels
) -> None:
    """Ten thousand loads with both sizes of pieces."""
    shape, file_type, has_room = WAYS[way]
    model, rng = device_models.get(shape, file_type), Random(0)
    for policy in CACHE_POLICIES:
        slots = [rng.randint(2, model.config.n_expert - 1) for _ in range(model.config.n_layer)]
        with closing(make_cache(model, *slots, policy=policy, has_room=has_room)) as cache:
            assert cache.is_on_device
            n_failed = load_at_random(model, cache, rng, n_loads=417)
            check_contents(model, cache)
            assert len(cache.store.reads) == 417 and 10 < n_failed < 100


def whole_slabs(model: OpenModel, slabs: ExpertSlabs) -> list[np.ndarray]:
    """Every slot's bytes of one layer: gate, up, down, each (n_slots, n_bytes)."""
    seen = []
    for tensor in (slabs.ffn_gate_exps, slabs.ffn_up_exps, slabs.ffn_down_exps):
        data = np.empty((tensor.shape[2], tensor.strides[2]), np.uint8)
        model.backend.read(tensor, data)
        seen.append(data)
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_a_load_writes_into_its_own_slot_only(way: str, device_models: OpenModels) -> None:
    shape, file_type, has_room = WAYS[way]
    model = device_models.get(shape, file_type)
    n_layer, marks = model.config.n_layer, np.random.default_rng(3)
    with closing(make_cache(model, *[3] * n_layer, has_room=has_room)) as cache:
        before = [whole_slabs(model, slabs) for slabs in cache.slabs]
        for slabs, layer in zip(cache.slabs, before, strict=True):
            tensors = (slabs.ffn_gate_exps, slabs.ffn_up_exps, slabs.ffn_down_exps)
            for tensor, data in zip(tensors, layer, strict=True):
                data[:] = marks.integers(0, 256, data.shape, np.uint8)
                model.backend.write(tensor, data)
        for number, expert in ((0, 0), (1, model.config.n_expert - 1), (1, 0), (0, 2)):
            load = cache.start_load(number, expert)
            cache.finish(load)
            for part, of_file in zip(before[number], model.experts[number][expert], strict=True):
                part[load.slot] = np.frombuffer(of_file, np.uint8)
            after = [whole_slabs(model, slabs) for slabs in cache.slabs]
            for expected, found in zip(before, after, strict=True):
                assert all(np.array_equal(a, b) for a, b in zip(expected, found, strict=True))


# reads that fail


@pytest.mark.parametrize("how", WAYS_TO_SPOIL)
def test_after_a_failed_read_the_slot_is_empty_and_the_next_try_succeeds(
    how: str, device_models: OpenModels
) -> None:
    model = device_models.get("unlike")
    with closing(make_cache(model, 1, 1, 1)) as cache:
        cache.finish(cache.start_load(1, 3))
        cache.store.spoiled[1] = how
        load = cache.start_load(1, 4)
        with pytest.raises(GGUFError, match=SPOILED):
            cache.finish(load)
        assert cache.table.expert_in[1].tolist() == [EMPTY]
        cache.finish(cache.start_load(1, 4))
        assert cache.table.residents(1).tolist() == [4]
        check_contents(model, cache)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_cut_short_leaves_no_expert_with_other_bytes(
    way: str, gpu_device: Device, tmp_path: Path
) -> None:
    shape, file_type, has_room = WAYS[way]
    with closing(OpenModel(tmp_path, SHAPES[shape], file_type, gpu_device)) as model:
        n_layer = model.config.n_layer
        with closing(make_cache(model, *[3] * n_layer, has_room=has_room)) as cache:
            cache.finish(cache.start_load(1, 0))
            with open(model.path, "r+b") as file:
                file.truncate(model.path.stat().st_size - 5000)
            for expert in range(1, model.config.n_expert):
                with pytest.raises(BuddyrunError, match="truncated"):
                    cache.finish(cache.start_load(1, expert))
            assert cache.table.residents(1).tolist() == [0]
            check_contents(model, cache)


# memory


def test_slots_that_the_device_cannot_hold_are_refused_and_others_still_work(
    device_models: OpenModels,
) -> None:
    model = device_models.get("alike")
    store = ExpertStore(model.file, model.config, has_room=True)
    for too_many in ([1 << 28] * 3, [2, 1 << 28, 2]):  # a terabyte in each tensor
        with pytest.raises(OutOfMemoryError):
            DeviceSlots(model.backend, model.file, model.config, store, too_many)
    with closing(make_cache(model, 2, 2, 2)) as cache:
        cache.finish(cache.start_load(0, 5))
        check_contents(model, cache)


def test_closing_waits_for_the_copy_that_was_begun_and_begins_no_other(
    device_models: OpenModels,
) -> None:
    cache = make_cache(device_models.get("alike"), 4, 4, 4)
    cache.is_late = True
    cache.store.allow(0)
    for expert in range(4):
        cache.start_load(1, expert)
    cache.store.wait_until_begun(1)
    cache._owned.callback(cache.store.allow, inf)  # when it closes, before it waits
    cache.close()
    cache.close()
    assert cache.store.reads == [(1, 0)]
    assert not cache._prefetcher._thread.is_alive()


def test_several_caches_share_a_device(device_models: OpenModels) -> None:
    alike, unlike = device_models.get("alike"), device_models.get("unlike")
    with closing(make_cache(alike, 2, 2, 2)) as one, closing(make_cache(unlike, 3, 3, 3)) as other:
        for expert in range(6):
            loads = [one.start_load(0, expert), other.start_load(2, expert)]
            other.finish(loads[1])
            one.finish(loads[0])
            check_contents(alike, one)
            check_contents(unlike, other)
