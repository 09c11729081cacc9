"""A list to choose from who stands in for missing experts. Knows no run."""

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from runner.client import BUDDY_POLICIES

_WORDS = {
    "blend": "router's scores and measured outputs together",
    "buddymoe": "the paper's: experts that were chosen together",
    "router": "the resident expert that the router likes best",
    "similar": "the resident expert with the most similar output",
    "prior": "the router leans towards residents",
    "prior-router": "prior, then router for what is still missing",
    "resident": "only residents are chosen at all",
    "drop": "nobody, the pair is left out (to compare)",
    "random": "anybody (to compare)",
}


class PolicyScreen(ModalScreen[str | None]):
    """Dismissed with a policy's name, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Leave it")]

    def __init__(self, policy: str, is_ascii: bool) -> None:
        super().__init__()
        self._policy = policy
        self.set_class(is_ascii, "-ascii")

    def compose(self) -> ComposeResult:
        options = [
            Option(
                Content.assemble((f"{name:<13}", "bold"), (_WORDS.get(name, ""), "$text-muted")),
                id=name,
            )
            for name in BUDDY_POLICIES
        ]
        choices = OptionList(*options, id="policies", markup=False)
        choices.border_title = Content("Who stands in")
        yield choices

    def on_mount(self) -> None:
        if self._policy in BUDDY_POLICIES:
            self.query_one(OptionList).highlighted = BUDDY_POLICIES.index(self._policy)

    def on_option_list_option_selected(self, message: OptionList.OptionSelected) -> None:
        self.dismiss(message.option.id)
