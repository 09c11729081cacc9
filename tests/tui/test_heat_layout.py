"""Where experts are on the map."""

import pytest

from tui.heat_layout import fit


def test_mixtral_takes_sixteen_rows_of_half_blocks() -> None:
    places = fit(32, 8, width=40, n_rows=16, is_ascii=False)
    assert (places.n_rows, places.cell_width, places.experts_per_column) == (16, 3, 1)
    assert places.width == 3 + 8 * 3


def test_a_layer_has_its_own_row_where_all_fit_and_without_half_blocks() -> None:
    assert fit(32, 8, 40, 32, is_ascii=False).layers_per_row == 1
    assert fit(32, 8, 40, 16, is_ascii=True).n_rows == 32


def test_experts_that_do_not_fit_share_columns() -> None:
    places = fit(48, 128, width=67, n_rows=24, is_ascii=False)
    assert (places.experts_per_column, places.n_columns, places.n_rows) == (2, 64, 24)
    assert list(places.experts_of(63)) == [126, 127]
    assert places.columns(bytes([0, 4, 6, 2]) + bytes(124))[:3] == bytes([4, 6, 0])


def test_the_last_column_may_have_fewer_experts() -> None:
    places = fit(2, 10, width=6, n_rows=4, is_ascii=False)
    assert (places.experts_per_column, places.n_columns) == (3, 4)
    assert list(places.experts_of(3)) == [9]


@pytest.mark.parametrize("width", [1, 2, 3, 20, 200])
@pytest.mark.parametrize("n_rows", [3, 24, 48])
def test_every_expert_is_found_where_it_is(width: int, n_rows: int) -> None:
    places = fit(47, 100, width, n_rows, is_ascii=False)
    for layer in (0, 1, 30, 46):
        for expert in (0, 1, 63, 99):
            x = places.label_width + places.column_of(expert) * places.cell_width
            y = places.row_of(layer) + (layer % places.layers_per_row) / places.layers_per_row
            found = places.place_at(x, y)
            assert found is not None and found[0] == layer
            assert expert in places.experts_of(found[1])


def test_beside_the_cells_is_nobody() -> None:
    places = fit(5, 8, width=40, n_rows=3, is_ascii=False)
    assert places.place_at(1, 0) is None  # a layer's number
    assert places.place_at(places.width, 0) is None
    assert places.place_at(5, 2.5) is None  # below the fifth layer
    assert places.layers_of(2) == (4, None)
