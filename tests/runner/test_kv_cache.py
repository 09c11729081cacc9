"""Which cell holds which position, and who may look where: answers known on paper."""

import numpy as np
import pytest

from runner.kv_cache import FREE, KVCells, padded_context


def visible(cells: KVCells, n_tokens: int, first_position: int) -> list[set[int]]:
    """The positions that each token may look at, by the mask."""
    mask = np.full((n_tokens, cells.n_visible), 7, np.float16)
    cells.fill_mask(mask, first_position)
    assert set(np.unique(mask)) <= {0, -np.inf}
    positions = cells.positions[: cells.n_visible]
    return [set(map(int, positions[row == 0])) for row in mask]


def test_tokens_see_themselves_and_what_came_before() -> None:
    cells = KVCells(256)
    assert list(cells.take(0, 3)) == [0, 1, 2]
    assert visible(cells, 3, 0) == [{0}, {0, 1}, {0, 1, 2}]
    assert list(cells.take(3, 1)) == [3]
    assert visible(cells, 1, 3) == [{0, 1, 2, 3}]


def test_a_sliding_window_ends_the_view() -> None:
    cells = KVCells(256, sliding_window=2)
    cells.take(0, 4)
    assert visible(cells, 4, 0) == [{0}, {0, 1}, {1, 2}, {2, 3}]


def test_attention_sees_whole_blocks_of_cells() -> None:
    cells = KVCells(1024)
    assert cells.n_visible == 256
    cells.take(0, 256)
    assert cells.n_visible == 256
    cells.take(256, 1)
    assert cells.n_visible == 512
    cells.truncate(256)
    assert cells.n_visible == 256


def test_truncated_positions_are_free_again() -> None:
    cells = KVCells(256)
    cells.take(0, 10)
    cells.truncate(4)
    assert (cells.positions[4:] == FREE).all()
    assert list(cells.take(4, 2)) == [4, 5]


def test_a_shift_moves_later_positions_down_and_reuses_the_gap() -> None:
    cells = KVCells(256)
    cells.take(0, 256)
    moves = cells.shift(n_keep=2, n_discard=100)
    assert list(moves[:103]) == [0] * 102 + [-100]
    assert list(cells.positions[[0, 1, 102, 255]]) == [0, 1, 2, 155]
    assert list(cells.take(156, 2)) == [2, 3]
    assert visible(cells, 1, 157) == [set(range(158))]


def test_a_full_cache_has_no_cell_to_give() -> None:
    cells = KVCells(256)
    cells.take(0, 256)
    with pytest.raises(AssertionError):
        cells.take(256, 1)


def test_every_history_of_takes_and_cuts_keeps_one_cell_per_position() -> None:
    rng = np.random.default_rng(2)
    cells, n_past = KVCells(512), 0
    for _ in range(3000):
        if n_past and rng.random() < 0.2:
            n_past = int(rng.integers(0, n_past))
            cells.truncate(n_past)
        elif n_past > 300 and rng.random() < 0.5:
            cells.shift(10, 120)
            n_past -= 120
        else:
            n = int(rng.integers(1, min(64, 513 - n_past))) if n_past < 512 else 0
            if n:
                cells.take(n_past, n)
                n_past += n
        held = cells.positions[cells.positions != FREE]
        assert sorted(held) == list(range(n_past))
        assert (cells.positions[cells.n_visible :] == FREE).all()


@pytest.mark.parametrize(("n", "padded"), [(1, 256), (256, 256), (257, 512), (8192, 8192)])
def test_contexts_are_whole_blocks(n: int, padded: int) -> None:
    assert padded_context(n) == padded
