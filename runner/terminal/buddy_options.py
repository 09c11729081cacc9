"""The flags about stand-ins for missing experts. Knows no command, runs nothing."""

from typing import Any

import click

from runner.config import (
    BUDDY_AUTO,
    BUDDY_OFF,
    BUDDY_POLICIES,
    BUDGET_WITHOUT_PROFILE,
    DEFAULT_BUDDY_BUDGET,
    MAX_VERIFY_EVERY,
    EngineConfig,
)
from runner.terminal.cli_options import FILE, flag, switch

_MAX_RANK = 1 << 16


class Share(click.ParamType):  # type: ignore[type-arg]
    """A part of a whole: 0.05 or 5%."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Raises click.BadParameter for what is no share."""
        if not isinstance(value, str):
            return value  # type: ignore[no-any-return]
        text = value.strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"{value!r:.40} is no share like 0.05 or 5%", param, ctx)
        if not 0.0 <= share <= 1.0:  # also what is no number
            self.fail(f"{value!r:.40} is not between 0 and 1, or 0% and 100%", param, ctx)
        return share


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


BUDDY_FLAGS = (
    flag(
        "--buddy",
        help="What happens when an expert is missing and would have to be read: auto lets a"
        " resident expert stand in, by the best policy for this model and budget; off never does;"
        f" or a policy: {', '.join(BUDDY_POLICIES)}.",
        type=click.Choice((BUDDY_AUTO, BUDDY_OFF, *BUDDY_POLICIES)),
        default=BUDDY_AUTO,
    ),
    switch("--exact", help="Nobody ever stands in, whatever --buddy says."),
    flag(
        "--buddy-budget",
        help="The most of the router's weight that stand-ins may carry over any 256 tokens, like"
        f" 0.05 or 5%; when it is used up misses are exact. 1 = no limit. Default:"
        f" {_percent(DEFAULT_BUDDY_BUDGET)} with a profile of the model,"
        f" {_percent(BUDGET_WITHOUT_PROFILE)} without.",
        type=Share(),
    ),
    flag(
        "--buddy-min-rank",
        help="The first of the router's choices for a token that may be replaced; 2 = never the"
        " first one.",
        type=click.IntRange(1, _MAX_RANK),
        default=EngineConfig.buddy_min_rank,
    ),
    flag(
        "--buddy-profile",
        help="The profile that `buddyrun profile` made, off = none. Default: the one beside the"
        " model, if there is one.",
        type=FILE,
        default=EngineConfig.buddy_profile,
    ),
    flag(
        "--verify-every",
        help="With stand-ins compute every N-th token of an answer a second time, exactly, and say"
        " how far it was off; 0 = none.",
        type=click.IntRange(0, MAX_VERIFY_EVERY),
        default=EngineConfig.verify_every,
    ),
)
