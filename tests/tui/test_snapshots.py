"""Pictures of every view in three rooms, of a recorded run of the demo model.

`pytest tests/tui/test_snapshots.py --snapshot-update` takes new ones, after a look at the report.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from textual.pilot import Pilot

from runner.recording import Replay
from tests.tui.monitor_app import MonitorApp

RECORDING = Path(__file__).parent.parent / "data" / "demo-run.jsonl"

Compare = Callable[..., bool]


async def play(pilot: Pilot[None]) -> None:
    """Show all frames at once, then ask about an expert."""
    assert isinstance(pilot.app, MonitorApp)
    for frame in Replay(RECORDING).all():
        pilot.app.monitor.show(frame)
    await pilot.press("down", "right")
    await pilot.pause()


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (200, 60)], ids=lambda size: f"{size[0]}")
@pytest.mark.parametrize("view", "12345")
def test_a_view_looks_as_it_did(snap_compare: Compare, view: str, size: tuple[int, int]) -> None:
    async def play_and_choose(pilot: Pilot[None]) -> None:
        await play(pilot)
        await pilot.press(view)
        await pilot.pause()

    assert snap_compare(MonitorApp(), terminal_size=size, run_before=play_and_choose)
