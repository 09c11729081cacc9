"""What the map shows of hand-made and of simulated moments."""

from dataclasses import replace

from tests.tui.fake_engine import FakeEngine
from tui import views
from tui.activity import Activity
from tui.heat_grid import heat_grid

FULL = 2 * (views.N_LEVELS - 1)


def test_residents_are_bright_and_others_are_not() -> None:
    stats = FakeEngine(2, 4, slots=2).stats()
    stats = replace(stats, residency=((3, 0), (-1, 1)))
    grid = heat_grid(views.RESIDENT, stats, Activity(), is_total=False)
    assert grid.rows == (bytes([FULL, 0, 0, FULL]), bytes([0, FULL, 0, 0]))
    assert grid.scale == "3 of 8 experts"


def test_without_a_cache_everybody_is_resident() -> None:
    grid = heat_grid(views.RESIDENT, FakeEngine(2, 4, slots=0).stats(), Activity(), False)
    assert grid.rows == (bytes([FULL] * 4),) * 2 and "no cache" in grid.scale


def test_a_model_without_experts_gets_a_sentence() -> None:
    grid = heat_grid(views.MISSES, FakeEngine(4, 0, 0, 0).stats(), Activity(), False)
    assert not grid.rows and "no experts" in grid.remark
    assert "no model" in heat_grid(views.MISSES, None, Activity(), False).remark


def test_choices_that_nobody_counts_are_not_shown_as_none() -> None:
    stats = FakeEngine(2, 4).stats()
    assert stats.experts is not None
    stats = replace(stats, experts=replace(stats.experts, used=()))
    grid = heat_grid(views.ACTIVATIONS, stats, Activity(), False)
    assert grid.rows == (bytes(4),) * 2 and grid.scale == "not counted in this run"


def test_the_largest_total_is_the_brightest_and_one_of_many_is_seen() -> None:
    stats = FakeEngine(1, 4).stats()
    assert stats.experts is not None
    stats = replace(stats, experts=replace(stats.experts, missed=((1, 0, 1000, 250),)))
    grid = heat_grid(views.MISSES, stats, Activity(), is_total=True)
    assert list(grid.rows[0]) == [2, 0, FULL, 2 + 2 * 4]  # half of it by the square root
    assert grid.scale == "up to 1,000 since loading"


def test_a_stand_in_and_a_replaced_expert_are_of_different_kinds() -> None:
    stats = FakeEngine(1, 3).stats()
    assert stats.experts is not None
    counts = replace(stats.experts, substituted=((9, 0, 0),), stood_in=((0, 9, 1),))
    grid = heat_grid(views.SUBSTITUTIONS, replace(stats, experts=counts), Activity(), True)
    assert [code % 2 for code in grid.rows[0]] == [0, 1, 1]
    assert grid.rows[0][0] + 1 == grid.rows[0][1] > grid.rows[0][2]


def test_a_burst_is_bright_at_first_and_fades() -> None:
    engine, activity = FakeEngine(4, 8), Activity()
    for frame in engine.frames(5):
        assert frame.stats is not None and frame.stats.experts is not None
        activity.add(frame.stats.experts, frame.time_s)
    brightness = []
    for n in range(4):
        grid = heat_grid(views.ACTIVATIONS, frame.stats, activity, is_total=False)
        brightness.append(sum(map(sum, grid.rows)))
        activity.add(frame.stats.experts, frame.time_s + 3 * (n + 1))
    assert brightness == sorted(brightness, reverse=True) and brightness[0] > 2 * brightness[-1] > 0
