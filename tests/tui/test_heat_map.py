"""What is drawn again, and what that costs."""

import time
from dataclasses import replace
from typing import Any

import pytest
from rich.segment import Segment

from tests.tui.fake_engine import FakeEngine
from tests.tui.monitor_app import MonitorApp
from tui.activity import Activity
from tui.half_blocks import blocks
from tui.heat_grid import HeatGrid, heat_grid
from tui.widgets import heat_map as heat_map_module
from tui.widgets.heat_map import HeatMap


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with every row that is made anew."""
    rows: list[object] = []

    def counted(*codes: Any) -> list[Segment]:
        rows.append(codes)
        return blocks(*codes)

    monkeypatch.setattr(heat_map_module, "blocks", counted)
    return rows


async def test_only_rows_that_changed_are_drawn_again(drawn: list[object]) -> None:
    app = MonitorApp()
    async with app.run_test(size=(80, 24)) as pilot:
        app.monitor.show(FakeEngine().frame())
        await pilot.pause()
        heat_map = app.query_one(HeatMap)
        rows = list(heat_map.grid.rows)
        n = len(drawn)
        heat_map.grid = replace(heat_map.grid, scale="other words")
        await pilot.pause()
        assert len(drawn) == n
        rows[5] = bytes(8)
        heat_map.grid = replace(heat_map.grid, rows=tuple(rows))
        await pilot.pause()
        assert len(drawn) == n + 1
        await pilot.press("down", "down")  # from rows 0 and 0 to row 1
        await pilot.pause()
        assert n + 1 < len(drawn) <= n + 1 + 4


async def test_a_change_of_the_view_draws_all(drawn: list[object]) -> None:
    app = MonitorApp()
    async with app.run_test(size=(80, 24)) as pilot:
        app.monitor.show(FakeEngine().frame())
        await pilot.pause()
        n = len(drawn)
        await pilot.press("2")
        await pilot.pause()
        assert len(drawn) == n + 16


def cost_of_python_ms() -> float:
    """CPU time of a fixed amount of Python: what this machine is worth at the moment."""
    begin = time.thread_time()
    total = 0
    for n in range(100_000):
        total += n * n
    return (time.thread_time() - begin) * 1e3


async def test_an_update_of_48_layers_with_128_experts_is_cheap() -> None:
    """The picture of a moment and its rows; at most 10 ms where 100,000 steps of Python take 5."""
    app, engine = MonitorApp(), FakeEngine(48, 128, 8, 40)
    async with app.run_test(size=(200, 60)) as pilot:
        frames = engine.frames(12)
        app.monitor.show(frames[0])
        await pilot.pause()
        heat_map, activity, costs = app.query_one(HeatMap), Activity(), []
        for frame in frames:
            assert frame.stats is not None and frame.stats.experts is not None
            begin, worth = time.thread_time(), cost_of_python_ms()
            begin = time.thread_time()
            activity.add(frame.stats.experts, frame.time_s)
            heat_map.grid = heat_grid(1, frame.stats, activity, is_total=False)
            for row in range(heat_map.places.n_rows):
                heat_map.render_line(row)
            costs.append((time.thread_time() - begin) * 1e3 / worth)
        assert heat_map.grid != HeatGrid(1)
        assert sorted(costs)[len(costs) // 2] < 10 / 5
