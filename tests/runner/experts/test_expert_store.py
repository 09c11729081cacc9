"""The host side of the experts: what comes into a slot, which pages stay and what is cheaper."""

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from gguf import GGMLQuantizationType as T

from quant.errors import GGUFError
from quant.gguf_file import ByteRange, GGUFFile
from quant.read_only_file import BLOCK_BYTES, round_up
from runner.checks.read_model import read_model
from runner.errors import BuddyrunError, ModelError
from runner.experts import expert_store
from runner.experts.expert_store import BELIEVED_S, ExpertCosts, ExpertStore
from runner.experts.slot_memory import Parts, SlotPart
from runner.experts.uploads import Piece
from tests.page_cache import bytes_read_from_disk, cached_pages, tells_what_is_cached
from tests.random_model import RandomModel, write_random_model

FILLING = 0xA5
WHOLE_BLOCKS = RandomModel(type=T.F32)
HALF_BLOCKS = RandomModel(type=T.Q8_0, n_ff=256)
SHAPES = {
    "whole blocks": WHOLE_BLOCKS,
    "half blocks": HALF_BLOCKS,
    "smaller than a block": RandomModel(type=T.Q8_0, n_embd=32, n_ff=32, n_head=1, n_head_kv=1),
    "one tensor per expert": RandomModel(type=T.Q8_0, n_ff=256, old_layout=True),
    "scattered": RandomModel(old_layout=True, scattered=True, n_expert=6),
    "split": RandomModel(n_layer=3, tensors_per_shard=7),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path, WHOLE_BLOCKS)


@pytest.fixture
def without_direct_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)


def write(folder: Path, model: RandomModel) -> Path:
    """Write a model whose pages the system can drop, and let it look old.

    Some systems' clocks for files stand still for milliseconds.
    """
    path = write_random_model(folder / "model.gguf", model)
    for part in folder.glob("*.gguf"):
        os.utime(part, (0, 0))
        with part.open("rb") as file:
            os.fsync(file.fileno())
    return path


@contextmanager
def store_of(path: Path, has_room: bool) -> Iterator[tuple[ExpertStore, GGUFFile]]:
    with GGUFFile.open(path) as file:
        yield ExpertStore(file, read_model(file), has_room), file


@contextmanager
def direct_store(path: Path) -> Iterator[tuple[ExpertStore, GGUFFile]]:
    with store_of(path, has_room=False) as (store, file):
        if not store.is_direct:
            pytest.skip("this file system has no direct reads")
        yield store, file


@contextmanager
def cold_store(path: Path, has_room: bool) -> Iterator[tuple[ExpertStore, GGUFFile]]:
    """A store of a file of which no page is in memory."""
    if not tells_what_is_cached(path):
        pytest.skip("this system does not tell which pages it has in memory")
    with store_of(path, has_room) as (store, file):
        for _ in range(20):  # the system leaves a page alone that it is busy with
            file.forget(ByteRange(0, 0, file.size_bytes))
        if cached_pages(path):
            pytest.skip("this file system keeps pages that it was told to drop")
        yield store, file


def slot(store: ExpertStore, layer: int, expert: int, shift: int = 0) -> Parts:
    """A slot that lies like this expert in the file, or `shift` bytes further within a block."""
    gate, up, down = (_part(part, shift) for part in store.ranges(layer, expert).parts)
    return gate, up, down


def _part(part: ByteRange, shift: int) -> SlotPart:
    memory = mmap.mmap(-1, round_up(part.n_bytes, BLOCK_BYTES) + BLOCK_BYTES)
    memory[:] = bytes([FILLING]) * len(memory)
    return SlotPart(memoryview(memory), (part.offset + shift) % BLOCK_BYTES, part.n_bytes)


def file_bytes(file: GGUFFile, part: ByteRange) -> bytes:
    return file.paths[part.shard].read_bytes()[part.offset : part.offset + part.n_bytes]


def experts_of(file: GGUFFile) -> list[tuple[int, int]]:
    config = read_model(file)
    return [(layer, expert) for layer in range(config.n_layer) for expert in range(config.n_expert)]


def assert_has_expert(
    store: ExpertStore, file: GGUFFile, layer: int, expert: int, parts: Parts
) -> None:
    for part, target in zip(store.ranges(layer, expert).parts, parts, strict=True):
        assert target.matrix == file_bytes(file, part), f"expert {expert} of layer {layer}"


# reading


def test_memory_that_direct_reads_cannot_reach_is_read_to_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with direct_store(write(tmp_path, SHAPES["half blocks"])) as (store, file):
        memory = memoryview(mmap.mmap(-1, 1 << 20))
        store.check_direct(memory)
        assert store.is_direct
        refuse = Mock(side_effect=GGUFError("bad address"))
        monkeypatch.setattr(file, "read_direct", refuse)
        store.check_direct(memory)
        assert not store.is_direct and refuse.call_count == 1
        monkeypatch.undo()
        part = store.ranges(0, 0).parts[0]
        piece = Piece(part.shard, part.offset, part.n_bytes, Mock(), 0)
        assert store.read_piece(piece, memory) == file_bytes(file, part)


@pytest.mark.parametrize("shift", [0, 32, 4064])
@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize("name", SHAPES)
def test_every_expert_comes_whole_into_a_slot_that_lies_like_it_or_unlike(
    name: str, has_room: bool, shift: int, tmp_path: Path
) -> None:
    with store_of(write(tmp_path, SHAPES[name]), has_room) as (store, file):
        for layer, expert in experts_of(file):
            parts = slot(store, layer, expert, shift)
            store.read(layer, expert, parts)
            assert_has_expert(store, file, layer, expert, parts)


@pytest.mark.parametrize("name", SHAPES)
def test_without_direct_reads_every_expert_comes_whole(
    name: str, tmp_path: Path, without_direct_reads: None
) -> None:
    with store_of(write(tmp_path, SHAPES[name]), has_room=False) as (store, file):
        assert not store.is_direct
        for layer, expert in experts_of(file):
            parts = slot(store, layer, expert)
            store.read(layer, expert, parts)
            assert_has_expert(store, file, layer, expert, parts)


def test_a_slot_that_lies_unlike_gets_the_matrices_and_nothing_else(tmp_path: Path) -> None:
    with direct_store(write(tmp_path, HALF_BLOCKS)) as (store, _):
        parts = slot(store, 1, 2, shift=32)
        store.read(1, 2, parts)
        for part in parts:
            around = [*part.blocks[: part.start], *part.blocks[part.start + part.n_bytes :]]
            assert set(around) == {FILLING}


def test_the_bytes_of_an_expert_are_those_of_its_three_matrices(path: Path) -> None:
    with store_of(path, has_room=True) as (store, _):
        assert store.n_bytes(0) == store.n_bytes(1) == 3 * 128 * 192 * 4
        assert [part.n_bytes for part in store.ranges(1, 3).parts] == [128 * 192 * 4] * 3


@pytest.mark.parametrize("has_room", [True, False])
def test_a_file_that_changed_is_refused_by_its_name(path: Path, has_room: bool) -> None:
    changes: list[Callable[[], object]] = [
        lambda: os.truncate(path, path.stat().st_size - 1),
        lambda: os.truncate(path, 5000),
    ]
    for change in changes:
        with store_of(path, has_room) as (store, _):
            change()
            with pytest.raises(BuddyrunError, match=str(path)):
                store.read(1, 3, slot(store, 1, 3))
        path = write(path.parent, WHOLE_BLOCKS)


@pytest.mark.parametrize("has_room", [True, False])
def test_a_file_that_was_written_to_is_refused_after_the_read(path: Path, has_room: bool) -> None:
    with store_of(path, has_room) as (store, _):
        with path.open("r+b") as other:
            other.seek(store.ranges(0, 0).gate.offset)
            other.write(b"new")
        with pytest.raises(ModelError, match=str(path)):
            store.read(0, 0, slot(store, 0, 0))


@pytest.mark.parametrize("has_room", [True, False])
def test_a_file_whose_name_was_taken_is_read_on(path: Path, has_room: bool) -> None:
    data = path.read_bytes()
    with store_of(path, has_room) as (store, _):
        path.rename(path.with_name("old.gguf"))
        path.write_bytes(bytes(len(data)))
        parts = slot(store, 1, 1)
        store.read(1, 1, parts)
        for part, target in zip(store.ranges(1, 1).parts, parts, strict=True):
            assert target.matrix == data[part.offset : part.offset + part.n_bytes]


def test_a_shard_whose_name_was_taken_before_leaves_no_direct_reads(tmp_path: Path) -> None:
    """Else a shard that came later would be read in the place of the one that was opened."""
    path = write(tmp_path, SHAPES["split"])
    with GGUFFile.open(path) as file:
        data = {shard: shard.read_bytes() for shard in file.paths}
        other = file.paths[1]
        other.rename(tmp_path / "old")
        other.write_bytes(bytes(len(data[other])))
        store = ExpertStore(file, read_model(file), has_room=False)
        assert not store.is_direct
        for layer, expert in experts_of(file):
            parts = slot(store, layer, expert)
            store.read(layer, expert, parts)
            for part, target in zip(store.ranges(layer, expert).parts, parts, strict=True):
                whole = data[file.paths[part.shard]]
                assert target.matrix == whole[part.offset : part.offset + part.n_bytes]


# reading ahead


def starts(parts: Parts) -> list[int]:
    """How many bytes the blocks before each part take."""
    lengths = [len(part.blocks) for part in parts]
    return [sum(lengths[:i]) for i in range(4)]


@pytest.mark.parametrize("name", ["whole blocks", "half blocks", "smaller than a block"])
def test_what_is_ready_is_kept_and_the_rest_is_read(name: str, tmp_path: Path) -> None:
    with direct_store(write(tmp_path, SHAPES[name])) as (store, file):
        n_bytes = starts(slot(store, 0, 1))[3]
        for n_ready in range(0, n_bytes + 1, BLOCK_BYTES):
            parts = slot(store, 0, 1)
            store.read(0, 1, parts, n_ready)
            for part, target, start in zip(
                store.ranges(0, 1).parts, parts, starts(parts), strict=False
            ):
                n_kept = min(max(0, n_ready - start), len(target.blocks))
                assert set(target.blocks[:n_kept]) <= {FILLING}
                data = file_bytes(file, part)
                assert (
                    target.matrix[max(0, n_kept - target.start) :]
                    == (data[max(0, n_kept - target.start) :])
                )


@pytest.mark.parametrize("name", ["whole blocks", "half blocks", "smaller than a block"])
def test_a_read_that_is_stopped_anywhere_and_gone_on_with_brings_the_whole_expert(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_store, "_PIECE_BYTES", 2 * BLOCK_BYTES)
    with direct_store(write(tmp_path, SHAPES[name])) as (store, file):
        n_read, n_pieces = [-1], 0
        while n_read[-1] < starts(slot(store, 1, 2))[3]:
            parts = slot(store, 1, 2)
            assert store.can_read_ahead(1, 2, parts)
            n_read.append(store.read_ahead(1, 2, parts, wanted(n_pieces)))
            assert n_read[-1] > n_read[-2] and n_read[-1] % BLOCK_BYTES == 0
            store.read(1, 2, parts, n_read[-1])
            assert_has_expert(store, file, 1, 2, parts)
            n_pieces += 1
        assert n_pieces > 3


def wanted(n_times: int) -> Callable[[], bool]:
    answers = iter([True] * n_times)
    return lambda: next(answers, False)


def test_nothing_is_read_ahead_into_memory_that_lies_unlike(tmp_path: Path) -> None:
    with direct_store(write(tmp_path, HALF_BLOCKS)) as (store, _):
        assert store.can_read_ahead(0, 1, slot(store, 0, 1))
        assert not store.can_read_ahead(0, 1, slot(store, 0, 1, shift=32))


def test_nothing_is_read_ahead_through_the_page_cache(path: Path) -> None:
    with store_of(path, has_room=True) as (store, _):
        assert not store.can_read_ahead(0, 1, slot(store, 0, 1))


# the page cache


def pages_of(store: ExpertStore, layer: int, expert: int) -> set[int]:
    """The whole pages of an expert, without those that it shares with its neighbours."""
    return {
        page
        for part in store.ranges(layer, expert).parts
        for page in range(
            -(-part.offset // mmap.PAGESIZE), (part.offset + part.n_bytes) // mmap.PAGESIZE
        )
    }


def test_direct_reads_leave_no_pages_behind(path: Path) -> None:
    with cold_store(path, has_room=False) as (store, _):
        if not store.is_direct:
            pytest.skip("this file system has no direct reads")
        store.read(0, 1, slot(store, 0, 1))
        store.read(1, 2, slot(store, 1, 2, shift=32))
        assert cached_pages(path) == []


def test_without_direct_reads_the_pages_of_an_expert_go_when_it_is_read(
    path: Path, without_direct_reads: None
) -> None:
    with cold_store(path, has_room=False) as (store, _):
        for expert in range(4):
            for _ in range(20):  # the system leaves a page alone that it is busy with
                store.read(0, expert, slot(store, 0, expert))
            assert not pages_of(store, 0, expert) & set(cached_pages(path))


def test_where_there_is_room_the_pages_of_an_expert_stay(path: Path) -> None:
    with cold_store(path, has_room=True) as (store, _):
        assert not store.is_direct
        store.read(1, 2, slot(store, 1, 2))
        assert pages_of(store, 1, 2) <= set(cached_pages(path))
        assert store.is_in_memory(1, 2)


@pytest.mark.parametrize("matrix", [0, 1, 2])
def test_an_expert_with_a_matrix_that_is_not_in_memory_is_not(
    path: Path, matrix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_of(path, has_room=True) as (store, file):
        missing = store.ranges(0, 1).parts[matrix]
        monkeypatch.setattr(file, "is_cached", lambda part: part != missing)
        assert not store.is_in_memory(0, 1)
        assert store.is_in_memory(0, 2)


def test_without_room_for_pages_nobody_asks_for_them_and_the_host_computes_nothing(
    path: Path,
) -> None:
    """Asking may bring pages in, which would soon look as if the whole expert were there."""
    with cold_store(path, has_room=False) as (store, _):
        measured(store, read=100.0, slot=1.0, host=1.0)
        before = bytes_read_from_disk()
        for _ in range(100):
            assert not store.is_cheaper_on_host(0, 1)
        assert bytes_read_from_disk() == before


# costs


def measured(store: ExpertStore, read: float, slot: float, host: float) -> ExpertStore:
    """Costs in seconds for an expert of 1000 bytes; 0.0 = not measured."""
    if read:
        store.observe_read(1000, read)
    for seconds, on_host in ((slot, False), (host, True)):
        if seconds:
            store.observe_compute(1000, seconds, on_host)
    return store


def test_the_first_measurement_counts_alone_and_later_ones_a_tenth(path: Path) -> None:
    with store_of(path, has_room=True) as (store, _):
        assert store.costs == ExpertCosts(0.0, 0.0, 0.0)
        measured(store, read=2.0, slot=1.0, host=4.0)
        assert store.costs == ExpertCosts(0.002, 0.004, 0.001)
        store.observe_compute(1000, 2.0, on_host=False)
        store.observe_compute(2000, 4.0, on_host=True)
        assert np.isclose(store.costs.slot_s_per_byte, 0.9 * 0.001 + 0.1 * 0.002, rtol=1e-12)
        assert np.isclose(store.costs.host_s_per_byte, 0.9 * 0.004 + 0.1 * 0.002, rtol=1e-12)
        store.observe_read(500, 2.0)
        assert np.isclose(store.costs.read_s_per_byte, 0.9 * 0.002 + 0.1 * 0.004, rtol=1e-12)


def test_a_host_that_was_slow_once_is_tried_again_after_some_reads(path: Path) -> None:
    with store_of(path, has_room=True) as (store, _):
        store.read(0, 1, slot(store, 0, 1))  # now its pages are in memory
        measured(store, read=1.0, slot=1.0, host=3.0)
        n_reads = 0
        while not store.is_cheaper_on_host(0, 1):
            store.observe_read(1000, 1.0)
            n_reads += 1
        assert 10 < n_reads < 200


def test_the_many_reads_of_a_prompt_make_the_host_seem_no_faster(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with store_of(path, has_room=True) as (store, _):
        monkeypatch.setattr(store, "is_in_memory", lambda layer, expert: True)
        measured(store, read=13.0, slot=0.35, host=2.2)
        for _ in range(300):
            store.observe_read(1000, 13.0, forgets=False)
        assert not store.is_cheaper_on_host(0, 1, 128)
        assert np.isclose(store.costs.host_s_per_byte, 0.0022, rtol=1e-12)


@pytest.mark.parametrize(
    ("slot_growth", "host_growth", "n_pairs_at_most"),
    [
        (1.0, 1.0, 12),  # each pair loses 1 s, a read takes 12.5
        (1.0, 0.5, 1000),  # a further pair costs 1 s, as in a slot
        (1.0, 0.75, 24),  # 2 + 1.5 * 23 = 36.5 = 12.5 + 24
        (0.5, 0.75, 12),  # 2 + 1.5 * 11 = 18.5 against 12.5 + 1 + 0.5 * 11 = 19
        (1.0, -3.0, 1000),  # noise: never less than nothing
        (1.0, 9.0, 12),  # nor more than all alone
    ],
)
def test_further_pairs_of_an_expert_cost_less_than_the_first(
    slot_growth: float, host_growth: float, n_pairs_at_most: int, path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with store_of(path, has_room=True) as (store, _):
        monkeypatch.setattr(store, "is_in_memory", lambda layer, expert: True)
        measured(store, read=12.5, slot=1.0, host=2.0)
        store.observe_more(slot_growth, on_host=False)
        store.observe_more(host_growth, on_host=True)
        is_cheaper = [store.is_cheaper_on_host(0, 1, n) for n in range(1, 1001)]
        assert is_cheaper == [n <= n_pairs_at_most for n in range(1, 1001)]


def test_many_equal_measurements_change_nothing(path: Path) -> None:
    with store_of(path, has_room=True) as (store, _):
        for _ in range(500):
            measured(store, read=3.0, slot=1.0, host=2.0)
        assert np.isclose(store.costs.read_s_per_byte, 0.003, rtol=1e-12)


@pytest.mark.parametrize(
    ("read", "slot", "host", "is_cheaper"),
    [
        (1.0, 1.0, 1.9, True),
        (1.0, 1.0, 2.1, False),
        (0.1, 1.0, 1.2, False),
        (5.0, 1.0, 1.2, True),
        (5.0, 1.0, 0.0, True),  # not measured: it has to be tried
    ],
)
def test_the_host_computes_what_costs_less_than_reading_and_computing_in_a_slot(
    read: float, slot: float, host: float, is_cheaper: bool, path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with store_of(path, has_room=True) as (store, _):
        measured(store, read, slot, host)
        monkeypatch.setattr(store, "is_in_memory", lambda layer, expert: True)
        assert store.is_cheaper_on_host(0, 1) == is_cheaper
        monkeypatch.setattr(store, "is_in_memory", lambda layer, expert: expert == 2)
        assert not store.is_cheaper_on_host(0, 3), "page faults cost more than any read"
        assert store.is_cheaper_on_host(0, 2) == is_cheaper


def test_an_expert_found_in_memory_is_looked_for_again_after_a_while_and_a_missing_one_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, asked = 100.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    with store_of(path, has_room=True) as (store, _):
        measured(store, 5.0, 1.0, 1.2)

        def is_in_memory(layer: int, expert: int) -> bool:
            asked.append((layer, expert))
            return expert == 1 and now_s < 101.0

        monkeypatch.setattr(store, "is_in_memory", is_in_memory)
        assert [store.is_cheaper_on_host(0, expert) for expert in (1, 1, 2, 2)] == [
            *(True, True, False, False)
        ]
        assert asked == [(0, 1), (0, 2), (0, 2)]
        now_s = 100.0 + BELIEVED_S
        assert not store.is_cheaper_on_host(0, 1), "its pages may be gone"
        assert asked[-1] == (0, 1)


@pytest.mark.parametrize(
    ("read", "slot", "host", "n_pairs_at_most"),
    [
        (4.5, 1.0, 2.0, 4),  # each pair loses 1 s on the host, a read takes 4.5
        (4.25, 1.0, 1.5, 8),
        (0.5, 1.0, 2.0, 0),
        (4.5, 2.0, 1.0, 1000),  # the host is the faster one
        (4.5, 1.0, 0.0, 1000),  # not measured
    ],
)
def test_the_more_pairs_an_expert_has_the_rather_it_is_read(
    read: float, slot: float, host: float, n_pairs_at_most: int, path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with store_of(path, has_room=True) as (store, _):
        measured(store, read, slot, host)
        monkeypatch.setattr(store, "is_in_memory", lambda layer, expert: expert == 1)
        is_cheaper = [store.is_cheaper_on_host(0, 1, n) for n in range(1, 1001)]
        assert is_cheaper == [n <= n_pairs_at_most for n in range(1, 1001)]
        assert store.is_cheaper_on_host(0, 1) == is_cheaper[0]
        assert not any(store.is_cheaper_on_host(0, 2, n) for n in (1, 2, 1000)), "not in memory"


def test_experts_of_unlike_layers_have_their_own_sizes(tmp_path: Path) -> None:
    model = replace(WHOLE_BLOCKS, n_layer=3)
    with store_of(write(tmp_path, model), has_room=True) as (store, file):
        for layer, expert in experts_of(file):
            ranges = store.ranges(layer, expert)
            assert ranges.n_bytes == store.n_bytes(layer)
            names = [f"blk.{layer}.ffn_{name}_exps.weight" for name in ("gate", "up", "down")]
            for part, name in zip(ranges.parts, names, strict=True):
                whole = file.tensors[name]
                assert part.offset == whole.offset + expert * whole.n_bytes // 4
