"""The checks of slots, loads and batches bite: each of seven kinds of bug, planted, is caught.

Every bug is a child of the real class with one thing wrong. The same random programs that the real
classes pass must fail with it, and for the reason that is expected.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import pytest

from runner.experts.expert_cache import ExpertCache
from runner.experts.expert_runner import ExpertRunner
from runner.experts.prefetcher import Load
from runner.experts.slot_memory import Parts
from runner.experts.slot_table import EMPTY, SlotTable
from runner.miss_policy import RoutingPlan
from tests.runner.experts.cache_programs import (
    CacheProgram,
    CommandedStore,
    OpenModels,
    TimedCache,
)
from tests.runner.experts.runner_programs import RunnerProgram
from tests.runner.experts.slot_model import Program, TableProgram, run_programs

KINDS = {
    1: "an expert that the batch still needs is evicted",
    2: "a slot that is being read into is used again",
    3: "an expert is resident after its read failed",
    4: "two experts are in one slot",
    5: "a pin is lost",
    6: "a slot that is still filling is a hit",
    7: "off by one between layers",
}


pytestmark = pytest.mark.usefixtures("small_pieces")


# bugs of the table


class NeverHolds(SlotTable):
    def hold(self, layer: int, slots: np.ndarray) -> None:
        pass

    def hold_only(self, layer: int, slots: np.ndarray) -> None:
        self.release(layer)


class HoldsAllButOne(SlotTable):
    def hold_only(self, layer: int, slots: np.ndarray) -> None:
        super().hold_only(layer, np.unique(slots)[1:])


class TakesSlotsBeingRead(SlotTable):
    def _takeable(self, layer: int) -> list[int]:
        being_read = np.flatnonzero(self._filling[layer] != EMPTY).tolist()
        return sorted({*super()._takeable(layer), *being_read})


class CommitsFailedReads(SlotTable):
    def fail(self, layer: int, slot: int) -> None:
        self.commit(layer, slot)


class PutsTheOldExpertBack(SlotTable):
    def take(self, layer: int, expert: int) -> int:
        before = self.expert_in[layer].copy()
        slot = super().take(layer, expert)
        self.__dict__.setdefault("_old", {})[layer, slot] = before[slot]
        return slot

    def fail(self, layer: int, slot: int) -> None:
        super().fail(layer, slot)
        old = self.__dict__["_old"][layer, slot]
        self.expert_in[layer, slot] = old
        if old != EMPTY:
            self.slot_of[layer, old] = slot


class ForgetsThatTheOldExpertLeft(SlotTable):
    def take(self, layer: int, expert: int) -> int:
        before = self.slot_of[layer].copy()
        slot = super().take(layer, expert)
        self.slot_of[layer, before == slot] = slot
        return slot


class LosesPinsWhenReleasing(SlotTable):
    def release(self, layer: int, slots: np.ndarray | None = None) -> None:
        super().release(layer, slots)
        self.unpin(layer, self.pinned(layer))


class IsResidentWhenTaken(SlotTable):
    def take(self, layer: int, expert: int) -> int:
        slot = super().take(layer, expert)
        self.slot_of[layer, expert] = slot
        return slot


def in_the_next_layer(method: str) -> type[SlotTable]:
    """A table of which one method goes wrong."""

    def wrong(self: SlotTable, layer: int, *arguments: Any) -> Any:
        return getattr(SlotTable, method)(self, (layer + 1) % len(self.n_slots), *arguments)

    return type(f"{method}_in_the_next_layer", (SlotTable,), {method: wrong})


# bugs of the cache and of the runner


class CommitsWhateverWasRead(TimedCache):
    def settle(self, load: Load) -> None:
        if self.is_late:
            self.store.allow(self.place_of[load])
        self._prefetcher.wait(load)
        load.error, load.n_read_bytes = None, 1
        super().settle(load)


class WaitsForNoRead(TimedCache):
    def settle(self, load: Load) -> None:
        load.is_done, load.n_read_bytes = True, 1
        ExpertCache.settle(self, load)


class ReadsTheNextLayer(CommandedStore):
    def read(self, layer: int, expert: int, parts: Parts, *ready: int) -> None:
        super().read((layer + 1) % len(self._ranges), expert, parts, *ready)


class WritesToTheNextLayer(TimedCache):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        n_slots, parts = self.table.n_slots, self._memory.parts

        def wrong(layer: int, slot: int) -> Parts:
            layer = (layer + 1) % len(n_slots)
            return parts(layer, min(slot, n_slots[layer] - 1))

        self._memory.parts = wrong


class ServesTheNextLayer(ExpertRunner):
    def serve(self, graph: Any, layer: int, expert_ids: np.ndarray) -> RoutingPlan:
        n_layer = len(self._cache.table.n_slots)
        return super().serve(graph, (layer + 1) % n_layer, expert_ids)


# what catches them

IN_USE = (
    "can_take is wrong|can_load is wrong|not the one to be taken|still held|another would leave"
)
PINS = f"{IN_USE}|a pin was lost|is not resident"
NOT_COMMITTED = "not what was committed|(a slot has|computed with) other bytes"
BYTES = "(a slot has|computed with) other bytes"
HOMES = "the lists disagree|two experts in one slot"
NOT_FILLING = "is not being filled|empty slots were miscounted"
NOWHERE = "computed by a slot that is not there"

TABLE_BUGS: list[tuple[int, type[SlotTable], dict[str, str]]] = [
    (1, NeverHolds, {"table": IN_USE, "loads": IN_USE, "batches": NOWHERE}),
    (1, HoldsAllButOne, {"table": IN_USE, "loads": IN_USE, "batches": NOWHERE}),
    (2, TakesSlotsBeingRead, {"table": IN_USE, "loads": IN_USE, "batches": NOT_FILLING}),
    (3, CommitsFailedReads, {"table": NOT_COMMITTED, "loads": NOT_COMMITTED, "batches": BYTES}),
    (3, PutsTheOldExpertBack, {"table": NOT_COMMITTED, "loads": NOT_COMMITTED, "batches": BYTES}),
    (4, ForgetsThatTheOldExpertLeft, {"table": HOMES, "loads": HOMES, "batches": HOMES}),
    (5, LosesPinsWhenReleasing, {"table": PINS, "loads": PINS, "batches": PINS}),
    (6, IsResidentWhenTaken, {"table": HOMES, "loads": HOMES, "batches": HOMES}),
    (7, in_the_next_layer("record_use"), {"table": "a use was", "loads": "a use was"}),
    (7, in_the_next_layer("take"), {"table": NOT_FILLING, "batches": NOT_FILLING}),
    (7, in_the_next_layer("commit"), {"table": NOT_FILLING, "batches": NOT_FILLING}),
    (7, in_the_next_layer("fail"), {"table": NOT_FILLING, "batches": NOT_FILLING}),
    (7, in_the_next_layer("hold"), {"table": IN_USE, "loads": IN_USE}),
    (7, in_the_next_layer("hold_only"), {"table": IN_USE, "loads": IN_USE, "batches": NOWHERE}),
    (7, in_the_next_layer("release"), {"table": IN_USE, "loads": IN_USE, "batches": IN_USE}),
    (7, in_the_next_layer("unpin"), {"table": PINS, "loads": PINS}),
]
CACHE_BUGS: list[tuple[int, type[TimedCache], str]] = [
    (3, CommitsWhateverWasRead, BYTES),
    (6, WaitsForNoRead, BYTES),
    (7, WritesToTheNextLayer, BYTES),
]
TABLE_CASES = [
    pytest.param(program, bug, words, id=f"{kind}-{bug.__name__}-{program}")
    for kind, bug, caught_by in TABLE_BUGS
    for program, words in caught_by.items()
]
CACHE_CASES = [
    pytest.param(bug, words, id=f"{kind}-{bug.__name__}") for kind, bug, words in CACHE_BUGS
]


@dataclass(frozen=True)
class Programs:
    """How a program of each sort is made with other parts than the real ones."""

    models: OpenModels

    def table(self, rng: Random, table_type: type[SlotTable] = SlotTable) -> Program:
        return TableProgram(table_type, rng)

    def loads(self, rng: Random, **parts: Any) -> Program:
        return CacheProgram(self.models.get("alike"), rng, **parts)

    def batches(self, rng: Random, **parts: Any) -> Program:
        some = [self.models.get(name) for name in ("two", "alike", "many")]
        return RunnerProgram(some, rng, **parts)


@pytest.fixture
def programs(models: OpenModels) -> Programs:
    return Programs(models)


def run(make: Callable[..., Program], **parts: Any) -> None:
    run_programs(lambda rng: make(rng, **parts), n_programs=20, n_steps=60)


def test_each_kind_of_bug_is_planted() -> None:
    planted = {kind for kind, *_ in (*TABLE_BUGS, *CACHE_BUGS)}
    assert planted == KINDS.keys()


@pytest.mark.parametrize("program", ["table", "loads", "batches"])
def test_the_programs_find_nothing_where_nothing_is_planted(
    program: str, programs: Programs
) -> None:
    run(getattr(programs, program))


@pytest.mark.parametrize(("program", "bug", "words"), TABLE_CASES)
def test_a_bug_planted_in_the_table_is_caught(
    program: str, bug: type[SlotTable], words: str, programs: Programs
) -> None:
    with pytest.raises(AssertionError, match=words):
        run(getattr(programs, program), table_type=bug)


@pytest.mark.parametrize(("bug", "words"), CACHE_CASES)
def test_a_bug_planted_in_the_cache_is_caught(
    bug: type[ExpertCache], words: str, programs: Programs
) -> None:
    with pytest.raises(AssertionError, match=words):
        run(programs.batches, cache_type=bug)


def test_a_store_that_reads_the_next_layer_is_caught(programs: Programs) -> None:
    with pytest.raises(AssertionError, match=BYTES):
        run(programs.loads, store_type=ReadsTheNextLayer)


def test_a_runner_that_serves_the_next_layer_is_caught(programs: Programs) -> None:
    with pytest.raises(AssertionError, match="computed in another layer"):
        run(programs.batches, runner_type=ServesTheNextLayer)
