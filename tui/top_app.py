"""`buddyrun top`: a program that watches engines in other processes, or plays a recording."""

from collections.abc import Iterable
from functools import partial
from typing import ClassVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen

from runner.client import MonitorRequest, Replay, Running
from tui.engine_list import EngineList, Find, find_all
from tui.frame_source import OneAtATime
from tui.monitor import Monitor
from tui.monitor_screen import WAIT, MonitorScreen
from tui.views import VIEWS


class TopApp(App[None]):
    """Shows what the request says; a single engine at once."""

    CSS_PATH = "app.tcss"
    TITLE = "buddyrun top"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q", "quit", "quit"),
        Binding("f1", "help", "help", show=False),
        Binding("ctrl+z", "suspend_process", "suspend", show=False),
    ]

    def __init__(self, request: MonitorRequest, find_running: Find = find_all) -> None:
        super().__init__()
        self._request = request
        self._find = find_running
        self._recorder = OneAtATime(request.recorder) if request.recorder is not None else None

    def on_mount(self) -> None:
        self.set_class(self._request.is_ascii, "-ascii")
        if self._request.replay is not None:
            self._watch(self._request.replay)
        elif len(self._request.running) == 1:
            self._watch(self._request.running[0])
        else:
            self._list(self._request.running, is_waiting=False)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """What the command palette offers: the views beside Textual's own."""
        yield from super().get_system_commands(screen)
        if not isinstance(screen, MonitorScreen):
            return
        monitor = screen.query_one(Monitor)
        for number, view in enumerate(VIEWS):
            yield SystemCommand(
                f"View: {view.name}",
                f"Experts {view.shows}",
                lambda number=number: monitor.action_view(number),
            )
        yield SystemCommand("Explain the screen", "Keys and words", monitor.action_help)

    def action_help(self) -> None:
        """Explain the monitor, where one is shown."""
        if isinstance(self.screen, MonitorScreen):
            self.screen.query_one(Monitor).action_help()

    def _watch(self, watched: Running | Replay) -> None:
        screen = MonitorScreen(watched, self._recorder, self._request.is_ascii)
        left = watched if isinstance(watched, Running) else None
        self.push_screen(screen, partial(self._leave_monitor, left))

    def _leave_monitor(self, left: Running | None, towards: str | None) -> None:
        self._list(None, is_waiting=towards == WAIT, left=left)

    def _list(
        self,
        running: tuple[Running, ...] | None,
        is_waiting: bool,
        left: Running | None = None,
    ) -> None:
        screen = EngineList(running, is_waiting, self._request.is_ascii, self._find, left)
        self.push_screen(screen, self._leave_list)

    def _leave_list(self, running: Running | None) -> None:
        if running is not None:
            self._watch(running)
