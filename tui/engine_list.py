"""The engines of this user that run now, to choose one from. It looks again by itself."""

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
    """Dismissed with the chosen engine; waiting, with the next one that was not there before."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "look", "look again"),
    ]

    def __init__(
        self,
        running: tuple[Running, ...],
        is_waiting: bool,
        is_ascii: bool,
        find_running: Find = find_all,
    ) -> None:
        super().__init__()
        self._engines = {each.pid: each for each in running}
        self._known = set(self._engines)
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

    def action_look(self) -> None:
        """Look who runs now, in a thread."""
        self.run_worker(self._look, thread=True, exclusive=True, exit_on_error=False)

    def _look(self) -> None:
        self.post_message(EnginesFound(self._find()))

    def on_engines_found(self, message: EnginesFound) -> None:
        self._engines = {each.pid: each for each in message.running}
        new = [each for each in message.running if each.pid not in self._known]
        if self._is_waiting and new:
            self.dismiss(new[0])
        else:
            self._show()

    def on_option_list_option_selected(self, message: OptionList.OptionSelected) -> None:
        self.dismiss(self._engines[int(message.option.id or 0)])

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
        self.query_one("#engines-none", Static).update("" if self._engines else _NOBODY)

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
