"""What slots must do, in plain Python, and random programs that compare SlotTable with it.

A program is a row of random operations; hypothesis makes the seeds. After every operation the table
says of every layer what the model says.
"""

from collections import Counter, deque
from collections.abc import Callable
from contextlib import closing
from math import isclose
from random import Random
from typing import Protocol

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from runner.config import CACHE_POLICIES
from runner.experts.eviction import LFU_HALF_LIFE
from runner.experts.slot_table import EMPTY, SlotTable


class LayerModel:
    """One layer's slots: dictionaries and sets, and every rule written once more."""

    def __init__(self, n_slots: int, n_expert: int, policy: str) -> None:
        self.n_slots, self.n_expert, self.policy = n_slots, n_expert, policy
        self.resident: dict[int, int] = {}  # slot -> expert
        self.filling: dict[int, int] = {}  # slot -> expert
        self.held: set[int] = set()
        self.pinned: set[int] = set()
        self.n_evicted = 0
        self.n_uses = [0] * n_expert
        self.favourites: list[int] | None = None
        self._n_tokens = 0
        self._last_token = [-1] * n_expert
        self._count = [0.0] * n_expert  # of uses; what is older counts less

    def slot_of(self, expert: int) -> int:
        return next((slot for slot, here in self.resident.items() if here == expert), EMPTY)

    def missing(self) -> list[int]:
        """The experts that are neither resident nor being read."""
        here = {*self.resident.values(), *self.filling.values()}
        return [expert for expert in range(self.n_expert) if expert not in here]

    def use(self, tokens: list[list[int]]) -> None:
        for n, experts in enumerate(tokens):
            for expert in experts:
                self._last_token[expert] = self._n_tokens + n
                self._count[expert] += 1
                self.n_uses[expert] += 1
        self._n_tokens += len(tokens)
        self._count = [n * 0.5 ** (len(tokens) / LFU_HALF_LIFE) for n in self._count]

    def expect(self, counts: list[int]) -> None:
        age = 0.5 ** (self._n_tokens / LFU_HALF_LIFE)
        self._count = [n * age for n in counts]
        ranked = sorted(range(self.n_expert), key=lambda expert: (-counts[expert], expert))
        self.favourites = ranked[: self.n_slots]

    def count(self, expert: int) -> float:
        """How often it was used, what is older counting less."""
        return self._count[expert]

    def free(self) -> set[int]:
        """The slots that may get another expert."""
        return set(range(self.n_slots)) - self.held - self.pinned - self.filling.keys()

    def next_slots(self) -> set[int]:
        """The slots that `take` may choose: empty ones, else those that are worth least."""
        free = self.free()
        if empty := free - self.resident.keys():
            return empty
        worth = self._count if self.policy == "lfu" else self._last_token
        least = min((worth[self.resident[slot]] for slot in free), default=0)
        return {
            slot
            for slot in free
            if isclose(worth[self.resident[slot]], least, rel_tol=1e-9, abs_tol=1e-200)
        }

    def next_victims(self) -> set[int | None]:
        """Any of these may leave at the next take; EMPTY = nobody, None = there is no slot."""
        if not self.free():
            return {None}
        if self.n_slots == self.n_expert:  # each has a slot of its own
            return {EMPTY}
        return {self.resident.get(slot, EMPTY) for slot in self.next_slots()}

    def take(self, expert: int, slot: int) -> None:
        assert slot in self.next_slots(), f"slot {slot} is not the one to be taken"
        self.n_evicted += self.resident.pop(slot, None) is not None
        self.filling[slot] = expert

    def commit(self, slot: int) -> None:
        self.resident[slot] = expert = self.filling.pop(slot)
        n_pins = self.n_slots - 1 if self.policy == "static" else 0
        is_liked = self.favourites is None or expert in self.favourites[:n_pins]
        if is_liked and len(self.pinned) < n_pins:
            self.pinned.add(slot)

    def fail(self, slot: int) -> None:
        del self.filling[slot]


class TableProgram:
    """Operations on a table of some layers, each done to the model too."""

    operations: tuple[str, ...] = (
        *("take",) * 6, *("commit",) * 4, "fail", *("use",) * 3, "hold", "hold_only",
        *("release",) * 2, "pin", *("unpin",) * 2, "expect",
    )  # fmt: skip
    ends: tuple[str, ...] = ("commit", "fail")  # need a slot that is being filled
    begins = "take"  # is done in their place where there is none
    on_all_layers: tuple[str, ...] = ("expect",)

    def __init__(self, table_type: type[SlotTable], rng: Random) -> None:
        n_expert = rng.randint(2, 16)
        n_slots = [rng.randint(1, n_expert) for _ in range(rng.randint(1, 4))]
        self._begin(rng, table_type(n_slots, n_expert, rng.choice(CACHE_POLICIES)))

    def _begin(self, rng: Random, table: SlotTable) -> None:
        self.rng, self.table = rng, table
        self.n_expert = table.slot_of.shape[1]
        self.layers = [LayerModel(n, self.n_expert, table.policy) for n in table.n_slots]
        self.n_done: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=40)  # the last operations

    def close(self) -> None:
        """A table alone has nothing to give back."""

    def step(self) -> None:
        """Do one operation and look at everything."""
        layer = self.rng.randrange(len(self.layers))
        others = {i: self._state(i) for i in range(len(self.layers)) if i != layer}
        name = self.rng.choice(self.operations)
        if name in self.ends and not self.layers[layer].filling:
            name = self.begins
        self.log.append(f"{name} in layer {layer}")
        self.n_done[name] += 1
        getattr(self, name)(layer)
        self.check()
        if name not in self.on_all_layers:
            assert others == {i: self._state(i) for i in others}, "another layer was touched"

    # operations

    def use(self, layer: int) -> None:
        n_expert_used = self.rng.randint(1, min(4, self.n_expert))
        n_tokens = self.rng.choice((1, 1, 1, 2, 7))
        experts = range(self.n_expert)
        tokens = [self.rng.sample(experts, n_expert_used) for _ in range(n_tokens)]
        self.table.record_use(layer, np.array(tokens, np.int32))
        self.layers[layer].use(tokens)

    def take(self, layer: int) -> None:
        expert = self._some_expert(layer)
        if expert not in self.layers[layer].missing() or not self.table.can_take(layer):
            with pytest.raises(AssertionError):
                self.table.take(layer, expert)
        else:
            self.layers[layer].take(expert, self.table.take(layer, expert))

    def commit(self, layer: int) -> None:
        slot = self.rng.choice(sorted(self.layers[layer].filling))
        self.table.commit(layer, slot)
        self.layers[layer].commit(slot)

    def fail(self, layer: int) -> None:
        slot = self.rng.choice(sorted(self.layers[layer].filling))
        self.table.fail(layer, slot)
        self.layers[layer].fail(slot)

    def hold(self, layer: int) -> None:
        slots = self._some_residents(layer)
        self.table.hold(layer, np.array(slots, np.int32))
        self.layers[layer].held.update(slots)

    def hold_only(self, layer: int) -> None:
        slots = self._some_residents(layer)
        self.table.hold_only(layer, np.array([slots, slots], np.int32))
        self.layers[layer].held = set(slots)

    def release(self, layer: int) -> None:
        if self.rng.random() < 0.7:
            self.table.release(layer)
            self.layers[layer].held.clear()
        else:
            slots = self._some_residents(layer)
            self.table.release(layer, np.array(slots, np.int32))
            self.layers[layer].held.difference_update(slots)

    def pin(self, layer: int) -> None:
        slots = self._some_residents(layer)[:1]
        self.table.pin(layer, [self.layers[layer].resident[slot] for slot in slots])
        self.layers[layer].pinned.update(slots)

    def unpin(self, layer: int) -> None:
        slots = self._some_residents(layer)
        self.table.unpin(layer, [self.layers[layer].resident[slot] for slot in slots])
        self.layers[layer].pinned.difference_update(slots)

    def expect(self, layer: int) -> None:
        counts = [self.rng.choices(range(9), k=self.n_expert) for _ in self.layers]
        self.table.expect(np.array(counts, np.float64))
        for model, row in zip(self.layers, counts, strict=True):
            model.expect(row)

    def _some_expert(self, layer: int) -> int:
        """Mostly a missing one."""
        missing = self.layers[layer].missing()
        is_wrong = not missing or self.rng.random() < 0.1
        return self.rng.randrange(self.n_expert) if is_wrong else self.rng.choice(missing)

    def _some_residents(self, layer: int) -> list[int]:
        slots = sorted(self.layers[layer].resident)
        return self.rng.sample(slots, self.rng.randint(0, len(slots)))

    # what is true after every operation

    def check(self) -> None:
        for layer in range(len(self.layers)):
            self._check_layer(layer)

    def _check_layer(self, layer: int) -> None:
        table, model = self.table, self.layers[layer]
        homes = check_homes(table, layer)
        assert not homes.keys() & model.filling.keys(), "a slot being filled has an expert"
        assert homes == model.resident, "not what was committed"
        assert table.has_all(layer) == (len(homes) == self.n_expert)
        assert sorted(table.residents(layer).tolist()) == sorted(homes.values())
        assert table.can_take(layer) == bool(model.free()), "can_take is wrong"
        assert table.n_evicted[layer] == model.n_evicted, "an eviction was not counted"
        assert table.n_uses[layer].tolist() == model.n_uses, "a use was not counted"
        assert table.favourites(layer) == (model.favourites or [])
        n_empty = model.n_slots - len(homes) - len(model.filling)
        assert table.n_empty(layer) == n_empty, "empty slots were miscounted"
        self._check_pins(layer)
        assert all(table.is_filling(layer, expert) for expert in model.filling.values())
        expert = self.n_done.total() % self.n_expert  # each in turn: asking for all takes too long
        assert table.is_filling(layer, expert) == (expert in model.filling.values())
        assert isclose(table.recent_uses(layer, expert), model.count(expert), rel_tol=1e-9)
        fewest = min((model.count(expert) for expert in homes.values()), default=0.0)
        assert table.least_recent_uses(layer) <= fewest * (1 + 1e-9), "a resident has fewer uses"
        if self.n_done.total() % 3 == 0:  # what is known of the fewest uses is kept until then
            assert table.next_victim(layer) in model.next_victims(), "another would leave"

    def _check_pins(self, layer: int) -> None:
        table, model = self.table, self.layers[layer]
        pinned = sorted(model.resident[slot] for slot in model.pinned)
        assert sorted(table.pinned(layer)) == pinned, "a pin was lost or came by itself"
        assert table.n_unpinned(layer) == model.n_slots - len(model.pinned)
        slot = self.n_done.total() % model.n_slots
        assert table.is_pinned(layer, slot) == (slot in model.pinned)

    def _state(self, layer: int) -> tuple[bytes | int, ...]:
        table = self.table
        arrays = (table.slot_of, table.expert_in, table.last_used, table.frequency)
        return table.n_evicted[layer], *(array[layer].tobytes() for array in arrays)


def check_homes(table: SlotTable, layer: int) -> dict[int, int]:
    """The resident experts by their slots, when both of the table's lists agree on them."""
    expert_in = table.expert_in[layer].tolist()
    homes = {slot: expert for slot, expert in enumerate(expert_in) if expert != EMPTY}
    slot_of = {
        expert: slot for expert, slot in enumerate(table.slot_of[layer].tolist()) if slot != EMPTY
    }
    assert len(set(slot_of.values())) == len(slot_of), "two experts in one slot"
    assert len(set(homes.values())) == len(homes), "an expert is in two slots"
    assert slot_of == {expert: slot for slot, expert in homes.items()}, "the lists disagree"
    assert all(slot < table.n_slots[layer] for slot in homes), "a slot that is not there"
    return homes


class Program(Protocol):
    n_done: Counter[str]
    log: deque[str]

    def step(self) -> None: ...
    def close(self) -> None: ...


def run_programs(make: Callable[[Random], Program], n_programs: int, n_steps: int) -> Counter[str]:
    """Run random programs of n_steps; returns how often each operation was done."""
    n_done: Counter[str] = Counter()

    @settings(
        max_examples=n_programs, derandomize=True, database=None, deadline=None,
        phases=[Phase.generate], suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )  # fmt: skip
    @given(st.randoms(use_true_random=True))
    def run(rng: Random) -> None:
        with closing(make(rng)) as program:
            try:
                for _ in range(n_steps):
                    program.step()
            except BaseException as error:
                error.add_note("the last operations:\n" + "\n".join(program.log))
                raise
        n_done.update(program.n_done)

    run()
    return n_done
