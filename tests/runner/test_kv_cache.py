"""Which cell holds which position, and who may look where: answers known on paper."""

from contextlib import closing

import numpy as np
import pytest

from quant.ggml import Backend
from quant.ggml_types import GGML_TYPES_BY_NAME
from quant.gguf_file import GGUFFile
from runner.checks.read_model import read_model
from runner.kv_cache import FREE, KVCache, KVCells, padded_context
from tests.paths import DEMO


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


def test_a_cell_is_read_and_put_back_apart_from_its_neighbours() -> None:
    q8_0, f16 = GGML_TYPES_BY_NAME["Q8_0"], GGML_TYPES_BY_NAME["F16"]
    with GGUFFile.open(DEMO) as file, Backend.cpu(1) as backend:
        config = read_model(file)
        with closing(KVCache(backend, config, 256, q8_0, f16)) as kv:
            n_row = config.n_embd_head * config.n_head_kv
            n_bytes = config.n_layer * (n_row // 32 * 34 + n_row * 2)
            rows = np.random.default_rng(0).integers(0, 256, (3, n_bytes), np.uint8)
            for cell, row in zip((6, 7, 8), rows, strict=True):
                kv.write_cell(cell, row)
            kv.write_cell(7, rows[0])
            assert [kv.read_cell(cell).tolist() for cell in (6, 7, 8)] == [
                rows[0].tolist(), rows[0].tolist(), rows[2].tolist(),
            ]  # fmt: skip
            first = np.empty(n_row // 32 * 34, np.uint8)
            backend.read(kv.k[0], first, 8 * first.nbytes)
            assert first.tolist() == rows[2, : first.nbytes].tolist()


def test_a_position_is_found_where_a_shift_left_it() -> None:
    cells = KVCells(256)
    cells.take(0, 256)
    cells.shift(n_keep=2, n_discard=100)
    cells.take(156, 2)
    assert [cells.cell_of(position) for position in (0, 2, 155, 156, 157)] == [0, 102, 255, 2, 3]


@pytest.mark.parametrize(("n", "padded"), [(1, 256), (256, 256), (257, 512), (8192, 8192)])
def test_contexts_are_whole_blocks(n: int, padded: int) -> None:
    assert padded_context(n) == padded
