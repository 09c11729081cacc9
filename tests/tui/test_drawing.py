"""Bars, gauges and sparklines, by cases that can be counted."""

import pytest

from tui.drawing import gauge, sparkline, split


def test_a_gauge_fills_by_eighths_of_a_cell() -> None:
    assert gauge(0.5, 4, is_ascii=False) == ("██", "░░")
    assert gauge(0.5625, 2, is_ascii=False) == ("█▏", "")
    assert gauge(0.5, 4, is_ascii=True) == ("##", "--")


@pytest.mark.parametrize("share", [-1.0, 0.0, 0.01, 0.99, 1.0, 7.0])
@pytest.mark.parametrize("width", [0, 1, 17])
def test_a_gauge_has_its_width_whatever_the_share(share: float, width: int) -> None:
    for is_ascii in (False, True):
        assert len("".join(gauge(share, width, is_ascii))) == width


def test_shares_become_cells_that_add_up() -> None:
    assert split([0.5, 0.25, 0.25], 8) == [4, 2, 2]
    assert sum(split([1 / 3, 1 / 3, 1 / 3], 10)) == 10


def test_what_is_there_at_all_can_be_seen() -> None:
    assert split([0.999, 0.001], 10) == [9, 1]
    assert split([1.0, 0.0], 10) == [10, 0]
    assert split([0.5, 0.5], 0) == [0, 0]


def test_a_sparkline_shows_the_latest_values_at_its_right() -> None:
    assert sparkline([1, 8], 4, 1, 8, is_ascii=False) == ["  ▁█"]
    assert sparkline([1, 2, 8, 4], 2, 1, 8, is_ascii=False) == ["█▄"]
    assert sparkline([9, 0], 2, 1, 9, is_ascii=True) == ["@."]


def test_a_high_sparkline_fills_rows_from_below() -> None:
    assert sparkline([16, 8, 12], 3, 2, 16, is_ascii=False) == ["█ ▄", "███"]


def test_a_moment_without_a_value_is_blank_and_zero_is_not() -> None:
    assert sparkline([None, 0, 8], 3, 1, 8, is_ascii=False) == [" ▁█"]
    assert sparkline([0, 0], 2, 1, 0, is_ascii=False) == ["▁▁"]
    assert sparkline([1], 0, 1, 1, is_ascii=False) == [""]
