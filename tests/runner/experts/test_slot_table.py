"""SlotTable does what plain Python says, in any order of its operations."""

from collections import Counter

import numpy as np
import pytest

from runner.experts.eviction import LFU_HALF_LIFE
from runner.experts.slot_table import EMPTY, SlotTable
from tests.runner.experts.slot_model import LayerModel, TableProgram, run_programs


def run(n_programs: int) -> Counter[str]:
    return run_programs(lambda rng: TableProgram(SlotTable, rng), n_programs, n_steps=400)


def load(table: SlotTable, layer: int, *experts: int) -> list[int]:
    """Make experts resident, one after the other; returns their slots."""
    slots = []
    for expert in experts:
        slots.append(table.take(layer, expert))
        table.commit(layer, slots[-1])
    return slots


def use(table: SlotTable, layer: int, *tokens: list[int]) -> None:
    table.record_use(layer, np.array(tokens, np.int32))


def test_any_row_of_operations_leaves_what_the_model_says() -> None:
    n_done = run(15)
    assert n_done.total() == 6_000
    assert n_done.keys() == set(TableProgram.operations)


@pytest.mark.slow
def test_a_hundred_thousand_operations_leave_what_the_model_says() -> None:
    n_done = run(300)
    assert n_done.total() == 120_000
    assert min(n_done.values()) >= 2_000


@pytest.mark.parametrize("policy", [pytest.param("lru", marks=pytest.mark.slow), "lfu"])
def test_who_leaves_is_right_after_more_tokens_than_aged_counts_can_count(policy: str) -> None:
    n_expert, n_all = 6, 0
    table, model = SlotTable([4, 3], n_expert, policy), LayerModel(3, n_expert, policy)
    rng = np.random.default_rng(0)
    for n in range(60):
        n_tokens = int(rng.integers(1, 20_000)) if n % 3 else 1
        few = rng.permuted(np.tile(np.arange(3), (n_tokens, 1)), axis=1)[:, :2]
        tokens = ((few + n) % n_expert).astype(np.int32)  # not all experts are used alike
        table.record_use(1, tokens)
        model.use(tokens.tolist())
        expert = int(rng.choice(model.missing()))
        slot = table.take(1, expert)
        model.take(expert, slot)
        table.commit(1, slot)
        model.commit(slot)
        n_all += n_tokens
    assert n_all > 300_000 > 2 * table.last_used.max(), "the clock began anew"
    assert np.isfinite(table.frequency).all()
    recent = [table.recent_uses(1, expert) for expert in range(n_expert)]
    assert recent == pytest.approx([model.count(expert) for expert in range(n_expert)], rel=1e-9)
    assert (table.last_used[0] == -1).all() and not table.frequency[0].any()


def test_the_expert_that_was_used_longest_ago_leaves_first() -> None:
    table = SlotTable([2], 4, "lru")
    first, second = load(table, 0, 0, 1)
    use(table, 0, [0], [1], [0])
    assert load(table, 0, 2) == [second]
    use(table, 0, [2])
    assert load(table, 0, 3) == [first]
    assert table.residents(0).tolist() == [3, 2]


def test_the_expert_that_was_used_least_often_leaves_first() -> None:
    table = SlotTable([2], 4, "lfu")
    _, second = load(table, 0, 0, 1)
    use(table, 0, [0], [0], [1])
    assert load(table, 0, 2) == [second]


def test_a_use_counts_half_after_the_half_life() -> None:
    table = SlotTable([2], 4, "lfu")
    first, second = load(table, 0, 0, 1)
    use(table, 0, [0], [0], [0])
    for _ in range(512):
        use(table, 0, [3])
    use(table, 0, [1])
    assert table.frequency[0, 0] < table.frequency[0, 1], "three uses of long ago, one of now"
    assert load(table, 0, 2) == [first]
    assert table.slot_of[0, 1] == second


def test_recent_uses_halve_with_every_half_life_of_the_layer() -> None:
    table = SlotTable([2, 2], 4, "lru")
    use(table, 0, [1, 2], [1, 2])
    use(table, 1, [3])
    assert table.recent_uses(0, 0) == 0.0
    for n_half_lives in (1, 2, 3):
        n_tokens = 62 if n_half_lives == 1 else LFU_HALF_LIFE  # two tokens went by already
        use(table, 0, *[[0, 2]] * n_tokens)
        assert table.recent_uses(0, 1) == pytest.approx(2 * 0.5**n_half_lives)
    assert table.recent_uses(0, 2) > 62 * 0.5**3
    assert table.recent_uses(1, 3) == pytest.approx(0.5 ** (1 / LFU_HALF_LIFE)), "its own clock"


def test_recent_uses_begin_with_the_counts_of_earlier_runs() -> None:
    table = SlotTable([2], 3, "lfu")
    table.expect(np.array([[5.0, 0.0, 2.0]]))
    assert [table.recent_uses(0, expert) for expert in range(3)] == [5.0, 0.0, 2.0]


def test_the_next_victim_is_who_leaves() -> None:
    table = SlotTable([4, 1], 6, "lru")
    slots = load(table, 0, 0, 1, 2, 3)
    use(table, 0, [0], [0], [0], [0], [1], [1], [1], [2], [2], [3])
    assert table.next_victim(0) == 0, "unused for longest, though it is used most"
    table.pin(0, [0])
    assert table.next_victim(0) == 1
    table.hold(0, np.array([slots[1]]))
    assert table.next_victim(0) == 2
    assert table.take(0, 5) == slots[2]
    table.hold_only(0, np.array([slots[1], slots[3]]))
    assert table.next_victim(0) is None, "pinned, in use or being filled"


def test_nobody_leaves_an_empty_slot() -> None:
    table = SlotTable([2, 4], 4, "lfu")
    use(table, 0, [0, 1])
    load(table, 0, 2)
    assert table.next_victim(0) == EMPTY
    load(table, 0, 3)
    assert table.next_victim(0) == 2
    load(table, 1, 0, 1)
    assert table.next_victim(1) == EMPTY, "each expert has a slot of its own"


def test_static_keeps_the_first_that_came_and_one_slot_for_all_others() -> None:
    table = SlotTable([3], 8, "static")
    load(table, 0, 5, 6, 7)
    for expert in (0, 1, 2):
        assert load(table, 0, expert) == [2]
        use(table, 0, [expert])
    assert sorted(table.pinned(0)) == [5, 6]
    assert table.n_unpinned(0) == 1


def test_static_keeps_the_favourites_of_earlier_uses_when_there_are_any() -> None:
    table = SlotTable([3, 2], 4, "static")
    table.expect(np.array([[0, 9, 5, 1], [7, 0, 0, 8]], float))
    load(table, 0, 0, 1, 2, 3)
    load(table, 1, 0, 3, 1)
    assert sorted(table.pinned(0)) == [1, 2]
    assert table.pinned(1) == [3]


def test_an_expert_whose_read_failed_is_missing_and_its_slot_the_next_to_be_filled() -> None:
    table = SlotTable([3], 8, "lru")
    load(table, 0, 0, 1, 2)
    slot = table.take(0, 3)
    table.fail(0, slot)
    assert table.slot_of[0].tolist().count(EMPTY) == 6
    assert table.expert_in[0, slot] == EMPTY
    assert table.take(0, 4) == slot
    assert table.n_evicted == [1]


def test_reads_may_end_in_another_order_than_they_began() -> None:
    table = SlotTable([3], 8, "lru")
    slots = [table.take(0, expert) for expert in (4, 5, 6)]
    assert not table.can_take(0)
    table.commit(0, slots[2])
    table.fail(0, slots[0])
    assert table.slot_of[0, 5] == EMPTY, "it is still being read"
    table.commit(0, slots[1])
    assert table.expert_in[0, slots].tolist() == [EMPTY, 5, 6]


def test_unpinning_a_missing_expert_loses_no_other_pin() -> None:
    table = SlotTable([2, 2], 4, "lru")
    table.commit(0, table.take(0, 0))
    table.commit(0, table.take(0, 1))
    table.pin(0, [1])
    with pytest.raises(AssertionError):
        table.unpin(0, [3])
    assert table.pinned(0) == [1]
