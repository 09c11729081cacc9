"""The smallest program with a monitor in it, and what its screen says."""

from pathlib import Path

from textual.app import App, ComposeResult
from textual.widgets import Footer

import tui
from tui.monitor import Monitor
from tui.owner import Owner


class MonitorApp(App[None]):
    CSS_PATH = Path(tui.__file__).parent / "app.tcss"

    def __init__(self, owner: Owner | None = None, is_ascii: bool = False, width: int = 0) -> None:
        super().__init__()
        self.monitor = Monitor(owner, is_ascii)
        self._width = width

    def compose(self) -> ComposeResult:
        yield self.monitor
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        if self._width:
            self.monitor.styles.width = self._width
        self.monitor.query_one("#heat-map").focus()


def screen_text(app: App[None]) -> str:
    """Every row of the screen as it is drawn."""
    strips = app.screen._compositor.render_strips()
    return "\n".join("".join(segment.text for segment in strip) for strip in strips)
