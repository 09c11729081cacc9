"""The engines of this user that run now, to choose one from. It looks again by itself."""

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from runner.client import BuddyrunError, Running, find
from tui.words import model_facts, phase_text, shown

Find = Callable[[], list[Running]]
_EVERY_S = 1.0
_LOOKING = "Looking for engines ..."
_NOBODY = "No buddyrun of this user is running. Start one: buddyrun MODEL. It will be listed here."


@dataclass
class EnginesFound(Message):
    """Who runs now."""

    running: list[Running]

    def can_replace(self, message: Message) -> bool:
        return isinstance(message, EnginesFound)


def find_all() -> list[Running]:
    """All engines; none is no error."""
    try:
        return find(None)
    except BuddyrunError:
        return []


class EngineList(Screen[Running]):
    """Dismissed with the chosen engine; waiting, with the next one that was not there before.

    Without any `running` it looks by itself. `left` was watched before: who waits, waits for
    another one, but what its program started in its place is another.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "look", "look again"),
    ]

    def __init__(
        self,
        running: tuple[Running, ...] | None,
        is_waiting: bool,
        is_ascii: bool,
        find_running: Find = find_all,
        left: Running | None = None,
    ) -> None:
        super().__init__()
        self._engines = {each.pid: each for each in running or ()}
        self._known: set[int] | None = None  # who was there at the first look
        self._left = left
        self._has_looked = running is not None
        self._looking: threading.Thread | None = None
        self._is_waiting = is_waiting
        self._is_ascii = is_ascii
        self._find = find_running
        self.set_class(is_ascii, "-ascii")

    def compose(self) -> ComposeResult:
        title = (
            "Waiting for the next buddyrun"
            if self._is_waiting
            else "Running now; Enter watches one"
        )
        yield Static(Content.styled(title, "bold"), id="engines-title", markup=False)
        yield OptionList(id="engines", markup=False)
        yield Static("", id="engines-none", markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        self._show()
        self.query_one(OptionList).focus()
        self.set_interval(_EVERY_S, self.action_look)
        if not self._has_looked:
            self.action_look()

    def action_look(self) -> None:
        """Look who runs now, in a thread: an engine that is stuck makes it slow. The program does
        not wait for that thread when it ends."""
        if self._looking is None or not self._looking.is_alive():
            self._looking = threading.Thread(target=self._look, name="engines", daemon=True)
            self._looking.start()

    def _look(self) -> None:
        found = self._find()
        with contextlib.suppress(RuntimeError):  # the program has ended meanwhile
            self.post_message(EnginesFound(found))

    def on_engines_found(self, message: EnginesFound) -> None:
        self._has_looked = True
        self._engines = {each.pid: each for each in message.running}
        if self._known is None:
            self._known = {each.pid for each in message.running if not self._is_successor(each)}
        new = [each for each in message.running if each.pid not in self._known]
        if self._is_waiting and new:
            self.dismiss(new[0])
        else:
            self._show()

    def on_option_list_option_selected(self, message: OptionList.OptionSelected) -> None:
        chosen = self._engines.get(int(message.option.id or 0))
        if chosen is not None:  # else it ended meanwhile, and the list is about to change
            self.dismiss(chosen)

    def _is_successor(self, running: Running) -> bool:
        """Whether it runs in the place of the engine that was watched before."""
        left = self._left
        return (
            left is not None
            and running.pid != left.pid
            and running.frame.owner_pid == left.frame.owner_pid
        )

    def _show(self) -> None:
        """Change the list where it differs, so that the highlight stays."""
        choices = self.query_one(OptionList)
        shown_ids = [option.id for option in choices.options]
        if shown_ids != [str(pid) for pid in self._engines]:
            choices.clear_options()
            choices.add_options(
                Option(self._row(each), id=str(pid)) for pid, each in self._engines.items()
            )
            choices.highlighted = 0 if self._engines else None
        else:
            for pid, each in self._engines.items():
                choices.replace_option_prompt(str(pid), self._row(each))
        choices.display = bool(self._engines)
        nobody = _NOBODY if self._has_looked else _LOOKING
        self.query_one("#engines-none", Static).update("" if self._engines else nobody)

    def _row(self, running: Running) -> Content:
        frame = running.frame
        facts = model_facts(frame.model) if frame.model is not None else ""
        name = shown(running.name or "no model yet", self._is_ascii)
        return Content.assemble(
            (f"{frame.owner_pid:>8}  ", "$text-muted"),
            (name, "bold"),
            f"  {facts}  ",
            (shown(phase_text(frame), self._is_ascii), "$text-accent"),
        )
