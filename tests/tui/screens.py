"""Looking at a chat screen in tests: what is on it, and waiting for something to be there."""

import time
from collections.abc import Callable

from textual.pilot import Pilot

from tui.chat_app import ChatApp

_PATIENCE_S = 20.0


def shown(app: ChatApp) -> str:
    """The text on the screen, line by line."""
    size = app.screen.size
    strips = app.screen._compositor.render_strips(size)
    return "\n".join(strip.text.rstrip() for strip in strips)


def app_of(pilot: Pilot[None]) -> ChatApp:
    """The chat that a pilot drives."""
    assert isinstance(pilot.app, ChatApp)
    return pilot.app


async def until(pilot: Pilot[None], is_so: Callable[[], object]) -> None:
    """Let the app work until something is so; fails after a while."""
    until_s = time.monotonic() + _PATIENCE_S
    while not is_so():
        assert time.monotonic() < until_s, f"never so; on the screen:\n{shown(app_of(pilot))}"
        await pilot.pause(0.01)


async def until_shown(pilot: Pilot[None], text: str) -> None:
    """Let the app work until a text is on the screen."""
    await until(pilot, lambda: text in shown(app_of(pilot)))


async def until_ready(pilot: Pilot[None]) -> None:
    """Let the app work until the chat waits for a message."""
    app = app_of(pilot)
    await until(pilot, lambda: app.pane.is_waiting and app.pane.feed.is_empty)
