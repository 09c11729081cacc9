"""Which expert is uploaded for tokens to come: counts by hand, answers known on paper.

A use that is moved from the host to the device saves one second per byte, unless a test says
otherwise, and `read` is what an upload costs.
"""

from collections.abc import Sequence

import numpy as np
import pytest

from runner.experts.eviction import LFU_HALF_LIFE
from runner.experts.expert_store import ExpertCosts
from runner.experts.slot_table import SlotTable
from runner.experts.upload_choice import expert_to_upload

HOST, SLOT = 1.25, 0.25


def table_of(
    uses: Sequence[float], residents: Sequence[int], n_slots: int = 2, policy: str = "lfu"
) -> SlotTable:
    """One layer whose experts were used so often lately; one layer more that nobody used."""
    table = SlotTable([n_slots, n_slots], len(uses), policy)
    counts = np.zeros((2, len(uses)))
    counts[0] = uses
    table.expect(counts)
    for expert in residents:
        table.commit(0, table.take(0, expert))
    return table


def choose(
    table: SlotTable,
    on_host: Sequence[int],
    read: float,
    host: float = HOST,
    slot: float = SLOT,
) -> int | None:
    return expert_to_upload(table, ExpertCosts(read, host, slot), 0, on_host)


def test_an_upload_pays_when_its_uses_save_more_than_it_takes() -> None:
    table = table_of([9, 2, 7, 0], residents=[0, 1])
    assert choose(table, [2], read=4.75) == 2, "5 uses more than expert 1 save 5 s"
    assert choose(table, [2], read=5.0) is None, "nothing is won"
    assert choose(table, [2], read=5.25) is None


def test_who_would_leave_is_asked_only_where_an_upload_can_pay(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, asked = table_of([9, 2, 7, 0], residents=[0, 1]), []
    find = table.next_victim
    monkeypatch.setattr(table, "next_victim", lambda layer: asked.append(layer) or find(layer))
    assert choose(table, [2], read=5.0) is None and not asked, "2 uses less, whoever leaves"
    table.pin(0, [1])
    assert choose(table, [2], read=4.75) is None and asked == [0], "but expert 1 cannot leave"


def test_what_a_use_saves_is_the_host_s_time_without_the_device_s() -> None:
    table = table_of([9, 2, 7, 0], residents=[0, 1])
    assert choose(table, [2], read=2.0, host=1.0, slot=0.5) == 2, "5 uses save 2.5 s"
    assert choose(table, [2], read=3.0, host=1.0, slot=0.5) is None
    assert choose(table, [2], read=3.0, host=1.0, slot=0.25) == 2, "5 uses save 3.75 s"


@pytest.mark.parametrize("read", [0.0, 0.001])
def test_nothing_is_uploaded_to_a_device_that_is_no_faster_than_the_host(read: float) -> None:
    table = table_of([9, 0, 1000, 0], residents=[0, 1])
    assert choose(table, [2], read, host=1.0, slot=1.0) is None
    assert choose(table, [2], read, host=1.0, slot=2.0) is None
    assert choose(table, [2], read, host=0.0, slot=1.0) is None, "the host was not measured"


def test_an_expert_that_is_used_no_more_than_the_least_used_resident_stays_away() -> None:
    table = table_of([9, 5, 5, 4], residents=[0, 1])
    assert choose(table, [2], read=0.0) is None
    assert choose(table, [3], read=0.0) is None


def test_the_most_used_candidate_is_chosen_whatever_their_order() -> None:
    table = table_of([9, 1, 5, 8, 6], residents=[0, 1])
    for on_host in ([2, 3, 4], [3, 4, 2], [4, 2, 3]):
        assert choose(table, on_host, read=6.0) == 3
    assert choose(table, [2, 4], read=6.0) is None, "without it none pays: 5 s at most"
    assert choose(table, [2, 4], read=4.5) == 4


def test_without_candidates_nothing_is_uploaded() -> None:
    assert choose(table_of([9, 1, 5, 8], residents=[0, 1]), [], read=0.0) is None


def test_a_pinned_resident_is_no_victim() -> None:
    table = table_of([9, 1, 5, 0], residents=[0, 1])
    table.pin(0, [1])
    assert choose(table, [2], read=1.0) is None, "expert 0, used 9 times, would have to leave"
    table.pin(0, [0])
    assert choose(table, [2], read=0.0) is None, "nobody can leave"
    table.unpin(0, [1])
    assert choose(table, [2], read=1.0) == 2


def test_a_resident_that_a_graph_reads_is_no_victim() -> None:
    table = table_of([9, 1, 5, 0], residents=[0, 1])
    table.hold(0, table.slot_of[0, [1]])
    assert choose(table, [2], read=1.0) is None
    table.hold(0, table.slot_of[0, [0]])
    assert choose(table, [2], read=0.0) is None
    table.release(0)
    assert choose(table, [2], read=1.0) == 2


def test_a_slot_that_is_being_filled_is_no_victim() -> None:
    table = table_of([9, 1, 5, 3], residents=[0, 1])
    slot = table.take(0, 3)
    assert choose(table, [2], read=1.0) is None, "expert 1 has left, 3 is on its way"
    table.commit(0, slot)
    assert choose(table, [2], read=1.5) == 2, "2 uses more than expert 3"
    assert choose(table, [2], read=2.5) is None


def test_old_uses_count_less_so_an_upload_that_paid_does_not_later() -> None:
    table = table_of([9, 2, 7, 0], residents=[0, 1])
    assert choose(table, [2], read=4.0) == 2
    table.record_use(0, np.zeros((LFU_HALF_LIFE, 1), np.int32))  # expert 0 alone
    assert choose(table, [2], read=4.0) is None, "5 uses of then count 2.5"
    assert choose(table, [2], read=2.25) == 2


def test_uses_in_another_layer_say_nothing() -> None:
    table = table_of([9, 2, 7, 0], residents=[0, 1])
    table.record_use(1, np.full((1000, 1), 3, np.int32))
    assert choose(table, [2, 3], read=4.75) == 2


def test_an_empty_slot_takes_whatever_pays_by_itself() -> None:
    table = table_of([9, 2, 5, 0], residents=[0])
    assert choose(table, [2], read=4.75) == 2, "5 uses, and nobody leaves"
    assert choose(table, [2], read=5.0) is None


def test_the_upload_is_weighed_against_the_expert_that_really_leaves() -> None:
    table = table_of([9, 1, 5, 0], residents=[0, 1], policy="lru")
    table.record_use(0, np.array([[0]], np.int32))
    table.record_use(0, np.array([[1]], np.int32))  # so 0, used often, was used longest ago
    assert choose(table, [2], read=0.0) is None
    table.take(0, 2)
    assert table.slot_of[0, 0] < 0 <= table.slot_of[0, 1], "0 would have left"
