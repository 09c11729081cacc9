"""ExpertCache and ExpertRunner with real memory: whose bytes are where, in any order of reads."""

from collections import Counter
from contextlib import closing
from math import inf
from pathlib import Path
from random import Random

import numpy as np
import pytest

from quant.gguf_file import GGUFFile
from quant.read_only_file import BLOCK_BYTES
from runner.errors import BuddyrunError, GGUFError
from runner.experts.expert_cache import ExpertCache
from runner.experts.slot_table import EMPTY
from tests.runner.experts.cache_programs import (
    SHAPES,
    SPOILED,
    CacheProgram,
    CommandedStore,
    NoDirectFile,
    OpenModel,
    OpenModels,
    check_contents,
    make_cache,
    reads_directly,
)
from tests.runner.experts.slot_model import run_programs

WAYS = {  # of reading: the model, its file, and whether the file's pages have room beside the slots
    "direct": ("alike", GGUFFile, False),
    "staged": ("unlike", GGUFFile, False),
    "scattered": ("scattered", GGUFFile, False),
    "buffered": ("unlike", GGUFFile, True),
    "buffered, pages dropped": ("unlike", NoDirectFile, False),
}


pytestmark = pytest.mark.usefixtures("small_pieces")


# any order


def run_loads(model: OpenModel, n_programs: int) -> Counter[str]:
    return run_programs(lambda rng: CacheProgram(model, rng), n_programs, n_steps=100)


@pytest.mark.parametrize("shape", ["alike", "unlike", "scattered"])
def test_late_and_failed_loads_in_any_order_leave_what_the_model_says(
    shape: str, models: OpenModels
) -> None:
    run_loads(models.get(shape), n_programs=10)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["alike", "unlike", "scattered"])
def test_ten_thousand_late_and_failed_loads_leave_what_the_model_says(
    shape: str, models: OpenModels
) -> None:
    n_done = run_loads(models.get(shape), n_programs=150)
    assert sum(n_done[name] for name in set(CacheProgram.operations)) == 15_000
    assert min(n_done[name] for name in set(CacheProgram.operations)) >= 200
    if shape == "alike" and reads_directly(models):
        assert n_done["guess used"] >= 100 and n_done["guess failed"] >= 20


# the bytes of every load


def load_at_random(model: OpenModel, has_room: bool, n_loads: int) -> None:
    config, rng = model.config, Random(0)
    n_slots = [rng.randint(2, config.n_expert - 1) for _ in range(config.n_layer)]
    with closing(make_cache(model, *n_slots, has_room=has_room)) as cache:
        for _ in range(n_loads):
            layer = rng.randrange(config.n_layer)
            residents = cache.table.residents(layer).tolist()
            missing = [expert for expert in range(config.n_expert) if expert not in residents]
            expert = rng.choice(missing)
            cache.table.record_use(layer, np.array([[expert]]))
            cache.finish(cache.start_load(layer, expert))
            check_contents(model, cache)
        assert len(cache.store.reads) == n_loads


def n_alike(model: OpenModel) -> Counter[bool]:
    """How many matrices lie like their slots do, so that whole blocks are read in place."""
    counts: Counter[bool] = Counter()
    with closing(make_cache(model, *[1] * model.config.n_layer)) as cache:
        for layer, experts in enumerate(model.experts):
            for expert in range(len(experts)):
                parts = cache.store.ranges(layer, expert).parts
                for place, part in zip(parts, cache._memory.parts(layer, 0), strict=True):
                    counts[place.offset % BLOCK_BYTES == part.start] += 1
    return counts


@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_are_the_files_after_every_load(way: str, models: OpenModels) -> None:
    shape, file_type, has_room = WAYS[way]
    load_at_random(models.get(shape, file_type), has_room, n_loads=200)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_the_bytes_are_the_files_after_every_one_of_thousands_of_loads(
    way: str, models: OpenModels
) -> None:
    shape, file_type, has_room = WAYS[way]
    load_at_random(models.get(shape, file_type), has_room, n_loads=4000)


def test_the_ways_to_read_are_all_tried(models: OpenModels) -> None:
    if not reads_directly(models):
        pytest.skip("this file system has no direct reads")
    assert n_alike(models.get("alike")) == {True: 3 * 6 * 3}
    assert n_alike(models.get("unlike"))[False] > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_load_writes_into_its_own_slot_only(way: str, models: OpenModels) -> None:
    shape, file_type, has_room = WAYS[way]
    model = models.get(shape, file_type)
    n_slots = [2] * model.config.n_layer
    with closing(make_cache(model, *n_slots, has_room=has_room)) as cache:
        slots = [(layer, slot) for layer in range(len(n_slots)) for slot in range(2)]
        parts_of = {place: cache._memory.parts(*place) for place in slots}
        for layer, expert in ((0, 0), (1, model.config.n_expert - 1)):
            for parts in parts_of.values():
                for part in parts:
                    part.blocks[:] = b"\xa5" * len(part.blocks)
            load = cache.start_load(layer, expert)
            cache.finish(load)
            for place, parts in parts_of.items():
                is_marked = [bytes(p.blocks) == b"\xa5" * len(p.blocks) for p in parts]
                assert is_marked == [place != (layer, load.slot)] * 3
        del parts, part, parts_of


# reads that fail


@pytest.mark.parametrize("how", ["at once", "half", "late"])
def test_after_a_failed_read_the_slot_is_empty_and_the_next_try_succeeds(
    how: str, models: OpenModels
) -> None:
    model = models.get("unlike")
    with closing(make_cache(model, 1, 1, 1)) as cache:
        cache.finish(cache.start_load(1, 3))
        cache.store.spoiled[1] = how
        load = cache.start_load(1, 4)
        with pytest.raises(GGUFError, match=SPOILED) as raised:
            cache.finish(load)
        assert raised.value is load.error
        assert cache.table.expert_in[1].tolist() == [EMPTY]
        assert cache.table.slot_of[1].tolist() == [EMPTY] * 6, "expert 3 was overwritten"
        assert not cache.table.is_filling(1, 4)
        cache.finish(cache.start_load(1, 4))
        assert cache.table.residents(1).tolist() == [4]
        check_contents(model, cache)


def test_settling_a_failed_load_raises_nothing(models: OpenModels) -> None:
    with closing(make_cache(models.get("alike"), 1, 1, 1)) as cache:
        cache.store.spoiled[0] = "half"
        load = cache.start_load(0, 2)
        cache.settle(load)
        assert load.is_done and isinstance(load.error, GGUFError)
        assert cache.can_load(0) and not len(cache.table.residents(0))


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_cut_short_leaves_no_expert_with_other_bytes(
    way: str, tmp_path: Path
) -> None:
    shape, file_type, has_room = WAYS[way]
    with closing(OpenModel(tmp_path, SHAPES[shape], file_type)) as model:
        n_slots = [3] * model.config.n_layer
        with closing(make_cache(model, *n_slots, has_room=has_room)) as cache:
            cache.finish(cache.start_load(1, 0))
            with open(model.path, "r+b") as file:
                file.truncate(model.path.stat().st_size - 5000)
            for expert in range(1, model.config.n_expert):
                with pytest.raises(BuddyrunError, match="truncated"):
                    cache.finish(cache.start_load(1, expert))
            assert cache.table.residents(1).tolist() == [0]
            check_contents(model, cache)


def test_loads_may_be_waited_for_in_another_order_than_they_are_read(
    models: OpenModels,
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 3, 2, 1)) as cache:
        loads = [cache.start_load(layer, expert) for layer, expert in ((0, 5), (1, 5), (0, 2))]
        cache.finish(loads[2])
        assert cache.table.residents(0).tolist() == [2], "the others were not waited for"
        assert cache.table.is_filling(0, 5) and cache.table.is_filling(1, 5)
        cache.finish(loads[0])
        cache.finish(loads[1])
        assert cache.store.reads == [(0, 5), (1, 5), (0, 2)]
        check_contents(model, cache)


def test_closing_waits_for_the_read_that_was_begun_and_begins_no_other(
    models: OpenModels,
) -> None:
    cache = make_cache(models.get("alike"), 4, 4, 4)
    cache.is_late = True
    cache.store.allow(0)
    loads = [cache.start_load(1, expert) for expert in range(4)]
    cache.store.wait_until_begun(1)
    cache._owned.callback(cache.store.allow, inf)  # when it closes, before it waits
    cache.close()
    assert cache.store.reads == [(1, 0)]
    assert not cache._prefetcher._thread.is_alive()
    assert bytes(loads[0].parts[2].matrix) == models.get("alike").experts[1][0][2]


def test_closing_twice_is_closing_once(models: OpenModels) -> None:
    cache = make_cache(models.get("alike"), 4, 4, 4)
    cache.start_load(0, 0)
    cache.close()
    cache.close()


# filling while nothing else is to do


def test_empty_slots_fill_with_the_favourites_of_each_layer(
    models: OpenModels,
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 2, 3, 1, policy="static")) as cache:
        cache.table.expect(np.array([[0, 0, 0, 0, 2, 1], [3, 0, 2, 0, 9, 0], [0, 1, 0, 0, 0, 0.0]]))
        cache.finish(cache.start_load(1, 4))
        cache.start_filling()
        cache.store.wait_until_ended(6)
        assert len(cache.stop_filling()) == 5
        assert [sorted(cache.table.residents(i).tolist()) for i in range(3)] == [
            [4, 5], [0, 2, 4], [1],
        ]  # fmt: skip
        assert [sorted(cache.table.pinned(layer)) for layer in range(3)] == [[4], [0, 4], []]
        check_contents(model, cache)


def test_filling_that_is_stopped_ends_with_the_read_that_was_begun(
    models: OpenModels,
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 4, 4, 4)) as cache:
        cache.is_late = True
        cache.store.allow(0)
        cache.start_filling()
        cache.store.wait_until_begun(1)
        assert [(load.layer, load.expert) for load in cache.stop_filling()] == [(0, 0)]
        assert cache.store.reads == [(0, 0)]
        assert [cache.table.n_empty(layer) for layer in range(3)] == [3, 4, 4]
        assert sum(cache.table.n_evicted) == 0
        cache.finish(cache.start_load(2, 1))
        check_contents(model, cache)


def test_a_guess_that_waits_behind_a_load_is_not_begun_when_it_is_stopped(
    models: OpenModels,
) -> None:
    if not reads_directly(models):
        pytest.skip("this file system has no direct reads")
    model = models.get("alike")
    store = CommandedStore(model.file, model.config, has_room=False)
    with closing(
        ExpertCache(model.backend, model.file, model.config, store, (1, 1, 1), "lru")
    ) as cache:
        store.allow(0)
        load, guess = cache.start_load(0, 1), cache.start_guess(1, 2)
        assert guess is not None
        guess.is_unwanted = True
        store.allow(1)
        cache.stop_guess(guess)
        assert guess.is_done and guess.error is not None
        assert store.reads == [(0, 1)]
        cache.finish(load)
        assert not len(cache.table.residents(1))


# uploads beside the batches


def test_an_upload_takes_the_slot_worth_least_and_is_resident_when_it_is_settled(
    models: OpenModels,
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 2, 1, 1)) as cache:
        for expert in (3, 4):
            cache.finish(cache.start_load(0, expert))
        cache.table.record_use(0, np.array([[4], [3], [4]]))
        cache.start_upload(0, 5)
        assert (cache.n_uploads, cache.is_reading) == (1, False), "no batch waits for it"
        assert cache.table.residents(0).tolist() == [4] and cache.table.is_filling(0, 5)
        (load,) = cache.settle_uploads(0)
        assert (load.layer, load.expert, load.is_done, load.error) == (0, 5, True, None)
        assert load.n_read_bytes == cache.store.n_bytes(0)
        assert cache.n_uploads == 0 and cache.settle_uploads(0) == []
        assert sorted(cache.table.residents(0).tolist()) == [4, 5]
        check_contents(model, cache)


def test_settling_waits_for_the_uploads_of_its_layer_only(models: OpenModels) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 1, 1, 1)) as cache:
        cache.is_late = True
        cache.store.allow(0)
        cache.start_upload(0, 2)
        cache.start_upload(1, 3)
        assert cache.settle_uploads(2) == [], "nothing has come"
        cache.store.allow(1)
        assert [load.layer for load in cache.settle_uploads(0)] == [0]
        assert cache.table.residents(0).tolist() == [2]
        assert cache.n_uploads == 1 and cache.table.is_filling(1, 3)
        assert not len(cache.table.residents(1))
        cache.store.allow(2)
        assert [load.expert for load in cache.settle_uploads(1)] == [3]
        check_contents(model, cache)


def test_uploads_of_other_layers_that_have_come_are_settled_as_well(models: OpenModels) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 1, 1, 1)) as cache:
        cache.start_upload(1, 3)
        cache.start_upload(2, 4)
        load = cache.start_load(0, 5)
        cache.finish(load)  # it was read behind them
        assert cache.n_uploads == 2 and not len(cache.table.residents(1))
        assert [load.layer for load in cache.settle_uploads(0)] == [1, 2]
        assert [cache.table.residents(layer).tolist() for layer in range(3)] == [[5], [3], [4]]
        check_contents(model, cache)


@pytest.mark.parametrize("how", ["at once", "half", "late"])
def test_a_failed_upload_raises_nothing_and_leaves_its_slot_empty(
    how: str, models: OpenModels
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 1, 2, 1)) as cache:
        cache.finish(cache.start_load(1, 0))
        cache.finish(cache.start_load(1, 1))
        cache.table.record_use(1, np.array([[0], [1]]))
        cache.store.spoiled[2] = how
        cache.start_upload(1, 4)
        (load,) = cache.settle_uploads(1)
        assert isinstance(load.error, GGUFError) and load.n_read_bytes == 0
        assert cache.n_uploads == 0 and not cache.table.is_filling(1, 4)
        assert cache.table.expert_in[1].tolist() == [EMPTY, 1], "expert 0 was overwritten"
        assert cache.table.slot_of[1].tolist() == [EMPTY, 1, *[EMPTY] * 4]
        assert cache.table.n_empty(1) == 1
        cache.start_upload(1, 4)
        assert cache.table.n_evicted[1] == 1, "the empty slot was taken"
        assert [load.error for load in cache.settle_uploads(1)] == [None]
        assert cache.table.expert_in[1].tolist() == [4, 1]
        check_contents(model, cache)


def test_a_layer_whose_slots_are_all_being_uploaded_takes_no_load(models: OpenModels) -> None:
    with closing(make_cache(models.get("alike"), 2, 1, 1)) as cache:
        cache.is_late = True
        cache.store.allow(0)
        cache.start_upload(0, 1)
        assert cache.can_load(0)
        cache.start_upload(0, 2)
        assert not cache.can_load(0) and cache.can_load(1)
        cache.store.allow(2)
        assert len(cache.settle_uploads(0)) == 2 and cache.can_load(0)


def test_a_batch_s_load_is_read_behind_an_upload_and_does_not_settle_it(
    models: OpenModels,
) -> None:
    model = models.get("alike")
    with closing(make_cache(model, 2, 1, 1)) as cache:
        cache.is_late = True
        cache.store.allow(0)
        cache.start_upload(0, 1)
        load = cache.start_load(1, 2)
        assert cache.is_reading
        cache.finish(load)
        assert cache.store.reads == [(0, 1), (1, 2)]
        assert (cache.n_uploads, cache.is_reading) == (1, False)
        assert cache.table.is_filling(0, 1), "resident from the next time that its layer is served"
        cache.settle_uploads(0)
        check_contents(model, cache)


def test_closing_waits_for_the_upload_that_was_begun_and_begins_no_other(
    models: OpenModels,
) -> None:
    cache = make_cache(models.get("alike"), 2, 2, 2)
    cache.is_late = True
    cache.store.allow(0)
    cache.start_upload(0, 3)
    cache.start_upload(1, 4)
    parts = cache._uploads[0].parts
    assert parts is not None
    cache.store.wait_until_begun(1)
    cache._owned.callback(cache.store.allow, inf)  # when it closes, before it waits
    cache.close()
    assert cache.store.reads == [(0, 3)] and cache.n_uploads == 0
    assert not cache._prefetcher._thread.is_alive()
    assert bytes(parts[2].matrix) == models.get("alike").experts[0][3][2], "not freed under it"
    cache.close()
